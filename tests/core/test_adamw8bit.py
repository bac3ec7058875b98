"""AdamW with moments of 8 bits: against bitsandbytes' own optimizer and AdamW, what is kept, exact resume."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise_core.errors import StageInterruptedError
from stackwise_core.model.precision import silent_import
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training import adamw8bit
from stackwise_core.training.adamw8bit import AdamW8bit, in_8_bits, in_float32
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.training import Hooks, train_step
from support.configurations import CORPUS, configuration, ids
from support.training import begins_with, grown, same_bits, stage_of, tiny, weights

G = "training.progressive."
BY_8_BITS: dict[str, Any] = {"optimizer": "adamw8bit"}


@pytest.fixture(autouse=True)
def _small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep most matrices of the tiny model in 8 bits."""
    monkeypatch.setattr("stackwise_core.training.optimizer.SMALLEST_IN_8_BITS", 100)


def test_the_steps_are_those_of_bitsandbytes() -> None:
    with silent_import():
        from bitsandbytes.optim import AdamW8bit as Theirs

    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(70, 71))
    theirs = nn.Parameter(ours.detach().clone())
    how: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}
    optimizers = AdamW8bit([{"params": [ours], "weight_decay": 0.1}], **how), Theirs([theirs], weight_decay=0.1, **how)
    for _ in range(4):
        ours.grad = torch.randn(70, 71)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert ours.equal(theirs)
    state = optimizers[0].state[ours]
    assert sum(each.nbytes for each in state.values()) < 2.04 * ours.numel()
    assert state["step"] == 4


def test_large_matrices_have_8_bits_and_the_rest_is_adamws_bit_for_bit() -> None:
    growth = {"qlora_enabled": True, "qlora_rank": 2}
    config = tiny("clm", tie=False, **BY_8_BITS, progressive=growth)
    model, batches_from = stage_of(config, 0)
    plain = copy.deepcopy(model)
    spec, batch = resolve_stage(config, 0).optim, next(iter(batches_from(0)))
    optimizer = make_optimizer(model, spec)
    adamw = make_optimizer(plain, spec.model_copy(update={"eight_bit": False}))
    for each, by in ((model, optimizer), (plain, adamw)):
        train_step(each, batch, by, spec, 0)
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    in_8 = {name for name, moments in kept.items() if moments == adamw8bit.STATE}
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and p.numel() >= 100}
    assert in_8 == matrices - {"embedding.weight"}
    assert {"head.projection.weight", "stacks.0.blocks.0.attention.q_proj.base_layer.weight"} <= in_8
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        # Even the first step of those differs by no more than the last bits: it is taken before moments are rounded.
        torch.testing.assert_close(one, other, rtol=1e-5 if name in in_8 else 0, atol=1e-7 if name in in_8 else 0)


def test_it_learns_what_adamw_learns() -> None:
    losses = dict[str, list[float]]()
    for optimizer in ("adamw", "adamw8bit"):
        config = tiny("clm", optimizer=optimizer, steps_per_stack=50)
        hooks = Hooks(on_step=lambda record, by=optimizer: losses.setdefault(by, []).append(record["loss"]))
        grown(config, 1, hooks=hooks)
    last = {by: sum(each[-4:]) / 4 for by, each in losses.items()}  # of every batch once
    assert last["adamw"] < 0.95 * losses["adamw"][0]
    assert last["adamw8bit"] == pytest.approx(last["adamw"], rel=0.02)


def test_kept_and_resumed_state_has_the_same_bits(tmp_path: Path) -> None:
    growth = {"trunk_strategy": "full"}
    config = tiny("clm", **BY_8_BITS, optimizer_state="keep", new_state="copy", progressive=growth)
    straight = grown(config, 2)
    asked = itertools.count()
    stopping = Hooks(checkpoint_folder=tmp_path, should_stop=lambda: next(asked) == 9)  # in the second stage
    with pytest.raises(StageInterruptedError):
        grown(config, 2, hooks=stopping)
    resumed = grown(config, 2, hooks=Hooks(checkpoint_folder=tmp_path))
    assert same_bits(weights(resumed.build_rack()), weights(straight.build_rack()))
    assert same_bits(resumed.moments, straight.moments)
    name = "stacks.1.blocks.0.ffn.up_proj.weight"
    assert straight.moments[f"{name}.exp_avg"].dtype == torch.uint8
    assert straight.moments[f"{name}.step"] == 14  # that of its source, and its own
    assert straight.moments["head.projection.weight.step"] == 14  # it was tied to the embedding, which is not in 8 bits


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_moments_are_rounded_and_read_back() -> None:
    torch.manual_seed(0)
    moments = {"exp_avg": torch.randn(30, 50), "exp_avg_sq": torch.rand(30, 50) ** 2}
    state = {"step": torch.tensor(3.0), **moments}
    read = in_float32(in_8_bits(state))
    assert read["step"] == 3
    for name, expected in moments.items():
        assert 0 < error(read[name], expected) < 0.02, name


def test_a_blend_has_the_mean_of_both_and_the_state_of_adamw_is_rounded() -> None:
    growth = {"trunk_strategy": "full", "building_mode": "insert", "target_stacks": 3}
    how = {"optimizer_state": "keep", "new_state": "copy", "new_stack_source": "blend"}
    config = tiny("clm", **how, progressive=growth)
    builder = grown(config, 2)
    config.training.optimizer = "adamw8bit"
    left, found = builder.moments, begins_with(builder, config)
    for part, sources in (("0", "0"), ("1", "1"), ("2", "01")):
        name = "stacks.{}.blocks.0.ffn.up_proj.weight."
        state = in_float32({moment: found[f"{name.format(part)}{moment}"] for moment in adamw8bit.STATE})
        for moment, value in state.items():
            expected = torch.stack([left[f"{name.format(source)}{moment}"] for source in sources]).mean(0)
            assert error(value, expected) < (0.02 if value.dim() else 1e-6), (part, moment)


def test_ids_and_what_is_refused() -> None:
    plain, rounded = (ids(plan_run(configuration(each), CORPUS)) for each in ({}, {"training.optimizer": "adamw8bit"}))
    assert {name for name in plain if plain[name] != rounded[name]} >= {"stack-0", "stack-1"}
    for joint in ({"training.joint_steps": 5}, {f"{G}enabled": False}):
        values = {"training.optimizer": "adamw8bit", "hardware.processes": 2, **joint}
        with pytest.raises(Exception, match="adamw8bit needs whole; use adamw"):
            configuration(values)
        configuration({**values, "hardware.shard": "never"})
    two = {"training.optimizer": "adamw8bit", "hardware.processes": 2}
    configuration(two)
    with pytest.raises(Exception, match="matrices of all training, which adamw8bit needs whole; use adamw"):
        configuration({**two, "hardware.shard": "always"})
