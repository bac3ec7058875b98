"""Parts of a rack set aside, to go back to: what a stage trains, as it was before the stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stackwise_core.model.blocks import Stack
from stackwise_core.model.rack import Rack
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.stages import Anatomy


def take_contents(module: nn.Module, other: nn.Module) -> None:
    """Have a module hold what another of its class holds; it stays the same object, with the hooks put on it."""
    for name in [name for name in module.__dict__ if "_hook" not in name]:
        del module.__dict__[name]
    module.__dict__.update({name: value for name, value in other.__dict__.items() if "_hook" not in name})


@dataclass
class Snapshot:
    """What a stage trains, copied as it was before, in its storage types; it can be gone back to once."""

    parts: dict[str, nn.Module]
    channels: dict[int, ChannelStatistics]
    tied: bool

    @classmethod
    def of(cls, rack: Rack, anatomy: Anatomy, channels: dict[int, ChannelStatistics]) -> Snapshot:
        """Copy what the stage of an anatomy trains, which takes as much memory again."""
        trained = {f"stack {index}" for index in anatomy.trained}
        trained |= {"embedding"} if anatomy.embedding_trains else set()
        trained |= {"head"} if anatomy.head_trains else set()
        parts = {name: part for name, part in _parts(rack).items() if name in trained}
        # Copied together, embedding and head still share their matrix if they did.
        return cls(copy.deepcopy(parts), dict(channels), rack.tied)

    @classmethod
    def all_of(cls, rack: Rack, channels: dict[int, ChannelStatistics]) -> Snapshot:
        """Take the parts of a whole rack, not copied."""
        return cls(_parts(rack), channels, rack.tied)

    def as_rack(self, rack: Rack) -> Rack:
        """Return the rack as it was, made of these parts and the others of the rack itself."""
        with torch.device("meta"):  # all parts are replaced
            whole = Rack(rack.shape)
        parts = {**_parts(rack), **self.parts}
        whole.stacks.extend(parts.pop(f"stack {stack.creation_index}") for stack in _stacks(rack))
        for name, part in parts.items():
            whole.add_module(name, part)
        whole.tied = self.tied
        return whole

    def restore(self, rack: Rack, channels: dict[int, ChannelStatistics]) -> None:
        """Have a rack and its channel statistics be what they were; all modules stay the same objects."""
        for name, part in _parts(rack).items():
            if name in self.parts:
                take_contents(part, self.parts[name])
        rack.tied = self.tied
        channels.clear()
        channels.update(self.channels)


def _parts(rack: Rack) -> dict[str, nn.Module]:
    stacks = {f"stack {stack.creation_index}": stack for stack in _stacks(rack)}
    return {"embedding": rack.embedding, "head": rack.head, **stacks}


def _stacks(rack: Rack) -> list[Stack]:
    return [stack for stack in rack.stacks if isinstance(stack, Stack)]


@dataclass
class Interrupted:
    """A stage that was stopped: its training state, and the rack as it was before."""

    settings: str
    """The hash of what it was trained with."""
    step: int
    tensors: Mapping[str, Tensor]
    records: list[dict[str, float]]
    before: Snapshot | None
    """None once the rack is so again."""
    after: dict[str, str]
    """The digests of the rack's parts as the stop, or going back, left them."""


@dataclass
class Annealed:
    """A joint anneal of a rack; growth goes on from the rack as it was before."""

    settings: str
    """The hash of what it was made with; '' where that is not known."""
    before: Snapshot
    after: dict[int, dict[str, str]] = field(default_factory=dict)
    """The digests of the parts of every stack as it left them, by creation index."""
