"""Building a rack: adding stacks by a growth operator, freezing the trunk, counting parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import ValidationError
from torch import nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_choice, check_integer, check_type, describe
from stackwise_core.config.rules import growth_faults
from stackwise_core.config.schema import GROWTH, ModelConfig, Precision, StackOverride
from stackwise_core.config.stacks import settings_of
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_names, adapter_parameters
from stackwise_core.model.blocks import Rack, Stack
from stackwise_core.model.growth_operators import freeze, give_adapter, new_rack, new_stack
from stackwise_core.model.precision import stored_bytes
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import Anatomy, StageSpec, resolve_stack, resolve_stage

_Mode = Literal["default", "append", "prepend"]


def create_stack_from_config(config: StackWiseConfig, creation_index: int = 0) -> Stack:
    """Return a randomly initialised stack of the configured shape, with its adapter if it has one."""
    check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected")
    config.validate(corpus=False)
    check_integer("creation_index", creation_index, 0, config.training.progressive.max_stacks - 1)
    config = config.model_copy(deep=True)
    growth = config.training.progressive
    growth.target_stacks = max(growth.target_stacks, int(creation_index) + 1)
    if faults := list(growth_faults(config)):
        raise ConfigError(faults)
    spec = resolve_stack(config, creation_index, creation_index)
    return new_stack(resolve_shape(config), spec, "random", config.run.seed, None)


class ProgressiveRackBuilder:
    """Grows one rack, stack by stack, at either end."""

    def __init__(self, config: StackWiseConfig | None = None, **dimensions: Any) -> None:
        """Start an empty rack; `dimensions` replace keys of `config.model`, such as d_model."""
        config = StackWiseConfig() if config is None else config
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        config = config.model_copy(deep=True) if dimensions else config
        for name, value in dimensions.items():
            if name not in ModelConfig.model_fields:
                known = ", ".join(ModelConfig.model_fields)
                raise ConfigError([Fault(name, repr(value), f"there is no such dimension; known: {known}")])
            try:
                setattr(config.model, name, value)
            except ValidationError as error:
                raise ConfigError([Fault(f"model.{name}", repr(value), error.errors()[0]["msg"])]) from None
        config.validate(corpus=False)
        self.config = config
        self._rack = new_rack(resolve_shape(config), config.run.seed)
        self._added: list[StackOverride] = []
        self._trained: set[int] = set()
        self.channels: dict[int, ChannelStatistics] = {}
        """Channel statistics of the stacks' outputs, by creation index, where the stream is quantised."""

    @property
    def stacks(self) -> list[Stack]:
        """The stacks in data-flow order."""
        return [stack for stack in self._rack.stacks if isinstance(stack, Stack)]

    @property
    def n_stacks(self) -> int:
        """The number of stacks."""
        return len(self._rack.stacks)

    @property
    def n_trained(self) -> int:
        """The number of stacks, in creation order, that have been trained."""
        return len(self._trained)

    def stack(self, creation_index: int) -> Stack:
        """Return a stack by its creation index."""
        for stack in self.stacks:
            if stack.creation_index == creation_index:
                return stack
        allowed = f"the rack has stacks 0 to {self.n_stacks - 1}" if self.stacks else "the rack has no stack yet"
        raise ConfigError([Fault("index", describe(creation_index), allowed)])

    def append_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Stack:
        """Add a stack between the trunk and the head, and return it; None takes the configuration's value."""
        return self._add("append", n_blocks, precision)

    def prepend_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Stack:
        """Add a stack between the embedding and the trunk, and return it; see `append_stack`."""
        return self._add("prepend", n_blocks, precision)

    def add_stack(self) -> Stack:
        """Add the next stack where the configuration says."""
        return self._add("default", None, None)

    def _add(self, mode: _Mode, n_blocks: int | None, precision: Precision | None) -> Stack:
        limit, index = self.config.training.progressive.max_stacks, self.n_stacks
        if index >= limit:
            raise ConfigError([Fault(f"{GROWTH}.max_stacks", str(index + 1), f"at most {limit} stacks")])
        if n_blocks is not None:
            check_integer("n_blocks", n_blocks, 1, 128)
        if precision is not None:
            check_choice("precision", precision, get_args(Precision))
        override = self._override(index, mode, n_blocks, precision)
        config = self.as_built(self.config, [*self._added, override])
        if faults := list(growth_faults(config)):
            raise ConfigError(faults)
        spec = resolve_stage(config, index)
        # Joint training from scratch does not copy.
        grown = config.training.progressive.enabled
        source = self.stack(spec.source) if grown and spec.source is not None else None
        stack = new_stack(self._rack.shape, spec.new, spec.operator if grown else "random", config.run.seed, source)
        for index_below in spec.trunk:
            self._give_progressive(spec, index_below)
        self._rack.stacks.insert(spec.anatomy.order.index(index), stack)
        self._added.append(override)
        return stack

    def _give_progressive(self, spec: StageSpec, index: int) -> None:
        """Give a stack of the trunk its 'progressive' adapter; the 'stack' adapter is added at creation only."""
        stack, adapters = self.stack(index), spec.stacks[index].adapters
        if "progressive" in adapters and "progressive" not in adapter_names(stack):
            give_adapter(stack, "progressive", adapters["progressive"], self.config.run.seed)

    def _override(self, index: int, mode: _Mode, n_blocks: int | None, precision: Precision | None) -> StackOverride:
        """Return how this stack is built, in full, so that later edits of the configuration do not change it."""
        settings = settings_of(self.config, index)
        return StackOverride(
            n_blocks=int(n_blocks or settings.n_blocks),
            precision=precision or settings.precision,
            mode=settings.mode if mode == "default" else mode,
        )

    def as_built(self, config: StackWiseConfig, added: list[StackOverride] | None = None) -> StackWiseConfig:
        """Return a copy of a configuration with this rack's shape, and with the stacks `added` (None: its own)."""
        added = self._added if added is None else added
        merged = config.model_copy(deep=True)
        merged.model = self.config.model.model_copy()
        growth = merged.training.progressive
        configured = growth.stacks
        growth.max_stacks = max(growth.max_stacks, self.config.training.progressive.max_stacks, len(added))
        growth.target_stacks = min(max(growth.target_stacks, len(added)), growth.max_stacks)
        steps = [entry.steps for entry in configured[: len(added)]] + [0] * len(added)
        built = [entry.model_copy(update={"steps": n}) for entry, n in zip(added, steps, strict=False)]
        growth.stacks = [*built, *configured[len(added) :]]
        return merged

    def prepare_stage(self, spec: StageSpec) -> None:
        """Freeze the rack and add the adapters that the stage needs; from the second stage on the head is untied."""
        if spec.index > 0:
            self._rack.untie()
        freeze(self._rack)
        for index in spec.anatomy.order:
            self._give_progressive(spec, index)

    def finish_stage(self, anatomy: Anatomy) -> None:
        """Freeze the rack and record that the stacks of a stage are trained; see `end_stage`."""
        freeze(self._rack)
        self._trained.update(anatomy.order)

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

    def build_rack(self) -> Rack:
        """Return the rack itself, not a copy."""
        return self._rack

    def get_rack_info(self) -> dict[str, Any]:
        """Return the numbers of stacks, blocks and parameters (all and trainable), and an entry for each stack."""
        stacks = [
            {
                "creation_index": stack.creation_index,
                "n_blocks": len(stack.blocks),
                "precision": stack.precision,
                "adapters": adapter_names(stack),
                "trained": stack.creation_index in self._trained,
                "bytes": stored_bytes(stack),
                **count_parameters(stack),
            }
            for stack in self.stacks
        ]
        return {
            "n_stacks": self.n_stacks,
            "n_blocks": sum(len(stack.blocks) for stack in self.stacks),
            **count_parameters(self._rack),
            "stacks": stacks,
        }


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters and of trainable ones; shared parameters count once."""
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
