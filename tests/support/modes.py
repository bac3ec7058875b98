"""Every way to grow that the tests compare, as changes to the tiny configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.plan import RunPlan, plan_config

G = "training.progressive."
LORA = {f"{G}qlora_rank": 4}
DUAL = {f"{G}progressive_qlora": True, f"{G}progressive_qlora_rank": 2}
DEPTH = {f"{G}training_objective": "mlm", f"{G}time_interpretation": "depth"}
INPUT = {f"{G}training_objective": "mlm", f"{G}time_interpretation": "input", f"{G}num_time_steps": 10}
MODES: dict[str, dict[str, Any]] = {
    "append": {},
    "prepend": {f"{G}building_mode": "prepend"},
    "full": {f"{G}trunk_strategy": "full"},
    "full prepend half": {
        f"{G}trunk_strategy": "full",
        f"{G}building_mode": "prepend",
        f"{G}new_stack_precision": "half",
    },
    "qlora trunk": {f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True, **LORA},
    "qlora top": {
        f"{G}trunk_strategy": "qlora",
        f"{G}trunk_trainable_top": 1,
        f"{G}qlora_enabled": True,
        f"{G}target_stacks": 4,
        **LORA,
    },
    "nf4": {f"{G}new_stack_precision": "qlora", **LORA},
    "nf4 dual": {f"{G}new_stack_precision": "qlora", f"{G}trunk_strategy": "qlora", **LORA, **DUAL},
    "nvfp4 top": {
        f"{G}new_stack_precision": "nvfp4",
        f"{G}trunk_strategy": "qlora",
        f"{G}trunk_trainable_top": 1,
        **DUAL,
    },
    "bfloat16": {
        f"{G}new_stack_precision": "bfloat16",
        f"{G}stacks": [{"n_blocks": 2}, {"n_blocks": 3}],
        "training.new_stack_source": "interleaved",
        "training.new_stack_noise": 0.2,
        "training.new_stack_output_scale": 0.5,
    },
    "joint": {"training.joint_steps": 6},
    "joint nf4": {"training.joint_steps": 6, f"{G}new_stack_precision": "qlora", **LORA, **DUAL},
    "one clock joint": {"training.joint_steps": 6, "training.schedule": "one_clock", "training.decay": "linear"},
    "kept": {"training.optimizer_state": "keep", f"{G}qlora_enabled": True, **LORA, **DUAL},
    "kept full": {
        "training.optimizer_state": "keep",
        "training.new_state": "copy",
        "training.new_stack_source": "interleaved",
        "training.new_stack_noise": 0.2,
        "training.joint_steps": 6,
        "training.schedule": "one_clock",
        f"{G}stacks": [{"n_blocks": 2}, {"n_blocks": 3}, {"mode": "prepend"}],
        f"{G}trunk_strategy": "full",
        f"{G}new_stack_precision": "bfloat16",
    },
    "muon": {
        "training.optimizer": "muon",
        "training.optimizer_state": "keep",
        "training.new_state": "copy",
        "training.joint_steps": 6,
        f"{G}qlora_enabled": True,
        **LORA,
    },
    "8 bits": {
        "training.optimizer": "adamw8bit",
        "training.optimizer_state": "keep",
        "training.new_state": "copy",
        f"{G}trunk_strategy": "full",
        **{"model.d_model": 64, "model.d_ff": 64},
    },
    "whole": {f"{G}enabled": False},
    "whole nvfp4": {f"{G}enabled": False, f"{G}new_stack_precision": "nvfp4"},
    "mixed": {
        "model.residual_scale": "depth",
        f"{G}stacks": [{}, {"mode": "prepend", "n_blocks": 2}, {"precision": "bfloat16", "steps": 8}, {}],
        f"{G}target_stacks": 4,
    },
    "insert": {f"{G}building_mode": "insert", "training.residual_warmup_steps": 6},
    "insert full": {
        f"{G}building_mode": "insert",
        f"{G}trunk_strategy": "full",
        f"{G}new_stack_precision": "half",
        "training.new_stack_source": "blend",
        "training.new_stack_noise": 0.2,
        "training.new_stack_output_scale": 0.5,
    },
    "insert below quantised": {
        f"{G}stacks": [{}, {}, {"mode": "insert"}, {"mode": "insert", "tail_stacks": 3}],
        f"{G}target_stacks": 4,
        f"{G}new_stack_precision": "nvfp4",
        f"{G}tail_strategy": "qlora",
    },
    "insert below qlora": {f"{G}building_mode": "insert", f"{G}new_stack_precision": "qlora"},
    "fresh": {  # stage 1 reads epochs 2.5 to 5, and stage 2 those to 7.5: of view 2 the two share half
        "data.rows": "fresh",
        "cache.dtype": "int8",
        f"{G}training_objective": "mlm",
        "cache.views": 4,
        "training.steps_per_stack": 10,
        "training.joint_steps": 6,
    },
    "depth": DEPTH,
    "depth prepend joint": {**DEPTH, f"{G}building_mode": "prepend", "training.joint_steps": 6},
    "depth joint": {**DEPTH, "training.joint_steps": 6, f"{G}stack_time_span": "interval"},
    "input": INPUT,
    "input per sequence": {**INPUT, "training.time_sampling": "per_sequence", f"{G}time_encoding_type": "learned"},
    "elbo": {
        **INPUT,
        "training.time_sampling": "stratified",
        "training.loss_weighting": "elbo",
        "training.corruption": "mask",
        f"{G}time_embedding_dim": 16,
    },
}
QUANTISED_MODES = {
    "blocks": {**INPUT, "training.shuffle_block": 3},
    "int8": {"cache.dtype": "int8"},
    "fp8": {"cache.dtype": "fp8"},
    "int8 mlm": {"cache.dtype": "int8", f"{G}training_objective": "mlm"},
    "fp8 depth": {"cache.dtype": "fp8", **DEPTH, f"{G}stack_time_span": "interval"},
    "int8 qlora top": {"cache.dtype": "int8", **MODES["qlora top"]},
    "int8 insert frozen": {
        "cache.dtype": "int8",
        f"{G}building_mode": "insert",
        f"{G}tail_strategy": "frozen",
        f"{G}tail_stacks": 2,
        f"{G}target_stacks": 4,
        "training.joint_steps": 6,
    },
    "int8 mixed": {"cache.dtype": "int8", **MODES["mixed"]},
}
MODES |= QUANTISED_MODES


def plan_of(config: StackWiseConfig) -> RunPlan:
    return plan_config(config)


def grown_in_memory(config: StackWiseConfig, root: Path, builder: Any = None, target: int | None = None) -> Any:
    """Return a builder, by default a new one, grown by the library's trainer on the sequences of a run."""
    from stackwise_core.model.rack_builder import ProgressiveRackBuilder
    from stackwise_core.objectives.batches import PackedBatches
    from stackwise_core.stages.resolve import resolve_order
    from stackwise_core.training.trainer import ProgressiveTrainer
    from storage.artifacts import Artifacts
    from storage.sequences import load_sequences

    train, _ = load_sequences(Artifacts(root), plan_of(config).data_ref)
    order = resolve_order(config, len(train))
    steps = order.steps_per_epoch * 16

    class Loader:
        """The batches of every stage, from its first step on: each pass of a stage begins with step 0."""

        def __iter__(self) -> Any:
            yield from PackedBatches(train, order, 0, steps)

    builder = builder or ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, Loader(), target)
    return builder
