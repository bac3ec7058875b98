"""How a new stack is initialised: at random or as a copy of its neighbour, with its adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from stackwise_core.config.stacks import AdapterSpec
from stackwise_core.data.masks import hash_bits
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import ADAPTERS, adapter_names, add_adapter, merged_dense
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import AdapterName, GrowthOperator, InitSpec, StackSpec

_SALT_INIT = 5
PLAIN = InitSpec()


def new_rack(shape: ModelShape, seed: int) -> Rack:
    """Return a rack without stacks, embedding and head initialised."""
    rack = Rack(shape)
    initialise(rack, _init_seed(seed, -1))
    return rack


def new_stack(
    shape: ModelShape,
    spec: StackSpec,
    operator: GrowthOperator,
    seed: int,
    sources: Sequence[Stack] = (),
    init: InitSpec = PLAIN,
) -> Stack:
    """Return a stack as it is before training, with its adapters.

    A stack of precision qlora that has a source is NF4 from the start; others are converted at the end of their stage.
    """
    stack = grow_stack(shape, spec.n_blocks, spec.index, operator, seed, sources, init)
    stack.precision = spec.precision
    if spec.precision == "qlora" and sources:
        convert_storage(stack, "qlora")
    give_adapters(stack, spec, seed)
    return stack


def give_adapters(stack: Stack, spec: StackSpec, seed: int) -> None:
    """Add the adapters that a stack lacks; its output does not change."""
    for name, adapter in spec.adapters.items():
        if name not in adapter_names(stack):
            give_adapter(stack, name, adapter, seed)


def give_adapter(stack: Stack, name: AdapterName, adapter: AdapterSpec, seed: int) -> None:
    """Add an adapter whose output is still zero; its first factor is seeded by run, stack and name."""
    drawn = _init_seed(seed, stack.creation_index, ADAPTERS.index(name))
    add_adapter(stack, name, adapter.rank, adapter.alpha, drawn)


def grow_stack(
    shape: ModelShape,
    n_blocks: int,
    index: int,
    operator: GrowthOperator,
    seed: int,
    sources: Sequence[Stack] = (),
    init: InitSpec = PLAIN,
) -> Stack:
    """Return the fp32 stack that a growth operator gives, without adapters.

    `copy` takes the source's blocks, the first n or repeated cyclically, dequantised and with adapters merged; of
    several sources their mean. `zero` and `copy_zero` leave the function of the rack exactly as it was: they zero what
    each half of a block ends with, its output projection or, where there is one, the norm of its output.
    """
    stack = Stack(shape, n_blocks, index)
    if operator in ("random", "zero") or init.noise:
        initialise(stack, _init_seed(seed, index))
    if operator in ("copy", "copy_zero"):
        if not sources:
            raise ConfigError([Fault("training.new_stack_init", repr(operator), "there is no stack to copy yet")])
        drawn = stack.blocks
        stack.blocks = _mean([_copied_blocks(source, n_blocks, interleaved=init.interleaved) for source in sources])
        if init.noise:
            _mix(stack.blocks, drawn, init.noise)
    scale = 0.0 if operator in ("zero", "copy_zero") else init.output_scale
    # Not the projection before a norm, which would blow up whatever the first step makes of zeros.
    for parameter in stack.last_weights() if scale != 1.0 else ():
        parameter.data.mul_(scale) if scale else nn.init.zeros_(parameter)
    return stack


def _copied_blocks(source: Stack, n_blocks: int, *, interleaved: bool) -> nn.ModuleList:
    blocks = merged_dense(source).blocks
    chosen = (copied_block(n, n_blocks, len(blocks), interleaved=interleaved) for n in range(n_blocks))
    return nn.ModuleList(copy.deepcopy(blocks[n]) for n in chosen)


def copied_block(block: int, n_blocks: int, of: int, *, interleaved: bool) -> int:
    """Return which of a source's blocks, `of` in number, a block of a copy of `n_blocks` is a copy of."""
    return block * of // n_blocks if interleaved else block % of


def _mean(copies: Sequence[nn.ModuleList]) -> nn.ModuleList:
    """Return the mean of the parameters of one or two copies, in the first."""
    for other in copies[1:]:
        _mix(copies[0], other, 0.5)
    return copies[0]


@torch.no_grad()
def _mix(blocks: nn.ModuleList, others: nn.ModuleList, share: float) -> None:
    for parameter, other in zip(blocks.parameters(), others.parameters(), strict=True):
        parameter.lerp_(other, share)


def freeze(module: nn.Module) -> None:
    """Take a module out of training: no gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def _init_seed(seed: int, *part: int) -> int:
    """Return the generator seed of a part of a rack: -1 is embedding and head, c is stack c, (c, a) its adapter a."""
    return int(hash_bits(seed, _SALT_INIT, *part)[0] >> np.uint64(1))
