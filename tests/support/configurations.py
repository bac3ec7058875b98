"""Keys of the configuration with valid values for each, and the ids of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Kind
from stackwise_core.stages.plan import RunPlan

GROWTH = "training.progressive"


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a.b": v} as {"a": {"b": v}}."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def leaf_fields(section: type[BaseModel] = StackWiseConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema that holds a value, with its field."""
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


LEAVES = dict(leaf_fields())


def faults_of(values: dict[str, Any]) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict(values)
    assert str(caught.value).splitlines() == [str(fault) for fault in caught.value.faults]
    return caught.value.faults


OTHERS: dict[str, Any] = {
    "run.name": "another",
    "data.source": "texts/*.txt",
    "model.vocab_size": 512,
    "model.d_model": 64,
    "model.n_heads": 2,
    "model.head_dim": 64,
    "model.rope_scaling.factor": 4.0,
    "model.rope_scaling.attention_factor": 1.5,
    "model.from": "rack",
    f"{GROWTH}.num_time_steps": 20,
    "training.new_stack_init": "random",
    "training.new_stack_source": "middle",
    "training.new_stack_noise": 0.2,
    "training.muon_learning_rate": 0.01,
    f"{GROWTH}.time_embedding_dim": 32,
    "data.tokenizer": "words.json",
    "data.end_token": "[END]",
    f"{GROWTH}.qlora_configs": {n: {"rank": 1, "alpha": 1.0} for n in range(3)},
    f"{GROWTH}.stack_time_mapping": "exponential",
    f"{GROWTH}.time_mapping": [0, 1, 1],
    f"{GROWTH}.stacks": [{"n_blocks": 3}],
    "training.mask_ratio_table": [0.1 * n for n in range(1, 10)] + [0.95] * 3,
    "training.custom_loss": "json:dumps",
    "hardware.device": "cpu",
    "hardware.rendezvous": "node-0:29400",
    "tracking.to": ["wandb"],
    "tracking.project": "another",
}


def other_value(path: str) -> Any:
    """A value of a key that is valid and not its default."""
    if path in OTHERS:
        return OTHERS[path]
    field = LEAVES[path]
    default = field.get_default(call_default_factory=True)
    if get_origin(field.annotation) is Literal:
        return next(value for value in get_args(field.annotation) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    assert isinstance(default, float)
    return default / 2


# What must be set beside a key for its other values to mean anything.
ADAPTED = {f"{GROWTH}.qlora_enabled": True}
PATTERNED = {**ADAPTED, f"{GROWTH}.qlora_strategy": "progressive"}
PROGRESSIVE = {f"{GROWTH}.progressive_qlora": True}
DEPTH = {f"{GROWTH}.time_interpretation": "depth"}
INPUT = {f"{GROWTH}.time_interpretation": "input"}
LLAMA3 = {"model.rope_scaling.kind": "llama3", "model.rope_scaling.factor": 2.0}
YARN = {**LLAMA3, "model.rope_scaling.kind": "yarn"}
NEEDS: dict[str, dict[str, Any]] = {
    "model.rope_scaling.factor": {"model.rope_scaling.kind": "linear"},
    "model.rope_scaling.original_max_position_embeddings": LLAMA3,
    "model.rope_scaling.low_freq_factor": LLAMA3,
    "model.rope_scaling.high_freq_factor": LLAMA3,
    "model.rope_scaling.beta_fast": YARN,
    "model.rope_scaling.beta_slow": YARN,
    "model.rope_scaling.attention_factor": YARN,
    "model.rope_scaling.truncate": YARN,
    "model.residual_blocks": {"model.residual_scale": "depth"},
    "data.sample": {"data.max_sequences": 5},
    f"{GROWTH}.trunk_trainable_top": {**ADAPTED, f"{GROWTH}.trunk_strategy": "qlora"},
    f"{GROWTH}.tail_stacks": {f"{GROWTH}.building_mode": "insert"},
    f"{GROWTH}.tail_strategy": {f"{GROWTH}.building_mode": "insert"},
    f"{GROWTH}.qlora_rank": ADAPTED,
    f"{GROWTH}.qlora_alpha": ADAPTED,
    f"{GROWTH}.qlora_strategy": ADAPTED,
    f"{GROWTH}.qlora_rank_pattern": PATTERNED,
    f"{GROWTH}.qlora_alpha_pattern": PATTERNED,
    f"{GROWTH}.qlora_configs": {**ADAPTED, f"{GROWTH}.qlora_strategy": "variable"},
    f"{GROWTH}.progressive_qlora_rank": PROGRESSIVE,
    f"{GROWTH}.progressive_qlora_alpha": PROGRESSIVE,
    f"{GROWTH}.time_embedding_dim": INPUT,
    f"{GROWTH}.time_encoding_type": INPUT,
    f"{GROWTH}.stack_time_mapping": {**DEPTH, f"{GROWTH}.num_time_steps": 100},
    f"{GROWTH}.time_mapping": {**DEPTH, f"{GROWTH}.stack_time_mapping": "custom"},
    f"{GROWTH}.time_per_stack": DEPTH,
    f"{GROWTH}.stack_time_span": DEPTH,
    f"{GROWTH}.num_time_steps": DEPTH,
    "training.adapter_learning_rate": ADAPTED,
    "training.decay_steps": {"training.schedule": "one_clock"},
    "training.muon_learning_rate": {"training.optimizer": "muon"},
    "training.new_state": {"training.optimizer_state": "keep"},
    "training.joint_learning_rate": {"training.joint_steps": 10},
    "training.mask_ratio_min": DEPTH,
    "training.mask_ratio_max": DEPTH,
    "training.mask_ratio_table": DEPTH,
    "training.time_sampling": INPUT,
    "training.loss_weighting": {**INPUT, "training.corruption": "mask"},
    "training.custom_loss": {f"{GROWTH}.training_objective": "custom"},
    "validation.cooldown_steps": {"training.schedule": "one_clock"},
    "validation.patience": {"validation.every": 5},
    "validation.keep": {"validation.every": 5},
    "cache.task_runner": {"cache.fill_workers": 2},
    "hardware.shard": {"hardware.processes": 2},
    "hardware.nodes": {"hardware.rendezvous": "node-0:29400"},
    "hardware.rendezvous": {"hardware.nodes": 2},
}
NOT_BUILT = {"data.tokenizer", "data.end_token", "model.from"}


def configuration(changes: dict[str, Any]) -> StackWiseConfig:
    values: dict[str, Any] = {}
    apply_overrides(values, changes)
    return StackWiseConfig.from_dict(values)


def values_of(path: str) -> list[Any]:
    """Every value of a choice; of any other key one that is not its default."""
    choices = get_args(LEAVES[path].annotation) if get_origin(LEAVES[path].annotation) is Literal else ()
    if path == f"{GROWTH}.stack_time_mapping":  # in the library also a function, so that it is no Literal
        choices = ("linear", "exponential", "custom")
    return list(choices) or ([other_value(path)] if path not in NOT_BUILT else [])


CORPUS = "0" * 64
KINDS: tuple[Kind, ...] = ("build", "trunk", "stack", "activations", "validation")


def ids(run: RunPlan) -> dict[str, str]:
    """Every id of a run: {"data": ..., "stack-1": ...}."""
    found = {"data": run.data_ref.sha256}
    for stage in run.stages:
        for kind in (*KINDS, "optimizer", "cooldown"):
            if stage.recipe(kind) is not None:
                found[f"{kind}-{stage.index}"] = stage.ref(kind).sha256
    return found
