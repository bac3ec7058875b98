"""The forecast of a stage's memory: against what torch allocates, and against arithmetic by hand for a large model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer, StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError, OutOfMemoryError
from stackwise_core.model.adapters import add_adapter
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.precision import convert_storage
from stackwise_core.stages.memory import Memory, Setting, memory
from stackwise_core.stages.remedies import does_not_fit, savings, table
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stage, resolve_stages
from stackwise_core.training import peak, training
from stackwise_core.training.peak import Peak
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, StageInputs, Trained, train_stage
from support.training import loader_of, same_bits, tiny, weights

G = "training.progressive."
T, B = 64, 4


def setting_of(changes: dict[str, Any], index: int, vocab_size: int = 257, **how: Any) -> tuple[Setting, Any]:
    values: dict[str, Any] = {
        "model": {"d_model": 64, "n_heads": 4, "d_ff": 160, "blocks_per_stack": 2},
        "data": {"seq_len": T},
        "training": {
            "batch_size": B,
            "warmup_steps": 0,
            "progressive": {"training_objective": "clm", "target_stacks": index + 1},
        },
        "hardware": {"threads": 1, "device": "cpu"},
    }
    apply_overrides(values, changes)
    config = StackWiseConfig.from_dict(values)
    shape = resolve_shape(config).model_copy(update={"vocab_size": vocab_size})
    how = {"loss_fraction": None, "cached": True, "cuda": False, **how}
    return Setting.of(config, shape, resolve_stage(config, index), **how), config


def model_of(setting: Setting, config: StackWiseConfig) -> StageModel:
    """What trains, as random tensors: no trunk is there, and none is needed."""
    shape, spec, stacks = setting.shape, setting.spec, dict[int, Stack]()
    for index in spec.anatomy.live:
        of = spec.stacks[index]
        stacks[index] = Stack(shape, of.n_blocks, index, of.precision)
        convert_storage(stacks[index], of.precision)
        for name, adapter in of.adapters.items():
            add_adapter(stacks[index], name, adapter.rank, adapter.alpha, 0)
    head, embedding = Head(shape), TokenEmbedding(shape)
    if spec.index == 0:
        head.projection.weight = embedding.weight
    return StageModel.assemble(config, spec.anatomy, stacks, head, embedding, torch.device("cpu"))


def trained(setting: Setting, config: StackWiseConfig, n_steps: int, trunk: Sequence[nn.Module] = ()) -> Trained:
    """A stage that trains for some steps on one batch."""
    tokens = torch.randint(0, setting.shape.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    batch: dict[str, Any] = {
        "input_ids": tokens,
        "targets": tokens,
        "masks": torch.ones_like(tokens, dtype=torch.bool),
        "sequence_ids": torch.arange(B),
        "stack_idx": setting.spec.index,
        "trunk_activations": torch.randn(B, T, 64).bfloat16() if setting.spec.anatomy.boundary else None,
    }
    spec = setting.spec.model_copy(update={"optim": setting.spec.optim.model_copy(update={"steps": n_steps})})
    batches: list[Any] = [batch] * n_steps
    return train_stage(StageInputs(spec, model_of(setting, config), batches, trunk=trunk), Hooks())


CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "first": ({}, 0, 257),
    "recomputed": ({"training.activation_checkpointing": True, "model.blocks_per_stack": 4}, 1, 257),
    "in parts, large head": ({"training.accumulation_steps": 2}, 1, 4096),
    "8 bits": ({"training.optimizer": "adamw8bit", f"{G}trunk_strategy": "full"}, 1, 257),
    "muon below": ({"training.optimizer": "muon", f"{G}building_mode": "prepend"}, 1, 257),
    "nf4, grouped, normed": (
        {f"{G}new_stack_precision": "qlora", f"{G}qlora_rank": 8, "model.n_kv_heads": 2, "model.qk_norm": True},
        1,
        257,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_what_a_stage_measures_and_what_torch_allocates(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, index, vocab_size = CASES[case]
    setting, config = setting_of(changes, index, vocab_size)
    monkeypatch.setattr(peak, "WATCHED", 3)
    measured = trained(setting, config, 3).peak_bytes
    assert memory(setting).peak == pytest.approx(measured, rel=0.1)
    with peak_bytes(torch.device("cpu")) as exact:  # of all that is allocated, from the weights on
        watched = trained(setting, config, 2)  # the second step has moments
    assert measured == pytest.approx(exact[0], rel=0.02)
    assert watched.peak_bytes is None
    assert capfd.readouterr().err == ""


LARGE = {
    "model.d_model": 8192,
    "model.n_heads": 64,
    "model.n_kv_heads": 8,
    "model.d_ff": 28672,
    "data.seq_len": 4096,
    "training.batch_size": 1,
    f"{G}new_stack_precision": "bfloat16",
}


def test_a_stage_of_the_shape_of_70b_is_as_counted_by_hand() -> None:
    found = memory(setting_of(LARGE, 1, 128256, cuda=True)[0])
    assert found.weights / 1e9 == pytest.approx(4 * 2.762, rel=0.001)
    assert found.gradients == found.weights
    assert found.moments / 1e9 == pytest.approx(8 * 2.762, rel=0.001)
    assert found.casts / 1e9 == pytest.approx(2 * 1.711, rel=0.001)
    per_position = 2 * (4 * 4 * 8192 + 2 * 2 * 8192 + 2 * 2 * (8192 + 1024) + 2 * 4 * 28672)
    assert found.activations / 1e9 == pytest.approx(4096 * per_position / 1e9, rel=0.01)
    assert found.boundary == 4 * 4096 * 8192
    assert 44.2e9 < found.peak < 51e9  # the optimizer step; the loss with whole logits
    eight, _ = setting_of({**LARGE, "training.optimizer": "adamw8bit"}, 1, 128256, cuda=True)
    assert memory(eight).moments / 1e9 == pytest.approx(5.6, abs=0.05)
    frozen, _ = setting_of({**LARGE, f"{G}train_head": False}, 1, 128256, cuda=True)
    assert memory(frozen).gradients / 1e9 == pytest.approx(4 * 1.711, rel=0.001)
    replicas = {**LARGE, "training.batch_size": 4, "hardware.processes": 4}
    assert memory(setting_of(replicas, 1, 128256, cuda=True)[0]).moments == found.moments


def test_processes_share_out_a_stage_that_would_not_fit_otherwise() -> None:
    two = {"hardware.processes": 2}
    whole, _ = setting_of({**two, "hardware.shard": "never"}, 1, 4096)
    always, _ = setting_of({**two, "hardware.shard": "always"}, 1, 4096)
    assert (whole.shards, always.shards) == (1, 2)
    mine, all_of_it = memory(always), memory(whole)
    n_trained = all_of_it.gradients // 4
    assert (mine.gradients, mine.moments) == (2 * n_trained, 4 * n_trained)
    block = 4 * 64 * 64 + 3 * 64 * 160 + 2 * 64
    assert n_trained == 2 * block + 4096 * 64 + 64  # two blocks, head and last norm: none is frozen here
    assert mine.weights == 2 * n_trained + 4 * (2 * block + 4096 * 64)
    assert mine.peak < all_of_it.peak
    there = [memory(setting_of(two, 1, 4096, there=n)[0]).peak for n in (0, all_of_it.peak, all_of_it.peak - 1)]
    assert there == [all_of_it.peak, all_of_it.peak, mine.peak]
    assert ("hardware.shard", "always") in [(way.key, way.value) for way in savings(whole)]
    assert "hardware.shard" not in [way.key for way in savings(always)]
    eight, _ = setting_of({**two, "training.optimizer": "adamw8bit"}, 1, 4096, there=1)
    assert eight.shards == 1
    for key, shards in (("auto", 2), ("never", 1)):
        _, config = setting_of({**two, "training.joint_steps": 5, "hardware.shard": key}, 1)
        joint = Setting.of(config, whole.shape, resolve_stages(config)[-1], loss_fraction=None, cached=True, cuda=False)
        assert joint.shards == shards


def test_each_saving_is_what_the_setting_gives() -> None:
    setting, _ = setting_of({}, 1, 4096)
    ways = {saving.key: saving for saving in savings(setting)}
    assert next(iter(ways)) == "training.activation_checkpointing"
    assert [key for key, way in ways.items() if way.same_stage] == ["training.activation_checkpointing"]
    assert len(ways) == 5
    for key, way in ways.items():
        other, _ = setting_of({key: way.value}, 1, 4096)
        assert way.n_bytes == memory(setting).peak - memory(other).peak, key
        assert key not in {saving.key for saving in savings(other)} or key.endswith(("steps", "batch_size"))
    assert str(ways["training.progressive.train_head"]).startswith("training.progressive.train_head=false saves 2")


def test_what_does_not_fit_is_said_and_what_cannot_is_refused() -> None:
    setting, _ = setting_of({}, 1, 4096, cuda=True)
    forecast = memory(setting)
    assert does_not_fit(setting, forecast.peak) == does_not_fit(setting, 0) == ""
    said = does_not_fit(setting, forecast.peak - 1)
    assert table(forecast) in said
    assert "training.accumulation_steps=2 saves" in said
    with pytest.raises(ConfigError, match="of weights, gradients and moments; the device has"):
        does_not_fit(setting, forecast.weights)


@pytest.mark.parametrize("index", [0, 1])
def test_out_of_memory_is_told_with_remedies_and_the_rack_stays(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("clm")
    builder = ProgressiveRackBuilder(config)
    if index:
        ProgressiveTrainer(config).train_progressively(builder, loader_of(), 1)
    before = weights(builder.build_rack()) if index else {}
    real = training.train_step

    def fails(*given: Any, **named: Any) -> Any:
        if given[4] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(*given, **named)

    monkeypatch.setattr(training, "train_step", fails)
    with pytest.raises(OutOfMemoryError) as told:
        ProgressiveTrainer(config).train_progressively(builder, loader_of(), index + 1)
    message = str(told.value)
    assert message.startswith(f"stage {index}: not enough memory on the device. It takes about ")
    assert message.count(" saves ") == 3
    assert "training.accumulation_steps=2 saves" in message
    assert "The rack is as it was before the stage" in message
    if index:
        assert same_bits(before, {n: p for n, p in weights(builder.build_rack()).items() if n in before})


def test_a_fault_that_is_no_want_of_memory_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise ValueError("shapes differ")

    monkeypatch.setattr(training, "train_step", fails)
    config = tiny("clm")
    with pytest.raises(ValueError, match="shapes differ"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), loader_of(), 1)


def test_a_trunk_that_computes_the_boundary_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "WATCHED", 3)
    setting, config = setting_of({"model.vocab_size": 4096}, 1, 4096, cached=False)
    below = Stack(setting.shape, 2, 0, "full")
    with_trunk = trained(setting, config, 3, [TokenEmbedding(setting.shape), below]).peak_bytes
    assert memory(setting).peak == pytest.approx(with_trunk, rel=0.1)
    alone = trained(setting, config, 3).peak_bytes
    assert with_trunk == (alone or 0) + 4 * (4096 * 64 + sum(weight.numel() for weight in below.parameters()))


def test_a_card_is_asked_for_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def reset(device: torch.device) -> None:
        asked.append(f"reset {device}")

    def most(device: torch.device) -> int:
        return len(asked)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", most)
    card = Peak(torch.device("cuda:0"), ())
    assert (card.n_bytes, asked) == (None, ["reset cuda:0"])
    batch: Any = {}
    with card.step(torch.optim.SGD([torch.zeros(1)]), batch):
        asked.append("a step")
    assert card.n_bytes == 2


def test_an_adopted_stage_takes_nothing() -> None:
    setting, _ = setting_of({}, 1)
    adopted = setting.spec.model_copy(update={"adopted": True})
    assert memory(Setting(setting.shape, adopted, T)) == Memory(0, 0, 0, 0, 0, 0, 0, 0)
