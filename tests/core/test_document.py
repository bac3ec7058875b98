"""What users of progressive training write, snippet by snippet, as their own document has it, and what each must mean.

Only the imports differ (everything is in `stackwise_core`), and the shapes, which are small.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stackwise_core import (
    ProgressiveDataLoader,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
    TimeStepMasking,
    create_stack_from_config,
)
from stackwise_core.errors import ConfigError
from stackwise_core.model.precision import dense_weight
from support.training import same_bits, weights

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

SEQ, ROWS, BATCH, STEPS = 12, 16, 4, 2


def small() -> StackWiseConfig:
    config = StackWiseConfig()
    config.model.d_model = 32
    config.model.n_heads = 2
    config.model.d_ff = 64
    config.model.blocks_per_stack = 1
    config.training.batch_size = BATCH
    config.training.steps_per_stack = STEPS
    config.hardware.threads = 1
    return config


def rows() -> Tensor:
    return torch.randint(0, 256, (ROWS, SEQ), generator=torch.Generator().manual_seed(1))


def loader() -> DataLoader[Tensor]:
    return DataLoader(rows(), batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def trained(builder: ProgressiveRackBuilder) -> list[str]:
    """The parameters that have `requires_grad`."""
    return [name for name, parameter in builder.build_rack().named_parameters() if parameter.requires_grad]


# ---------------------------------------------------------------- the YAML blocks

DUAL_LORA = """
training:
  progressive:
    # Stack LoRA parameters (added to each stack)
    qlora_enabled: true
    qlora_rank: 16
    qlora_alpha: 32
    # Progressive QLoRA parameters (added to trunk when new stacks are added)
    progressive_qlora: true
    progressive_qlora_rank: 8
    progressive_qlora_alpha: 16
"""

WHOLE = """
training:
  progressive:
    enabled: true
    trunk_strategy: "frozen"  # "frozen" or "qlora"
    new_stack_precision: "full"  # "full", "half", "bfloat16", "qlora"
    cache_activations: true

    # Simplified QLoRA configuration
    qlora_enabled: true  # Enable QLoRA adapters on all stacks
    qlora_rank: 16  # QLoRA rank for all stacks
    qlora_alpha: 32  # QLoRA alpha parameter
    qlora_strategy: "simplified"  # "simplified" - add LoRA to all stacks

    max_stacks: 12
    building_mode: "append"  # "append" or "prepend"

    # Time interpretation
    time_interpretation: "depth"  # "input" or "depth"
    time_embedding_dim: 512  # For time-as-input
    time_encoding_type: "sinusoidal"  # "sinusoidal" or "learned"
    stack_time_mapping: "linear"  # "linear", "exponential", "custom"
    time_per_stack: 100  # For time-as-depth
"""


def from_yaml(text: str, folder: Path) -> StackWiseConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    config = StackWiseConfig.from_yaml(path)
    config.validate()
    shape = small()
    config.model, config.hardware = shape.model, shape.hardware
    config.training.batch_size, config.training.steps_per_stack = BATCH, STEPS
    return config


def test_both_adapters_of_the_yaml_stand_where_it_says(tmp_path: Path) -> None:
    config = from_yaml(DUAL_LORA, tmp_path)
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader(), target_stacks=2)
    assert [entry["adapters"] for entry in builder.get_rack_info()["stacks"]] == [["stack", "progressive"], ["stack"]]
    below = builder.stacks[0].state_dict()
    ranks = {
        name: below[f"blocks.0.attention.q_proj.lora_A.{name}.weight"].shape[0] for name in ("stack", "progressive")
    }
    assert ranks == {"stack": 16, "progressive": 8}


def test_the_whole_yaml_grows_a_rack_by_depth(tmp_path: Path) -> None:
    config = from_yaml(WHOLE, tmp_path)
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader(), target_stacks=3)
    assert [result.time_step for result in results] == [0, 100, 200]
    ratios = [0.15 + 0.75 * step / 1199 for step in (0, 100, 200)]
    assert [result.mask_ratio for result in results] == pytest.approx(ratios)
    assert [result.precision for result in results] == ["full"] * 3


# ---------------------------------------------------------------- components


def test_a_builder_adds_stacks_of_each_precision_at_both_ends() -> None:
    config = small()
    builder = ProgressiveRackBuilder(
        config=config,  # All parameters read from config (including max_stacks)
        building_mode="append",  # or "prepend"
        default_precision="full",
    )
    stack1 = builder.append_stack(n_blocks=4, precision="full")
    stack2 = builder.append_stack(n_blocks=4, precision="half")
    stack3 = builder.prepend_stack(n_blocks=4, precision="qlora")
    rack = builder.build_rack()

    assert builder.stacks == [stack3, stack1, stack2]
    assert [len(stack.blocks) for stack in (stack1, stack2, stack3)] == [4, 4, 4]
    info = builder.get_rack_info()
    assert [entry["precision"] for entry in info["stacks"]] == ["qlora", "full", "half"]
    assert (info["n_stacks"], info["n_blocks"]) == (3, 12)
    assert rack(rows()[:2]).shape == (2, SEQ, config.model.vocab_size or 264)

    results = ProgressiveTrainer(config).train_progressively(builder, loader(), target_stacks=3)
    assert [result.index for result in results] == [0, 1, 2]
    assert builder.build_rack() is rack
    assert builder.stacks == [stack3, stack1, stack2]
    kinds = [type(stack.blocks[0].attention.q_proj).__name__ for stack in builder.stacks]  # pyright: ignore
    assert len(set(kinds)) > 1, "trained stacks keep the storage of their precision"


def test_a_builder_prepends_by_default_where_it_is_told() -> None:
    config = small()
    builder = ProgressiveRackBuilder(config=config, building_mode="prepend", default_precision="bfloat16")
    ProgressiveTrainer(config).train_progressively(builder, loader(), target_stacks=2)
    assert [stack.creation_index for stack in builder.stacks] == [1, 0]
    assert [stack.precision for stack in builder.stacks] == ["bfloat16"] * 2


def test_a_stack_from_the_configuration_is_the_stack_that_a_builder_adds() -> None:
    config = small()
    stack = create_stack_from_config(
        stack_id=0,
        n_blocks=4,
        config=config,  # All parameters read from config
    )
    built = ProgressiveRackBuilder(config).append_stack(n_blocks=4)
    assert len(stack.blocks) == 4
    assert same_bits(weights(stack), weights(built))


def test_a_dataloader_with_its_strategy() -> None:
    config = small()
    masking_strategy = TimeStepMasking(config)
    progressive_dataloader = ProgressiveDataLoader(
        base_dataloader=loader(),
        masking_strategy=masking_strategy,
        stack_idx=0,
        trunk_activations=None,
        cache_activations=True,
    )
    assert len(progressive_dataloader) == ROWS // BATCH
    for batch, clean in zip(progressive_dataloader, loader(), strict=True):
        assert batch["targets"].equal(clean)
        assert batch["masks"].equal(masking_strategy.generate_masks(clean))
        assert (batch["input_ids"] == clean)[~batch["masks"]].all()


def test_cached_activations_follow_their_sequences() -> None:
    """Activations are kept by sequence, whatever order a shuffled loader has."""
    config = small()
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader(), target_stacks=1)
    data = [{"input_ids": row, "sequence_ids": n} for n, row in enumerate(rows())]
    cached_activations = torch.arange(ROWS, dtype=torch.float32)[:, None, None].expand(ROWS, SEQ, 32)
    progressive_dataloader = ProgressiveDataLoader(
        base_dataloader=DataLoader(data, batch_size=BATCH, shuffle=True),  # pyright: ignore[reportArgumentType]
        masking_strategy=TimeStepMasking(config),
        stack_idx=1,
        trunk_activations=cached_activations,
        cache_activations=True,
    )
    for batch in progressive_dataloader:
        assert batch["trunk_activations"][:, 0, 0].tolist() == batch["sequence_ids"].tolist()
    shuffled = DataLoader(rows(), batch_size=BATCH, shuffle=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="sequence_ids"):
        list(ProgressiveDataLoader(shuffled, TimeStepMasking(config), 1, cached_activations, cache_activations=True))


def test_a_trainer_grows_to_its_target() -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    trainer = ProgressiveTrainer(config)
    results = trainer.train_progressively(rack_builder=builder, dataloader=loader(), target_stacks=6)
    assert [result.index for result in results] == list(range(6))
    assert builder.n_trained == builder.n_stacks == 6


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_time_as_input_is_drawn_uniformly_and_embedded(encoding: Any) -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    rack = builder.build_rack()
    config.training.progressive.time_interpretation = "input"
    config.training.progressive.time_embedding_dim = 512
    config.training.progressive.time_encoding_type = encoding  # or "learned"
    masking_strategy = TimeStepMasking(config)

    steps = [int(masking_strategy.time_steps(batch)[0]) for batch in torch.randint(0, 256, (400, 1, SEQ))]
    assert set(steps) <= set(range(1000)), "of 1,000 noise levels"
    assert len(set(steps)) > 250
    assert sum(steps) / len(steps) == pytest.approx(499.5, abs=4 * 1000 / math.sqrt(12 * 400))

    results = ProgressiveTrainer(config).train_rack(builder, loader(), target_stacks=2)
    assert [len(result.records) for result in results] == [STEPS, STEPS]
    assert builder.build_rack() is rack, "the rack gains a time embedding while nothing of it is trained"
    near, far = (rack(rows()[:1], torch.tensor([step])) for step in (0, 999))
    assert not near.equal(far)


def test_time_as_depth_gives_each_stack_its_step_and_masks() -> None:
    config = small()
    config.training.progressive.time_interpretation = "depth"
    config.training.progressive.stack_time_mapping = "linear"  # or "exponential"
    config.training.progressive.time_per_stack = 100
    masking_strategy = TimeStepMasking(config)
    tokens = torch.randint(0, 256, (64, 256))
    batch = {"input_ids": tokens}
    masks = masking_strategy.generate_masks_for_stack(batch, stack_idx=2)
    time_step = masking_strategy.get_time_step_for_stack(stack_idx=2)
    assert time_step == 200
    expected = 0.15 + 0.75 * 200 / 1199
    assert masks.float().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / masks.numel()))
    assert masks.equal(masking_strategy.generate_masks_for_time_step(tokens, time_step))
    lighter = masking_strategy.generate_masks_for_stack(tokens, stack_idx=1)
    assert (masks | lighter).equal(masks), "masks of an earlier stack are contained in those of a later one"


def test_a_custom_mapping_of_time() -> None:
    def custom_time_mapping(stack_idx: int, max_stacks: int, num_time_steps: int) -> int:
        # Custom logic here
        return min(stack_idx * 50, num_time_steps - 1)

    config = small()
    config.training.progressive.time_interpretation = "depth"
    config.training.progressive.time_per_stack = 10
    config.training.progressive.stack_time_mapping = custom_time_mapping
    assert [TimeStepMasking(config).get_time_step_for_stack(c) for c in range(4)] == [0, 50, 100, 119]


# ---------------------------------------------------------------- the trunk


def test_a_frozen_trunk_keeps_its_bits() -> None:
    config = small()
    rack_builder, dataloader = ProgressiveRackBuilder(config), loader()
    ProgressiveTrainer(config).train_rack(rack_builder, dataloader, target_stacks=1)
    before = weights(rack_builder.stacks[0])
    config.training.progressive.trunk_strategy = "frozen"
    config.training.progressive.new_stack_precision = "full"
    # Previous stacks are frozen, only new stack is trained
    trainer = ProgressiveTrainer(config)
    results = trainer.train_rack(rack_builder, dataloader, target_stacks=6)
    assert [result.index for result in results] == [1, 2, 3, 4, 5]
    assert same_bits(before, weights(rack_builder.stacks[0]))


def test_a_qlora_trunk_trains_adapters_and_nothing_else() -> None:
    """Chosen without a word about adapters, as the document does."""
    config = small()
    rack_builder, dataloader = ProgressiveRackBuilder(config), loader()
    ProgressiveTrainer(config).train_rack(rack_builder, dataloader, target_stacks=1)
    base = dense_weight(rack_builder.stacks[0].blocks[0].attention.q_proj)  # pyright: ignore
    config.training.progressive.trunk_strategy = "qlora"
    config.training.progressive.new_stack_precision = "full"
    config.training.progressive.cache_activations = True
    config.training.steps_per_stack = 4  # B is zero at first: A moves from the second step on
    trainer = ProgressiveTrainer(config)
    results = trainer.train_rack(rack_builder, dataloader, target_stacks=2)
    assert len(results) == 1
    trunk = rack_builder.stacks[0]
    assert rack_builder.get_rack_info()["stacks"][0]["adapters"] == ["progressive"]
    state = trunk.state_dict()
    assert state["blocks.0.attention.q_proj.base_layer.weight"].equal(base)
    assert state["blocks.0.attention.q_proj.lora_B.progressive.weight"].abs().sum() > 0


def test_a_builder_of_dimensions_follows_a_qlora_trainer() -> None:
    config = small()
    rack_builder = ProgressiveRackBuilder(
        vocab_size=config.model.vocab_size,
        d_model=config.model.d_model,
        d_ff=config.model.d_ff,
        n_heads=config.model.n_heads,
    )
    config.training.progressive.trunk_strategy = "qlora"
    config.training.progressive.cache_activations = True
    results = ProgressiveTrainer(config).train_rack(rack_builder, loader(), target_stacks=2)
    assert [result.index for result in results] == [0, 1]
    assert rack_builder.get_rack_info()["stacks"][0]["adapters"] == ["progressive"]


def test_freezing_by_hand() -> None:
    config = small()
    config.training.progressive.qlora_enabled = True
    config.training.progressive.qlora_strategy = "progressive"  # or "simplified", "variable"
    rack_builder = ProgressiveRackBuilder(config)
    for _ in range(3):
        rack_builder.append_stack()
    trunk_indices = [0, 1]
    rack_builder.freeze_trunk(trunk_indices)
    # Result: No training on trunk stacks
    assert not any(name.startswith(("stacks.0.", "stacks.1.")) for name in trained(rack_builder))
    rack_builder.freeze_all_but_qlora(trunk_indices)
    # Result: Only LoRA adapters are updated, original params frozen
    of_trunk = [name for name in trained(rack_builder) if name.startswith(("stacks.0.", "stacks.1."))]
    assert of_trunk
    assert all(".lora_" in name for name in of_trunk)


# ---------------------------------------------------------------- adapters


def ranks_and_alphas(config: StackWiseConfig, n_stacks: int = 4) -> list[tuple[int, float]]:
    """Rank and alpha of each stack's adapter, read off the modules: alpha is scaling times rank."""
    builder = ProgressiveRackBuilder(config)
    found: list[tuple[int, float]] = []
    for _ in range(n_stacks):
        block: Any = builder.append_stack().blocks[0]
        layer = block.attention.q_proj
        found.append((layer.r["stack"], layer.scaling["stack"] * layer.r["stack"]))
    return found


def test_the_simplified_strategy_gives_all_stacks_the_same() -> None:
    config = small()
    config.training.progressive.qlora_enabled = True
    config.training.progressive.qlora_strategy = "simplified"
    config.training.progressive.qlora_rank = 16
    config.training.progressive.qlora_alpha = 32
    assert ranks_and_alphas(config) == [(16, 32.0)] * 4


def test_the_progressive_strategy_doubles_the_rank_up_to_the_width() -> None:
    config = small()
    config.training.progressive.qlora_enabled = True
    config.training.progressive.qlora_strategy = "progressive"
    config.training.progressive.qlora_rank_pattern = "increasing"  # 16, 32, 64, 128...
    config.training.progressive.qlora_alpha_pattern = "constant"  # 32, 32, 32, 32...
    assert ranks_and_alphas(config) == [(16, 32.0), (32, 32.0), (32, 32.0), (32, 32.0)]  # the width is 32


def test_the_variable_strategy_takes_each_stack_from_its_entry(tmp_path: Path) -> None:
    config = small()
    config.model.d_model = 64
    config.training.progressive.qlora_enabled = True
    config.training.progressive.qlora_strategy = "variable"
    config.training.progressive.qlora_configs = {  # pyright: ignore[reportAttributeAccessIssue]
        0: {"rank": 8, "alpha": 16},  # Stack 0: small QLoRA
        1: {"rank": 16, "alpha": 32},  # Stack 1: medium QLoRA
        2: {"rank": 32, "alpha": 64},  # Stack 2: large QLoRA
        3: {"rank": 64, "alpha": 128},  # Stack 3: very large QLoRA
    }
    config.training.progressive.target_stacks = 4
    expected = [(8, 16.0), (16, 32.0), (32, 64.0), (64, 128.0)]
    assert ranks_and_alphas(config) == expected
    config.to_yaml(tmp_path / "config.yaml")
    assert ranks_and_alphas(StackWiseConfig.from_yaml(tmp_path / "config.yaml")) == expected


def test_stacks_of_different_precisions() -> None:
    rack_builder = ProgressiveRackBuilder(small())
    rack_builder.append_stack(precision="full")  # First stack
    rack_builder.append_stack(precision="half")  # Second stack
    rack_builder.append_stack(precision="qlora")  # Third stack
    ProgressiveTrainer(small()).train_progressively(rack_builder, loader(), target_stacks=3)
    stored = [entry["precision"] for entry in rack_builder.get_rack_info()["stacks"]]
    assert stored == ["full", "half", "qlora"]
    half: Any = rack_builder.stacks[1].blocks[0]
    assert half.attention.q_proj.weight.dtype == torch.float16


# ---------------------------------------------------------------- the complete examples


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_complete_example(objective: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"model: {{d_model: 32, n_heads: 2, d_ff: 64, blocks_per_stack: 1}}\n"
        f"training:\n  batch_size: {BATCH}\n  steps_per_stack: {STEPS}\n"
        f"  progressive: {{training_objective: {objective}}}\n"
        f"hardware: {{threads: 1}}\n"
    )
    # Load configuration
    config = StackWiseConfig.from_yaml(tmp_path / "config.yaml")
    config.validate()
    # Create components
    rack_builder = ProgressiveRackBuilder(
        vocab_size=config.model.vocab_size,
        d_model=config.model.d_model,
        d_ff=config.model.d_ff,
        n_heads=config.model.n_heads,
    )
    trainer = ProgressiveTrainer(config)
    # Train progressively
    results = trainer.train_progressively(rack_builder=rack_builder, dataloader=loader(), target_stacks=6)
    assert [result.index for result in results] == list(range(6))

    whole = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(whole, loader(), target_stacks=6)
    assert same_bits(weights(rack_builder.build_rack()), weights(whole.build_rack()))


def test_a_custom_objective_takes_the_targets_of_the_batch() -> None:
    config = small()
    rack_builder = ProgressiveRackBuilder(config)
    config.training.progressive.training_objective = "custom"
    # Targets must be provided in the batch
    tokens = rows()
    batches = [{"input_ids": part, "targets": (part * 0 + 7)} for part in tokens.split(BATCH)]
    config.training.steps_per_stack, config.training.learning_rate = 12, 2e-2
    (result,) = ProgressiveTrainer(config).train_rack(rack_builder, batches, target_stacks=1)
    assert result.losses[-1] < result.losses[0] / 2, "every target is the token 7"
    with pytest.raises(ConfigError, match="targets"):
        ProgressiveTrainer(config).train_rack(ProgressiveRackBuilder(config), loader(), target_stacks=1)


def test_a_loop_over_the_causal_objective() -> None:
    config = small()
    config.training.progressive.training_objective = "clm"
    rack = ProgressiveRackBuilder(config)
    rack.append_stack()
    progressive_dataloader = ProgressiveDataLoader(
        base_dataloader=loader(), masking_strategy=TimeStepMasking(config), stack_idx=0, cache_activations=True
    )

    def compute_loss(logits: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[loss_mask], targets[loss_mask])

    seen = 0
    for batch in progressive_dataloader:
        if batch["training_objective"] == "clm":
            targets, logits = batch["targets"], rack.build_rack()(batch["input_ids"])
            # Use combined_masks which excludes the last position
            loss_mask = batch["combined_masks"]
            # Or use clm_mask for all positions except last
            clm_mask = batch["clm_mask"]
            loss = compute_loss(logits, targets, loss_mask)
            shifted = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            )
            torch.testing.assert_close(loss, shifted)
            assert targets[:, -1].equal(batch["input_ids"][:, -1])
            assert not clm_mask[:, -1].any()
            assert clm_mask[:, :-1].all()
            seen += 1
    assert seen == ROWS // BATCH


# ---------------------------------------------------------------- its best practices


def test_history_cache_and_time_steps_can_be_checked() -> None:
    config = small()
    config.training.progressive.time_interpretation = "depth"
    config.training.progressive.cache_activations = True
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    trainer.train_progressively(builder, loader(), target_stacks=3)
    # Check training history for each stack
    assert [result.index for result in trainer.history] == [0, 1, 2]
    for result in trainer.history:
        assert (result.mode, result.precision, result.steps) == ("append", "full", STEPS)
        assert len(result.losses) == STEPS
        assert result.loss == result.losses[-1]
        assert result.seconds > 0
    # Monitor activation cache size
    info = trainer.cache_info()
    assert info["bytes"] == info["rows"] * SEQ * config.model.d_model * 2, "bfloat16 rows"
    assert trainer.history[-1].cache_bytes == info["bytes"]
    # Verify time step assignments
    assert [result.time_step for result in trainer.history] == [0, 1, 2]
