"""A comparison: which ordinary runs it consists of, whether it can be fair, and running those that are missing."""

from __future__ import annotations

import difflib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel

from flows.run.events import GO_ON, Message, emit, emit_waiting, stop_requested, stopping_on_signals
from flows.run.numbers import clock, loss
from flows.run.prepare import check_validation, prepare_data
from flows.run.reading import Reading
from flows.run.summary import StageSummary, summarise
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import TrainingConfig
from stackwise_core.errors import ConfigError, Fault, NonFiniteLossError, StackWiseError, StageInterruptedError
from stackwise_core.stages.arms import (
    ANNEAL,
    ARMS,
    CONFIGURED,
    CONTROLS,
    END_TO_END,
    JOINT_STEPS,
    Changes,
    arm,
    changed,
)
from stackwise_core.stages.charges import charge, cost
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, StagePlan
from storage.adopt import plan_in
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.demand import compute_demand
from storage.errors import ArtifactError
from storage.runs import attempts, register_complete, retire_stores

MOST_SEEDS = 20
_MOST_EXTENSIONS = 4
"""Points that are added to a grid of rates on one side or the other."""
_RATES = [
    f"training.{key}" for key in TrainingConfig.model_fields if key.endswith("learning_rate") and key[:3] != "min"
]
"""The peak rates, which are tuned together."""
_LONGEST_NAME = 64
_SECONDS_BETWEEN_LOOKS = 0.2


class Comparison(BaseModel, frozen=True):
    """What is compared, with what, and at what budgets."""

    config: StackWiseConfig
    name: str
    arms: dict[str, Changes]
    """The keys that each arm changes."""
    rates: tuple[float, ...]
    """Factors of the rates of a configuration, rising."""
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    """Multiples of the unit, rising."""
    curve: tuple[float, ...] = ()
    """More budgets for the end-to-end arm only."""
    tflop: float = 0.0
    """What a budget of 1 is [TFLOP]; 0: what the configuration itself costs."""
    extend: bool = False

    def budgets_of(self, arm: str) -> tuple[float, ...]:
        """Return the budgets of an arm, rising."""
        return tuple(sorted({*self.budgets, *self.curve})) if arm == END_TO_END else self.budgets


def comparison_of(
    config: StackWiseConfig,
    arms: Sequence[str] = (),
    own: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    rates: Sequence[float] = (0.5, 1.0, 2.0),
    seeds: int = 3,
    budgets: Sequence[float] = (1.0,),
    curve: Sequence[float] = (),
    tflop: float = 0.0,
    extend: bool = False,
    name: str = "",
) -> Comparison:
    """Return a comparison of the controls and the named arms.

    Args:
        config: what all arms share.
        arms: names of `ARMS`, or of `own`.
        own: other arms: the keys that each changes, dotted or nested, as `arm` which of `ARMS` it starts from, and as
            `anneal` the share of its FLOPs for joint training at the end.
        rates: factors of the learning rates, for every arm.
        seeds: how many; the first is that of the configuration.
        budgets: multiples of the FLOPs of the configuration, or of `tflop`. Rates are tuned at the first.
        curve: further budgets of the end-to-end arm.
        tflop: what a budget of 1 is; 0 for the FLOPs of the configuration.
        extend: whether the grid grows while its edge is best.
        name: of the comparison, with which the names of its runs begin; by default that of the configuration.

    Raises:
        ConfigError: names every fault.
    """
    own = own or {}
    config = changed(config, {"validation.cooldown_steps": 0})  # which only judges stages before the last
    faults = [*_faults_of_numbers(rates, seeds, budgets, curve, tflop), *_faults_of_names(arms, own)]
    if config.model.from_:
        allowed = "what an imported model has cost is not known; compare configurations that begin from nothing"
        faults.append(Fault("model.from", repr(config.model.from_), allowed))
    if faults:
        raise ConfigError(faults)
    named = {name: ARMS[name](config) for name in dict.fromkeys((*CONTROLS, *arms)) if name in ARMS}
    comparison = Comparison(
        config=config,
        name=name or config.run.name,
        arms=named | {name: _changes_of(config, changes) for name, changes in own.items()},
        rates=tuple(sorted(set(rates))),
        seeds=tuple(range(config.run.seed, config.run.seed + seeds)),
        budgets=tuple(dict.fromkeys(budgets)),
        curve=tuple(curve),
        tflop=tflop,
        extend=extend,
    )
    changed(config, {"run.name": comparison.name})  # raises if it is no name of a run
    return comparison


def _faults_of_numbers(
    rates: Sequence[float], seeds: int, budgets: Sequence[float], curve: Sequence[float], tflop: float
) -> Iterator[Fault]:
    for option, values in (("--rates", rates), ("--budgets", budgets), ("--curve", curve)):
        for value in values:
            if not (math.isfinite(value) and value > 0):
                yield Fault(option, f"{value:g}", "a number above 0 is expected")
    for option, values in (("--rates", rates), ("--budgets", budgets)):
        if not values:
            yield Fault(option, "nothing", "at least one number is expected, such as 1")
    if not 1 <= seeds <= MOST_SEEDS:
        yield Fault("--seeds", str(seeds), f"1 to {MOST_SEEDS} are expected")
    if not (math.isfinite(tflop) and tflop >= 0):
        yield Fault("--tflop", f"{tflop:g}", "a number above 0 is expected")


def _faults_of_names(arms: Sequence[str], own: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    for name in arms:
        if name not in ARMS and name not in own:
            yield Fault("--arms", repr(name), unknown_arm(name))
    for name, changes in own.items():
        if name in ARMS:
            yield Fault("--arms", repr(name), "there is an arm of this name; give the file another")
        if (start := changes.get("arm", CONFIGURED)) not in ARMS:
            yield Fault(f"arm of {name}", repr(start), unknown_arm(str(start)))
        share = changes.get(ANNEAL, 0.5)
        if not (isinstance(share, int | float) and 0 < share < 1):
            yield Fault(f"{ANNEAL} of {name}", repr(share), "a share of the FLOPs between 0 and 1 is expected, as 0.2")
        for key in _dotted(changes):
            if key.split(".")[0] == "run":
                yield Fault(f"{key} of {name}", "a value", "runs are named and seeded by the comparison; leave it out")


def unknown_arm(name: str) -> str:
    """Return what to do about an arm that is none."""
    close = difflib.get_close_matches(name, ARMS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(ARMS)}"
    return f"there is no such arm; {hint} A path of a YAML file with keys to change is one, too"


def _changes_of(config: StackWiseConfig, own: Mapping[str, Any]) -> Changes:
    keys = dict(own)
    changes = ARMS[keys.pop("arm", CONFIGURED)](config)
    keys = _dotted(keys)
    if JOINT_STEPS in keys:  # which are its own then
        changes.pop(ANNEAL, None)
    return {**changes, **keys}


def _dotted(values: Mapping[str, Any], before: str = "") -> Changes:
    """Return nested mappings as one of dotted keys."""
    flat: Changes = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _dotted(value, f"{before}{key}.") if nested else {f"{before}{key}": value}
    return flat


# ---------------------------------------------------------------- its runs


class Chosen(NamedTuple):
    """One run of a comparison."""

    arm: str
    budget: float
    factor: float
    """Of the rates."""
    seed: int


class Result(NamedTuple):
    """What came of a run."""

    state: Literal["done", "diverged", "failed"]
    loss: float
    """Validation loss of the last stage [nats per loss position]; infinite if there is none."""
    seconds: float = 0.0
    """Of all stages, without their validation."""
    message: str = ""
    """Why there is no loss."""
    made_by: Mapping[str, Any] = {}
    """Versions and machine of the last stack, as its manifest says."""


Results = Mapping[Chosen, Result]


class Grid(NamedTuple):
    """The rates of an arm that were tried, and the best."""

    factors: tuple[float, ...]
    best: float | None
    """None until all were tried, or if none gave a loss."""
    edge: bool
    """Whether the best is the lowest or the highest."""


def grid_of(comparison: Comparison, losses: Mapping[float, float]) -> Grid:
    """Return the grid of an arm as far as it is known from the losses of the factors that were tried.

    A tie goes to the lower rate. With `extend`, another factor is added beyond the edge while the edge is best.
    """
    factors = list(comparison.rates)
    while True:
        if any(factor not in losses for factor in factors):
            return Grid(tuple(factors), None, edge=False)
        best = min(factors, key=lambda factor: (losses[factor], factor))
        if not math.isfinite(losses[best]):
            return Grid(tuple(factors), None, edge=False)
        edge = best in (factors[0], factors[-1])
        if not (edge and comparison.extend) or len(factors) >= len(comparison.rates) + _MOST_EXTENSIONS:
            return Grid(tuple(factors), best, edge)
        low = best == factors[0]
        near = factors[:2] if low else factors[-2:]
        step = near[1] / near[0] if len(factors) > 1 else 2.0
        factors.insert(0 if low else len(factors), float(f"{best / step if low else best * step:.6g}"))


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
        try:
            return arm(comparison.config, comparison.arms[name], budget * self.unit, self.n_rows)
        except ConfigError as error:
            where = f"arm {name} at budget {budget:g}"
            raise ConfigError([fault_at(where, fault) for fault in error.faults]) from None

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
            try:
                config = changed(config, {**rates, "run.seed": run.seed, "run.name": name})
                self._planned[run] = plan_in(self.artifacts, config, Reading("read"))
            except ConfigError as error:
                where = f"arm {run.arm} at {run.factor:g} times its rate"
                raise ConfigError([fault_at(where, fault) for fault in error.faults]) from None
        return self._planned[run]

    def name_of(self, run: Chosen) -> str:
        """Return the name of a run: of the comparison, the arm, the factor of the rate, the seed and the budget."""
        arm = run.arm.replace("/", "of")
        name = f"{self.comparison.name}-{arm}-x{run.factor:g}-s{run.seed}-b{run.budget:g}"
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


def fault_at(where: str, fault: Fault) -> Fault:
    """Return a fault with where it was found."""
    return Fault(f"{where}: {fault.path}", fault.received, fault.allowed)


# ---------------------------------------------------------------- running them


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> str | None:
        """Return None while it runs, then '' or what went wrong."""

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""


Start = Callable[[StackWiseConfig, Artifacts], Job]


class RunsFailedError(StackWiseError):
    """Some runs of a comparison have no result."""


def open_field(comparison: Comparison, root: str) -> Field:
    """Pack the corpus if need be, and balance the arms on its rows; see `Field`."""
    artifacts = artifacts_at(root).open()
    config, plan = plan_in(artifacts, comparison.config, Reading("read"))
    with without_gc(artifacts, emit_waiting):
        data = prepare_data(config, artifacts, plan)
        check_validation(config, artifacts, plan)
    return Field(comparison, artifacts, data)


def known_results(field: Field, *, failed: bool = False) -> dict[Chosen, Result]:
    """Return the results that there are, those of runs that failed only if asked: they are tried again.

    They decide which further runs are looked for.
    """
    results: dict[Chosen, Result] = {}
    while found := {
        run: result
        for run in field.wanted(results)
        if run not in results and (result := field.look(run) or (field.ended(run) if failed else None))
    }:
        results |= found
    return results


def run_missing(field: Field, start: Start, jobs: int) -> dict[Chosen, Result]:
    """Run what has no result, `jobs` at a time, and return all results. A failed run does not stop the others.

    Raises:
        StageInterruptedError: a stop was asked for; the runs that were at work have stopped at a safe point.
    """
    results = known_results(field)
    running: dict[Chosen, tuple[Job, float]] = {}
    with stopping_on_signals():
        while missing := [run for run in field.wanted(results) if run not in results]:
            if stop_requested():
                _stop(running)
            for run in [run for run in missing if run not in running][: jobs - len(running)]:
                emit(
                    Message(
                        f"{told(field, run)}: starts ({len(results)} of {len(results) + len(missing)} runs are done)"
                    )
                )
                running[run] = start(field.config_of(run), field.artifacts), time.monotonic()
            for run, (job, began) in list(running.items()):
                if (problem := job.poll()) is not None:
                    del running[run]
                    results[run] = _result(field, run, problem)
                    emit(Message(f"{told(field, run)}: {_said(results[run])} in {clock(time.monotonic() - began)}"))
            if running:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    return results


def _stop(running: dict[Chosen, tuple[Job, float]]) -> None:
    for job, _ in running.values():
        job.stop()
    while any(job.poll() is None for job, _ in running.values()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise StageInterruptedError(f"stopped on request; {GO_ON}")


def _result(field: Field, run: Chosen, problem: str) -> Result:
    """Return the result of a run that has ended, and drop the stores that only growing on it would read."""
    if found := field.look(run):
        if found.state == "done" and field.config_of(run).cache.keep == "last":
            try:
                retire_stores(field.artifacts, field.plan_of(run), field.config_of(run).run.name)
            except ArtifactError as error:  # of another run, whose plan cannot be read
                emit(Message(f"the stores of {told(field, run)} are kept: {error}"))
        return found
    return field.ended(run) or Result("failed", math.inf, message=problem or "it ended without a result")


def told(field: Field, run: Chosen) -> str:
    """Return a run in words."""
    rate = field.config_of(run).training.learning_rate
    return f"{run.arm}, rate {rate:g}, seed {run.seed}, budget {run.budget:g}"


def _said(result: Result) -> str:
    return f"loss {loss(result.loss)}" if result.state == "done" else f"{result.state} ({result.message})"
