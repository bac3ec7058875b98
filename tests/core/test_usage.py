"""The library as its users write it: what the calls mean, from the tensors that changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stackwise_core import (
    MaskSpec,
    ProgressiveDataLoader,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
    TimeStepMasking,
)
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from stackwise_core.model.adapters import adapter_names, adapter_parameters, base_state
from stackwise_core.training.boundary import LiveTrunk

N, T, BATCH, STEPS = 24, 12, 8, 4
TOKENS = torch.randint(0, 256, (N, T), generator=torch.Generator().manual_seed(0))


def loader_of(tokens: Tensor = TOKENS) -> DataLoader[Any]:
    return DataLoader(tokens, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def tiny(**growth: Any) -> StackWiseConfig:
    """Return a configuration by attribute assignment, as a user does."""
    config = StackWiseConfig()
    config.model.d_model, config.model.n_heads, config.model.blocks_per_stack = 16, 2, 1
    config.training.steps_per_stack, config.training.warmup_steps = STEPS, 1
    config.training.batch_size = BATCH
    config.hardware.threads, config.hardware.device = 1, "cpu"
    for name, value in growth.items():
        setattr(config.training.progressive, name, value)
    return config


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


# ---------------------------------------------------------------- building


def test_plain_dimensions_make_the_rack_they_say() -> None:
    builder = ProgressiveRackBuilder(vocab_size=300, d_model=32, n_heads=2)
    first = builder.append_stack(n_blocks=2, precision="full")
    below = builder.prepend_stack(n_blocks=1, precision="bfloat16")
    rack, info = builder.build_rack(), builder.get_rack_info()
    assert builder.stacks == [below, first]
    assert rack(TOKENS).shape == (N, T, 300)
    assert (info["n_stacks"], info["n_blocks"]) == (2, 3)
    assert [(entry["creation_index"], entry["precision"]) for entry in info["stacks"]] == [(1, "bfloat16"), (0, "full")]
    assert info["parameters"] == sum(parameter.numel() for parameter in rack.parameters())


def test_freezing_some_stacks_leaves_the_others() -> None:
    builder = ProgressiveRackBuilder(config=tiny())
    first, second, third = (builder.append_stack() for _ in range(3))
    builder.freeze_trunk(indices=[0, 2])
    trainable = [any(p.requires_grad for p in stack.parameters()) for stack in (first, second, third)]
    assert trainable == [False, True, False]


@pytest.mark.parametrize("precision", ["full", "qlora"])
def test_freezing_all_but_qlora_leaves_exactly_the_adapters(precision: Any) -> None:
    builder = ProgressiveRackBuilder(config=tiny(qlora_enabled=True, qlora_rank=2, new_stack_precision=precision))
    first, second = builder.append_stack(), builder.append_stack()
    builder.freeze_all_but_qlora(indices=[0])
    trainable = {id(parameter) for parameter in first.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter_parameters(first)}
    assert trainable
    builder.freeze_all_but_qlora()
    stacks = [*first.parameters(), *second.parameters()]
    adapters = [*adapter_parameters(first), *adapter_parameters(second)]
    assert {id(p) for p in stacks if p.requires_grad} == {id(p) for p in adapters}
    assert builder.get_rack_info()["stacks"][1]["trainable_parameters"] == sum(
        parameter.numel() for parameter in adapter_parameters(second)
    )


def test_nothing_to_adapt_is_an_error() -> None:
    builder = ProgressiveRackBuilder(config=tiny())
    builder.append_stack()
    with pytest.raises(ConfigError, match="none of these stacks has an adapter"):
        builder.freeze_all_but_qlora(indices=[0])


def test_one_stack_more_than_max_stacks_is_an_error() -> None:
    config = tiny(max_stacks=2, target_stacks=2)
    builder = ProgressiveRackBuilder(config=config)
    builder.append_stack()
    builder.prepend_stack()
    for add in (builder.append_stack, builder.prepend_stack):
        with pytest.raises(ConfigError, match="at most 2 stacks"):
            add()
    with pytest.raises(ConfigError, match="max_stacks is 2"):
        ProgressiveTrainer(config).train_rack(builder, loader_of(), target_stacks=3)
    assert (builder.n_stacks, builder.n_trained) == (2, 0)


# ---------------------------------------------------------------- training


def test_six_stacks_by_either_call() -> None:
    racks: list[dict[str, Tensor]] = []
    for call in ("train_progressively", "train_rack"):
        config = tiny()
        builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
        results = getattr(trainer, call)(rack_builder=builder, dataloader=loader_of(), target_stacks=6)
        assert [result.index for result in results] == list(range(6))
        racks.append(tensors(builder.build_rack()))
    assert all(tensor.equal(racks[1][name]) for name, tensor in racks[0].items())


def test_prepending_trains_the_prepended_stack_alone() -> None:
    config = tiny(training_objective="clm")
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
    trainer.train_progressively(rack_builder=builder, dataloader=loader_of(), target_stacks=2)
    rack, trunk = builder.build_rack(), list(builder.stacks)
    new = builder.prepend_stack(n_blocks=2)
    before = [tensors(module) for module in (*trunk, rack.embedding, rack.head)]
    fresh, logits = tensors(new), rack(TOKENS)
    # copy_zero: the new stack starts as the identity, and its zeroed projections are what must have moved.
    results = trainer.train_progressively(rack_builder=builder, dataloader=loader_of(), target_stacks=3)
    assert [result.index for result in results] == [2]
    assert builder.stacks == [new, *trunk]
    assert all(
        same(tensors_, module) for tensors_, module in zip(before, (*trunk, rack.embedding, rack.head), strict=True)
    )
    assert not any(tensor.equal(new.state_dict()[name]) for name, tensor in fresh.items())
    assert not rack(TOKENS).equal(logits)


def test_untrained_stacks_train_first_in_creation_order() -> None:
    """Each of them alone: when stack 0 trains, stack 1, though below it in the rack, is not there yet."""
    config = tiny()
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
    first = builder.append_stack()
    second = builder.prepend_stack()
    untouched = tensors(second)
    trainer.train_rack(builder, loader_of(), target_stacks=1)
    assert builder.n_trained == 1
    assert same(untouched, second)
    trained = tensors(first)
    results = trainer.train_rack(builder, loader_of(), target_stacks=3)
    assert [result.index for result in results] == [1, 2]
    assert same(trained, first)
    assert not same(untouched, second)
    alone = ProgressiveRackBuilder(config=config)
    trainer.train_rack(alone, loader_of(), target_stacks=1)
    assert same(trained, alone.stack(0))


def test_without_a_target_the_rack_trains_whole() -> None:
    config = tiny()
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
    builder.append_stack()
    builder.append_stack(n_blocks=2)
    rack = builder.build_rack()
    before = [tensors(module) for module in (*builder.stacks, rack.embedding, rack.head)]
    (result,) = trainer.train_rack(builder, loader_of(), target_stacks=None)
    assert len(result.records) == STEPS
    for tensors_, module in zip(before, (*builder.stacks, rack.embedding, rack.head), strict=True):
        assert not any(tensor.equal(module.state_dict()[name]) for name, tensor in tensors_.items())
    with pytest.raises(ConfigError, match="the rack has no stack yet"):
        trainer.train_rack(ProgressiveRackBuilder(config=config), loader_of())


def test_an_assignment_between_calls_changes_the_next_stage() -> None:
    config = tiny(qlora_enabled=True, qlora_rank=2)
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
    trainer.train_progressively(builder, loader_of(), target_stacks=2)
    trunk = list(builder.stacks)
    base = [[tensor.clone() for name, tensor in stack.state_dict().items() if "lora" not in name] for stack in trunk]

    frozen = [tensors(stack) for stack in trunk]
    trainer.train_progressively(builder, loader_of(), target_stacks=3)
    assert all(same(before, stack) for before, stack in zip(frozen, trunk, strict=True))

    config.training.progressive.trunk_strategy = "qlora"
    config.training.progressive.progressive_qlora = True
    config.training.progressive.progressive_qlora_rank = 1
    trainer.train_progressively(builder, loader_of(), target_stacks=4)
    for before, bases, stack in zip(frozen, base, trunk, strict=True):
        assert adapter_names(stack) == ["stack", "progressive"]
        assert all(parameter.abs().sum() > 0 for parameter in adapter_parameters(stack, "progressive"))
        moved = [name for name, tensor in before.items() if not tensor.equal(stack.state_dict()[name])]
        assert {name for name in before if "lora" in name} == set(moved)
        after = [tensor for name, tensor in stack.state_dict().items() if "lora" not in name]
        assert all(a.equal(b) for a, b in zip(after, bases, strict=True))

    config.training.progressive.building_mode = "prepend"
    config.training.progressive.trunk_strategy = "frozen"
    trainer.train_progressively(builder, loader_of(), target_stacks=5)
    assert [stack.creation_index for stack in builder.stacks] == [4, 0, 1, 2, 3]

    config.training.progressive.trunk_strategy = "full"
    before_full = [tensors(stack) for stack in trunk]
    trainer.train_progressively(builder, loader_of(), target_stacks=6)
    assert not any(same(before, stack) for before, stack in zip(before_full, trunk, strict=True))


def test_a_trunk_of_adapters_is_one_choice() -> None:
    """No key of adapters: each trunk stack gets a progressive one, which trains, and nothing else of it does."""
    config = tiny(trunk_strategy="qlora", target_stacks=3)
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config=config)
    trainer.train_progressively(builder, loader_of(), target_stacks=2)
    base = {name: tensor.clone() for name, tensor in base_state(builder.stack(1)).items()}
    trainer.train_progressively(builder, loader_of(), target_stacks=3)
    assert [adapter_names(stack) for stack in builder.stacks] == [["progressive"], ["progressive"], []]
    for stack in builder.stacks[:2]:
        assert all(matrix.any() for matrix in adapter_parameters(stack, "progressive"))
        assert {matrix.shape[0] for matrix in adapter_parameters(stack)[::2]} == {8}
    assert all(tensor.equal(base[name]) for name, tensor in base_state(builder.stack(1)).items())


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("cached", [True, False])
def test_a_cached_trunk_runs_once_a_row(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 rows under one view, 9 steps of 8 read each three times."""
    rows = 0
    call = LiveTrunk.__call__

    def counting(self: LiveTrunk, input_ids_BT: Tensor, time_step: Tensor | None = None) -> Tensor:
        nonlocal rows
        rows += len(input_ids_BT)
        return call(self, input_ids_BT, time_step)

    monkeypatch.setattr(LiveTrunk, "__call__", counting)
    config = tiny(training_objective="clm", cache_activations=cached)
    config.training.steps_per_stack = 9
    ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config=config), loader_of(), target_stacks=2)
    assert rows == (N if cached else 9 * BATCH)


def test_a_progressive_loader_stands_for_the_loader_it_wraps() -> None:
    """Handed to the trainer as it is; every stage still has the index, ratio and trunk of its own."""
    racks: list[dict[str, Tensor]] = []
    config = tiny(time_interpretation="depth")
    masking = TimeStepMasking(config)
    wrapped = ProgressiveDataLoader(
        base_dataloader=loader_of(),
        masking_strategy=masking,
        stack_idx=0,
        trunk_activations=None,
        cache_activations=True,
    )
    for dataloader in (loader_of(), wrapped):
        builder = ProgressiveRackBuilder(config=config)
        ProgressiveTrainer(config).train_progressively(rack_builder=builder, dataloader=dataloader, target_stacks=3)
        racks.append(tensors(builder.build_rack()))
    assert all(tensor.equal(racks[1][name]) for name, tensor in racks[0].items())


@pytest.mark.parametrize("jointly", [False, True])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_progressive_loader_that_masks_otherwise_is_refused(objective: str, jointly: bool) -> None:
    config = tiny(training_objective=objective, time_interpretation="depth")
    masks = MaskSpec(seed=0, ratio=0.15, corruption="bert", mask_token=256, n_regular_tokens=256)  # of stack 0 only
    builder, trainer = ProgressiveRackBuilder(config=config), ProgressiveTrainer(config)
    builder.append_stack()
    builder.append_stack()
    wrapped = ProgressiveDataLoader(loader_of(), masking_strategy=masks)
    with pytest.raises(ConfigError, match=r"masking_strategy: got .*make the two equal"):
        trainer.train_rack(builder, wrapped, target_stacks=None if jointly else 2)
    assert builder.n_trained == (0 if jointly or objective == "clm" else 1)


def test_activations_of_one_trunk_are_refused_by_the_trainer() -> None:
    wrapped = ProgressiveDataLoader(loader_of(), trunk_activations=torch.zeros(N, T, 16))
    config = tiny(training_objective="clm")
    with pytest.raises(ConfigError, match="trunk_activations"):
        ProgressiveTrainer(config).train_rack(ProgressiveRackBuilder(config=config), wrapped, target_stacks=1)


def test_batches_of_dicts_and_tuples_train_alike() -> None:
    racks: list[dict[str, Tensor]] = []
    for dataset in (TOKENS, TensorDataset(TOKENS), [{"input_ids": row} for row in TOKENS.int()]):
        builder = ProgressiveRackBuilder(config=tiny())
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH)  # pyright: ignore[reportArgumentType]
        ProgressiveTrainer(tiny()).train_rack(rack_builder=builder, dataloader=loader, target_stacks=1)
        racks.append(tensors(builder.build_rack()))
    for rack in racks[1:]:
        assert all(tensor.equal(rack[name]) for name, tensor in racks[0].items())


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_a_custom_loss_sees_targets_of_the_batch_at_the_masks(name: str) -> None:
    """Every position is to say 'a' where the mask lets it: that is learnt, and nothing else is asked."""
    seen: list[Tensor] = []

    def loss(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
        seen.append(targets_P)
        return nn.functional.cross_entropy(logits_PV, targets_P, reduction="none")

    config = tiny(training_objective="custom")
    config.training.custom_loss = loss
    config.training.steps_per_stack, config.training.learning_rate = 30, 1e-2
    masks = torch.arange(T) % 2 == 0
    rows = [{"input_ids": row, name: torch.where(masks, 97, 98), "masks": masks} for row in TOKENS]
    loader: DataLoader[Any] = DataLoader(rows, batch_size=BATCH)  # pyright: ignore[reportArgumentType]
    builder = ProgressiveRackBuilder(config=config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader, target_stacks=2)
    assert len(seen) == 60
    assert all(targets.tolist() == [97] * (BATCH * T // 2) for targets in seen)
    assert results[-1].loss < 0.1 < 5 < results[0].records[0]["loss"]
    config.training.custom_loss = ""
    with pytest.raises(ConfigError, match="custom objective needs targets"):
        ProgressiveTrainer(config).train_progressively(builder, loader_of(), target_stacks=3)


def test_a_mapping_may_be_a_function() -> None:
    config = tiny(time_interpretation="depth", max_stacks=4, num_time_steps=20)
    config.training.progressive.stack_time_mapping = lambda stack_idx, max_stacks, num_time_steps: (
        stack_idx * num_time_steps // max_stacks
    )
    masking = TimeStepMasking(config)
    assert [masking.get_time_step_for_stack(stack) for stack in range(4)] == [0, 5, 10, 15]
    light, heavy = (masking.generate_masks_for_stack(TOKENS, stack) for stack in (0, 3))
    assert (light & ~heavy).sum() == 0
    assert light.sum() < heavy.sum()


# ---------------------------------------------------------------- what an attack found


def _config(**changes: Any) -> StackWiseConfig:
    values: dict[str, Any] = {
        "model": {"d_model": 16, "n_heads": 2, "blocks_per_stack": 1},
        "training": {"steps_per_stack": 3, "warmup_steps": 0, "batch_size": 8},
        "hardware": {"threads": 1, "device": "cpu"},
    }
    apply_overrides(values, {key.replace("__", "."): value for key, value in changes.items()})
    return StackWiseConfig.from_dict(values)


LOADER = [torch.randint(0, 256, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (8, 7, 4)]
GROWTH = "training__progressive__"


def test_a_last_batch_may_have_fewer_rows_than_parts() -> None:
    config = _config(training__accumulation_steps=8)
    (result,) = ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), LOADER, 1)
    whole = _config()
    (reference,) = ProgressiveTrainer(whole).train_progressively(ProgressiveRackBuilder(whole), LOADER, 1)
    assert result.loss == pytest.approx(reference.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        (
            {
                f"{GROWTH}qlora_enabled": True,
                f"{GROWTH}qlora_strategy": "variable",
                f"{GROWTH}qlora_configs": {n: {"rank": 2, "alpha": 1.0} for n in range(3)},
            },
            8,
            "stacks 3, 4, 5, 6 and 1 more are without an entry",
        ),
        (
            {
                f"{GROWTH}time_interpretation": "depth",
                f"{GROWTH}stack_time_mapping": "custom",
                f"{GROWTH}time_mapping": [0, 1, 2],
            },
            5,
            "has no step for stack 3",
        ),
        ({}, 0, "a number of stacks from 1 to 12"),
        ({}, -1, "a number of stacks from 1 to 12"),
        ({}, "2", "a number of stacks from 1 to 12"),
    ],
)
def test_an_impossible_target_is_refused_before_the_first_step(
    changes: dict[str, Any], target: Any, message: str
) -> None:
    config = _config(**changes)
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(ConfigError, match=message):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, target)
    assert builder.n_stacks == 0


def test_a_stack_that_could_not_train_is_refused_whoever_added_it() -> None:
    config = _config()
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    builder.append_stack(precision="nvfp4")
    trainer.train_progressively(builder, LOADER, 2)
    with pytest.raises(ConfigError, match="stack 0 is quantised and has no adapter"):
        trainer.train_rack(builder, LOADER)
    full = _config(**{f"{GROWTH}trunk_strategy": "full"})
    with pytest.raises(ConfigError, match="these weights, which would be quantised"):
        ProgressiveTrainer(full).train_progressively(builder, LOADER, 3)


def test_joint_training_takes_the_whole_rack_or_none() -> None:
    config = _config()
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 3)
    config.training.joint_steps = 2
    with pytest.raises(ConfigError, match="the rack has 3 stacks already"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)


def test_a_stack_keeps_the_adapters_of_its_creation() -> None:
    config = _config()
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    trainer.train_progressively(builder, LOADER, 1)
    config.training.progressive.qlora_enabled = True
    config.training.progressive.qlora_rank = 2
    trainer.train_progressively(builder, LOADER, 2)
    assert [entry["adapters"] for entry in builder.get_rack_info()["stacks"]] == [[], ["stack"]]


def test_a_library_needs_no_tokenizer() -> None:
    config = _config(**{f"{GROWTH}training_objective": "clm"})
    builder = ProgressiveRackBuilder(config, vocab_size=100)
    loader = [tokens % 100 for tokens in LOADER]
    ProgressiveTrainer(config).train_progressively(builder, loader, 2)
    assert builder.build_rack()(loader[0]).shape[-1] == 100
    config.training.progressive.training_objective = "mlm"
    builder = ProgressiveRackBuilder(config, vocab_size=100)
    with pytest.raises(ConfigError, match=r"token 256 for \[MASK\]"):
        ProgressiveTrainer(config).train_progressively(builder, loader, 2)


def test_ids_that_name_two_sequences_are_refused_where_rows_are_kept() -> None:
    config = _config(**{f"{GROWTH}training_objective": "clm"})
    loader = [{"input_ids": tokens[:4], "sequence_ids": torch.arange(4)} for tokens in LOADER]
    with pytest.raises(ConfigError, match="two sequences came under this id"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), loader, 2)


@pytest.mark.parametrize("token", [-1, 264, 4_000])
def test_a_token_without_a_row_is_named(token: int) -> None:
    config = _config(**{f"{GROWTH}training_objective": "clm"})
    tokens = LOADER[0].clone()
    tokens[1, 3] = token
    with pytest.raises(ConfigError, match=f"the batch holds token {token}"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), [tokens], 1)
    batches = [{"input_ids": LOADER[0], "targets": tokens}]
    config.training.progressive.training_objective = "custom"
    with pytest.raises(ConfigError, match=f"the batch holds target {token}"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), batches, 1)


def test_an_empty_batch_is_named() -> None:
    config = _config()
    with pytest.raises(ConfigError, match="each batch needs at least one token"):
        ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), [LOADER[0][:0]], 1)
