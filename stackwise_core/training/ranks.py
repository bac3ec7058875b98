"""Ranks: the processes that train a stage together, and how their results are combined into one step.

A rank reads its share of every batch; sums over ranks are sums over the batch, so that a step of several processes is
the step that one process would take, up to the order in which floats are added.
"""

from __future__ import annotations

import contextlib

from torch import Tensor

from stackwise_core.objectives.losses import Batch
from stackwise_core.training.stage_model import StageModel


class Ranks:
    """A single process, which reads every row."""

    rank, count = 0, 1
    gradient_divisor = 1
    """What the gradients are divided by when they are reduced over the processes: the loss is multiplied by it."""
    failpoint = "train"
    """The name of the step's failpoint."""

    def wrap(self, model: StageModel) -> None:
        """Distribute a model, before an optimizer is made of its parameters."""

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return model.summed_loss(batch)[0]

    def gradient_sync(self, *, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a backward pass reduces gradients over the processes, if enabled."""
        return contextlib.nullcontext()

    def sum(self, value: float) -> float:
        """Return the sum of every process's value."""
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all processes get the same answer."""
        return flag

    def gather(self, ids: list[int]) -> list[int]:
        """Return the ids of every process, in the order of the batch."""
        return ids

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return a parameter, gradient norm or optimizer moment, gathered from all processes."""
        return tensor

    def local_shard(self, full: Tensor, parameter: Tensor) -> Tensor:
        """Return the shard of a full tensor that this process holds, laid out like a parameter."""
        return full


ALONE = Ranks()
