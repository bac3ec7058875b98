"""The frozen trunk's stream: one stream, whether it is live, advanced from a store, or refilled from tokens.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from stackwise_core.masking import IntArray
from stackwise_core.model import Stack

STREAM_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class RowSource(Protocol):
    """Anything that has the boundary of a sequence under a view: a store, for one."""

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        """Return the boundary activations of some sequences: [B, T, D]."""
        ...


@torch.no_grad()
def advance(stacks: Sequence[Stack], stream_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Move the frozen trunk's stream through some stacks, rounding it to `dtype` after each.

    On a CPU every sequence goes through on its own: the bits of a matrix product can depend on how
    many rows it has, and a row must have the same bytes in a training batch, in a cache being filled
    and in a check of sampled rows. See docs/decisions/0001-one-sequence-at-a-time.md.

    Args:
        stacks: in data-flow order, in eval mode.
        stream_BTD: the stream before them, any float type.
        dtype: `cache.dtype`.

    Returns:
        [B, T, D] in `dtype`.
    """
    out_BTD = torch.empty(stream_BTD.shape, dtype=dtype, device=stream_BTD.device)
    group = 1 if stream_BTD.device.type == "cpu" else max(1, len(stream_BTD))
    for first in range(0, len(stream_BTD), group):
        x_BTD = stream_BTD[first : first + group]
        for stack in stacks:
            x_BTD = stack(x_BTD.float()).to(dtype)
        out_BTD[first : first + group] = x_BTD
    return out_BTD


class LiveTrunk:
    """A frozen trunk that computes its boundary from tokens, the same bytes a store would hold."""

    def __init__(self, embedding: nn.Embedding, stacks: Sequence[Stack], dtype: torch.dtype) -> None:
        """Take the trunk's parts, in data-flow order; nothing is copied."""
        self.embedding = embedding
        self.stacks = [stack.eval() for stack in stacks]
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, input_ids_BT: Tensor) -> Tensor:
        """Return the boundary of (corrupted) inputs: [B, T, D] in the stream's dtype."""
        device = self.embedding.weight.device
        return advance(self.stacks, self.embedding(input_ids_BT.to(device)), self.dtype)
