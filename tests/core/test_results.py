"""What a trainer reports, logs and keeps in RAM, and a stage that fails: the rack is as it was before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, NonFiniteLossError, StageInterruptedError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages import costs
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import Hooks
from support.training import T, loader_of
from support.training import tiny as tiny_of

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

LOADER, STEPS = loader_of(), 3


def tiny(objective: str = "mlm", **training: Any) -> StackWiseConfig:
    return tiny_of(objective, **{"steps_per_stack": STEPS, **training})


ROW_BYTES = T * 16 * 2
"""Of a row of the boundary in bfloat16."""


# ---------------------------------------------------------------- results


def test_a_result_says_what_its_stage_was() -> None:
    growth = {"time_interpretation": "depth", "num_time_steps": 13, "time_per_stack": 4, "target_stacks": 3}
    config = tiny(progressive=growth, joint_steps=2)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    builder.append_stack()
    builder.prepend_stack(precision="bfloat16")
    results = trainer.train_progressively(builder, LOADER, validation=LOADER[:1])
    assert [result.mode for result in results] == ["append", "prepend", "append", "joint"]
    assert [result.precision for result in results] == ["full", "bfloat16", "full", None]
    assert [result.time_step for result in results] == [0, 4, 8, None]
    ratios = [result.mask_ratio for result in results]
    assert ratios == [pytest.approx(0.15), pytest.approx(0.4), pytest.approx(0.65), None]
    assert [result.steps for result in results] == [STEPS, STEPS, STEPS, 2]
    for result in results:
        assert result.losses == [record["loss"] for record in result.records]
        assert result.losses[-1] == result.loss
        assert result.seconds > 0
        assert result.validation_loss
    shape, built = resolve_shape(config), builder.as_built(config)
    for stage in range(3):
        spec = resolve_stage(built, stage)
        assert results[stage].parameters["trained"] == costs.trainable_parameters(shape, spec)
    assert results[2].parameters["total"] == costs.rack_parameters(shape, resolve_stage(built, 2))
    later = trainer.train_rack(builder, LOADER, target_stacks=4)
    assert trainer.history == [*results, *later]


@pytest.mark.parametrize(
    ("objective", "time", "ratio"), [("mlm", "none", 0.4), ("clm", "none", None), ("mlm", "input", None)]
)
def test_the_mask_ratio_is_that_of_the_inputs(objective: str, time: str, ratio: float | None) -> None:
    config = tiny(objective, progressive={"time_interpretation": time}, mask_ratio=0.4)
    (result,) = ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), LOADER, 1)
    assert (result.mask_ratio, result.time_step) == (ratio, None)
    assert result.parameters["total"] == costs.rack_parameters(resolve_shape(config), resolve_stage(config, 0))


def test_the_log_has_a_line_for_each_stage_and_the_notes_once(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(progressive={"time_per_stack": 3})
    with caplog.at_level(logging.INFO, logger="stackwise"):
        builder = ProgressiveRackBuilder(config)
        results = ProgressiveTrainer(config).train_progressively(builder, LOADER, validation=LOADER[:1])
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "not used" in line] == [lines[0]]
    assert "time_per_stack" in lines[0]
    for stage, how in enumerate(("from scratch, full", "append, frozen, full")):  # below the first lies no trunk
        begins, ends = (f"stage {stage} ({how}) {what}: " for what in ("begins", "ends"))
        assert sum(line.startswith(begins) and line.endswith(f"{STEPS} steps") for line in lines) == 1
        trained, total = results[stage].parameters["trained"], results[stage].parameters["total"]
        losses = f"loss {results[stage].loss:.4f}, validation loss {results[stage].validation_loss:.4f}"
        ended = f"{ends}{losses}, {trained:,} of {total:,} parameters trained, {results[stage].seconds:.1f} s"
        assert lines.count(ended) == 1


def test_the_log_says_where_a_stage_goes_on(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = tiny()

    def stopped(builder: ProgressiveRackBuilder, folder: Path | None = None) -> None:
        hooks = Hooks(should_stop=iter([False, True]).__next__, checkpoint_folder=folder)
        with pytest.raises(StageInterruptedError):
            ProgressiveTrainer(config, hooks=hooks).train_progressively(builder, LOADER, 1)

    def goes_on(builder: ProgressiveRackBuilder, folder: Path | None = None) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="stackwise"):
            hooks = Hooks(checkpoint_folder=folder)
            ProgressiveTrainer(config, hooks=hooks).train_progressively(builder, LOADER, 1)
        return [record.getMessage() for record in caplog.records]

    stopped(builder := ProgressiveRackBuilder(config))
    assert "stage 0 goes on after step 2, where it was stopped" in goes_on(builder)
    stopped(ProgressiveRackBuilder(config), tmp_path)
    assert "stage 0 goes on after step 2, from its checkpoint" in goes_on(ProgressiveRackBuilder(config), tmp_path)
    stopped(builder := ProgressiveRackBuilder(config))
    config.training.learning_rate *= 2
    assert "stage 0 starts anew: its settings are not those that it was stopped with" in goes_on(builder)


# ---------------------------------------------------------------- activations in RAM


@pytest.mark.parametrize(("limit", "rows"), [(50 * 2**30, 16), (5 * ROW_BYTES, 5), (1, 0)])
def test_the_cache_in_ram_is_bounded_and_changes_no_bit(limit: int, rows: int) -> None:
    config = tiny("clm", steps_per_stack=6)
    config.cache.max_gb = limit / 2**30
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    assert trainer.cache_info() == {}
    results = trainer.train_progressively(builder, LOADER, 2)
    full = rows < 16
    found = {"boundary": 1, "rows": rows, "bytes": rows * ROW_BYTES, "limit": limit, "full": full}
    assert trainer.cache_info() == found
    assert [result.cache_bytes for result in results] == [0, rows * ROW_BYTES]
    config = tiny("clm", steps_per_stack=6, progressive={"cache_activations": False})
    live, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    trainer.train_progressively(live, LOADER, 2)
    assert trainer.cache_info() == {}
    assert tensor_digest(live.build_rack()) == tensor_digest(builder.build_rack())


# ---------------------------------------------------------------- a stage that fails


class Failing:
    """Batches that end in an error."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __iter__(self) -> Iterator[Tensor]:
        for batch in LOADER:
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "the first stage": (2, {}),
    "frozen": (STEPS + 2, {}),
    "full, half": (STEPS + 2, {"progressive": {"trunk_strategy": "full", "new_stack_precision": "half"}}),
    "qlora": (
        STEPS + 2,
        {
            "progressive": {
                "trunk_strategy": "qlora",
                "qlora_enabled": True,
                "qlora_rank": 2,
                "new_stack_precision": "qlora",
            }
        },
    ),
    "joint": (2 * STEPS + 2, {"joint_steps": 4}),
}


@pytest.mark.parametrize("way", WAYS)
def test_after_an_error_the_same_call_begins_the_stage_cleanly(way: str) -> None:
    after, training = WAYS[way]
    error = KeyboardInterrupt() if way == "frozen" else OSError("the disk is gone")
    config = tiny(**training)
    expected = ProgressiveRackBuilder(config)
    losses = [r.losses for r in ProgressiveTrainer(config).train_progressively(expected, LOADER)]
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    rack = builder.build_rack()
    with pytest.raises(type(error)):
        trainer.train_progressively(builder, Failing(error, after))
    done = len(trainer.history)
    assert done == after // STEPS
    if done:  # of the finished stages nothing is lost
        reference = ProgressiveRackBuilder(config)
        config.training.joint_steps = 0
        ProgressiveTrainer(config).train_progressively(reference, LOADER, done)
        config.training.joint_steps = training.get("joint_steps", 0)
        for index in range(done):
            assert tensor_digest(reference.stack(index)) == tensor_digest(builder.stack(index))
    trainer.train_progressively(builder, LOADER)
    assert [result.losses for result in trainer.history] == losses
    assert builder.build_rack() is rack
    assert tensor_digest(rack) == tensor_digest(expected.build_rack())


def test_after_a_loss_that_explodes_the_rack_is_as_before() -> None:
    config = tiny()
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    before = tensor_digest(builder.stack(0)), tensor_digest(builder.build_rack().head)
    config.training.learning_rate, config.training.gradient_clip = 1e30, 0.0
    with pytest.raises(NonFiniteLossError):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert (tensor_digest(builder.stack(0)), tensor_digest(builder.build_rack().head)) == before
    assert builder.n_trained == 1


def test_a_stage_stays_trained_if_its_evaluation_fails() -> None:
    config = tiny("clm")
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    with pytest.raises(ConfigError, match="without a loss position"):
        trainer.train_progressively(builder, LOADER, 1, validation=[LOADER[0][:, :1]])
    assert (builder.n_trained, [result.steps for result in trainer.history]) == (1, [STEPS])
