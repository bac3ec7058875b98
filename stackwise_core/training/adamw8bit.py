"""AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861): a byte for each value, a scale for every 256.

The update is bitsandbytes' own, on a CPU and on CUDA; the state is plain tensors under names of our own, so that it is
saved, kept and restored like that of any other optimizer. Importing this module does not import bitsandbytes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackwise_core.model.precision import silent_import

BLOCK = 256
_MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
STATE = {"step", *_MOMENTS, *SCALES}
"""What is kept for a parameter: moments have its shape, a scale stands for every 256 values in a row."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are rounded to 8 bits after every step."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        """Take what torch's AdamW takes: groups, lr, betas; weights are float32."""
        super().__init__(groups, {"eps": 1e-8, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        with silent_import():
            from bitsandbytes.functional import optimizer_update_8bit_blockwise

        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(_zeros(parameter))
        state["step"] = state["step"].cpu().add_(1)  # the update takes a number
        signed, unsigned = _codes(parameter.device)
        optimizer_update_8bit_blockwise(
            "adam",
            parameter.grad.contiguous(),
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            *group["betas"],
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=int(state["step"]),
            lr=group["lr"],
            qmap1=signed,
            qmap2=unsigned,
            absmax1=state["exp_avg_scale"],
            absmax2=state["exp_avg_sq_scale"],
            weight_decay=group["weight_decay"],
        )


def in_8_bits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter with its moments rounded to 8 bits."""
    with silent_import():
        from bitsandbytes.functional import quantize_blockwise

    found = {"step": state["step"]}
    for moment, scale, code in zip(_MOMENTS, SCALES, _codes(state["exp_avg"].device), strict=True):
        found[moment], how = quantize_blockwise(state[moment].contiguous(), code=code, blocksize=BLOCK)
        found[scale] = how.absmax
    return found


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a parameter as AdamW has it; that of another optimizer unchanged."""
    if set(state) != STATE:
        return dict(state)
    with silent_import():
        from bitsandbytes.functional import dequantize_blockwise

    found = {"step": state["step"]}
    for moment, scale, code in zip(_MOMENTS, SCALES, _codes(state["exp_avg"].device), strict=True):
        found[moment] = dequantize_blockwise(state[moment], absmax=state[scale], code=code, blocksize=BLOCK)
    return found


def _zeros(parameter: nn.Parameter) -> dict[str, Tensor]:
    scales = torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)
    moments = {moment: torch.zeros_like(parameter, dtype=torch.uint8) for moment in _MOMENTS}
    return {"step": torch.zeros(()), **moments, **{scale: scales.clone() for scale in SCALES}}


@functools.cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the 256 codes of the first moment stand for, and those of the second, which has no sign."""
    with silent_import():
        from bitsandbytes.functional import create_dynamic_map
    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
