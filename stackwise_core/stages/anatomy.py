"""The anatomy of a stage: which stacks there are, in which order they run, and what of them trains.

Everything that differs between append and prepend, and between frozen, qlora and full trunks, is
decided here, once, from the configuration alone. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from stackwise_core.config.stacks import QUANTISED, has_adapter, stage_mode, stage_precision

if TYPE_CHECKING:  # whose own rules ask this module
    from stackwise_core.config.schema import StackWiseConfig

AdapterName = Literal["stack", "progressive"]
Trains = Literal["everything", "adapters", "nothing"]


class Anatomy(BaseModel, frozen=True):
    """One stage. Stacks are named by creation index; the newest is the one that is added."""

    order: tuple[int, ...]
    """In data-flow order."""
    trains: tuple[Trains, ...]
    """What of each trains, in the same order."""
    embedding_trains: bool
    head_trains: bool

    @property
    def newest(self) -> int:
        """The stack that was created last: in a growth stage, the one that is added."""
        return max(self.order)

    @property
    def boundary(self) -> int:
        """How many stacks lie below the first that trains: their output may be cached."""
        if self.embedding_trains:
            return 0
        return next(n for n, trains in enumerate(self.trains) if trains != "nothing")

    @property
    def below(self) -> tuple[int, ...]:
        """The frozen stacks below the boundary, in data-flow order."""
        return self.order[: self.boundary]

    @property
    def live(self) -> tuple[int, ...]:
        """The stacks from the boundary to the head, in data-flow order: gradients flow through them."""
        return self.order[self.boundary :]

    @property
    def trained(self) -> tuple[int, ...]:
        """The stacks of which something trains, in data-flow order."""
        return tuple(stack for stack, trains in zip(self.order, self.trains, strict=True) if trains != "nothing")

    def trains_of(self, stack: int) -> Trains:
        """What of a stack trains."""
        return self.trains[self.order.index(stack)]


def data_flow(config: StackWiseConfig, n_stacks: int) -> tuple[int, ...]:
    """Return the creation indices of the first `n_stacks` stacks in data-flow order."""
    order: list[int] = []
    for index in range(n_stacks):
        order.insert(0 if stage_mode(config, index) == "prepend" else index, index)
    return tuple(order)


def stage_anatomy(config: StackWiseConfig, stage: int) -> Anatomy:
    """Return the anatomy of a growth stage.

    The first stage trains embedding, stack and head. Afterwards an appended stack trains with the
    head; a prepended one below a frozen head, its fixed anchor. Of the trunk there trains what its
    strategy says.
    """
    growth = config.training.progressive
    order = data_flow(config, stage + 1)
    full = growth.trunk_strategy == "full"
    trunk = [c for c in order if c != stage]
    top = set(trunk[-growth.trunk_trainable_top :] if growth.trunk_trainable_top else trunk)
    trains: list[Trains] = [
        _newest_trains(config, stage) if c == stage else _trunk_trains(config, c, c in top) for c in order
    ]
    return Anatomy(
        order=order,
        trains=tuple(trains),
        embedding_trains=stage == 0 or full,
        head_trains=stage == 0 or full or stage_mode(config, stage) == "append",
    )


def joint_anatomy(config: StackWiseConfig, n_stacks: int) -> Anatomy:
    """Return the anatomy of joint training: everything, but of a quantised stack its adapters only."""
    order = data_flow(config, n_stacks)
    grown = config.training.progressive.enabled
    trains: tuple[Trains, ...] = tuple(
        "adapters" if grown and stage_precision(config, c) in QUANTISED else "everything" for c in order
    )
    return Anatomy(order=order, trains=trains, embedding_trains=True, head_trains=True)


def _newest_trains(config: StackWiseConfig, stage: int) -> Trains:
    # The very first stack has nothing to copy: it trains whole and is quantised afterwards.
    return "adapters" if stage_precision(config, stage) == "qlora" and stage > 0 else "everything"


def _trunk_trains(config: StackWiseConfig, stack: int, in_top: bool) -> Trains:
    growth = config.training.progressive
    if growth.trunk_strategy == "full":
        return "everything"
    adapts = in_top and (growth.progressive_qlora or has_adapter(config, stack))
    return "adapters" if growth.trunk_strategy == "qlora" and adapts else "nothing"


def last_trained(anatomies: Sequence[Anatomy], stack: int, part: Literal["base", "adapters"]) -> int:
    """Return the last of some successive stages that trained a part of a stack; the stage that made it is one."""
    wanted = ("everything",) if part == "base" else ("everything", "adapters")
    there = [stage for stage, anatomy in enumerate(anatomies) if stack in anatomy.order]
    trained = [stage for stage in there if anatomies[stage].trains_of(stack) in wanted]
    return max([there[0], *trained])
