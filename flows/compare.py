"""The flow that compares a configuration with other ways to spend its FLOPs."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, tags
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.logging.handlers import APILogHandler
from pydantic import Field

from flows.artifacts import publish_comparison, run_log
from flows.errors import explained_server_errors, one_line_errors, outlive_the_worker
from flows.flow_runs import end, page_of_run, tagged, tags_of, watched
from flows.pages.comparison import write_comparison
from flows.run.comparing import RunsFailedError, open_field, run_missing
from flows.run.comparison import MOST_SEEDS, Comparison, comparison_of
from flows.run.events import GO_ON, Message, emit, subscribed
from flows.run.train_process import TrainProcess
from flows.run.verdict import failures_of, judge
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StageInterruptedError

Factor = Annotated[float, Field(gt=0.0)]


@flow(name="compare", flow_run_name="compare {config.run.name}")
def compare(
    config: StackWiseConfig,
    artifacts: str = "artifacts",
    arms: list[str] = [],  # noqa: B006 -- Prefect's form shows its default
    own: dict[str, dict[str, Any]] = {},  # noqa: B006
    rates: list[Factor] = [0.5, 1.0, 2.0],  # noqa: B006
    seeds: Annotated[int, Field(ge=1, le=MOST_SEEDS)] = 3,
    budgets: list[Factor] = [1.0],  # noqa: B006
    curve: list[Factor] = [],  # noqa: B006
    tflop: Annotated[float, Field(ge=0.0)] = 0.0,
    extend: bool = False,
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1,
    name: str = "",
) -> State[Any] | None:
    """Compare a configuration with other ways to spend its FLOPs, every arm at its best rate.

    The runs are ordinary ones, each in a process of its own. What is sealed is not run again.

    Args:
        config: The run that is asked about.
        artifacts: The artifacts folder.
        arms: More arms: jump, full, insert, frozen, frozen+anneal.
        own: More arms by name, each with the keys of the configuration that it changes.
        rates: Factors of the learning rates that are tried for every arm, with the first seed at the first budget.
        seeds: Number of seeds; the first is that of the configuration.
        budgets: Multiples of the FLOPs of the configuration.
        curve: Further budgets of end-to-end training, between which its loss is interpolated.
        tflop: What a budget of 1 is; 0 for the FLOPs of the configuration.
        extend: Try one more rate while the best is at the edge of the grid.
        jobs: Number of runs at a time.
        name: Name of the comparison; empty for that of the configuration.
    """
    outlive_the_worker()
    if page := page_of_run():
        emit(Message(f"page of this comparison: {page}"))
    with one_line_errors():
        numbers: dict[str, Any] = {"rates": rates, "seeds": seeds, "budgets": budgets, "curve": curve, "tflop": tflop}
        comparison = comparison_of(config, arms, own, **numbers, extend=extend, name=name)
        with tagged(comparison.name), watched(), subscribed(run_log()):
            try:
                field = open_field(comparison, artifacts)
                results = run_missing(field, TrainProcess, jobs)
            except (StageInterruptedError, KeyboardInterrupt, TerminationSignal) as stop:
                return end(str(stop) if isinstance(stop, StageInterruptedError) else f"stopped on request; {GO_ON}")
            field.register(results)
            document = judge(field, results)
            write_comparison(document, field.artifacts)
            publish_comparison(document)
    if failures := failures_of(document):
        raise RunsFailedError("\n".join(failures))
    return None


def compare_to_the_end(comparison: Comparison, arguments: dict[str, Any]) -> None:
    """Run the flow from the command line with its arguments, and flush its log before the embedded server ends.

    Raises:
        StackWiseError: one clear message; the same command goes on from what is sealed.
    """
    try:
        with explained_server_errors(), tags(*tags_of(comparison.name)):
            compare(**arguments)
    except CancelledRun as stop:
        raise StageInterruptedError(str(stop)) from None
    finally:
        APILogHandler().flush()
