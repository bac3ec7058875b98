"""What one process of those that train a stage together sees, and how their parts become one step.

A rank is one of them. It reads its share of every batch; sums over ranks are the sums over the batch, so that a
step of several processes is the step that one process would take, up to the order in which floats are added.
"""

from __future__ import annotations

import contextlib

from torch import Tensor

from stackwise_core.objectives.losses import Batch
from stackwise_core.training.stage_model import StageModel


class Ranks:
    """The only process: it reads every row, and what it computes is the whole."""

    rank, count = 0, 1
    divides_by = 1
    """What gradients are divided by when they are added up over the processes: the loss is multiplied by it."""
    failpoint = "train"
    """The name of the step's failpoint."""

    def share(self, model: StageModel) -> None:
        """Take up a model, before an optimizer is made of its parameters."""

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return model.summed_loss(batch)[0]

    def reducing(self, *, now: bool) -> contextlib.AbstractContextManager[None]:
        """Compute a part of a batch: gradients add up over the processes at its last part, `now`."""
        return contextlib.nullcontext()

    def total(self, value: float) -> float:
        """Return the sum of every process's value."""
        return value

    def any(self, flag: bool) -> bool:
        """Say whether some process says so: all of them hear the same."""
        return flag

    def gathered(self, ids: list[int]) -> list[int]:
        """Return the ids of every process, in the order of the batch."""
        return ids

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter, a gradient norm or a moment as one process would have it."""
        return tensor

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return of a whole tensor what this process holds, laid out like a parameter."""
        return whole


ALONE = Ranks()
