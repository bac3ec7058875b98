"""`stackwise train`: check without torch, prefect or a server whether anything has to run, then run it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

from flows.cli.arguments import add_common, add_config, add_loudness, load_config, print_waiting
from flows.network import check_proxies, shown, watching
from flows.run.devices import check_machine
from flows.run.events import Subscriber, subscribed
from flows.run.numbers import parameters
from flows.run.reading import Reading
from flows.run.say import complain, report, say
from flows.run.summary import summarise
from flows.run.terminal import plain_console, reading_shown, say_hanging, showing, stage_tables
from flows.server import check_api, check_home, embedded_server, quiet_prefect
from flows.services import send_heartbeats
from flows.settings import find_api, load_prefect
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import GROWTH
from stackwise_core.config.sizes import residual_blocks_of
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.resolve import imports
from storage.adopt import plan_in
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.demand import compute_demand, forced_refs
from storage.runs import find_run, register_complete


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`."""
    add_common(parser, _run)
    add_config(parser)
    parser.add_argument("--from-stack", type=int, default=-1, metavar="K", help="redo the stages from K on (0-based)")
    parser.add_argument("--force", default="", metavar="TASK", help="redo build, trunk, train, cool, cache or validate")
    add_loudness(parser)


def _run(options: argparse.Namespace) -> None:
    if options.from_stack < -1:
        raise ConfigError([Fault("--from-stack", str(options.from_stack), "stages are counted from 0")])
    command = ["stackwise", "train", options.config, *(word for entry in options.set for word in ("--set", entry))]
    shown = showing(quiet=options.quiet, verbose=options.verbose)
    train(load_config(options), command, options.artifacts, options.from_stack, options.force, shown)


def train(
    config: StackWiseConfig,
    command: list[str],
    root: str,
    from_stack: int,
    force: str,
    shown: AbstractContextManager[Subscriber],
) -> None:
    """Grow the rack of a configuration to its target, and print the result.

    `from_stack` and `force` name the first stage and the task to redo (-1 and '' redo nothing); the printed hint how
    to add a stack repeats `command`. `shown` shows the progress.

    Raises:
        StackWiseError: one clear message; the same command resumes from the sealed artifacts.
    """
    artifacts = artifacts_at(root).open()
    with reading_shown():
        filled, plan = plan_in(artifacts, config, Reading("read"))
    forced = forced_refs(plan, from_stack, force)
    with without_gc(artifacts, print_waiting):  # keeps gc from removing what is about to be reported as complete
        complete = compute_demand(plan, artifacts, config.cache.keep, forced).complete
        if complete:
            register_complete(artifacts, config, plan)
            complain(*imports(filled), *notes(filled))  # a run prints them itself
    if not complete:
        check_machine(filled, remote=artifacts.is_remote)
        _run_flow(config, artifacts, from_stack, force, shown)
    _print_result(config, command, artifacts, reused=complete)


def _run_flow(
    config: StackWiseConfig,
    artifacts: Artifacts,
    from_stack: int,
    force: str,
    shown: AbstractContextManager[Subscriber],
) -> None:
    with on_server(artifacts):
        from flows.train_rack import run_to_the_end

        with shown as listener, subscribed(listener):
            run_to_the_end(config, artifacts.uri, from_stack, force)


@contextmanager
def on_server(artifacts: Artifacts) -> Generator[None]:
    """Let flows of the block run on the server of PREFECT_API_URL, or on an embedded one.

    It starts while prefect and what trains are imported.
    """
    quiet_prefect()
    send_heartbeats()
    check_proxies()
    given = find_api()
    if url := given.value:
        check_api(url, where=str(given))
    else:
        check_home()
    by = f", by {given}" if given.source else ""
    server = (
        f"its server is {shown(url)}{by}" if url else "on the first run of a machine its server takes up to a minute"
    )
    report(f"starting Prefect (seconds; {server})")
    with nullcontext() if url else embedded_server(artifacts.root / "prefect" / "server.log") as server:
        load_prefect()
        import_module("flows.train_rack")
        if server is not None:
            server.wait_until_ready()
        with watching(os.environ["PREFECT_API_URL"]):
            yield


def _print_result(config: StackWiseConfig, command: list[str], artifacts: Artifacts, *, reused: bool) -> None:
    """Print the stages of the run, which may have been grown beyond this configuration."""
    name, asked = config.run.name, config.training.progressive.target_stacks
    run = find_run(artifacts, name)
    stages = summarise(artifacts, run.plan)
    plain_console().print(stage_tables(stages))
    last = [stage for stage in stages if not stage.unfinished][-1]
    made = "was there already" if reused else "is done"
    plural = "stack" if last.stacks == 1 else "stacks"
    counts = f"{last.stacks} {plural}, {parameters(last.rack_parameters)} parameters"
    grown = run.config.training.progressive.target_stacks
    if grown > asked:
        counts += f" (this configuration asks for {asked})"
        command = ["stackwise", "train", str(run.folder / "config.yaml")]  # stacks may have been added in another way
    root = [] if artifacts.uri == str(Path("artifacts").absolute()) else ["--artifacts", artifacts.uri]
    look = shlex.join([name, *root])
    more = keys_of_one_more(run.config if grown > asked else config, grown + 1)
    grow = shlex.join([*command, *root, *(word for key in more for word in ("--set", key))])
    if not more:
        grow = f"not beyond the {grown} stacks of {GROWTH}.max_stacks, from which the time step of every stack follows"
    say("")
    say_hanging("", f"{name} {made}: {counts}, validation loss {last.validation_loss:.4f}, in {artifacts.uri}")
    say(
        f"look: stackwise status {look}",
        f"      stackwise verify {look}",
        f"grow: {grow}",
    )


def keys_of_one_more(config: StackWiseConfig, n_stacks: int) -> list[str]:
    """Return the settings with which a run grows to one stack more and keeps those it has; [] if none does."""
    growth, keys = config.training.progressive, [f"{GROWTH}.target_stacks={n_stacks}"]
    if n_stacks <= growth.max_stacks:
        return keys
    if growth.time_interpretation == "depth":
        return []
    scale = residual_blocks_of(config)
    keys += [f"{GROWTH}.max_stacks={n_stacks}"]
    return [*keys, f"model.residual_blocks={scale}"] if scale else keys
