"""Growing in memory by `ProgressiveTrainer`: stages, caches, checkpoints, evaluation and compilation."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, StageInterruptedError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import Hooks, TrainingState
from support.training import STEPS, T, loader_of, same_bits, tiny, weights

pytestmark = pytest.mark.usefixtures("one_thread_per_module")


# ---------------------------------------------------------------- growing in memory


def grown(config: StackWiseConfig, loader: Iterable[Any] | None = None) -> tuple[ProgressiveRackBuilder, list[float]]:
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of() if loader is None else loader)
    return builder, [record["loss"] for result in results for record in result.records]


def states(builder: ProgressiveRackBuilder) -> str:
    """All tensors, in whatever type they are stored."""
    return tensor_digest(builder.build_rack())


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


@pytest.mark.parametrize(
    ("precision", "init"), [("full", "auto"), ("full", "random"), ("bfloat16", "copy_zero"), ("qlora", "auto")]
)
def test_stacks_already_there_and_untrained_are_trained_first(precision: Any, init: Any) -> None:
    """As if each had been added when its stage begins: it copies a trained neighbour, and NF4 is of trained weights."""
    growth = {"target_stacks": 3, "new_stack_precision": precision, "qlora_rank": 2}
    config = tiny(new_stack_init=init, progressive=growth)
    expected, losses = grown(config)
    builder = ProgressiveRackBuilder(config)
    stacks = [builder.append_stack() for _ in range(3)]
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of(), 3)
    assert [result.index for result in results] == [0, 1, 2]
    assert (builder.n_trained, builder.stacks) == (3, stacks)
    assert [record["loss"] for result in results for record in result.records] == losses
    assert states(builder) == states(expected)


def test_a_stack_that_was_edited_by_hand_trains_as_it_is() -> None:
    config = tiny(learning_rate=1e-9, min_learning_rate=0.0)
    builder = ProgressiveRackBuilder(config)
    first, second = builder.append_stack(), builder.append_stack()
    for stack in (first, second):
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.add_(1.0)
    before = weights(builder.build_rack().stacks)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), 2)
    for name, weight in weights(builder.build_rack().stacks).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=1e-6)


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
    config.training.loss_weighting = "elbo"
    for train in (trainer.train_progressively, trainer.train_rack):
        with pytest.raises(ConfigError, match="loss_weighting: got 'elbo'; needs"):
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
