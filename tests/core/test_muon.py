"""Muon for the matrices of stacks and AdamW for the rest: against singular values, one clock, exact resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core.config.unused import notes
from stackwise_core.errors import StageInterruptedError
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.optimizer import learning_rate, make_optimizer, muon_parameters
from stackwise_core.training.training import Hooks, TrainingState, train_step
from support.configurations import CORPUS, configuration, ids
from support.training import grown, same_bits, stage_of, tiny, weights

MUON: dict[str, Any] = {"optimizer": "muon"}
G = "training.progressive."


def test_a_step_has_the_directions_of_the_momentum_and_equal_lengths() -> None:
    """Of the momentum U S V, Muon takes about U V: its singular vectors, and singular values near 1."""
    config = tiny("clm", **MUON, gradient_clip=0.0, weight_decay=0.1, warmup_steps=0, muon_learning_rate=0.01)
    model, batches_from = stage_of(config, 0)
    spec = resolve_stage(config, 0).optim
    optimizer, batch = make_optimizer(model, spec), next(iter(batches_from(0)))
    names = {id(p): name for name, p in model.named_parameters()}
    momentum: dict[str, Tensor] = {}
    for step in range(3):
        before = weights(model)
        model.zero_grad()
        loss, positions = model.summed_loss(batch)
        (loss / positions).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        train_step(model, batch, optimizer, spec, step)
        rate = learning_rate(spec, step) * 0.01 / config.training.learning_rate
        for parameter in muon_parameters(model, spec):
            name = names[id(parameter)]
            momentum[name] = 0.95 * momentum.get(name, 0.0) + 0.05 * gradients[name]
            ahead = (0.05 * gradients[name] + 0.95 * momentum[name]).double()  # Nesterov's
            u, s, v = torch.linalg.svd(ahead, full_matrices=False)
            moved = before[name] * (1 - rate * 0.1) - parameter.detach()
            made = u.T @ (moved / (rate * 0.2 * max(parameter.shape) ** 0.5)).double() @ v.T
            large = s > 0.05 * s[0]  # smaller ones are not brought to 1 in five iterations
            lengths = made.diagonal()[large]
            assert 0.6 < lengths.min() <= lengths.max() < 1.3, name
            crossed = (made - made.diagonal().diag())[large][:, large]  # those are near the noise of bfloat16
            assert crossed.abs().max() < 0.05, name
    assert len(momentum) == 7


def test_matrices_of_stacks_go_by_muon_and_the_rest_by_adamw_on_one_schedule() -> None:
    growth = {"qlora_enabled": True, "qlora_rank": 2}
    config = tiny("clm", tie=False, **MUON, muon_learning_rate=0.02, progressive=growth)
    model, batches_from = stage_of(config, 0)
    spec = resolve_stage(config, 0).optim
    optimizer = make_optimizer(model, spec)
    train_step(model, next(iter(batches_from(0))), optimizer, spec, 0)
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    by_muon = {name for name, moments in kept.items() if moments == {"momentum_buffer"}}
    assert by_muon == {name for name in kept if "_proj" in name and "lora" not in name}
    assert all(moments == {"step", "exp_avg", "exp_avg_sq"} for name, moments in kept.items() if name not in by_muon)
    peaks = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: peaks[id(p)] for name, p in model.named_parameters()}
    for name, rate in rates.items():
        adamw = config.training.adapter_learning_rate if "lora" in name else config.training.learning_rate
        assert rate == pytest.approx((0.02 if name in by_muon else adamw) / 2), name  # the first of two of warm-up


def test_kept_and_resumed_state_has_the_same_bits(tmp_path: Path) -> None:
    config = tiny("clm", **MUON, optimizer_state="keep", progressive={"trunk_strategy": "full"})
    states: list[TrainingState] = []
    keeping = Hooks(on_end=lambda state: states.append(state.copy()))
    straight = grown(config, 2, hooks=keeping)
    asked = itertools.count()
    stopping = Hooks(checkpoint_folder=tmp_path, should_stop=lambda: next(asked) == 9)  # in the second stage
    with pytest.raises(StageInterruptedError):
        grown(config, 2, hooks=stopping)
    resumed = grown(config, 2, hooks=Hooks(checkpoint_folder=tmp_path))
    assert same_bits(weights(resumed.build_rack()), weights(straight.build_rack()))
    assert same_bits(resumed.moments, straight.moments)
    # The first step of the second stage goes on from the buffer that the first left.
    config.training.steps_per_stack = 1
    name = "stacks.0.blocks.0.ffn.up_proj.weight.momentum_buffer"
    after = grown(config, 2, grown(tiny("clm", **MUON, optimizer_state="keep"), 1)).moments[name]
    left = states[0].tensors[f"optimizer.{name}"]
    cosine = torch.nn.functional.cosine_similarity(after.flatten(), left.flatten(), dim=0)
    assert cosine > 0.9


def test_the_state_of_another_optimizer_is_not_kept() -> None:
    config = tiny("clm", optimizer_state="keep", progressive={"trunk_strategy": "full"})
    builder = grown(config, 1)
    config.training.optimizer = "muon"
    grown(config, 2, builder)
    assert set(builder.moments) >= {"stacks.0.blocks.0.ffn.up_proj.weight.momentum_buffer"}
    assert builder.moments["head.norm.weight.step"] == 14


def test_ids_notes_and_what_it_costs() -> None:
    plain, muon = (ids(plan_run(configuration(each), CORPUS)) for each in ({}, {"training.optimizer": "muon"}))
    assert {name for name in plain if plain[name] != muon[name]} >= {"stack-0", "stack-1"}
    said = {"training.optimizer": "muon", "training.muon_learning_rate": 2e-3}  # which is learning_rate
    assert ids(plan_run(configuration(said), CORPUS)) == muon
    unused = {"training.muon_learning_rate": 1e-2}
    assert ids(plan_run(configuration(unused), CORPUS)) == plain
    assert notes(configuration(unused)) == ["not used: muon_learning_rate (optimizer: adamw)"]
    config = tiny("clm", **MUON)
    spec, shape = resolve_stage(config, 0), resolve_shape(config)
    without = spec.model_copy(update={"optim": spec.optim.model_copy(update={"muon_learning_rate": 0.0})})
    more = stage_flops(shape, spec, 10, 1.0)[0] - stage_flops(shape, without, 10, 1.0)[0]
    sides = [(16, 16), (16, 16), (8, 16), (8, 16), (16, 24), (16, 24), (16, 24)]
    products = [2 * a * b * a + 2 * a**3 + 2 * a * a * b for a, b in sides]  # A A', its square, times A
    assert more == spec.optim.steps * 5 * sum(products)
