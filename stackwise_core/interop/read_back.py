"""What was exported, read back and compared with its rack before it counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.errors import ConfigError, Fault, StackWiseError
from stackwise_core.interop.families import EMBEDDING, HEAD, NORM
from stackwise_core.interop.parts import Dtype, Parts, folded, unscaled
from stackwise_core.model.adapters import adapter_names
from stackwise_core.model.blocks import Stack
from stackwise_core.model.rack import Rack

Read = Callable[[str], Tensor]
_MOST_OF_MERGING = 1e-4
"""The most that merging adapters or a residual scale may change a logit, as a share of the largest logit."""


class ExportError(StackWiseError):
    """What was written is not the rack; nothing was exported."""


class Comparison(NamedTuple):
    """What was written, read back, beside the rack that it was written from, on a few fixed tokens."""

    tokens: int
    equal: bool
    """Whether all logits are equal, bit for bit."""
    difference: float
    """The largest difference of a logit, as a share of the largest logit."""
    same_choices: float
    """The share of positions at which the token of the largest logit is the same."""


@torch.no_grad()
def read_back(read: Read, rack: Rack, time_step: int | None, dtype: Dtype, seq_len: int) -> Comparison:
    """Compare what was written with a rack: every tensor, and logits computed from the files alone, on the CPU.

    One stack is in memory at a time, beside the rack.

    Args:
        read: returns a tensor of the written files, in the type in which it is there, by its name in transformers.
        rack: what was written.
        time_step: the step that was fixed, where time is an input.
        dtype: the type that was written.
        seq_len: the longest text [tokens].

    Raises:
        ExportError: what is written is not the rack.
        ConfigError: the rack, or its weights in this type, are of no use.
    """
    parts, checked = Parts(rack, time_step), partial(_checked, read)
    tokens_BT = _some_tokens(rack.shape.vocab_size, min(seq_len, 8))
    steps = None if time_step is None else torch.full((1,), time_step)
    of_rack = on_cpu(rack.embedding)(tokens_BT, steps)
    of_files = F.embedding(tokens_BT, checked(EMBEDDING, parts.embedding()))
    for stack, names in parts.numbered():
        mine = on_cpu(stack)
        of_rack, state = mine(of_rack), folded(mine).state_dict()
        with torch.device("meta"):
            again = Stack(unscaled(stack.shape), len(stack.blocks))
        read_state = {ours: checked(theirs, state[ours]) for ours, theirs in names.items()}
        again.load_state_dict({**state, **read_state}, assign=True)  # which blocks have RoPE is in config.json
        of_files = again(of_files)
    mine, norm = on_cpu(rack.head), on_cpu(rack.head).norm
    of_rack = mine(of_rack)
    of_files = F.rms_norm(of_files, norm.normalized_shape, checked(NORM, norm.weight), norm.eps)
    of_files = F.linear(of_files, checked(EMBEDDING if parts.tied else HEAD, mine.projection.weight))
    merged = rack.shape.residual_scale != 1.0 or any(adapter_names(stack) for stack in parts.stacks)
    return _compared(of_rack, of_files, dtype, merged=merged)


def _compared(of_rack: Tensor, of_files: Tensor, dtype: Dtype, *, merged: bool) -> Comparison:
    if not of_rack.isfinite().all():
        raise ConfigError([Fault("rack", "logits that are not finite", "train it again")])
    if not of_files.isfinite().all():
        raise ConfigError([Fault("dtype", dtype, "some weights are too large for it; use bfloat16 or float32")])
    difference = float((of_files - of_rack).abs().max() / of_rack.abs().max().clamp_min(1e-30))
    equal, most = of_files.equal(of_rack), _MOST_OF_MERGING if merged else 0.0
    if dtype == "float32" and not equal and difference >= most:
        raise ExportError(f"the logits differ from those of the rack by {difference:.1e} of the largest; report this")
    same = float((of_files.argmax(-1) == of_rack.argmax(-1)).float().mean())
    return Comparison(of_files[..., 0].numel(), equal, difference, same)


def _some_tokens(vocab_size: int, length: int) -> Tensor:
    """Return a sequence that goes through the vocabulary in strides: [1, length]."""
    return (torch.arange(length) * 7919 + 13).remainder(vocab_size).view(1, length)


Part = TypeVar("Part", bound=nn.Module)


def on_cpu(module: Part) -> Part:
    """Return a module, or a copy of it, on the CPU."""
    there = all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers()))
    return module if there else copy.deepcopy(module).cpu()


def _checked(read: Read, name: str, written: Tensor) -> Tensor:
    """Return a tensor of a file as float32, which is what was written."""
    found = read(name)
    if not _bits(found).equal(_bits(written.detach().cpu().to(found.dtype))):
        raise ExportError(f"{name} was read back with other bits; check the disk, and run the same command again")
    return found.float()


def _bits(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().flatten().view(torch.uint8)
    return data if data.numel() % 8 else data.view(torch.int64)  # eight bytes are compared as fast as one
