"""Hashes of tensors: what is still as it was has the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stackwise_core.model.adapters import adapter_names, adapter_state, base_state
from stackwise_core.model.blocks import Stack


def tensor_digest(module: nn.Module) -> str:
    """Return the hash of a module's tensors: names, types, shapes and bytes, in the order of the names."""
    return digest_of(module.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = torch.atleast_1d(tensor.detach().cpu().contiguous())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def part_digests(stack: Stack) -> dict[str, str]:
    """Return the hashes of a stack's base and of each of its adapters: an adapter more changes no other hash."""
    adapters = {name: digest_of(adapter_state(stack, name)) for name in adapter_names(stack)}
    return {"base": digest_of(base_state(stack)), **adapters}
