"""Tensors as bytes: views, checksums, and where in memory they should lie."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Final

import google_crc32c
import numpy as np
import torch

PAGE_BYTES: Final = 4096

crc32c: Final[Callable[[np.ndarray], int]] = google_crc32c.value  # pyright: ignore
"""Checksum of contiguous uint8 `[size]`; an array, for google_crc32c refuses a writable memoryview."""


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """View a contiguous CPU tensor `[n, ...]` as uint8 `[n, bytes]` without a copy."""
    return tensor.view(torch.uint8).numpy().reshape(len(tensor), tensor[:1].nbytes)


def empty_aligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make an uninitialised CPU tensor that begins on a page.

    Large allocations begin 16 bytes or more into one, and reads into them were several times slower.
    """
    n_bytes = prod(shape) * dtype.itemsize
    raw = torch.empty(n_bytes + PAGE_BYTES, dtype=torch.uint8)
    first = -raw.data_ptr() % PAGE_BYTES
    return raw[first : first + n_bytes].view(dtype).view(shape)


def destination(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Give `out` if it can be filled with such values, or a new page-aligned tensor if there is none.

    Raises:
        ValueError: `out` has another shape or dtype, is not contiguous, or is not on the CPU.
    """
    if out is None:
        return empty_aligned(shape, dtype)
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out must be {shape} {dtype}, contiguous, on the cpu; "
            f"got {tuple(out.shape)} {out.dtype} {out.stride()} on {out.device}"
        )
    return out
