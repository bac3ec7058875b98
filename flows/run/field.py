"""The runs of a comparison in an artifacts folder: which they are, whether they can be fair, and what came of them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from flows.run.comparison import Chosen, Comparison, Grid, Result, Results, grid_of, in_run_names
from flows.run.events import emit_waiting
from flows.run.reading import Reading
from flows.run.summary import StageSummary, summarise
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import TrainingConfig
from stackwise_core.errors import ConfigError, Fault, NonFiniteLossError
from stackwise_core.stages.arms import END_TO_END, arm, changed
from stackwise_core.stages.charges import charge, cost
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, StagePlan
from storage.adopt import plan_in
from storage.artifacts import Artifacts
from storage.collect import without_gc
from storage.demand import compute_demand
from storage.runs import attempts, register_complete

_RATES = [
    f"training.{key}" for key in TrainingConfig.model_fields if key.endswith("learning_rate") and key[:3] != "min"
]
"""The peak rates, which are tuned together."""
_LONGEST_NAME = 64


class Field:
    """The runs of a comparison in an artifacts folder: their configurations, plans and results."""

    def __init__(self, comparison: Comparison, artifacts: Artifacts, data: Ref) -> None:
        """Balance every arm at every budget on the rows of sealed `data`.

        Raises:
            ConfigError: an arm cannot be balanced, or is not judged as the others are.
        """
        self.comparison, self.artifacts, self._data = comparison, artifacts, data
        self.n_rows = artifacts.manifest(data).count("train_sequences")
        self._planned: dict[Chosen, tuple[StackWiseConfig, RunPlan]] = {}
        self._balanced = {
            (name, budget): self._balance(name, budget)
            for name in comparison.arms
            for budget in comparison.budgets_of(name)
        }
        self._check_common_measure()

    @cached_property
    def unit(self) -> float:
        """What a budget of 1 is [FLOP]."""
        return self.comparison.tflop * 1e12 or cost(self.comparison.config, self.n_rows)

    def _balance(self, name: str, budget: float) -> StackWiseConfig:
        comparison = self.comparison
        with _naming(f"arm {name} at budget {budget:g}"):
            return arm(comparison.config, comparison.arms[name], budget * self.unit, self.n_rows)

    def config_of(self, run: Chosen) -> StackWiseConfig:
        """Return the configuration of a run."""
        return self._of(run)[0]

    def plan_of(self, run: Chosen) -> RunPlan:
        """Return the plan of a run."""
        return self._of(run)[1]

    def _of(self, run: Chosen) -> tuple[StackWiseConfig, RunPlan]:
        if run not in self._planned:
            config, name = self._balanced[run.arm, run.budget], self.name_of(run)
            values = config.model_dump()["training"]
            rates = {key: float(f"{run.factor * values[key.split('.')[1]]:.12g}") for key in _RATES}
            with _naming(f"arm {run.arm} at {run.factor:g} times its rate"):
                config = changed(config, {**rates, "run.seed": run.seed, "run.name": name})
                self._planned[run] = plan_in(self.artifacts, config, Reading("read"))
        return self._planned[run]

    def name_of(self, run: Chosen) -> str:
        """Return the name of a run: of the comparison, the arm, the factor of the rate, the seed and the budget."""
        name = f"{self.comparison.name}-{in_run_names(run.arm)}-x{run.factor:g}-s{run.seed}-b{run.budget:g}"
        name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
        if len(name) > _LONGEST_NAME:
            allowed = f"its runs would have names of more than {_LONGEST_NAME} characters, such as {name}; shorten it"
            raise ConfigError([Fault("--name", repr(self.comparison.name), f"{allowed}, or the name of the arm")])
        return name

    def _check_common_measure(self) -> None:
        """Raise if an arm reads or judges other sequences than the end-to-end arm, or in another way."""
        first = self.comparison.budgets[0]
        judged = {
            name: self._judged(Chosen(name, first, 1.0, self.comparison.seeds[0])) for name in self.comparison.arms
        }
        faults = [
            Fault(
                f"{what} of arm {name}", str(mine), f"{theirs} end to end: no measure is common to both; leave it out"
            )
            for name, each in judged.items()
            for (what, mine), theirs in zip(each.items(), judged[END_TO_END].values(), strict=True)
            if mine != theirs
        ]
        if faults:
            raise ConfigError(faults)

    def _judged(self, run: Chosen) -> dict[str, Any]:
        """Return what the last loss of a run depends on, by what messages call it."""
        config, plan = self._of(run)
        last = plan.stages[-1]
        assert last.validation
        mask, ratios = last.mask, ", ".join(f"{ratio:g}" for ratio in last.validation.grid)
        return {
            "training_objective": config.training.progressive.training_objective,
            "the text, tokenizer or sequences": plan.data_ref.name,
            "the custom loss": config.training.custom_loss,
            "validation.max_sequences": last.validation.sequences,
            "the mask ratio of the last stage": ratios or (f"{mask.mean_ratio:.3g}" if mask else ""),
        }

    @property
    def judged_on(self) -> str:
        """What every loss is measured on, in words."""
        judged = self._judged(Chosen(END_TO_END, self.comparison.budgets[0], 1.0, self.comparison.seeds[0]))
        there = self.artifacts.manifest(self._data).count("validation_sequences")
        count = min(there, judged["validation.max_sequences"])
        masked = judged["the mask ratio of the last stage"]
        return f"{count:,} withheld sequences" + (f", masked at {masked}" if masked else "")

    def pilots(self, arm: str, factors: Sequence[float]) -> list[Chosen]:
        """Return the runs that tune the rate of an arm."""
        return [Chosen(arm, self.comparison.budgets[0], factor, self.comparison.seeds[0]) for factor in factors]

    def grid(self, arm: str, results: Results) -> Grid:
        """Return what is known of the grid of an arm."""
        mine = [run for run in results if run[:2] == (arm, self.comparison.budgets[0])]
        losses = {run.factor: results[run].loss for run in mine if run.seed == self.comparison.seeds[0]}
        return grid_of(self.comparison, losses)

    def judged_runs(self, arm: str, best: float) -> list[Chosen]:
        """Return the runs of an arm at its best rate: all seeds at all budgets."""
        budgets, seeds = self.comparison.budgets_of(arm), self.comparison.seeds
        return [Chosen(arm, budget, best, seed) for budget in budgets for seed in seeds]

    def wanted(self, results: Results) -> list[Chosen]:
        """Return the runs that can be named so far, in the order to run them: pilots, then those at the best rate."""
        grids = {name: self.grid(name, results) for name in self.comparison.arms}
        pilots = [run for name, grid in grids.items() for run in self.pilots(name, grid.factors)]
        rest = [
            run for name, grid in grids.items() if grid.best is not None for run in self.judged_runs(name, grid.best)
        ]
        return list(dict.fromkeys((*pilots, *sorted(rest, key=lambda run: (run.budget, run.seed)))))

    def planned(self, results: Results) -> list[dict[str, Any]]:
        """Return every run with its steps, its FLOPs and whether it is there; rate None is the best one to come."""
        rows = [self._told(run, results) for run in self.wanted(results)]
        for name in self.comparison.arms:
            grid = self.grid(name, results)
            if grid.best is None and any(run not in results for run in self.pilots(name, grid.factors)):
                (tuned,) = self.pilots(name, grid.factors[:1])
                rest = [run for run in self.judged_runs(name, tuned.factor) if run != tuned]
                rows += [{**self._told(run, {}), "rate": None, "run": None} for run in rest]
        return rows

    def _told(self, run: Chosen, results: Results) -> dict[str, Any]:
        config, plan = self._of(run)
        state = results[run].state if run in results else "to run"
        return {
            **{"run": config.run.name, "arm": run.arm, "budget": run.budget, "rate": config.training.learning_rate},
            "seed": run.seed,
            "steps": [stage.spec.optim.steps for stage in plan.stages],
            "tflop": math.fsum(each.total for each in charge(config, plan, self.n_rows)) / 1e12,
            "state": state,
        }

    def look(self, run: Chosen) -> Result | None:
        """Return the result of a run if it has one; a run that diverged is not tried again.

        Raises:
            ArtifactError: an artifact of it is damaged, or of a newer version.
        """
        config, plan = self._of(run)
        if compute_demand(plan, self.artifacts, config.cache.keep).complete:
            stages = summarise(self.artifacts, plan)
            last = _judged_loss(stages[-1])
            made_by = self.artifacts.manifest(plan.stages[-1].ref("stack")).fingerprint
            return Result("done", last, sum(map(self._seconds, plan.stages, stages)), made_by=made_by)
        ended = self.ended(run)
        return ended if ended and ended.state == "diverged" else None

    def _seconds(self, stage: StagePlan, summary: StageSummary) -> float:
        """Return how long a stage took, without its validation; what a resumed training did before is estimated."""
        kinds = ("build", "trunk", "stack", "activations")
        found = [self.artifacts.lookup(stage.ref(kind)).folder for kind in kinds if stage.recipe(kind) is not None]
        facts = [each.manifest.facts for each in found if each]
        seconds = math.fsum(each.get("seconds", 0.0) for each in facts)
        first = max((each.get("first_step", 0) for each in facts), default=0)
        before = first * stage.spec.optim.batch_size * self.comparison.config.data.seq_len
        return seconds + (before / summary.tokens_per_second if before and summary.tokens_per_second else 0.0)

    def ended(self, run: Chosen) -> Result | None:
        """Return how the newest attempt of a run failed, if it was of this plan and did."""
        config, plan = self._of(run)
        for attempt in attempts(self.artifacts, config.run.name)[-1:]:
            outcome = attempt.outcome
            if outcome and outcome["state"] == "failed" and attempt.plan == plan:
                diverged = NonFiniteLossError.SIGN in outcome["message"]
                return Result("diverged" if diverged else "failed", math.inf, message=outcome["message"])
        return None

    def register(self, results: Results) -> None:
        """Register the runs that were found done under other names, so that they are listed and kept."""
        with without_gc(self.artifacts, emit_waiting):
            for run, result in results.items():
                if result.state == "done":
                    register_complete(self.artifacts, *self._of(run))


def _judged_loss(stage: StageSummary) -> float:
    """Return the validation loss of a stage; where stages have ratios of their own, the mean over those they share."""
    assert stage.validation_loss is not None
    return statistics.mean(stage.by_mask_ratio.values()) if stage.by_mask_ratio else stage.validation_loss


@contextmanager
def _naming(where: str) -> Generator[None]:
    """Say of every fault that is raised where it was found."""
    try:
        yield
    except ConfigError as error:
        faults = [Fault(f"{where}: {fault.path}", fault.received, fault.allowed) for fault in error.faults]
        raise ConfigError(faults) from None
