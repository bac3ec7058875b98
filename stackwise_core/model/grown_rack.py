"""A rack, and the record of how it has grown: what is as it was created, what is trained, what can be undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from stackwise_core.config.arguments import check_type, describe
from stackwise_core.config.schema import GROWTH, Mode, StackOverride
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.blocks import Stack
from stackwise_core.model.digests import part_digests, tensor_digest
from stackwise_core.model.growth_operators import freeze, new_rack
from stackwise_core.model.rack import Rack
from stackwise_core.model.snapshot import Annealed, Interrupted, Snapshot
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import Anatomy


class GrownRack:
    """A rack and its record; `ProgressiveRackBuilder` adds stacks to it."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        """Start with a rack without stacks."""
        self.channels: dict[int, ChannelStatistics] = {}
        """Channel statistics of the stacks' outputs, by creation index, where the stream is quantised."""
        self.annealed: Annealed | None = None
        """The joint anneal that the rack has had, if any; growth goes on from the rack before it."""
        self.interrupted: Interrupted | None = None
        """The stage that a trainer was stopped in, if any; the same call goes on there."""
        self.moments: dict[str, Tensor] = {}
        """The optimizer state that the last growth stage left, as `<name>.<moment>`, if it is kept."""
        self.added: list[StackOverride] = []
        """How each stack was built, in creation order."""
        self.trained: set[int] = set()
        """Creation indices of the stacks whose stage is over."""
        self.created: dict[int, dict[str, str]] = {}
        """Digests of every stack as it was created, by creation index."""
        self.seed = seed
        self.rack = new_rack(shape, seed)
        self.created_ends = self.ends()
        """Digests of embedding and head as they were created."""

    def _repr_html_(self) -> str:
        created = enumerate(self.added)
        how = {i: f", {each.mode}{'' if self.is_trained(i) else ', not trained yet'}" for i, each in created}
        return self.rack.shown(how)

    @property
    def stacks(self) -> list[Stack]:
        """The stacks in data-flow order."""
        return [stack for stack in self.rack.stacks if isinstance(stack, Stack)]

    @property
    def n_stacks(self) -> int:
        """The number of stacks."""
        return len(self.rack.stacks)

    @property
    def n_trained(self) -> int:
        """The number of stacks, in creation order, that have been trained."""
        return len(self.trained)

    @property
    def modes(self) -> list[Mode]:
        """How each stack was added, in creation order."""
        return [entry.mode for entry in self.added if entry.mode != "default"]  # each says its own

    def is_trained(self, creation_index: int) -> bool:
        """Return whether a stack has been trained."""
        return creation_index in self.trained

    def stack(self, creation_index: int) -> Stack:
        """Return a stack by its creation index."""
        for stack in self.stacks:
            if stack.creation_index == creation_index:
                return stack
        allowed = f"the rack has stacks 0 to {self.n_stacks - 1}" if self.stacks else "the rack has no stack yet"
        raise ConfigError([Fault("index", describe(creation_index), allowed)])

    def build_rack(self) -> Rack:
        """Return the rack itself, not a copy."""
        return self.rack

    # ------------------------------------------------------------ what trains

    def freeze_trunk(self, indices: list[int] | None = None) -> None:
        """Freeze some stacks by creation index; all but the newest by default."""
        for stack in self._chosen(range(self.n_stacks - 1) if indices is None else indices):
            freeze(stack)

    def freeze_all_but_qlora(self, indices: list[int] | None = None) -> None:
        """Freeze some stacks by creation index, all by default, except their adapters."""
        chosen = self._chosen(range(self.n_stacks) if indices is None else indices)
        adapters = [parameter for stack in chosen for parameter in adapter_parameters(stack)]
        if not adapters:
            allowed = f"none of these stacks has an adapter; set {GROWTH}.qlora_enabled before they are built"
            raise ConfigError([Fault("indices", repr([stack.creation_index for stack in chosen]), allowed)])
        for stack in chosen:
            freeze(stack)
        for parameter in adapters:
            parameter.requires_grad_(True)

    def _chosen(self, indices: Iterable[int]) -> list[Stack]:
        check_type("indices", indices, (list, tuple, range, set), "a list of creation indices is expected")
        return [self.stack(index) for index in indices]

    def finish_stage(self, anatomy: Anatomy) -> None:
        """Freeze the rack and record that the stacks of a stage are trained; see `end_stage`."""
        freeze(self.rack)
        self.trained.update(anatomy.order)

    # ------------------------------------------------------------ what can be undone

    def keep_annealed(self, settings: str, before: Snapshot) -> None:
        """Record a joint anneal, and the rack before it."""
        after = {stack.creation_index: part_digests(stack) for stack in self.stacks}
        self.annealed = Annealed(settings, before, after)

    def is_annealed(self, settings: str) -> bool:
        """Return whether the rack is as a joint anneal of these settings left it."""
        return self.annealed is not None and self.annealed.settings == settings and self._is_as_annealed(self.annealed)

    def undo_anneal(self) -> None:
        """Go back to the rack before its joint anneal, unless it was trained or edited since."""
        annealed, self.annealed = self.annealed, None
        if annealed is not None and self._is_as_annealed(annealed):
            annealed.before.restore(self.rack, self.channels)

    def undo_interrupted(self) -> None:
        """Go back to the rack before the stage that was stopped, unless it was edited since: then it is forgotten."""
        kept = self.interrupted
        if kept is not None and kept.after != self.digests():
            self.interrupted = None
        elif kept is not None and kept.before is not None:
            kept.before.restore(self.rack, self.channels)
            kept.before, kept.after = None, self.digests()

    def _is_as_annealed(self, annealed: Annealed) -> bool:
        digests = {index: part_digests(self.stack(index)) for index in annealed.after}
        return all(left.items() <= digests[index].items() for index, left in annealed.after.items())

    # ------------------------------------------------------------ what it is

    def is_untouched(self) -> bool:
        """Return whether the whole rack is as it was created."""
        if self.trained or self.ends() != self.created_ends:
            return False
        return all(self.is_as_created(index) for index in range(self.n_stacks))

    def is_as_created(self, index: int) -> bool:
        """Return whether a stack is as it was created, by its creation index."""
        return index not in self.trained and part_digests(self.stack(index)) == self.created.get(index)

    def ends(self) -> tuple[str, str]:
        """Return the hashes of embedding and head."""
        return tensor_digest(self.rack.embedding), tensor_digest(self.rack.head)

    def digests(self, *, trained_only: bool = False) -> dict[str, str]:
        """Return the hashes of the parts of the rack: embedding, head, and the base and adapters of its stacks."""
        stacks = [stack for stack in self.stacks if stack.creation_index in self.trained or not trained_only]
        parts = {
            f"stack {stack.creation_index} {name}": digest
            for stack in stacks
            for name, digest in part_digests(stack).items()
        }
        return dict(zip(("embedding", "head"), self.ends(), strict=True)) | parts

    def description(self) -> dict[str, Any]:
        """Return shape, seed, stacks and digests of the rack as JSON values."""
        stacks = [override.model_dump(exclude={"steps"}) for override in self.added]
        shape = self.rack.shape.model_dump(mode="json")
        return {"shape": shape, "seed": self.seed, "stacks": stacks, "weights": self.digests()}
