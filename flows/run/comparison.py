"""What a comparison compares: its arms, rates, seeds and budgets, and which faults it has before anything is run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.arms import ANNEAL, ARMS, CONFIGURED, CONTROLS, END_TO_END, JOINT_STEPS, Changes, changed

MOST_SEEDS = 20
_MOST_EXTENSIONS = 4
"""Points that are added to a grid of rates on one side or the other."""


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
    """Multiples of the unit; rates are tuned at the first."""
    curve: tuple[float, ...] = ()
    """More budgets for the end-to-end arm only."""
    tflop: float = 0.0
    """What a budget of 1 is [TFLOP]; 0: what the configuration itself costs."""
    extend: bool = False
    so_far: bool = False
    """Whether the best of the rates that were tried counts before all of them were."""

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
    so_far: bool = False,
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
        so_far: whether the best of the rates that were tried counts before all of them were.
        name: of the comparison, with which the names of its runs begin; by default that of the configuration.

    Raises:
        ConfigError: names every fault.
    """
    own = own or {}
    # Cool-downs only judge stages before the last, and where a stage may end early its FLOPs are not known before.
    config = changed(config, {"validation.cooldown_steps": 0, "validation.patience": 0})
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
        so_far=so_far,
    )
    changed(config, {"run.name": comparison.name})  # raises if it is no name of a run
    return comparison


def _faults_of_numbers(
    rates: Sequence[float], seeds: int, budgets: Sequence[float], curve: Sequence[float], tflop: float
) -> Iterator[Fault]:
    for option, values in {"--rates": rates, "--budgets": budgets, "--curve": curve}.items():
        if not values and option != "--curve":
            yield Fault(option, "nothing", "at least one number is expected, such as 1")
        for value in values:
            if not (math.isfinite(value) and value > 0):
                yield Fault(option, f"{value:g}", "a number above 0 is expected")
    if not 1 <= seeds <= MOST_SEEDS:
        yield Fault("--seeds", str(seeds), f"1 to {MOST_SEEDS} are expected")
    if not (math.isfinite(tflop) and tflop >= 0):
        yield Fault("--tflop", f"{tflop:g}", "a number above 0 is expected")


def _faults_of_names(arms: Sequence[str], own: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    for name in arms:
        if name not in ARMS and name not in own:
            yield Fault("--arms", repr(name), unknown_arm(name))
    called: dict[str, str] = {}
    for name in dict.fromkeys((*CONTROLS, *arms, *own)):
        if (other := called.setdefault(in_run_names(name), name)) != name:
            yield Fault("--arms", repr(name), f"its runs would have the names of those of {other!r}; give it another")
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
            if key == "validation.patience":
                allowed = "where a stage may end early its FLOPs are not known before; leave it out"
                yield Fault(f"{key} of {name}", "a value", allowed)


def in_run_names(arm: str) -> str:
    """Return the name of an arm as the names of its runs have it."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", arm.replace("/", "of")).strip("-")


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


# ---------------------------------------------------------------- one run, and the rates of an arm


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
            tried = [factor for factor in factors if math.isfinite(losses.get(factor, math.inf))]
            if not comparison.so_far or not tried:
                return Grid(tuple(factors), None, edge=False)
            best = min(tried, key=lambda factor: (losses[factor], factor))
            return Grid(tuple(factors), best, best in (tried[0], tried[-1]))
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
