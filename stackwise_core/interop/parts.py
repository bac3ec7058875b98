"""The tensors of a rack as one dense model, under the names of transformers. Letters: V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from stackwise_core.interop.families import EMBEDDING, HEAD, NORM, block_tensors, layer
from stackwise_core.interop.tensor_files import Entry
from stackwise_core.model.adapters import adapter_names, merged_dense
from stackwise_core.model.blocks import Block, Stack
from stackwise_core.model.precision import base_linears, storage_of
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape

Dtype = Literal["float32", "bfloat16", "float16"]
"""The type of the tensors that an export writes."""
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parts:
    """The tensors of a rack under the names of transformers."""

    def __init__(self, rack: Rack, time_step: int | None) -> None:
        """Take a rack, and the step to fix where its time is an input."""
        self._rack, self._time_step = rack, time_step
        ends = rack.embedding.weight, rack.head.projection.weight
        self.tied = time_step is None and (rack.tied or (rack.shape.tie_embeddings and torch.equal(*ends)))
        """Whether one matrix serves as embedding and as head: a step's vector is added to the embedding alone."""
        self.stacks = [stack for stack in rack.stacks if isinstance(stack, Stack)]
        self.n_blocks = sum(len(stack.blocks) for stack in self.stacks)
        blocks = (block for stack in self.stacks for block in stack.blocks if isinstance(block, Block))
        self.has_rope = [block.attention.has_rope is None or bool(block.attention.has_rope) for block in blocks]
        """Of each layer, in data-flow order."""
        with torch.device("meta"):
            block = Block(rack.shape).state_dict()
        self._block = [(ours, theirs, tuple(block[ours].shape)) for ours, theirs in block_tensors(rack.shape).items()]

    @property
    def entries(self) -> list[Entry]:
        """Names and shapes, in the order of `tensors`."""
        table = tuple(self._rack.embedding.weight.shape)
        layers = [Entry(layer(n) + theirs, size) for n in range(self.n_blocks) for _, theirs, size in self._block]
        found = [Entry(EMBEDDING, table), *layers, Entry(NORM, table[1:])]
        return found if self.tied else [*found, Entry(HEAD, table)]

    def numbered(self) -> Iterator[tuple[Stack, dict[str, str]]]:
        """Yield each stack in data-flow order, with the names of its dense tensors here and in transformers."""
        first = 0
        for stack in self.stacks:
            blocks = range(len(stack.blocks))
            yield (
                stack,
                {f"blocks.{n}.{ours}": layer(first + n) + theirs for n in blocks for ours, theirs, _ in self._block},
            )
            first += len(blocks)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and float32 tensors; one stack is dense at a time."""
        yield EMBEDDING, self.embedding()
        for stack, names in self.numbered():
            state = folded(stack).state_dict()
            yield from ((theirs, state[ours]) for ours, theirs in names.items())
        yield NORM, self._rack.head.norm.weight.detach()
        if not self.tied:
            yield HEAD, self._rack.head.projection.weight.detach()

    @torch.no_grad()
    def embedding(self) -> Tensor:
        """Return the table of tokens [V, D], the vector of the fixed step added to each."""
        embedding = self._rack.embedding
        if embedding.time is None:
            return embedding.weight.detach()
        step = torch.tensor([self._time_step], device=embedding.weight.device)
        return embedding.weight.detach() + embedding.time(step)


def dense_rack(rack: Rack) -> Rack:
    """Return a rack whose stacks are replaced by dense ones of float32 where they are not, for use alone."""
    for number, stack in enumerate(rack.stacks):
        if isinstance(stack, Stack):
            rack.stacks[number] = dense(stack)
    return rack.requires_grad_(False).eval()


def dense(stack: Stack) -> Stack:
    """Return a float32 stack of the same function, itself if it is one without adapters."""
    plain = {storage_of(linear) for linear in base_linears(stack).values()} == {"float32"}
    return stack if plain and not adapter_names(stack) else merged_dense(stack)


@torch.no_grad()
def folded(stack: Stack) -> Stack:
    """Return a dense stack of the same function, up to rounding, that adds its residual branches as they are.

    What they are multiplied by is in the weights: other programs know no such factor.
    """
    found, scale = dense(stack), stack.shape.residual_scale
    if scale == 1.0:
        return found
    with torch.device("meta"):
        plain = Stack(unscaled(stack.shape), len(stack.blocks), stack.creation_index)
    plain.load_state_dict(found.state_dict(), assign=True)
    for weight in plain.last_weights():
        weight.data = weight * scale
    return plain


def unscaled(shape: ModelShape) -> ModelShape:
    """Return a shape whose residual branches are added as they are."""
    return shape.model_copy(update={"residual_blocks": 0})
