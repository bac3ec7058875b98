"""Validations inside a stage decide when it ends and which weights are kept, and decide the same after a kill."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError, StageInterruptedError
from stackwise_core.stages.memory import Setting
from stackwise_core.stages.remedies import savings
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import WatchSpec, resolve_stages
from stackwise_core.training.training import Hooks, TrainingState, train_stack
from stackwise_core.training.watch import Watch
from support.configurations import configuration
from support.metrics import unclocked
from support.training import STEPS, loader_of, same_bits, spec_of, stage_of, tiny, weights

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "patience", "ends", "best"),
    [
        ([3.0, 2.0, 1.0, 0.5], 1, 0, 4),
        ([3.0, 2.0, 2.0, 1.0], 1, 3, 2),  # as good as before is not better
        ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4, 2),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 2, 6, 4),  # in a row
        ([NAN, 2.0, NAN, NAN], 2, 4, 2),
        ([NAN, NAN], 2, 2, 0),
        ([3.0, 4.0, 5.0], 0, 0, 1),
    ],
)
def test_patience_and_the_best(losses: list[float], patience: int, ends: int, best: int) -> None:
    watch = Watch(spec_of(steps=100, watch=WatchSpec(every=1, patience=patience, keep="best")))
    over = 0
    for n, loss in enumerate(losses):
        watch.see({"step": 0.0, "validation_loss": loss})
        if watch.is_over:
            over = n + 1
            break
    assert (over, watch.best) == (ends, best)


# What is measured after each step; of a stage that keeps its last weights the last step is not measured.
LOSSES = [5.0, 3.0, 4.0, 4.0, 3.5, 1.0, 2.0]


def stage(
    keep: str, patience: int, hooks: Hooks, state: TrainingState | None = None
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    model, batches_from = stage_of(tiny(), 0)
    spec = spec_of(watch=WatchSpec(every=1, patience=patience, keep=keep))  # pyright: ignore
    at = state.step if state else 0
    losses = iter(LOSSES[at:])
    hooks.validate, hooks.validate_every = lambda _: next(losses), 1
    records = train_stack(model, batches_from(at), spec, state=state, hooks=hooks)
    return weights(model), records


def after_each_step() -> list[dict[str, Tensor]]:
    model, batches_from = stage_of(tiny(), 0)
    seen: list[dict[str, Tensor]] = []
    train_stack(model, batches_from(0), spec_of(), hooks=Hooks(on_step=lambda _: seen.append(weights(model))))
    return seen


@pytest.mark.parametrize(
    ("keep", "patience", "taken", "kept"), [("last", 2, 4, 4), ("best", 2, 4, 2), ("best", 0, STEPS, 6)]
)
def test_the_weights_are_those_of_that_step(keep: str, patience: int, taken: int, kept: int) -> None:
    ended: list[TrainingState] = []
    found, records = stage(keep, patience, Hooks(on_end=lambda state: ended.append(state.copy())))
    assert len(records) == taken
    assert same_bits(found, after_each_step()[kept - 1])
    (state,) = ended
    assert {tensor.item() for name, tensor in state.tensors.items() if name.endswith(".step")} == {kept}  # AdamW's


@pytest.mark.parametrize(("keep", "patience"), [("best", 0), ("best", 3), ("last", 2)])
def test_killed_after_any_step_it_keeps_the_same(keep: str, patience: int) -> None:
    ends: list[TrainingState] = []

    def on_end(state: TrainingState) -> None:
        ends.append(state.copy())

    expected, expected_records = stage(keep, patience, Hooks(on_end=on_end))
    for stop in range(1, len(expected_records)):
        steps: list[float] = []
        hooks = Hooks(on_end=on_end, on_step=lambda record, steps=steps: steps.append(record["step"]))
        hooks.should_stop = lambda steps=steps, stop=stop: len(steps) == stop
        with pytest.raises(StageInterruptedError) as stopped:
            stage(keep, patience, hooks)
        found, records = stage(keep, patience, Hooks(on_end=on_end), stopped.value.state.copy())
        assert same_bits(found, expected)
        assert unclocked(records) == unclocked(expected_records)
        assert [record["step"] for record in records] == list(range(len(records)))  # none twice
        assert same_bits(ends[0].tensors, ends[-1].tensors)


def test_a_checkpoint_of_the_end_is_enough() -> None:
    checkpoints: list[TrainingState] = []
    hooks = Hooks(on_checkpoint=lambda state: checkpoints.append(state.copy()), checkpoint_last=True)
    expected, records = stage("best", 2, hooks)
    found, again = stage("best", 2, Hooks(), checkpoints[-1])
    assert same_bits(found, expected)
    assert again == records


def test_a_record_says_when_how_quickly_and_in_how_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))  # 2 s between two looks at it
    monkeypatch.setattr("stackwise_core.training.training._now", lambda: float(next(clock)))
    before = time.time()
    model, batches_from = stage_of(tiny(), 0)
    for record in train_stack(model, batches_from(0), spec_of()):
        assert before - 1 <= record["time"] <= time.time() + 1
        assert record["tokens_per_second"] == 4 * 10 / 2
        assert 2**26 < record["memory_bytes"] < 2**40


# ---------------------------------------------------------------- the configuration, and the library


EVERY: dict[str, Any] = {"validation.every": 2, "validation.patience": 3, "validation.keep": "best"}


def test_with_one_clock_the_stage_that_decays_has_all_its_steps() -> None:
    config = configuration({**EVERY, "training.schedule": "one_clock"})
    assert [spec.optim.watch and spec.optim.watch.patience for spec in resolve_stages(config)] == [3, 3, 0]
    assert "taken: validation.patience 0 instead of 3 in the last stage (training.schedule: one_clock)" in notes(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.schedule": "one_clock", "validation.cooldown_steps": 5}, "validation.cooldown_steps: got 5; it"),
        (
            {"training.joint_steps": 3, "hardware.processes": 2},
            "validation.patience: got 3; the 2 processes that",
        ),
        (
            {"hardware.processes": 2, "hardware.shard": "always"},
            "validation.keep: got 'best'; the 2 processes that share",
        ),
        ({"training.joint_steps": 3, "hardware.processes": 2}, "validation.keep: got 'best'; the 2 processes that"),
    ],
)
def test_what_cannot_be_decided_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configuration({**EVERY, **changes}).validate(corpus=False)


def test_no_remedy_is_named_that_would_be_refused() -> None:
    two = configuration({**EVERY, "hardware.processes": 2})
    for spec in resolve_stages(two):
        setting = Setting.of(two, resolve_shape(two), spec, loss_fraction=None, cached=True, cuda=False, there=1)
        assert setting.shards == 1
        assert "hardware.shard" not in [saving.key for saving in savings(setting)]


def test_without_validations_they_are_not_used() -> None:
    assert any("not used: " in line and "patience" in line for line in notes(configuration({"validation.patience": 3})))


def test_the_library_wants_the_batches_that_decide() -> None:
    config = tiny()
    config.validation.every, config.validation.keep = 2, "best"
    with pytest.raises(ConfigError, match=r"validation\.keep: got 'best'; give `validation`"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), loader_of(), 1)


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_result_of_the_library_is_of_the_kept_weights(state: str) -> None:
    config = tiny("clm", learning_rate=0.5, min_learning_rate=0.5, optimizer_state=state)  # soon gets worse
    config.validation.every, config.validation.keep, config.validation.patience = 1, "best", 2
    held_out = [torch.flip(rows, [0, 1]) for rows in loader_of(1)]
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of(), 2, validation=held_out)
    assert any(result.steps < STEPS for result in results)
    for result in results:
        inside = [record["validation_loss"] for record in result.records]
        assert result.validation_loss == min(inside)
        assert result.kept in (None, inside.index(min(inside)) + 1)
    if state == "keep":
        taken = [result.kept or result.steps for result in results]
        steps = {value.item() for name, value in builder.moments.items() if name.endswith("head.norm.weight.step")}
        assert steps == {sum(taken)}
