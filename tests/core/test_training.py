"""Training a stage against AdamW written out by hand, and the same bits whether or not it was interrupted."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.errors import ConfigError, NonFiniteLossError, StageInterruptedError
from stackwise_core.objectives.losses import Batch, loss_positions
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.stages import OptimSpec
from stackwise_core.training.optimizer import learning_rate, make_optimizer
from stackwise_core.training.stage_model import Ranks, StageModel
from stackwise_core.training.training import Hooks, TrainingState, capture, restore, train_stack, train_step
from support.metrics import unclocked
from support.training import STEPS, T, same_bits, sequences, spec_of, stage_of, tiny, weights

pytestmark = pytest.mark.usefixtures("one_thread_per_module")


# ---------------------------------------------------------------- the learning rate


@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1), st.floats(1e-6, 1))
def test_learning_rate_is_a_line_then_half_a_cosine(steps: int, warmup: int, lowest: float, peak: float) -> None:
    warmup, lowest = min(warmup, steps), lowest * peak
    spec = spec_of(steps=steps, warmup_steps=warmup, learning_rate=peak, min_learning_rate=lowest)
    rates = [learning_rate(spec, step) for step in range(steps)]
    for step in range(steps):
        if step < warmup:
            expected = peak * (step + 1) / warmup
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            expected = (peak + lowest) / 2 + (peak - lowest) / 2 * math.cos(angle)
        assert rates[step] == pytest.approx(expected, rel=1e-9)
    assert max(rates) <= peak * (1 + 1e-12)
    assert learning_rate(spec, steps) == pytest.approx(lowest if warmup < steps else peak, rel=1e-9)


# ---------------------------------------------------------------- one step


def dense_mean_loss(model: StageModel, batch: Batch) -> Tensor:
    """Logits everywhere, the mean of the cross-entropy over the loss positions."""
    positions = loss_positions(batch)
    return F.cross_entropy(model.head(model(batch))[positions], batch["targets"][positions])


class PlainAdamW:
    """Algorithm 2 of Loshchilov and Hutter (2019), with clipping by the global norm, in plain tensors."""

    def __init__(self, model: StageModel, spec: OptimSpec) -> None:
        self.model, self.spec, self.step = model, spec, 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    def take(self, batch: Batch, rate: float) -> tuple[float, float]:
        spec, self.step = self.spec, self.step + 1
        loss = dense_mean_loss(self.model, batch)
        parameters = dict(self.model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        scale = min(1.0, spec.gradient_clip / norm) if spec.gradient_clip else 1.0
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v) = gradients[name] * scale, self.moments[name]
                decay = 0.0 if "norm" in name or "embedding" in name else spec.weight_decay
                p.mul_(1 - rate * decay)
                m.mul_(spec.beta1).add_((1 - spec.beta1) * g)
                v.mul_(spec.beta2).add_((1 - spec.beta2) * g * g)
                mean, square = m / (1 - spec.beta1**self.step), v / (1 - spec.beta2**self.step)
                p.sub_(rate * mean / (square.sqrt() + 1e-8))
        return loss.item(), norm


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("tie", [True, False])
def test_steps_of_the_first_stage_equal_adamw_by_hand(tie: bool, clip: float) -> None:
    """In float64, so that the tolerance (1e-6 of the rate) is far below what any wrong detail would cause.

    Torch adds 1e-6 to the norm it divides by, which is 2e-5 of the gradient where clipping is strongest.
    """
    spec = spec_of(gradient_clip=clip, weight_decay=0.3, learning_rate=1e-2)
    model, batches_from = stage_of(tiny(tie=tie), 0)
    model = model.double()
    plain = PlainAdamW(copy.deepcopy(model), spec)
    optimizer = make_optimizer(model, spec)
    start = weights(model)
    for step, batch in zip(range(4), batches_from(0), strict=False):
        rate = 1e-2 * (step + 1) / 2 if step < 2 else learning_rate(spec, step)
        loss, norm = plain.take(batch, rate)
        record = train_step(model, batch, optimizer, spec, step)
        assert record["step"] == step
        assert record["learning_rate"] == pytest.approx(rate)
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["gradient_norm"] == pytest.approx(norm, rel=1e-6)
        assert clip == 0 or (norm > clip) == (clip < 1)
    expected = weights(plain.model)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        assert (weight - start[name]).abs().max() > 1e-3


def test_a_step_of_a_later_stage_equals_adamw_by_hand() -> None:
    """Float32: AdamW's first step is nearly rate * sign, so gradients near 0 are left out."""
    spec = spec_of(weight_decay=0.3, warmup_steps=0)
    model, batches_from = stage_of(tiny(), 1)
    assert model.embedding is None
    plain = PlainAdamW(copy.deepcopy(model), spec)
    batch = next(iter(batches_from(0)))
    train_step(model, batch, make_optimizer(model, spec), spec, 0)
    plain.take(batch, spec.learning_rate)
    expected = weights(plain.model)
    for name, weight in weights(model).items():
        clear = plain.moments[name][0].abs() > 1e-6
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(weight[clear], expected[name][clear], rtol=0, atol=0.01 * spec.learning_rate)


def test_norms_and_embeddings_do_not_decay() -> None:
    for tie in (True, False):
        model, _ = stage_of(tiny(tie=tie), 0)
        decay = {id(p): g["weight_decay"] for g in make_optimizer(model, spec_of()).param_groups for p in g["params"]}
        for name, parameter in model.named_parameters():
            assert decay[id(parameter)] == (0.0 if "norm" in name or "embedding" in name else 0.1)
        assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_accumulation_gives_the_same_weights(objective: str, parts: int) -> None:
    """To 1e-6, in float64: parts hold unequal numbers of loss positions, whose mean is over the whole batch."""
    trained: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for n_parts in (1, parts):
        model, batches_from = stage_of(tiny(objective), 0)
        records = train_stack(model.double(), batches_from(0), spec_of(accumulation_steps=n_parts))
        trained.append(weights(model))
        losses.append([record["loss"] for record in records])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=0, atol=1e-6)


def test_accumulation_takes_every_row() -> None:
    model, _ = stage_of(tiny("clm"), 0)
    batch = make_batch(
        {"input_ids": sequences(5).tokens.astype(np.int64), "sequence_ids": np.arange(5), "view": 0}, None
    )
    batch["stack_idx"] = 0
    spec = spec_of(accumulation_steps=2)
    expected = dense_mean_loss(model, batch).item()
    record = train_step(model, batch, make_optimizer(model, spec), spec, 0)
    assert record["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_rows", [2, 3])
def test_every_rank_cuts_its_share_into_as_many_parts(n_rows: int) -> None:
    """Of five rows one rank has two and the other three: another number of backward passes would be waited for."""
    model, _ = stage_of(tiny("clm"), 0)
    fields = {"input_ids": sequences(5).tokens.astype(np.int64)[:n_rows], "sequence_ids": np.arange(n_rows), "view": 0}
    batch = make_batch(fields, None)
    batch["stack_idx"] = 0
    synced: list[bool] = []

    class OneOfTwo(Ranks):
        count = 2

        def gradient_sync(self, *, enabled: bool) -> contextlib.AbstractContextManager[None]:
            synced.append(enabled)
            return contextlib.nullcontext()

    spec = spec_of(batch_size=5, accumulation_steps=3)
    train_step(model, batch, make_optimizer(model, spec), spec, 0, ranks=OneOfTwo())
    assert synced == [False, True]


def test_non_finite_loss_stops_before_any_weight_changes() -> None:
    model, batches_from = stage_of(tiny(), 1)
    spec = spec_of()
    optimizer = make_optimizer(model, spec)
    batches = iter(batches_from(0))
    train_step(model, next(batches), optimizer, spec, 0)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    for poison in (math.nan, math.inf):
        batch = next(batches)
        batch["trunk_activations"] = batch["trunk_activations"].clone()
        batch["trunk_activations"][2, 3, 5] = poison
        ids = batch["sequence_ids"].tolist()
        with pytest.raises(NonFiniteLossError) as caught:
            train_step(model, batch, optimizer, spec, 5)
        assert str(caught.value).startswith("step 6: loss nan")
        assert f"sequence ids {ids}" in str(caught.value)
        assert same_bits(weights(model), before)
        after = optimizer.state_dict()["state"]
        assert all(after[n][key].equal(value) for n, state in moments.items() for key, value in state.items())


def test_non_finite_gradient_of_a_finite_loss_stops_too() -> None:
    model, batches_from = stage_of(tiny(), 0)
    model.live_stacks()[0].register_full_backward_hook(lambda *_: (torch.full((4, T, 16), math.inf),))
    before = weights(model)
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        train_step(model, next(iter(batches_from(0))), make_optimizer(model, spec_of()), spec_of(), 0)
    assert same_bits(weights(model), before)


def test_a_batch_without_loss_positions_is_no_fault() -> None:
    model, batches_from = stage_of(tiny(), 0)
    batch = next(iter(batches_from(0)))
    batch["masks"] = torch.zeros_like(batch["masks"])
    record = train_step(model, batch, make_optimizer(model, spec_of()), spec_of(), 0)
    assert (record["loss"], record["gradient_norm"]) == (0.0, 0.0)
    assert all(weight.isfinite().all() for weight in weights(model).values())


# ---------------------------------------------------------------- a stage, interrupted or not


Stored = tuple[bytes, str]


def stored(state: TrainingState) -> Stored:
    return safetensors.torch.save(state.tensors), json.dumps(state.records)


def loaded(stored: Stored) -> TrainingState:
    records = json.loads(stored[1])
    return TrainingState(len(records), safetensors.torch.load(stored[0]), records)


STAGES = [(index, objective) for index in (0, 1) for objective in ("mlm", "clm")]
UNINTERRUPTED: dict[Any, tuple[dict[str, Tensor], list[dict[str, float]]]] = {}


def uninterrupted(index: int, objective: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    if (index, objective) not in UNINTERRUPTED:
        model, batches_from = stage_of(tiny(objective), index)
        records = train_stack(model, batches_from(0), spec_of())
        UNINTERRUPTED[index, objective] = weights(model), records
    return UNINTERRUPTED[index, objective]


@settings(max_examples=25)
@given(st.sampled_from(STAGES), st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=3, unique=True))
def test_interrupted_at_any_steps_gives_the_same_bits(stage: tuple[int, str], stops: list[int]) -> None:
    expected, expected_records = uninterrupted(*stage)
    state: TrainingState | None = None
    for stop in [*sorted(stops), STEPS]:
        torch.manual_seed(stop)  # the global generator plays no part
        model, batches_from = stage_of(tiny(stage[1]), stage[0])
        done: list[dict[str, float]] = []
        checkpoints: list[Stored] = []
        hooks = Hooks(
            on_step=done.append,
            on_checkpoint=lambda state, kept=checkpoints: kept.append(stored(state)),
            should_stop=lambda stop=stop, done=done: bool(done) and done[-1]["step"] + 1 == stop < STEPS,
        )
        start = state.step if state else 0
        if stop < STEPS:
            with pytest.raises(StageInterruptedError, match=f"after step {stop} of {STEPS}"):
                train_stack(model, batches_from(start), spec_of(), state=state, hooks=hooks)
            (checkpoint,) = checkpoints
            state = loaded(checkpoint)
            assert state.step == stop
        else:
            records = train_stack(model, batches_from(start), spec_of(), state=state, hooks=hooks)
            assert unclocked(records) == unclocked(expected_records)
            assert same_bits(weights(model), expected)
        assert [record["step"] for record in done] == list(range(start, stop))


def test_checkpoints_come_when_due_and_change_nothing() -> None:
    expected, expected_records = uninterrupted(0, "mlm")
    model, batches_from = stage_of(tiny(), 0)
    steps: list[int] = []
    hooks = Hooks(on_checkpoint=lambda state: steps.append(state.step), checkpoint_every=2)
    assert unclocked(train_stack(model, batches_from(0), spec_of(), hooks=hooks)) == unclocked(expected_records)
    assert steps == [2, 4, 6]
    assert same_bits(weights(model), expected)


def test_a_stop_at_the_last_step_loses_nothing() -> None:
    model, batches_from = stage_of(tiny(), 0)
    checkpoints: list[int] = []
    hooks = Hooks(on_checkpoint=lambda state: checkpoints.append(state.step))
    hooks.should_stop = lambda: bool(model) and model.steps_seen == STEPS  # pyright: ignore
    hooks.on_step = lambda record: setattr(model, "steps_seen", int(record["step"]) + 1)
    try:
        records = train_stack(model, batches_from(0), spec_of(), hooks=hooks)
    except StageInterruptedError:
        records = []
    assert records or checkpoints == [STEPS]


def test_restore_is_the_inverse_of_capture() -> None:
    model, batches_from = stage_of(tiny(), 1)
    spec = spec_of()
    optimizer = make_optimizer(model, spec)
    records = [
        train_step(model, batch, optimizer, spec, n) for n, batch in zip(range(3), batches_from(0), strict=False)
    ]
    state = loaded(stored(capture(model, optimizer, records)))
    other, _ = stage_of(tiny(), 1)
    other_optimizer = make_optimizer(other, spec)
    restore(other, other_optimizer, state)
    again = capture(other, other_optimizer, state.records)
    assert (again.step, again.records) == (3, records)
    assert same_bits(again.tensors, state.tensors)
    kinds = {name.rsplit(".", 1)[1] for name in state.tensors if name.startswith("optimizer.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_too_few_batches_is_an_error() -> None:
    model, batches_from = stage_of(tiny(), 0)
    batches = [batch for batch, _ in zip(batches_from(0), range(3), strict=False)]
    with pytest.raises(ConfigError, match=f"dataloader: got 3 batches; training.steps_per_stack = {STEPS} are needed"):
        train_stack(model, batches, spec_of())
