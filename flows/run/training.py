"""Training the live part of the rack, in this process or as one rank of several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.run.boundaries import boundary_below
from flows.run.events import Message, emit
from flows.run.live_part import batches_of, hooks_of, model_to_train
from flows.run.stage import Stage, fingerprint_of
from stackwise_core.errors import StackWiseError
from stackwise_core.stages.identity import Ref
from stackwise_core.training.ranks import ALONE, Ranks
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import TrainingState, fits, train_stack
from storage.checkpoints import frozen_digests, load_state


class FrozenChangedError(StackWiseError):
    """A weight that does not train was changed by training."""


class Attempt(BaseModel, frozen=True):
    """How a stage came to its last step."""

    first_step: int
    seconds: float
    """From there on, without building the model."""
    frozen: list[str]
    """Live parts that do not train, and did not change."""


@dataclass
class Trained:
    """A stage that was trained to its last step."""

    model: StageModel
    records: list[dict[str, float]]
    attempt: Attempt


def train_live_part(stage: Stage, build: Ref | None, folder: Path, ranks: Ranks = ALONE) -> Trained:
    """Train a stage from its last checkpoint, if there is one, to its last step.

    Args:
        stage: which.
        build: the description of what is new.
        folder: the work folder, with the checkpoint.
        ranks: the processes that call this together.

    Raises:
        FrozenChangedError: a weight that does not train was changed.
    """
    model = model_to_train(stage, build)
    state = _checkpoint(stage, folder, model)
    frozen = frozen_digests(model)
    began = time.monotonic()
    with boundary_below(stage) as boundary:
        batches = batches_of(stage, boundary, state.step if state else 0, ranks)
        hooks = hooks_of(stage, folder, ranks)
        records = train_stack(model, batches, stage.plan.spec.optim, state=state, hooks=hooks, ranks=ranks)
    attempt = Attempt(first_step=state.step if state else 0, seconds=time.monotonic() - began, frozen=sorted(frozen))
    if frozen_digests(model) != frozen:
        raise FrozenChangedError(f"stage {stage.index}: training changed frozen weights; nothing was sealed")
    return Trained(model, records, attempt)


def _checkpoint(stage: Stage, folder: Path, model: StageModel) -> TrainingState | None:
    """Return the checkpoint that a stage goes on from, and say so; one after the last step is a result, not news."""
    state = load_state(folder)
    if state is None:
        return None
    if not fits(model, state):
        emit(Message(f"stage {stage.index} starts anew: its checkpoint is of another version of StackWise"))
        return None
    if state.step == stage.plan.spec.optim.steps:
        return state
    emit(Message(f"stage {stage.index} goes on from its checkpoint at step {state.step}"))
    if differences := ", ".join(_differences(state.fingerprint, fingerprint_of(stage))):
        emit(Message(f"the checkpoint was made with another {differences}: bits may differ from an undisturbed run's"))
    return state


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield what the numbers may depend on and is not as it was."""
    for name, value in then.items():
        if value != now.get(name):
            yield f"{name} ({value}, now {now.get(name)})"
