"""The result of every stage of a run, read from its manifests, and the row that tables show of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from flows.run.numbers import clock, loss, parameters, percent, size
from stackwise_core.stages.identity import Kind
from stackwise_core.stages.plan import RunPlan, StagePlan
from storage.artifacts import Artifacts, State
from storage.demand import TASK_KINDS, made_by
from storage.midstage import bytes_written, step_reached


class StageSummary(BaseModel, frozen=True):
    """The result of one stage; a number that is not known yet is None."""

    stage: int
    name: str
    """Such as 'append, frozen, full'."""
    states: dict[str, str]
    """State of each artifact on disk by kind; 'none' if the stage makes none."""
    artifacts: dict[str, str]
    """Name of each artifact by kind."""
    steps: int
    """Those that were planned, until it is trained."""
    steps_planned: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Where it ended early (`validation.patience`)."""
    kept_step: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """After how many steps its weights are kept, if it took more (`validation.keep`)."""
    steps_kept: int | None = None
    """Steps in the checkpoint of an unfinished training; None if there is no checkpoint."""
    bytes_kept: int = 0
    """Bytes of the written shards of a store that is not sealed yet."""
    stacks: int
    """Number of stacks in the rack after this stage."""
    blocks: int
    """Number of blocks that this stage added; in joint training, all."""
    rack_parameters: int | None = None
    trainable_parameters: int | None = None
    train_loss: float | None = None
    """At the last step [nats per loss position]."""
    validation_loss: float | None = None
    """[nats per loss position]"""
    cooled_loss: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Validation loss after its cool-down, if it has one [nats per loss position]."""
    mask_ratio: float | None = None
    """Mean mask ratio of a masked objective; losses at different ratios are not comparable."""
    by_mask_ratio: dict[str, float] = {}
    """Validation losses at ratios that all stages share, if their own differ [nats per loss position]."""
    seconds: float | None = None
    """Duration of all tasks [s]."""
    tokens_per_second: int | None = None
    memory_bytes_forecast: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Peak of training as it was forecast [bytes]."""
    memory_bytes_peak: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """As it was measured, of one process [bytes]; None if it trained for too few steps."""
    cache_bytes: int | None = None
    """Size of the store that this stage wrote, even if it was retired since."""
    cache_note: str = ""
    """Why there is no store, or where it came from."""

    @property
    def unfinished(self) -> bool:
        """Whether the stack or its validation is still to be made; adopted stacks have no validation but the last."""
        judged = (self.states.get(kind, "none") for kind in ("cooldown", "validation"))
        return self.states["stack"] != "sealed" or any(state not in ("sealed", "none") for state in judged)

    @property
    def cells(self) -> list[str]:
        """The row of this stage under `STAGE_COLUMNS`."""
        state = self.states["activations"]
        return [
            str(self.stage),
            self.name,
            parameters(self.rack_parameters),
            loss(self.train_loss),
            loss(self.validation_loss) + self._cooled,
            "-" if self.seconds is None else clock(self.seconds),
            size(self.cache_bytes) if self.cache_bytes is not None and state == "sealed" else state,
        ]

    @property
    def _cooled(self) -> str:
        return "" if self.cooled_loss is None else f", cooled {loss(self.cooled_loss)}"

    @property
    def line(self) -> str:
        """The result in one line."""
        parts = [f"validation loss {loss(self.validation_loss)}{self._cooled}"]
        if self.validation_loss is None:
            parts = ["unfinished" if self.unfinished else "adopted"]
        if self.by_mask_ratio and self.mask_ratio is not None:  # losses of other stages are at other ratios
            parts[0] += f" at {percent(self.mask_ratio)} masked"
        if self.steps_planned is not None:
            parts.append(f"ended after {self.steps} of {self.steps_planned} steps")
        if self.kept_step is not None:
            parts.append(f"weights of step {self.kept_step}")
        if self.seconds is not None:
            parts.append(f"in {clock(self.seconds)}")
        if self.cache_bytes is not None:
            parts.append(f"cache {size(self.cache_bytes)}")
        if self.memory_bytes_forecast is not None and self.memory_bytes_peak is not None:
            parts.append(f"memory {size(self.memory_bytes_peak)}, forecast {size(self.memory_bytes_forecast)}")
        return ", ".join(parts)


def comparable_losses(judged: Sequence[StageSummary]) -> list[float]:
    """Return the validation losses of stages that have one; none if these are not comparable.

    If their own are at different mask ratios, these are means over the ratios at which all were measured.
    """
    if len({stage.mask_ratio for stage in judged}) == 1:
        return [stage.validation_loss or 0.0 for stage in judged]
    shared = set[str].intersection(*(set(stage.by_mask_ratio) for stage in judged))
    return [math.fsum(stage.by_mask_ratio[at] for at in shared) / len(shared) for stage in judged] if shared else []


_RISE = 0.01
"""Smallest rise of a validation loss that is said, as a share of it: less may be noise."""


def rise(stages: Sequence[StageSummary]) -> str:
    """Return a line if the last of some stages is worse in validation than the one measured before it, '' otherwise.

    Stages of different mask ratios are compared at the ratios that both were measured at.
    """
    known = [stage for stage in stages if stage.validation_loss is not None]
    if len(known) < 2 or known[-1] != stages[-1]:
        return ""
    before, after = known[-2:]
    was, now = comparable_losses([before, after]) or (0.0, 0.0)
    if now <= was * (1 + _RISE):
        return ""
    means = "validation loss" if before.mask_ratio == after.mask_ratio else "mean validation loss at equal mask ratios"
    remedy = "more steps, more text or a lower learning rate may help"
    return f"stage {after.stage} is worse than stage {before.stage}: {means} {loss(was)}, then {loss(now)}; {remedy}"


STAGE_COLUMNS = ("stage", "how", "|params", "|loss", "|val. loss", "|time", "cache")
"""Header of the stage table in the terminal, on Prefect's pages and in the report; | aligns a column right."""


def state_of_run(outcome: dict[str, Any] | None, *, live: bool, all_done: bool) -> str:
    """Return the state of a run: running, done, killed, incomplete, or as its newest attempt ended: failed, stopped."""
    if live:
        return "running"
    if all_done:  # the artifacts on disk count more than how the last attempt ended
        return "done"
    if outcome is None:
        return "killed"
    return "incomplete" if outcome["state"] == "done" else str(outcome["state"])


def summarise(artifacts: Artifacts, plan: RunPlan) -> list[StageSummary]:
    """Return a summary of each stage of a plan, whether it exists yet or not."""
    return [_summarise_stage(artifacts, stage) for stage in plan.stages]


def _summarise_stage(artifacts: Artifacts, stage: StagePlan) -> StageSummary:
    kinds: list[Kind] = [kind for task in TASK_KINDS for kind in made_by(task, stage)]
    found = {kind: artifacts.lookup(stage.ref(kind)) for kind in kinds}
    states: dict[str, str] = {kind: "none" for kind in TASK_KINDS.values() if kind != "cooldown"}
    states |= {kind: lookup.state.value for kind, lookup in found.items()}
    made = {kind: lookup.folder for kind, lookup in found.items() if lookup.state in (State.SEALED, State.RETIRED)}
    manifests = {kind: folder.manifest for kind, folder in made.items() if folder}
    facts = {kind: manifest.facts for kind, manifest in manifests.items()}
    stack, cache = facts.get("stack", {}), facts.get("activations", {})
    judged = facts if stack else {}  # the losses of a stack that is gone are of nothing that is there
    validation, cooled = judged.get("validation", {}), judged.get("cooldown", {})
    seconds = [known.get("seconds", 0.0) for known in facts.values()]
    return StageSummary(
        stage=stage.index,
        name=stage.spec.name,
        states=states,
        artifacts={kind: stage.ref(kind).name for kind in kinds},
        steps=stack.get("steps", stage.spec.optim.steps),
        steps_planned=stack.get("steps_planned"),
        kept_step=stack.get("kept_step"),
        steps_kept=None if stack else step_reached(artifacts, stage.ref("stack")),
        bytes_kept=bytes_written(artifacts, stage.ref("activations")) if "activations" in kinds else 0,
        stacks=len(stage.spec.stacks),
        blocks=stage.spec.n_blocks,
        rack_parameters=stack.get("rack_parameters"),
        trainable_parameters=stack.get("trainable_parameters"),
        train_loss=stack.get("train_loss"),
        validation_loss=validation.get("validation_loss"),
        cooled_loss=cooled.get("validation_loss"),
        mask_ratio=stage.mask.for_validation().mean_ratio if stage.mask else None,
        by_mask_ratio=validation.get("by_mask_ratio", {}),
        seconds=round(sum(seconds), 1) if stack else None,
        tokens_per_second=stack.get("tokens_per_second"),
        memory_bytes_forecast=stack.get("memory_bytes_forecast"),
        memory_bytes_peak=stack.get("memory_bytes_peak"),
        cache_bytes=manifests["activations"].n_bytes if "activations" in manifests else None,
        cache_note=f"from {cache['from']}" if "from" in cache else stage.no_cache_reason,
    )
