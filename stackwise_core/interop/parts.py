"""The tensors of a rack as one dense model, under the names of transformers. Letters: V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from stackwise_core.interop.families import EMBEDDING, HEAD, NORM, block_tensors, layer
from stackwise_core.interop.tensor_files import Entry
from stackwise_core.model.adapters import merged_dense
from stackwise_core.model.blocks import Head, Stack
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parts:
    """The tensors of a rack under the names of transformers."""

    def __init__(self, rack: Rack, time_step: int | None) -> None:
        """Take a rack, and the step to fix where its time is an input."""
        self._rack, self._time_step = rack, time_step
        self.tied = rack.tied and time_step is None
        """Whether one matrix serves as embedding and as head; a step's vector is added to the embedding alone."""
        self.stacks = [stack for stack in rack.stacks if isinstance(stack, Stack)]
        self.n_blocks = sum(len(stack.blocks) for stack in self.stacks)

    @property
    def entries(self) -> list[Entry]:
        """Names and shapes, in the order of `tensors`."""
        table = tuple(self._rack.embedding.weight.shape)
        found = [Entry(EMBEDDING, table)]
        for first, stack in self.numbered():
            name = names_of(stack.shape, first)
            found += [Entry(name(key), tuple(tensor.shape)) for key, tensor in empty(stack).state_dict().items()]
        found.append(Entry(NORM, table[1:]))
        return found if self.tied else [*found, Entry(HEAD, table)]

    def numbered(self) -> Iterator[tuple[int, Stack]]:
        """Yield each stack in data-flow order, with the number of its first layer."""
        first = 0
        for stack in self.stacks:
            yield first, stack
            first += len(stack.blocks)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and float32 tensors; one stack is dense at a time."""
        yield EMBEDDING, self.embedding()
        for first, stack in self.numbered():
            dense, name = merged_dense(stack).state_dict(), names_of(stack.shape, first)
            yield from ((name(key), dense[key]) for key in empty(stack).state_dict())
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


def names_of(shape: ModelShape, first: int) -> Callable[[str], str]:
    """Return a function from the name of a stack's tensor to that in transformers, given its first layer's number."""
    tensors = block_tensors(shape)

    def name_of(key: str) -> str:
        _, block, name = key.split(".", 2)
        return layer(first + int(block)) + tensors[name]

    return name_of


def empty(stack: Stack) -> Stack:
    """Return a stack of the same dense tensors, without memory for them."""
    with torch.device("meta"):
        return Stack(stack.shape, len(stack.blocks), stack.creation_index)


def empty_head(shape: ModelShape) -> Head:
    """Return a head without memory for its tensors."""
    with torch.device("meta"):
        return Head(shape)
