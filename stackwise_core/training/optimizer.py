"""The optimizer of a stage, its learning rate, and the loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.precision import compute_dtype
from stackwise_core.stages.memory import SMALLEST_IN_8_BITS
from stackwise_core.stages.stages import OptimSpec
from stackwise_core.training.adamw8bit import AdamW8bit
from stackwise_core.training.stage_model import StageModel


class WithAdamW(torch.optim.Optimizer):
    """Another optimizer for some parameters and AdamW for the others, in one object."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """Take the two; their groups and their state are shared with this."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step of each."""
        for part in self._parts:
            part.step()


def make_optimizer(model: StageModel, spec: OptimSpec) -> torch.optim.Optimizer:
    """Return AdamW over what trains: no weight decay on norms and embeddings, adapters at their own learning rate.

    With a rate for it, Muon (Jordan et al. 2024) trains the matrices of stacks. Its steps have the size that AdamW's
    usually have, so that rate and weight decay of AdamW serve (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    With `eight_bit`, large matrices keep their moments in 8 bits.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    adapters = {id(p) for stack in model.live_stacks() for p in adapter_parameters(stack)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        received, allowed = repr(model.anatomy.trains), "nothing would train; choose another trunk_strategy"
        raise ConfigError([Fault("training.progressive.trunk_strategy", received, allowed)])
    decayed = [p for p in trainable if p.dim() > 1 and id(p) not in embeddings | adapters]
    others = [p for p in trainable if p.dim() <= 1 or id(p) in embeddings]
    by_muon, in_8_bits = ({id(p) for p in found(model, spec)} for found in (muon_parameters, eight_bit_parameters))
    kinds = [
        (decayed, spec.weight_decay, spec.learning_rate),
        (others, 0.0, spec.learning_rate),
        ([p for p in trainable if id(p) in adapters], 0.0, spec.adapter_learning_rate),
    ]

    def groups(chosen: Callable[[nn.Parameter], bool]) -> list[dict[str, Any]]:
        found = [([p for p in params if chosen(p)], decay, peak) for params, decay, peak in kinds]
        return [{"params": params, "weight_decay": decay, "peak": peak} for params, decay, peak in found if params]

    how: dict[str, Any] = {"lr": spec.learning_rate, "betas": (spec.beta1, spec.beta2)}
    rest = groups(lambda p: id(p) not in by_muon | in_8_bits)
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, **how, fused=True)] if rest else []
    if in_8_bits:
        parts.insert(0, AdamW8bit(groups(lambda p: id(p) in in_8_bits), **how))
    if by_muon:
        muon = [{"params": [p for p in decayed if id(p) in by_muon], "peak": spec.muon_learning_rate}]
        scaled: dict[str, Any] = {"weight_decay": spec.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        parts.insert(0, torch.optim.Muon(muon, lr=spec.muon_learning_rate, **scaled))
    return parts[0] if len(parts) == 1 else WithAdamW(*parts)


def muon_parameters(model: StageModel, spec: OptimSpec) -> list[nn.Parameter]:
    """Return what Muon trains: the matrices of stacks, without adapters; embeddings and head are never among them."""
    if not spec.muon_learning_rate:
        return []
    stacks = model.live_stacks()
    adapters = {id(p) for stack in stacks for p in adapter_parameters(stack)}
    found = (p for stack in stacks for p in stack.parameters())
    return [p for p in found if p.requires_grad and p.dim() == 2 and id(p) not in adapters]


def eight_bit_parameters(model: StageModel, spec: OptimSpec) -> list[nn.Parameter]:
    """Return what keeps its moments in 8 bits: large matrices, but not the embedding, whose rows seldom have gradients.

    Dettmers et al. 2022, arXiv 2110.02861, section 2.3.
    """
    if not spec.eight_bit:
        return []
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = (p for p in model.parameters() if p.requires_grad)
    return [p for p in trainable if p.dim() > 1 and p.numel() >= SMALLEST_IN_8_BITS and id(p) not in embeddings]


def learning_rate(spec: OptimSpec, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, the peak, then a decay to the minimum.

    `sqrt` is the 1 - sqrt of Hägele et al. 2024, arXiv 2405.18392.
    """
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    decay_steps = spec.steps - spec.warmup_steps if spec.decay_steps is None else spec.decay_steps
    if step < spec.steps - decay_steps:
        return spec.learning_rate
    progress = (step - (spec.steps - decay_steps)) / max(1, decay_steps)
    if spec.decay == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - (math.sqrt(progress) if spec.decay == "sqrt" else progress)
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * left


class LossScale:
    """Dynamic loss scaling for fp16 matrix products (Micikevicius et al. 2018, section 3.2).

    The scale halves when a gradient overflows, and that step changes no weight; it doubles after 2,000 steps without
    overflow. It is a function of the step records alone, so that a resumed stage has the scale of an undisturbed one.
    """

    growth_interval = 2000

    def __init__(self, start: float, records: list[dict[str, float]]) -> None:
        """Start at a scale and replay the records so far."""
        self.value, self.steps_without = start, 0
        for record in records:
            self.update(overflowed=bool(record.get("skipped")))

    @classmethod
    def of(cls, model: StageModel, records: list[dict[str, float]]) -> LossScale | None:
        """Return the loss scale of a stage in which a stack computes in fp16; None for any other stage."""
        device = model.head.projection.weight.device
        kinds = {compute_dtype(stack.precision, device) for stack in model.live_stacks()}
        return cls(2.0**16, records) if torch.float16 in kinds else None

    def update(self, *, overflowed: bool) -> None:
        """Adjust the scale after a step."""
        self.steps_without = 0 if overflowed else self.steps_without + 1
        if overflowed:
            self.value /= 2
        elif self.steps_without % self.growth_interval == 0:
            self.value *= 2
