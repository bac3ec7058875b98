"""Exported folders, opened by transformers, and greedy decoding as the rack itself does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise_core.model.rack import Rack


def opened(folder: Path, **how: Any) -> Any:
    """Return the model that transformers makes of a folder; nothing of it may be made up or left over."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    causal = "gguf_file" in how or AutoConfig.from_pretrained(folder).architectures[0].endswith("CausalLM")
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model, told = kind.from_pretrained(folder, output_loading_info=True, **how)
    assert {name: found for name, found in told.items() if found} == {}
    return model.eval()


@torch.no_grad()
def greedy(rack: Rack, prompt_BT: Tensor, n_tokens: int) -> Tensor:
    """Return a prompt with the likeliest tokens behind it, everything computed anew for each: [B, T + n_tokens]."""
    for _ in range(n_tokens):
        prompt_BT = torch.cat([prompt_BT, rack(prompt_BT)[:, -1:].argmax(-1)], dim=1)
    return prompt_BT
