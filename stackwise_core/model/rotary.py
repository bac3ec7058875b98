"""Rotary positions (RoPE, Su et al. 2021): the table of cosines and sines that all blocks of a rack share.

A model whose context was extended after its first training has other frequencies, see `RopeScaling`. All arithmetic is
float32 and in the order of transformers, so that an imported model has its bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stackwise_core.config.schema import RopeScaling
from stackwise_core.stages.resolve import ModelShape

_tables: dict[tuple[int, int, float, RopeScaling | None, torch.device], Tensor] = {}


def rotary_table(shape: ModelShape, seq_len: int, device: torch.device) -> Tensor:
    """Return cosines and sines of the rotary angles: [2, T, C], float32, shared by every block."""
    key = (seq_len, shape.head_dim, shape.rope_theta, shape.rope_scaling, device)
    if key not in _tables:
        with torch.inference_mode(False):  # a table made under inference mode could not be used in training
            _tables[key] = _make_table(shape, seq_len).to(device)
    return _tables[key]


def rotate(x_BHTC: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel c with channel c + C/2 by the angle of its position (the half-split layout of Llama)."""
    return x_BHTC * rotary[0] + x_BHTC.roll(x_BHTC.shape[-1] // 2, dims=-1) * rotary[1]


def _make_table(shape: ModelShape, seq_len: int) -> Tensor:
    frequencies, scale = _frequencies(shape)
    angles = torch.outer(torch.arange(seq_len).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    # Sines of the first half are negated here, so that a rotation is one roll and two products.
    sign = torch.ones(shape.head_dim)
    sign[: shape.head_dim // 2] = -1.0
    return torch.stack([angles.cos() * scale, angles.sin() * scale * sign])


def _frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Return the angle that each pair of channels turns from one position to the next [C/2], and a factor on both."""
    width, scaling = shape.head_dim, shape.rope_scaling
    periods = shape.rope_theta ** (torch.arange(0, width, 2).float() / width)
    if scaling is None:
        return 1.0 / periods, 1.0
    if scaling.kind == "linear":
        return 1.0 / periods / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _by_band(1.0 / periods, scaling), 1.0
    # Cosines and sines grow, so that the scores grow by the square (section 3.4).
    return _yarn(periods, shape.rope_theta, scaling), scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _by_band(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the low frequencies by the factor, keep the high ones, and go over smoothly between them (Llama 3.1)."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    divided = torch.where(wavelength > context / low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength >= context / high) & (wavelength <= context / low), between, divided)


def _yarn(periods: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Divide the frequencies that turn less than `beta_slow` times in the context (Peng et al. 2023, section 3.2)."""
    width, context = 2 * len(periods), scaling.original_max_position_embeddings

    def channel(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0.0
    kept = 1 - ((torch.arange(width // 2).float() - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
