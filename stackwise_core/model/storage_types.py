"""From a dense matrix to the tensors that store it, and back: fp16, bf16, NVFP4, NF4."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.errors import ConfigError, Fault

_LOW_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


_NVFP4_BLOCK = 16


_NVFP4_LARGEST = 448.0 * 6.0
"""The largest E4M3 block scale times the largest E2M1 value."""


_NF4_BLOCK = 64


_NF4_NESTED_BLOCK = 256


def bytes_per_parameter(storage: str) -> float:
    """Return the bytes of one weight in a large matrix.

    NVFP4: 4 bits, and an 8-bit scale for 16 weights. NF4 with double quantisation (Dettmers et al. 2023): 4 bits,
    an 8-bit absmax for 64 weights, and an fp32 scale for 256 of those.
    """
    return {
        "float32": 4.0,
        "float16": 2.0,
        "bfloat16": 2.0,
        "nvfp4": 0.5 + 1 / _NVFP4_BLOCK,
        "nf4": 0.5 + 1 / _NF4_BLOCK + 4 / (_NF4_BLOCK * _NF4_NESTED_BLOCK),
    }[storage]


@contextlib.contextmanager
def silent_import() -> Generator[None]:
    """Keep off the screen what libraries log when imported: kernels of other devices, deprecations of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def quantise(weight: Tensor, storage: str) -> dict[str, Tensor]:
    """Return the tensors that store a float32 matrix [out, in].

    fp16, bf16: `weight`. NVFP4: `weight` (two E2M1 values a byte), `scale` (E4M3 bits, one per 16), `per_tensor_scale`.
    NF4: `weight` (two codes a byte), `absmax` (8-bit codes, one per 64), `absmax_scale`, `absmax_offset`.

    Raises:
        ConfigError: NVFP4 of a matrix whose dimensions do not divide by 16.
    """
    if storage == "nvfp4":
        return _quantise_nvfp4(weight)
    if storage == "nf4":
        return _quantise_nf4(weight)
    return {"weight": weight.to(_LOW_DTYPES[storage])}


def dequantise(stored: dict[str, Tensor], storage: str, shape: tuple[int, int]) -> Tensor:
    """Return the float32 matrix [out, in] that is stored."""
    if storage == "nvfp4":
        return _dequantise_nvfp4(stored)
    if storage == "nf4":
        return _dequantise_nf4(stored, shape)
    return stored["weight"].float()


def _quantise_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    with silent_import():
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    if any(size % _NVFP4_BLOCK for size in weight.shape):
        received = " x ".join(str(size) for size in weight.shape)
        allowed = f"nvfp4 needs both dimensions of every matrix to divide by {_NVFP4_BLOCK}"
        raise ConfigError([Fault("precision", f"a matrix of {received}", allowed)])
    # A matrix of zeros (a fresh copy_zero) would divide by zero; no trained weight is as small as the clamp.
    per_tensor_scale = weight.abs().amax().clamp(min=1e-12) / _NVFP4_LARGEST
    scale, packed = nvfp4_quantize(weight.contiguous(), _NVFP4_BLOCK, per_tensor_scale)
    # The scales' bits, since collectives between processes do not know float8.
    return {"weight": packed, "scale": scale.view(torch.uint8), "per_tensor_scale": per_tensor_scale}


def _dequantise_nvfp4(stored: dict[str, Tensor]) -> Tensor:
    # torchao's own takes 10 times as long on a CPU: it decodes by arithmetic, this by a table [measured, 0.18.0].
    packed = stored["weight"]
    values = F.embedding(packed.int(), _e2m1_pairs(packed.device)).view(packed.shape[0], -1, _NVFP4_BLOCK)
    scale = stored["per_tensor_scale"] * stored["scale"].view(torch.float8_e4m3fn).float()
    return (values * scale[..., None]).flatten(1)


def _quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    with silent_import():
        from bitsandbytes.functional import quantize_4bit

    # One block a row: bitsandbytes cuts blocks from the flat matrix but on a CPU reads them back row by row, so
    # that a width which 64 does not divide came back with errors of 12 to 40 % instead of 9 [measured, 0.50.2].
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    state: Any
    packed, state = quantize_4bit(blocks, blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=True)
    absmax_scale, offset = state.state2.absmax, state.offset
    return {"weight": packed, "absmax": state.absmax, "absmax_scale": absmax_scale, "absmax_offset": offset}


def _dequantise_nf4(stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    with silent_import():
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    nested = dequantize_blockwise(stored["absmax"], absmax=stored["absmax_scale"], blocksize=_NF4_NESTED_BLOCK)
    absmax = nested + stored["absmax_offset"]
    blocks = torch.Size((absmax.numel(), _NF4_BLOCK))
    state = QuantState(absmax, shape=blocks, dtype=torch.float32, blocksize=_NF4_BLOCK, quant_type="nf4")
    return dequantize_4bit(stored["weight"], state).flatten()[: shape[0] * shape[1]].view(shape)


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """Return the two E2M1 values in each of the 256 bytes, the low half first: [256, 2]."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256)
    return torch.stack([values[byte % 16], values[byte // 16]], dim=1).to(device)
