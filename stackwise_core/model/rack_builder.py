"""Building a rack: adding stacks by a growth operator, as a configuration says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_choice, check_integer, check_type
from stackwise_core.config.rules import growth_faults
from stackwise_core.config.schema import GROWTH, Mode, ModelConfig, Precision, StackOverride
from stackwise_core.config.sizes import residual_blocks_of, vocab_size_of
from stackwise_core.config.stacks import settings_of
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_names, adapter_state
from stackwise_core.model.agreement import Told, agreed_config, default_faults, shape_faults
from stackwise_core.model.blocks import Stack
from stackwise_core.model.digests import digest_of, part_digests
from stackwise_core.model.grown_rack import GrownRack
from stackwise_core.model.growth_operators import freeze, give_adapter, new_rack, new_stack
from stackwise_core.model.precision import count_parameters, stored_bytes
from stackwise_core.model.rack import Rack, load_rack
from stackwise_core.model.saved_builder import builder_files, check_no_code, config_in, record_in, take_record
from stackwise_core.model.saving import described_stacks, write_whole
from stackwise_core.model.snapshot import Snapshot, take_contents
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.saved_rack import CONFIG, SavedBuilder
from stackwise_core.stages.stages import StageSpec, resolve_stack, resolve_stage

_AddedAs = Mode | Literal["default"]


def create_stack_from_config(
    config: StackWiseConfig, stack_id: int = 0, n_blocks: int | None = None, precision: Precision | None = None
) -> Stack:
    """Return a randomly initialised stack of the configured shape, with its adapter if it has one.

    Args:
        config: the configuration.
        stack_id: the creation index, on which adapters and the random numbers depend.
        n_blocks: None takes the configuration's value.
        precision: None takes the configuration's value.
    """
    check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected")
    config.validate(corpus=False)
    check_integer("stack_id", stack_id, 0, config.training.progressive.max_stacks - 1)
    _check_stack(n_blocks, precision)
    shape, config, index = resolve_shape(config), config.model_copy(deep=True), int(stack_id)
    growth = config.training.progressive
    growth.target_stacks = max(growth.target_stacks, index + 1)
    growth.stacks = growth.stacks + [StackOverride()] * (index + 1 - len(growth.stacks))
    said = {"n_blocks": n_blocks and int(n_blocks), "precision": precision}
    own = {name: value for name, value in said.items() if value is not None}
    growth.stacks[index] = growth.stacks[index].model_copy(update=own)
    if faults := list(growth_faults(config)):
        raise ConfigError(faults)
    return new_stack(shape, resolve_stack(config, index, index), "random", config.run.seed)


class ProgressiveRackBuilder(GrownRack):
    """Grows one rack, stack by stack, at either end or within."""

    def __init__(
        self,
        config: StackWiseConfig | None = None,
        building_mode: Mode | None = None,
        default_precision: Precision | None = None,
        **dimensions: Any,
    ) -> None:
        """A new one has no stacks.

        Args:
            config: the configuration, which may be edited later; without it, that of the trainer is followed.
            building_mode: where stacks are added unless a call says; None leaves it to the configuration.
            default_precision: their precision unless a call says; None leaves it to the configuration.
            dimensions: keys of `config.model`, such as d_model, which they take the place of.
        """
        whole = StackWiseConfig() if config is None else config
        check_type("config", whole, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        if building_mode is not None:
            check_choice("building_mode", building_mode, get_args(Mode))
        if default_precision is not None:
            check_choice("default_precision", default_precision, get_args(Precision))
        self.config = _with_dimensions(whole, dimensions)
        self.config.validate(corpus=False)
        self._own = self.config if config is None else config
        """The configuration that rules what is added by hand; its sizes are as they were written."""
        self._told = Told(
            self.config.model.model_copy(update=_settled(self.config, given=config is not None)),
            frozenset(name for name in dimensions if (name, dimensions[name]) != ("vocab_size", 0)),
            None if config is None else config.model,
            {name: getattr(whole.model, name) for name in dimensions},
            building_mode,
            default_precision,
        )
        self.progress: Any = None
        """The folder in which a trainer keeps how far this rack is, if it was given one."""
        self._own_shape = resolve_shape(self.config)
        super().__init__(self._own_shape, self.config.run.seed)

    def append_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Stack:
        """Add a stack between the trunk and the head, and return it; None takes the configuration's value."""
        return self._add("append", n_blocks, precision)

    def prepend_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Stack:
        """Add a stack between the embedding and the trunk, and return it; see `append_stack`."""
        return self._add("prepend", n_blocks, precision)

    def insert_stack(
        self, n_blocks: int | None = None, precision: Precision | None = None, tail_stacks: int | None = None
    ) -> Stack:
        """Add a stack below the top `tail_stacks` of the rack, and return it; see `append_stack`."""
        if tail_stacks is not None:
            check_integer("tail_stacks", tail_stacks, 1, 1024)
        return self._add("insert", n_blocks, precision, tail_stacks=tail_stacks)

    def add_stack(self, config: StackWiseConfig | None = None) -> Stack:
        """Add the next stack as a configuration says, such as a trainer's; None takes the builder's own."""
        return self._add("default", None, None, config)

    def _add(
        self,
        mode: _AddedAs,
        n_blocks: int | None,
        precision: Precision | None,
        config: StackWiseConfig | None = None,
        tail_stacks: int | None = None,
    ) -> Stack:
        if config is None:
            self._check_not_ahead()
            self._follow_edits()
        config, index = config or self._own, self.n_stacks
        limit = config.training.progressive.max_stacks
        if index >= limit:
            raise ConfigError([Fault(f"{GROWTH}.max_stacks", str(index + 1), f"at most {limit} stacks")])
        _check_stack(n_blocks, precision)
        override = self._override(config, mode, n_blocks, precision, tail_stacks)
        built = self.as_built(config, [*self.added, override])
        if faults := list(growth_faults(built)):
            raise ConfigError(faults)
        spec = resolve_stage(built, index)
        stack = self._new_stack(built, spec)
        for index_below in spec.trunk:
            self._give_progressive(spec, index_below, built.run.seed)
        self.rack.stacks.insert(spec.anatomy.order.index(index), stack)
        self.added.append(override)
        self.created[index] = part_digests(stack)
        return stack

    def _check_not_ahead(self) -> None:
        if self.progress is not None and self.progress.ahead:
            allowed = f"it is as later calls left it in {self.progress.folder}: give each call a folder of its own"
            raise ConfigError([Fault("rack_builder", "one more stack, by hand", allowed)])

    def _override(
        self,
        config: StackWiseConfig,
        mode: _AddedAs,
        n_blocks: int | None,
        precision: Precision | None,
        tail_stacks: int | None,
    ) -> StackOverride:
        """Return how this stack is built, in full, so that later edits of the configuration do not change it."""
        index = self.n_stacks
        said = {"building_mode": mode != "default", "new_stack_precision": precision is not None}
        faults = default_faults(self._told, config, index)
        if left := [fault for fault in faults if not said[fault.path.removeprefix(f"{GROWTH}.")]]:
            raise ConfigError(left)
        settings = settings_of(agreed_config(self._told, config), index)
        mode = settings.mode if mode == "default" else mode
        tail = min(int(tail_stacks or settings.tail_stacks), index) if mode == "insert" else 0
        return StackOverride(
            n_blocks=int(n_blocks or settings.n_blocks),
            precision=precision or settings.precision,
            mode=mode,
            tail_stacks=tail,
        )

    def _new_stack(self, built: StackWiseConfig, spec: StageSpec) -> Stack:
        """Return the stack that a stage adds, as it is before training."""
        grown = built.training.progressive.enabled  # joint training from scratch does not copy
        if not grown:
            return new_stack(self.rack.shape, spec.new, "random", built.run.seed)
        sources = [self.stack(source) for source in spec.sources]
        return new_stack(self.rack.shape, spec.new, spec.operator, built.run.seed, sources, spec.init)

    def _give_progressive(self, spec: StageSpec, index: int, seed: int) -> None:
        """Give a stack of the trunk its 'progressive' adapter; the 'stack' adapter is added at creation only."""
        stack, adapters = self.stack(index), spec.stacks[index].adapters
        if "progressive" in adapters and "progressive" not in adapter_names(stack):
            give_adapter(stack, "progressive", adapters["progressive"], seed)
            self.created.setdefault(index, {})["progressive"] = digest_of(adapter_state(stack, "progressive"))

    # ------------------------------------------------------------ the configuration that rules

    def as_built(self, config: StackWiseConfig, added: list[StackOverride] | None = None) -> StackWiseConfig:
        """Return a copy of a configuration with this rack's shape, and with the stacks `added` (None: its own).

        Raises:
            ConfigError: the configuration says another size than the rack was built with.
        """
        added = self.added if added is None else added
        merged = agreed_config(self._told, config)
        growth = merged.training.progressive
        configured = growth.stacks
        growth.max_stacks = max(growth.max_stacks, len(added))
        growth.target_stacks = min(max(growth.target_stacks, len(added)), growth.max_stacks)
        steps = [entry.steps for entry in configured[: len(added)]] + [0] * len(added)
        built = [entry.model_copy(update={"steps": n}) for entry, n in zip(added, steps, strict=False)]
        growth.stacks = [*built, *configured[len(added) :]]
        return merged

    def check_additions(self, config: StackWiseConfig, target: int) -> None:
        """Reject what the builder was given for all additions, where a configuration that adds says something else."""
        stacks = range(self.n_stacks, target)
        if faults := [fault for stack in stacks for fault in default_faults(self._told, config, stack)]:
            raise ConfigError(list(dict.fromkeys(faults)))

    def adopt(self, config: StackWiseConfig) -> None:
        """Have a configuration rule this rack from now on: attention and time embedding become what it says.

        A rack that nobody has trained or edited is made anew where that needs other weights; all objects stay.

        Raises:
            ConfigError: the rack is trained, or edited by hand, as something else.
        """
        built = self.as_built(config)
        follows = self._told.given is None
        shape, seed = resolve_shape(built), config.run.seed if follows else self.seed
        if (shape, seed) != (self.rack.shape, self.seed):
            if self.is_untouched():
                self._make_anew(built, shape, seed)
            elif shape != self.rack.shape:
                raise ConfigError(shape_faults(built, self.rack.shape, shape))
        self._told = replace(self._told, model=built.model)
        if follows:
            self._own, self.config = config, config.model_copy(update={"model": built.model.model_copy()})
        self._own_shape = resolve_shape(self.as_built(self._own))

    def _follow_edits(self) -> None:
        """Adopt the builder's own configuration if it was edited to say another attention or time embedding."""
        if resolve_shape(self.as_built(self._own)) != self._own_shape:
            self.adopt(self._own)

    def _make_anew(self, built: StackWiseConfig, shape: ModelShape, seed: int) -> None:
        """Make every part of the rack again, in another shape or from another seed, within the same objects."""
        rack, fresh = self.rack, new_rack(shape, seed).to(self.rack.embedding.weight.device)
        take_contents(rack.embedding, fresh.embedding)
        take_contents(rack.head, fresh.head)
        rack.shape, rack.tied, self.seed = shape, fresh.tied, seed
        self.created_ends = self.ends()
        for index in range(self.n_stacks):
            spec = resolve_stage(built, index)
            self.renew(built, spec, always=True)
            for index_below in spec.trunk:
                self._give_progressive(spec, index_below, seed)

    def renew(self, built: StackWiseConfig, spec: StageSpec, *, always: bool = False) -> None:
        """Make the stack of a growth stage again by its operator if it is still as it was created.

        It then is a copy of a trained neighbour, though it was added before that was trained.
        """
        index = spec.index
        if always or self.is_as_created(index):
            stack, device = self.stack(index), self.rack.embedding.weight.device
            take_contents(stack, self._new_stack(built, spec).to(device))
            self.created[index] = part_digests(stack)

    # ------------------------------------------------------------ the stages of a trainer

    def prepare_stage(self, spec: StageSpec, seed: int | None = None) -> None:
        """Freeze the rack and add the adapters that the stage needs; from the second stage on the head is untied."""
        if spec.index > 0:
            self.rack.untie()
        freeze(self.rack)
        for index in spec.anatomy.order:
            self._give_progressive(spec, index, self.config.run.seed if seed is None else seed)

    # ------------------------------------------------------------ folders

    def save(self, folder: str | Path) -> None:
        """Write rack, configuration and what is trained into a folder, whole or not at all.

        Growth goes on from there with the same bits, see `load`. A rack that was saved there before is replaced.

        Raises:
            SavedRackError: the folder holds something else; it is left as it is.
        """
        write_whole(folder, self.files())

    def files(self, more: Iterable[tuple[str, bytes]] = ()) -> Iterator[tuple[str, bytes]]:
        """Yield the files that `save` writes, path and bytes, one at a time, and `more` of them."""
        return builder_files(self, self._told, self._own, more)

    @classmethod
    def load(cls, folder: str | Path, config: StackWiseConfig | None = None, *, trust_functions: bool = False) -> Self:
        """Return a builder as it was saved, its rack on the CPU.

        Args:
            folder: what `save` wrote; of a rack that was saved without its builder all stacks count as trained.
            config: takes the place of the configuration that was saved, if there was one.
            trust_functions: import the functions that the saved configuration names; only if you know who wrote it.

        Raises:
            SavedRackError: there is none, a file is missing or damaged, or another version wrote it.
            ConfigError: the configuration is missing, says another shape than the rack has, or names functions.
        """
        rack, saved, channels = load_rack(folder)
        known = record_in(saved)
        if config is None and CONFIG not in saved.files:
            why = saved.no_config or "the rack was saved without its builder"
            raise ConfigError([Fault("config", "None", f"none was saved ({why}): give load() one")])
        if config is None:
            config = config_in(saved, known.said if known else ())
            check_no_code(config, str(saved.folder), trusted=trust_functions)
        builder = cls._as_told(known, config) if known else cls(config)
        modes: list[Mode] = [stack.mode for stack in saved.stacks]
        builder.take_rack(rack, [stack.index for stack in saved.stacks if stack.trained], channels, modes)
        if known:
            take_record(builder, known, saved)
        return builder

    @classmethod
    def _as_told(cls, known: SavedBuilder, config: StackWiseConfig) -> Self:
        """Return an empty builder that was given the same arguments."""
        ways: dict[str, Any] = {"building_mode": known.building_mode, "default_precision": known.default_precision}
        builder = cls(config if known.given else None, **ways, **known.dimensions)
        builder._told = replace(builder._told, model=known.model.model_copy())
        if not known.given:
            builder._own = config
            builder.config = config.model_copy(update={"model": builder._told.model.model_copy()})
        return builder

    def go_on_from(self, folder: str | Path) -> None:
        """Be as another builder of the same configuration was when it was saved; all objects stay."""
        other, have = type(self).load(folder, self._own), {stack.creation_index: stack for stack in self.stacks}
        Snapshot.all_of(other.build_rack(), other.channels).restore(self.rack, self.channels)
        del self.rack.stacks[:]
        self.rack.stacks.extend(have.get(stack.creation_index, stack) for stack in other.stacks)
        self.added, self.trained, self.seed = other.added, other.trained, other.seed
        self.created, self.created_ends = other.created, other.created_ends
        self.annealed, self.interrupted, self.moments = other.annealed, other.interrupted, other.moments

    def take_rack(
        self, rack: Rack, trained: Iterable[int], channels: Mapping[int, ChannelStatistics], modes: Sequence[Mode]
    ) -> None:
        """Have a finished rack take the place of the builder's own.

        `trained` are creation indices; `modes` says how each stack was added, in creation order.

        Raises:
            ConfigError: the configuration says another shape, or creation indices are missing.
        """
        wanted = resolve_shape(self.as_built(self._own, []))
        if wanted != rack.shape:
            raise ConfigError(shape_faults(self._own, rack.shape, wanted))
        stacks = [stack for stack in rack.stacks if isinstance(stack, Stack)]
        described = described_stacks(stacks, set(trained), modes)
        self.added = [
            StackOverride(n_blocks=stack.n_blocks, precision=stack.precision, mode=stack.mode, tail_stacks=stack.tail)
            for stack in described
        ]
        self.rack, self.trained = rack, {stack.index for stack in described if stack.trained}
        self.created, self.created_ends, self.annealed = {}, ("", ""), None
        self.channels = dict(channels)
        self._own_shape = resolve_shape(self.as_built(self._own))

    def get_rack_info(self) -> dict[str, Any]:
        """Return the numbers of stacks, blocks and parameters, and an entry for each stack.

        Parameters are counted in all, in adapters, and where they have `requires_grad`; see `count_parameters`.
        `notes` lists the keys of the configuration that are not used, and the values that others were taken for.
        """
        described = self.config.model_copy(deep=True)
        described.training.progressive.stacks = self.added
        described.training.progressive.target_stacks = max(1, self.n_stacks)
        stacks = [
            {
                "creation_index": stack.creation_index,
                "n_blocks": len(stack.blocks),
                "precision": stack.precision,
                "adapters": adapter_names(stack),
                "trained": stack.creation_index in self.trained,
                "bytes": stored_bytes(stack),
                **count_parameters(stack),
            }
            for stack in self.stacks
        ]
        return {
            "n_stacks": self.n_stacks,
            "n_blocks": sum(len(stack.blocks) for stack in self.stacks),
            **count_parameters(self.rack),
            "stacks": stacks,
            "notes": notes(described),
        }


def _with_dimensions(config: StackWiseConfig, dimensions: dict[str, Any]) -> StackWiseConfig:
    """Return a configuration with other sizes; all other sections stay shared, so that edits of them are seen."""
    if not dimensions:
        return config
    model, sizes = config.model.model_copy(), [name for name in ModelConfig.model_fields if name != "from_"]
    for name, value in dimensions.items():
        if name not in sizes:
            known = ", ".join(sizes)
            raise ConfigError([Fault(name, repr(value), f"there is no such dimension; known: {known}")])
        try:
            setattr(model, name, value)
        except ValidationError as error:
            raise ConfigError([Fault(f"model.{name}", repr(value), error.errors()[0]["msg"])]) from None
    return config.model_copy(update={"model": model})


def _settled(config: StackWiseConfig, *, given: bool) -> dict[str, int]:
    """Return the sizes that 0 stands for; without a configuration, that of the trainer will say how deep a rack is."""
    sizes = {"vocab_size": vocab_size_of(config)}
    return {**sizes, "residual_blocks": residual_blocks_of(config)} if given else sizes


def _check_stack(n_blocks: Any, precision: Any) -> None:
    if n_blocks is not None:
        check_integer("n_blocks", n_blocks, 1, 128)
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
