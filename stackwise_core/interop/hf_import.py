"""The tensors of a Hugging Face checkpoint as those of a rack's files: tensor by tensor, one stack at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stackwise_core.config.schema import Precision
from stackwise_core.errors import CheckpointError
from stackwise_core.interop.checkpoint import Checkpoint
from stackwise_core.interop.families import EMBEDDING as TOKENS
from stackwise_core.interop.families import HEAD as LOGITS
from stackwise_core.interop.families import NORM, block_tensors, layer
from stackwise_core.model.blocks import Stack
from stackwise_core.model.precision import STORAGE, quantise
from stackwise_core.model.rack import Rack
from stackwise_core.model.saving import EMBEDDING, HEAD, STACK, folder_of

PRECISION: dict[str, Precision] = {"float32": "full", "float16": "half", "bfloat16": "bfloat16"}
"""In which precision a checkpoint is kept, by the type of its matrices: that has its bits."""


def rack_tensors(
    checkpoint: Checkpoint, blocks: list[range], precision: Precision
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the files of a rack, path and tensors, one at a time: its stacks, its embedding and its head.

    Tensors that need no conversion are views of the file, which the system reads when they are written.

    Args:
        checkpoint: whose tensors are known to fit.
        blocks: the layers of each stack.
        precision: in which matrices of stacks are stored; norms and biases are float32, embedding and head as they are.
    """
    reader, described = _Reader(checkpoint), checkpoint.described
    names = block_tensors(described.shape)
    for stack, layers in enumerate(blocks):
        tensors: dict[str, Tensor] = {}
        for block, number in enumerate(layers):
            for ours, theirs in names.items():
                tensors |= _stored(f"blocks.{block}.{ours}", reader.read(f"{layer(number)}{theirs}"), precision)
            if described.shape.no_rope_interval:
                tensors[f"blocks.{block}.attention.has_rope"] = torch.tensor(described.has_rope[number])
        yield f"{folder_of(stack)}/{STACK}", tensors
    tokens = reader.read(TOKENS)
    yield EMBEDDING, {"weight": tokens}
    head = tokens if checkpoint.is_tied else reader.read(LOGITS)
    if described.shape.tie_embeddings and not torch.equal(head, tokens):
        problem = f"has {LOGITS} beside another {TOKENS}, though tie_word_embeddings says that they are one"
        raise CheckpointError(checkpoint.folder, problem, "Set tie_word_embeddings to false in config.json")
    yield HEAD, {"norm.weight": reader.read(NORM), "projection.weight": head}


def checkpoint_rack(checkpoint: Checkpoint) -> Rack:
    """Return a checkpoint as a rack of one float32 stack on the CPU, nothing of it training."""
    described = checkpoint.described
    with torch.device("meta"):
        rack = Rack(described.shape)
        rack.stacks.append(Stack(described.shape, described.n_layers))
    rack.untie()
    modules = {f"{folder_of(0)}/{STACK}": rack.stacks[0], EMBEDDING: rack.embedding, HEAD: rack.head}
    for path, tensors in rack_tensors(checkpoint, [range(described.n_layers)], "full"):
        module = modules[path]
        wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        module.load_state_dict(wide, assign=True)
    if described.shape.tie_embeddings:  # one matrix: it was checked
        rack.tie()
    return rack.requires_grad_(False).eval()


def _stored(name: str, tensor: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Return the tensors that a stack of a precision has for one of a checkpoint."""
    if tensor.dim() == 1 or STORAGE[precision] == "float32":
        return {name: tensor.float()}
    module = name.removesuffix("weight")
    if str(tensor.dtype) == f"torch.{STORAGE[precision]}":
        return {name: tensor}
    return {f"{module}{part}": stored for part, stored in quantise(tensor.float(), STORAGE[precision]).items()}


class _Reader:
    """The files of a checkpoint; that of the last tensor stays open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._name = ""
        self._file: Any = None

    def read(self, name: str) -> Tensor:
        file = self._checkpoint.tensors[name].file
        try:
            if file != self._name:
                self._name, self._file = file, safe_open(self._checkpoint.path(file), "pt")
            return self._file.get_tensor(name)
        except Exception as error:  # safetensors raises SafetensorError, and others for bad shapes
            path = self._checkpoint.folder / file
            raise CheckpointError(path, f"cannot be read ({error})", "Download the folder again") from None
