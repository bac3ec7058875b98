"""Building a rack: adding stacks by a growth operator, freezing the trunk, counting what is there."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from stackwise_core.config import ModelConfig, StackWiseConfig
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.masking import hash_bits
from stackwise_core.model import Rack, Stack, initialise
from stackwise_core.resolve import GrowthOperator, ModelShape, resolve_shape, resolve_stage

_SALT_INIT = 5


def init_seed(seed: int, part: int) -> int:
    """Return the generator seed of one part of a rack: part -1 is embedding and head, c >= 0 is stack c."""
    return int(hash_bits(seed, _SALT_INIT, part)[0] >> np.uint64(1))


def new_rack(shape: ModelShape, seed: int) -> Rack:
    """Return a rack without stacks, embedding and head initialised."""
    rack = Rack(shape)
    initialise(rack, init_seed(seed, -1))
    return rack


def grow_stack(
    shape: ModelShape, n_blocks: int, index: int, operator: GrowthOperator, seed: int, source: Stack | None
) -> Stack:
    """Return stack `index` as it is before training.

    Args:
        shape: of the rack.
        n_blocks: blocks of the new stack.
        index: creation index; seeds a random start.
        operator: `random`; `zero`: random with output projections zeroed; `copy`: the source's blocks, the
            first n or repeated cyclically; `copy_zero`: a copy with output projections zeroed. The two
            zero forms leave the rack's function exactly as it was.
        seed: of the run.
        source: the neighbouring stack, for the copies.
    """
    stack = Stack(shape, n_blocks, index)
    if operator in ("random", "zero"):
        initialise(stack, init_seed(seed, index))
    else:
        if source is None:
            raise ConfigError([Fault("training.new_stack_init", repr(operator), "there is no stack to copy yet")])
        stack.blocks = nn.ModuleList(
            copy.deepcopy(source.blocks[n % len(source.blocks)]) for n in range(n_blocks)
        ).requires_grad_(True)
    if operator in ("zero", "copy_zero"):
        _zero_output_projections(stack)
    return stack


@torch.no_grad()
def _zero_output_projections(stack: Stack) -> None:
    for name, parameter in stack.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


def freeze(module: nn.Module) -> None:
    """Take a module out of training: no gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def create_stack_from_config(config: StackWiseConfig, creation_index: int = 0) -> Stack:
    """Return a randomly initialised stack of the configured shape."""
    config.validate()
    spec = resolve_stage(config, creation_index)
    return grow_stack(resolve_shape(config), spec.n_blocks, creation_index, "random", config.run.seed, None)


class ProgressiveRackBuilder:
    """Grows one rack, stack by stack."""

    def __init__(self, config: StackWiseConfig | None = None, **dimensions: Any) -> None:
        """Start an empty rack.

        Args:
            config: the whole configuration; None takes the defaults.
            **dimensions: keys of `model` (vocab_size, d_model, n_heads, ...), applied on top.

        Raises:
            ConfigError: an impossible configuration or an unknown dimension.
        """
        config = (config or StackWiseConfig()).model_copy(deep=True) if dimensions else (config or StackWiseConfig())
        for name, value in dimensions.items():
            if name not in ModelConfig.model_fields:
                known = ", ".join(ModelConfig.model_fields)
                raise ConfigError([Fault(name, repr(value), f"there is no such dimension; known: {known}")])
            try:
                setattr(config.model, name, value)
            except ValidationError as error:
                raise ConfigError([Fault(f"model.{name}", repr(value), error.errors()[0]["msg"])]) from None
        config.validate()
        self.config = config
        self._rack = new_rack(resolve_shape(config), config.run.seed)
        self._trained: set[int] = set()

    @property
    def stacks(self) -> list[Stack]:
        """The stacks in data-flow order."""
        return [stack for stack in self._rack.stacks if isinstance(stack, Stack)]

    @property
    def n_stacks(self) -> int:
        """How many stacks there are."""
        return len(self._rack.stacks)

    @property
    def n_trained(self) -> int:
        """How many stacks, in creation order, have been trained."""
        return len(self._trained)

    def append_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Add a stack on top and return it.

        Args:
            n_blocks: its blocks; None takes the configuration's.
            precision: its precision; None takes the configuration's.

        Raises:
            ConfigError: there are `max_stacks` already, or the precision is not built yet.
        """
        growth = self.config.training.progressive
        index = self.n_stacks
        if index >= growth.max_stacks:
            received, allowed = str(index + 1), f"at most {growth.max_stacks} stacks"
            raise ConfigError([Fault("training.progressive.max_stacks", received, allowed)])
        if n_blocks is not None and n_blocks < 1:
            raise ConfigError([Fault("n_blocks", str(n_blocks), "a stack has at least one block")])
        if precision not in (None, "full"):
            raise ConfigError([Fault("precision", repr(precision), "this version does not build it yet")])
        spec = resolve_stage(self.config, index)
        source = self.stacks[-1] if self.stacks else None
        shape, seed = self._rack.shape, self.config.run.seed
        stack = grow_stack(shape, n_blocks or spec.n_blocks, index, spec.operator, seed, source)
        self._rack.stacks.append(stack)
        return stack

    def prepare_stage(self, index: int) -> None:
        """Let the stack and the head of stage `index` train, in the first stage the embedding; freeze the rest."""
        if index > 0:
            self._rack.untie()
        freeze(self._rack)
        trained = [self.stacks[index], self._rack.head, *([self._rack.embedding] if index == 0 else [])]
        for module in trained:
            module.requires_grad_(True)

    def freeze_trunk(self, indices: list[int] | None = None) -> None:
        """Freeze some stacks by creation index; all but the newest by default."""
        for stack in self.stacks:
            chosen = indices if indices is not None else range(self.n_stacks - 1)
            if stack.creation_index in chosen:
                freeze(stack)

    def mark_trained(self, index: int) -> None:
        """Record that a stack's stage is over."""
        self._trained.add(index)

    def build_rack(self) -> Rack:
        """Return the rack; it is shared with the builder, not a copy."""
        return self._rack

    def get_rack_info(self) -> dict[str, Any]:
        """Return counts: stacks, blocks, parameters in all and trainable, and one entry per stack."""
        stacks = [
            {
                "creation_index": stack.creation_index,
                "n_blocks": len(stack.blocks),
                "precision": "full",
                "trained": stack.creation_index in self._trained,
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
    """Return the number of parameters, and of those that train; a shared one counts once."""
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
