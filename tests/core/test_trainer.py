"""Training against AdamW written out by hand, and the same bits whether or not a stage was interrupted."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.packing import PackedSequences
from stackwise_core.errors import ConfigError, NonFiniteLossError, StageInterruptedError
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.losses import Batch, loss_positions
from stackwise_core.objectives.make_batch import make_batch, validation_batch
from stackwise_core.stages.resolve import resolve_mask, resolve_order
from stackwise_core.stages.stages import OptimSpec, resolve_stage
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.optimizer import learning_rate, make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import (
    Hooks,
    TrainingState,
    capture,
    restore,
    train_stack,
    train_step,
)
from support.runs import stage_model

T, STEPS = 10, 7


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small matrices gain nothing from a second thread, and wait for it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(objective: str = "mlm", tie: bool = True, **training: Any) -> StackWiseConfig:
    growth = {"target_stacks": 2, "max_stacks": 4, "training_objective": objective, **training.pop("progressive", {})}
    values = {"batch_size": 4, "steps_per_stack": STEPS, "warmup_steps": 2, "progressive": growth}
    if growth["training_objective"] == "mlm" and "time_interpretation" not in growth:
        values["mask_ratio"] = 0.4
    model = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "blocks_per_stack": 1, "tie_embeddings": tie}
    sections = {"model": model, "data": {"seq_len": T}, "training": {**values, **training}, "hardware": {"threads": 1}}
    return StackWiseConfig.from_dict(sections)


def sequences(n: int = 18) -> PackedSequences:
    tokens = np.random.default_rng(3).integers(0, 256, (n, T)).astype(np.uint16)
    return PackedSequences(tokens, np.arange(n, dtype=np.int64))


def loader_of(n_batches: int = 4, batch_size: int = 4) -> list[Tensor]:
    return list(torch.from_numpy(sequences(n_batches * batch_size).tokens.astype(np.int64)).split(batch_size))


def stage_of(config: StackWiseConfig, index: int) -> tuple[StageModel, Callable[[int], Iterable[Batch]]]:
    """A stage as the flow has it: what trains, and its batches from any step on."""
    builder = ProgressiveRackBuilder(config)
    for n in range(index + 1):
        builder.append_stack()
        builder.prepare_stage(resolve_stage(config, n))
    rack, data = builder.build_rack(), sequences()
    trunk = LiveTrunk(rack.embedding, builder.stacks[:index], Stream("bfloat16")) if index else None

    def batches_from(step: int) -> Iterable[Batch]:
        order = resolve_order(config, len(data))
        base = PackedBatches(data, order, step, STEPS)
        return ProgressiveDataLoader(base, resolve_mask(config, index), index, trunk)

    return stage_model(rack, index), batches_from


def spec_of(**changes: Any) -> OptimSpec:
    return resolve_stage(tiny(), 0).optim.model_copy(update=changes)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


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


@pytest.mark.parametrize("parts", [2, 4])
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
        assert str(caught.value).startswith("step 5: loss nan")
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
            assert records == expected_records
            assert same_bits(weights(model), expected)
        assert [record["step"] for record in done] == list(range(start, stop))


def test_checkpoints_come_when_due_and_change_nothing() -> None:
    expected, expected_records = uninterrupted(0, "mlm")
    model, batches_from = stage_of(tiny(), 0)
    steps: list[int] = []
    hooks = Hooks(on_checkpoint=lambda state: steps.append(state.step), checkpoint_every=2)
    assert train_stack(model, batches_from(0), spec_of(), hooks=hooks) == expected_records
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


# ---------------------------------------------------------------- growing in memory


def grown(config: StackWiseConfig, loader: Iterable[Any] | None = None) -> tuple[ProgressiveRackBuilder, list[float]]:
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of() if loader is None else loader)
    return builder, [record["loss"] for result in results for record in result.records]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_two_runs_have_the_same_bits(objective: str) -> None:
    first, losses = grown(tiny(objective))
    torch.manual_seed(99)
    second, again = grown(tiny(objective))
    assert losses == again
    assert same_bits(weights(first.build_rack()), weights(second.build_rack()))
    other = tiny(objective)
    other.run.seed = 1
    assert grown(other)[1] != losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_cache_in_memory_changes_no_bit(objective: str, dtype: Any) -> None:
    """12 steps over 4 batches: rows come round again, with clm under the same view."""
    runs: list[Any] = []
    for cached in (True, False):
        config = tiny(objective, steps_per_stack=12, progressive={"cache_activations": cached, "target_stacks": 3})
        config.cache.dtype, config.cache.views = dtype, 1 if objective == "clm" else 2
        runs.append(grown(config))
    assert runs[0][1] == runs[1][1]
    assert same_bits(*(weights(builder.build_rack()) for builder, _ in runs))


@pytest.mark.parametrize("tie", [True, False])
def test_the_first_stage_trains_the_embedding_and_later_ones_leave_the_trunk(tie: bool) -> None:
    config = tiny(tie=tie)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    rack = builder.build_rack()
    fresh = rack.embedding.weight.detach().clone()
    trainer.train_progressively(builder, loader_of(), 1)
    assert not rack.embedding.weight.equal(fresh)
    for target in (2, 3):
        trunk = [weights(module) for module in (rack.embedding, *builder.stacks)]
        head = weights(rack.head)
        (result,) = trainer.train_progressively(builder, loader_of(), target)
        assert result.index == target - 1
        after = [weights(module) for module in (rack.embedding, *builder.stacks)]
        assert all(same_bits(a, b) for a, b in zip(after, trunk, strict=False))
        assert not any(weight.equal(weights(rack.head)[name]) for name, weight in head.items())
        assert len(builder.stacks) == target


def test_growing_on_from_two_stacks_to_three_trains_one() -> None:
    config = tiny(progressive={"target_stacks": 3})
    at_once, losses = grown(config)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    first = trainer.train_progressively(builder, loader_of(), 2)
    rest = trainer.train_rack(builder, loader_of(), 3)
    assert ([result.index for result in first], [result.index for result in rest]) == ([0, 1], [2])
    assert [record["loss"] for result in (*first, *rest) for record in result.records] == losses
    assert rest[0].loss == losses[-1]
    assert same_bits(weights(builder.build_rack()), weights(at_once.build_rack()))
    assert trainer.train_progressively(builder, loader_of(), 3) == []


def test_stacks_already_there_and_untrained_are_trained_first() -> None:
    config = tiny(new_stack_init="random")  # with copies, a stack added early starts from other weights
    expected, losses = grown(config)
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.append_stack()
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of(), 2)
    assert [result.index for result in results] == [0, 1]
    assert builder.n_trained == 2
    assert [record["loss"] for result in results for record in result.records] == losses
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


def test_a_cache_handed_in_is_what_the_stage_reads() -> None:
    config = tiny("clm")
    expected, losses = grown(config)

    class Store:
        """The boundary of a rack whose first stage is trained, by content id."""

        def __init__(self) -> None:
            self.asked: list[int] = []
            builder = ProgressiveRackBuilder(config)
            ProgressiveTrainer(config).train_progressively(builder, loader_of(), 1)
            trunk = LiveTrunk(builder.build_rack().embedding, builder.stacks, Stream("bfloat16"))
            self.kept: dict[int, Tensor] = {}
            for batch in ProgressiveDataLoader(loader_of()):
                for sequence_id, row in zip(batch["sequence_ids"].tolist(), trunk(batch["input_ids"]), strict=True):
                    self.kept[sequence_id] = row

        def rows(self, sequence_ids: Any, view: int) -> Tensor:
            self.asked.append(view)
            return torch.stack([self.kept[sequence_id] for sequence_id in sequence_ids.tolist()])

    store, builder = Store(), ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of(), cache={1: store})
    assert store.asked == [0] * STEPS
    assert [record["loss"] for result in results for record in result.records] == losses
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


@pytest.mark.parametrize(
    ("objective", "views", "asked"),
    [
        ("mlm", 0, [0, 0, 1, 1, 2, 2, 3]),
        ("mlm", 2, [0, 0, 1, 1, 0, 0, 1]),
        ("clm", 0, [0] * 7),
    ],
)
def test_each_pass_over_the_loader_is_the_next_view(objective: str, views: int, asked: list[int]) -> None:
    class Store:
        """Zeros, whatever is asked."""

        views_asked: list[int]

        def rows(self, sequence_ids: Any, view: int) -> Tensor:
            self.views_asked.append(view)
            return torch.zeros(len(sequence_ids), T, 16)

    config, store = tiny(objective), Store()
    config.cache.views, store.views_asked = views, []
    ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), loader_of(2), cache={1: store})
    assert store.views_asked == asked


def test_training_lowers_the_loss() -> None:
    """A repeated text is learnt: far below the ln 256 of a guess."""
    text = torch.arange(T).repeat(4, 1) + 97
    builder, losses = grown(tiny("clm", steps_per_stack=60, learning_rate=1e-2), [text])
    assert losses[0] > 5
    assert losses[59] < 1
    assert losses[-1] < 0.2
    assert builder.n_trained == 2


def test_loaders_that_run_dry_are_an_error() -> None:
    for loader, received in (([], "no batch from list"), ((batch for batch in loader_of(3)), "an exhausted iterator")):
        with pytest.raises(ConfigError, match=f"base_dataloader: got {received}.*; every epoch of every stage"):
            grown(tiny(), loader)


def test_trainer_validates_on_entry() -> None:
    config = tiny()
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    with pytest.raises(ConfigError, match="target_stacks: got None; the rack has no stack yet"):
        trainer.train_rack(builder, loader_of())
    config.training.progressive.trunk_strategy = "qlora"
    for train in (trainer.train_progressively, trainer.train_rack):
        with pytest.raises(ConfigError, match="trunk_strategy: got 'qlora'; no trunk stack has an adapter"):
            train(builder, loader_of(), 2)
    assert builder.n_stacks == 0


def test_without_a_target_the_rack_trains_as_it_is() -> None:
    """All stacks together, in one stage, from the tokens to the head."""
    config = tiny()
    builder = ProgressiveRackBuilder(config)
    for _ in range(3):
        builder.append_stack()
    before = [weights(module) for module in (*builder.stacks, builder.build_rack().head)]
    (result,) = ProgressiveTrainer(config).train_rack(builder, loader_of())
    assert (result.index, len(result.records), builder.n_stacks, builder.n_trained) == (0, STEPS, 3, 3)
    after = [weights(module) for module in (*builder.stacks, builder.build_rack().head)]
    for old, new in zip(before, after, strict=True):
        assert not any(weight.equal(new[name]) for name, weight in old.items())


def test_a_bidirectional_rack_does_not_train_causally() -> None:
    builder = ProgressiveRackBuilder(d_model=16, n_heads=2)  # mlm, so bidirectional
    with pytest.raises(ConfigError):
        ProgressiveTrainer(tiny("clm")).train_progressively(builder, loader_of(), 1)


def test_more_than_max_stacks_is_refused_before_training() -> None:
    config = tiny(steps_per_stack=2)
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(ConfigError):
        ProgressiveTrainer(config).train_progressively(builder, loader_of(), 5)
    assert builder.n_trained == 0


# ---------------------------------------------------------------- checkpoints, evaluation, compilation


def stop_after(n_steps: int) -> Hooks:
    """Hooks that ask to stop after so many steps of any stages."""
    steps: list[float] = []
    return Hooks(on_step=lambda record: steps.append(record["step"]), should_stop=lambda: len(steps) >= n_steps)


WAYS: dict[str, Callable[[], StackWiseConfig]] = {
    "mlm": tiny,
    "clm, rows kept in memory": lambda: tiny("clm", steps_per_stack=9),
    "live trunk": lambda: tiny(progressive={"cache_activations": False}),
    "joint in time": lambda: tiny(
        joint_steps=6, progressive={"time_interpretation": "depth", "num_time_steps": 4, "target_stacks": 2}
    ),
}


@pytest.mark.parametrize(
    ("way", "stop"),
    [
        ("mlm", 3),
        ("mlm", STEPS + 5),
        ("clm, rows kept in memory", STEPS + 5),
        ("live trunk", STEPS + 5),
        ("joint in time", 2 * STEPS + 3),
    ],
)
def test_an_interrupted_stage_resumes_with_the_same_bits(way: str, stop: int) -> None:
    config = WAYS[way]()
    expected, losses = grown(config)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config, hooks=stop_after(stop))
    with pytest.raises(StageInterruptedError, match="stopped on request after step") as interrupted:
        trainer.train_progressively(builder, loader_of())
    state = interrupted.value.state
    assert isinstance(state, TrainingState)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of(), state=state.copy())
    found = [record["loss"] for result in results for record in result.records]
    assert found == losses[-len(found) :]
    assert len(found) >= len(losses) - stop
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


def test_a_checkpoint_continues_in_another_rack_and_keeps_the_statistics_of_a_quantised_stream() -> None:
    config = tiny()
    config.cache.dtype = "int8"
    expected, _ = grown(config)
    kept: list[TrainingState] = []
    hooks = Hooks(on_checkpoint=lambda state: kept.append(state.copy()), checkpoint_every=4)
    ProgressiveTrainer(config, hooks=hooks).train_progressively(ProgressiveRackBuilder(config), loader_of(), 1)
    assert [state.step for state in kept] == [4]
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), state=kept[0])
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))
    for index, channels in expected.channels.items():
        assert channels.mean.equal(builder.channels[index].mean)
        assert channels.std.equal(builder.channels[index].std)


def test_a_checkpoint_of_another_stage_is_rejected() -> None:
    config = tiny()
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    with pytest.raises(StageInterruptedError) as interrupted:
        trainer.train_progressively(builder, loader_of(), hooks=stop_after(3))
    state = interrupted.value.state
    assert pickle.loads(pickle.dumps(interrupted.value)).state is None  # a model is not sent along with a message
    trainer.train_progressively(builder, loader_of(), 1, state=state)
    with pytest.raises(ConfigError, match="state: got a checkpoint at step 3; stage 1 trains other tensors"):
        trainer.train_progressively(builder, loader_of(), 2, state=state)
    trainer.train_progressively(builder, loader_of(), 2)
    with pytest.raises(ConfigError, match="state: got a checkpoint; no stage is left to train"):
        trainer.train_progressively(builder, loader_of(), 2, state=state)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_stage_is_evaluated_on_held_out_batches(objective: str) -> None:
    config = tiny(objective)
    held_out = loader_of(3)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    for stage in range(2):
        (result,) = trainer.train_progressively(builder, loader_of(), stage + 1, validation=held_out)
        rack, batch = builder.build_rack(), validation_batch(torch.cat(held_out), resolve_mask(config, stage))
        parts = rack.embedding, builder.stacks, rack.head
        (judged,) = judge_rack(*parts, [batch], stream=Stream("bfloat16"), boundary=stage)
        # The mean of three batches, and of all sequences at once: float32 sums in another order.
        assert result.validation_loss == pytest.approx(judged["validation_loss"], rel=1e-6)
    (result,) = ProgressiveTrainer(config).train_rack(ProgressiveRackBuilder(config), loader_of(), 1)
    assert result.validation_loss is None


def test_evaluating_changes_no_bit_of_the_training() -> None:
    config = tiny()
    expected, _ = grown(config)
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), validation=loader_of(2))
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


def test_held_out_batches_without_a_loss_position_are_an_error() -> None:
    config, one_token = tiny("clm"), [torch.ones(4, 1, dtype=torch.long)]
    with pytest.raises(ConfigError, match="validation: got batches without a loss position"):
        ProgressiveTrainer(config).train_progressively(
            ProgressiveRackBuilder(config), loader_of(), 1, validation=one_token
        )


def test_compilation_is_that_of_the_live_stacks_while_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against eager stacks that count their calls: the compiler itself needs a C++ toolchain."""
    expected, losses = grown(tiny())
    compiled: list[int] = []
    calls: list[int] = []

    def compiling(stack: Any) -> Callable[[Tensor], Tensor]:
        compiled.append(stack.creation_index)

        def run(stream: Tensor) -> Tensor:
            calls.append(stack.creation_index)
            return stack(stream)

        return run

    monkeypatch.setattr(torch, "compile", compiling)
    config = tiny()
    config.hardware.compile = True
    builder, found = grown(config)
    assert compiled == [0, 1]
    assert calls == [0] * STEPS + [1] * STEPS
    assert found == losses
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))
