"""Racks that were not trained but are past it: every precision, adapters that do something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stackwise_core.config.schema import Precision
from stackwise_core.model.adapters import add_adapter
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.growth_operators import freeze, new_rack
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape

SHAPE = ModelShape(vocab_size=40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, causal=True)
TOKENS = torch.arange(24).view(2, 12)


def lively_rack(vocab_size: int, n_blocks: int = 1, seed: int = 1, **changes: Any) -> Rack:
    """Return a rack of one random stack whose matrices are large, so that what it predicts is far from uniform."""
    shape = ModelShape(vocab_size=vocab_size, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, **changes)
    rack = Rack(shape)
    rack.stacks.append(Stack(shape, n_blocks))
    initialise(rack, seed)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return rack.eval()


def mixed_rack(precisions: Sequence[Precision], tied: bool = True) -> Rack:
    """Return a rack of one stack per precision, prepended in turn; all but the first have two adapters and train."""
    rack = new_rack(SHAPE, seed=1)
    if not tied:
        rack.untie()
        nn.init.normal_(rack.head.projection.weight)
    for index, precision in enumerate(precisions):
        stack = Stack(SHAPE, 1 + index % 2, index, precision)
        initialise(stack, index)
        convert_storage(stack, precision)
        freeze(stack)
        if index:
            add_adapter(stack, "stack", 2, 3.0, seed=index)
            add_adapter(stack, "progressive", 4, 1.0, seed=index)
            generator = torch.Generator().manual_seed(index)
            for name, parameter in stack.named_parameters():
                if ".lora_B." in name:
                    nn.init.normal_(parameter, std=0.1, generator=generator)
        rack.stacks.insert(0, stack)
    return rack
