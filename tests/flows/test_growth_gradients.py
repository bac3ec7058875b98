"""What growing trains and what it does not: through which gradients, at which rate and loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core.model.adapters import adapter_parameters, adapter_state
from stackwise_core.model.precision import StoredLinear
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.stages.stages import resolve_stages
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.optimizer import LossScale, learning_rate, make_optimizer
from stackwise_core.training.training import capture, train_stack, train_step
from support.growth import batch_of, built, dense_loss, finish, gradients, model_of, residual_stream
from support.modes import DUAL, LORA, MODES, G
from support.runs import tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


# ---------------------------------------------------------------- who gets a gradient


@pytest.mark.parametrize(
    "mode", ["append", "prepend", "insert", "full", "qlora trunk", "nf4 dual", "nvfp4 top", "mixed"]
)
def test_exactly_what_trains_gets_a_gradient_and_it_is_the_dense_one(mode: str, tmp_path: Path) -> None:
    """Against autograd through the whole rack, with everything trainable."""
    config = tiny(tmp_path, MODES[mode])
    stage = len(resolve_stages(config)) - 1
    builder = built(config, stage + 1)
    model = model_of(builder, config, stage)
    rack = builder.build_rack()
    trunk = None
    if model.embedding is None:
        below = rack.stacks[: model.anatomy.boundary]

        def trunk(input_ids: Tensor) -> Tensor:
            x = rack.embedding(input_ids)
            for stack in below:
                x = stack(x)
            return x.detach()

    batch = batch_of(config, stage, trunk)
    total, count = model.summed_loss(batch)
    (total / count).backward()
    found = gradients(rack)
    expected_names = {name for name, p in rack.named_parameters() if p.requires_grad}
    assert found.keys() == expected_names
    rack.zero_grad(set_to_none=True)
    trains = {c: model.anatomy.trains_of(c) for c in model.anatomy.order}
    rack.requires_grad_(True)
    dense_loss(rack, batch).backward()
    dense = gradients(rack)
    for name, gradient in found.items():
        assert torch.allclose(gradient, dense[name], atol=1e-6, rtol=1e-4), name
    # What should train, by the design: the new stack, the head if it is on top, adapters of a qlora trunk.
    newest, order = model.anatomy.newest, list(model.anatomy.order)
    strategy = config.training.progressive.trunk_strategy
    for position, c in enumerate(order):
        names = {name for name in expected_names if name.startswith(f"stacks.{position}.")}
        adapters = {name for name in names if ".lora_" in name}
        in_tail = mode == "insert" and position > order.index(newest)
        if (c == newest and trains[c] == "everything") or strategy == "full" or in_tail:
            assert names - adapters, c
        elif strategy == "qlora" and (c == newest or config.training.progressive.trunk_trainable_top in (0, 1)):
            top = c == newest or config.training.progressive.trunk_trainable_top == 0 or position == len(order) - 2
            assert names == adapters, c
            assert bool(adapters) == top, c
        else:
            assert not names, c
    head = {name for name in expected_names if name.startswith("head")}
    assert bool(head) == (strategy == "full" or mode == "insert" or order[-1] == newest)
    assert ("embedding.weight" in expected_names) == (strategy == "full")


def test_both_adapters_of_a_trunk_train_and_both_contribute(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["nf4 dual"])
    builder = built(config, 3)
    model_of(builder, config, 2)
    trunk = builder.stack(0)
    trainable = {id(p) for p in trunk.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(trunk)}
    x = residual_stream()
    outputs = [trunk(x)]
    for name in ("stack", "progressive"):
        with torch.no_grad():
            for parameter in adapter_parameters(trunk, name):
                parameter.zero_()
        outputs.append(trunk(x))
    assert not outputs[0].equal(outputs[1])
    assert not outputs[1].equal(outputs[2])


def test_under_frozen_no_adapter_of_the_trunk_trains_and_all_contribute(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, **DUAL})
    builder = built(config, 3)
    model = model_of(builder, config, 2)
    assert [c for c in model.anatomy.order if model.anatomy.trains_of(c) != "nothing"] == [2]
    assert not any(p.requires_grad for c in (0, 1) for p in builder.stack(c).parameters())
    stack, x = builder.stack(0), residual_stream()
    before = stack(x)
    with torch.no_grad():
        adapter_parameters(stack, "progressive")[1].zero_()
    assert not stack(x).equal(before)


def test_adapters_begin_apart(tmp_path: Path) -> None:
    """Of one rank, they are drawn by stack and name: equal factors would learn the same thing twice."""
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, **DUAL, f"{G}progressive_qlora_rank": 4})
    builder = ProgressiveRackBuilder(config)
    builder.add_stack()
    builder.add_stack()
    own, progressive = (adapter_state(builder.stack(0), name) for name in ("stack", "progressive"))
    assert own.keys() == progressive.keys()
    assert not any(own[key].equal(progressive[key]) for key in own if "lora_A" in key)
    neighbour = adapter_state(builder.stack(1), "stack")
    assert not any(own[key].equal(neighbour[key]) for key in own if "lora_A" in key)


def test_adapters_train_at_a_rate_of_their_own_and_do_not_decay(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**MODES["qlora trunk"], "training.adapter_learning_rate": 7e-4})
    builder = built(config, 3)
    model, spec = model_of(builder, config, 2), resolve_stages(config)[2].optim
    optimizer = make_optimizer(model, spec)
    train_step(model, batch_of(config, 2), optimizer, spec, 1)
    adapters = {id(p) for c in range(3) for p in adapter_parameters(builder.stack(c))}
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert adapters < found.keys()
    share = learning_rate(spec, 1) / spec.learning_rate
    assert [found[key] for key in adapters] == [(pytest.approx(7e-4 * share), 0.0)] * len(adapters)
    assert {found[key][0] for key in found.keys() - adapters} == {spec.learning_rate * share}


RANKS_AND_ALPHAS: dict[str, tuple[dict[str, Any], list[tuple[int, float]]]] = {
    "simplified": ({}, [(4, 3.0)] * 3),
    "increasing": ({"qlora_rank_pattern": "increasing"}, [(4, 3.0), (8, 3.0), (16, 3.0)]),
    "decreasing": (
        {"qlora_rank_pattern": "decreasing", "qlora_alpha_pattern": "decreasing"},
        [(4, 3.0), (2, 1.5), (1, 1.0)],
    ),
    "linear": ({"qlora_rank_pattern": "linear", "qlora_alpha_pattern": "linear"}, [(4, 3.0), (8, 6.0), (12, 9.0)]),
    "variable": (
        {"qlora_configs": {n: {"rank": n + 1, "alpha": n + 5.0} for n in range(3)}},
        [(1, 5.0), (2, 6.0), (3, 7.0)],
    ),
}


@pytest.mark.parametrize("name", RANKS_AND_ALPHAS)
def test_each_stack_has_the_rank_and_alpha_of_its_strategy(name: str, tmp_path: Path) -> None:
    more, expected = RANKS_AND_ALPHAS[name]
    strategy = name if name in ("simplified", "variable") else "progressive"
    given = {"qlora_enabled": True, "qlora_strategy": strategy, **more}
    if name != "variable":
        given |= {"qlora_rank": 4, "qlora_alpha": 3.0}
    config = tiny(tmp_path, {f"{G}{key}": value for key, value in given.items()})
    adapters = [stack.adapters["stack"] for stack in resolve_stages(config)[-1].stacks]
    assert [(adapter.rank, adapter.alpha) for adapter in adapters] == expected


def test_the_top_of_a_trunk_is_what_lies_next_to_the_head(tmp_path: Path) -> None:
    """Also where the stack that was created last lies at the bottom."""
    stacks = [{}, {"mode": "prepend"}, {}]
    config = tiny(tmp_path, {**MODES["qlora top"], f"{G}target_stacks": 3, f"{G}stacks": stacks})
    anatomy = resolve_stages(config)[2].anatomy
    assert anatomy.order == (1, 0, 2)
    assert anatomy.trained == (0, 2)
    assert anatomy.below == (1,)


def test_a_gradient_left_on_what_is_frozen_is_not_clipped_by(tmp_path: Path) -> None:
    """As after a user's own backward pass: only what trains counts in the norm."""
    config = tiny(tmp_path, MODES["prepend"])
    norms: list[float] = []
    for left in (False, True):
        builder = built(config, 2)
        model, spec = model_of(builder, config, 1), resolve_stages(config)[1].optim
        if left:
            model.head.projection.weight.grad = torch.ones_like(model.head.projection.weight)
        norms.append(train_step(model, batch_of(config, 1), make_optimizer(model, spec), spec, 0)["gradient_norm"])
    assert norms[0] == norms[1]


def test_a_gentler_anneal_is_gentler_everywhere(tmp_path: Path) -> None:
    """At a tenth of the rate, adapters have a tenth of theirs, and the minimum is no higher than the peak."""
    rates = {"learning_rate": 1e-2, "min_learning_rate": 2e-3, "adapter_learning_rate": 4e-3}
    changes = {f"training.{key}": value for key, value in rates.items()} | {"training.joint_learning_rate": 1e-3}
    config = tiny(tmp_path, {**changes, "training.joint_steps": 6, f"{G}qlora_enabled": True, **LORA})
    *_, last, joint = (stage.optim for stage in resolve_stages(config))
    assert (last.learning_rate, last.min_learning_rate, last.adapter_learning_rate) == (1e-2, 2e-3, 4e-3)
    assert (joint.learning_rate, joint.min_learning_rate) == (1e-3, 1e-3)
    assert joint.adapter_learning_rate == pytest.approx(4e-4)


def test_a_trained_stage_keeps_no_gradient(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    model, spec = model_of(built(config, 1), config, 0), resolve_stages(config)[0].optim
    train_stack(model, [batch_of(config, 0)] * spec.steps, spec)
    assert not gradients(model)


def test_a_quantised_trunk_is_dense_only_while_it_runs(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["nf4"])
    builder = built(config, 2)
    finish(builder, config, 0)
    stored = [module for module in builder.stack(0).modules() if isinstance(module, StoredLinear)]
    held: list[bool] = []
    builder.stack(0).register_forward_hook(lambda *_: held.append(all(linear.held is not None for linear in stored)))
    LiveTrunk(builder.build_rack().embedding, [builder.stack(0)], Stream("bfloat16"))(
        torch.zeros(2, 5, dtype=torch.long)
    )
    assert stored
    assert held == [True, True]
    assert all(linear.held is None for linear in stored)


# ---------------------------------------------------------------- fp16


def test_a_loss_scale_halves_on_overflow_and_doubles_after_a_while() -> None:
    scale = LossScale(2.0**16, [])
    history: list[dict[str, float]] = []
    for step in range(4100):
        overflowed = step in (3, 50)
        scale.update(overflowed=overflowed)
        history.append({"step": step, "skipped": float(overflowed)})
    assert scale.value == 2.0**16 / 4 * 4  # two halvings, then doubled 2,000 and 4,000 steps after step 50
    assert LossScale(2.0**16, history).value == scale.value


def test_a_scaled_step_is_the_step_and_an_overflow_changes_no_weight(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}new_stack_precision": "half"})
    weights: list[dict[str, Tensor]] = []
    for scale in (None, LossScale(2.0**16, []), LossScale(2.0**127, [])):
        builder = built(config, 1)
        model = model_of(builder, config, 0)
        spec = resolve_stages(config)[0]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = batch_of(config, 0)
        optimizer = make_optimizer(model, spec.optim)
        record = train_step(model, batch, optimizer, spec.optim, 0, scale)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if scale is not None and scale.value == 2.0**126:
            assert record["skipped"] == 1.0
            assert all(before[name].equal(p) for name, p in model.named_parameters())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])  # powers of two lose nothing


def test_a_resumed_stage_scales_its_loss_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU products are fp32: here the stage takes them for fp16."""
    from stackwise_core.training import optimizer as core_optimizer
    from stackwise_core.training import training

    scales: list[float] = []

    def noting(
        model: Any, batch: Any, optimizer: Any, spec: Any, step: int, scale: Any, ranks: Any
    ) -> dict[str, float]:
        scales.append(scale.value)
        return train_step(model, batch, optimizer, spec, step, scale, ranks)

    monkeypatch.setattr(core_optimizer, "compute_dtype", lambda precision, device: torch.float16)
    monkeypatch.setattr(training, "train_step", noting)
    config = tiny(tmp_path, {f"{G}new_stack_precision": "half"})
    model, spec = model_of(built(config, 1), config, 0), resolve_stages(config)[0].optim
    records = [{"step": float(n), "loss": 1.0, "skipped": float(n in (0, 3))} for n in range(spec.steps - 2)]
    state = capture(model, make_optimizer(model, spec), records)
    train_stack(model, [batch_of(config, 0)] * 2, spec, state=state)
    assert scales == [2.0**14, 2.0**14]
