"""What makes sense together: the faults of a configuration, each with path, value and remedy."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stackwise_core.errors import Fault

if TYPE_CHECKING:
    from stackwise_core.config import StackWiseConfig

BYTE_VOCABULARY = 259
"""256 bytes and [MASK], [PAD], [END]."""


def cross_field_faults(config: StackWiseConfig) -> list[Fault]:
    """Return every broken rule of a configuration whose types and ranges are right."""
    return [*_model_faults(config), *_training_faults(config), *_growth_faults(config), *_not_built_faults(config)]


def _model_faults(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if model.d_model % model.n_heads:
        yield Fault("model.n_heads", str(model.n_heads), f"must divide model.d_model = {model.d_model}")
    elif (model.d_model // model.n_heads) % 2:
        width = model.d_model // model.n_heads
        yield Fault("model.n_heads", str(model.n_heads), f"gives heads of {width} channels; RoPE needs an even number")
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield Fault("model.n_kv_heads", str(model.n_kv_heads), f"must divide model.n_heads = {model.n_heads}")
    if config.data.tokenizer == "byte" and model.vocab_size < BYTE_VOCABULARY:
        yield Fault("model.vocab_size", str(model.vocab_size), f"the byte tokenizer needs at least {BYTE_VOCABULARY}")
    if config.training.progressive.training_objective == "clm" and model.attention == "bidirectional":
        yield Fault("model.attention", "'bidirectional'", "with clm every position would see its own target; use auto")


def _training_faults(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if training.batch_size % training.accumulation_steps:
        yield Fault(
            "training.accumulation_steps",
            str(training.accumulation_steps),
            f"must divide training.batch_size = {training.batch_size}",
        )
    if training.min_learning_rate > training.learning_rate:
        yield Fault(
            "training.min_learning_rate",
            str(training.min_learning_rate),
            f"must not exceed training.learning_rate = {training.learning_rate}",
        )
    shortest = min(stage_steps(config, stage) for stage in range(training.progressive.target_stacks))
    if training.warmup_steps > shortest:
        yield Fault(
            "training.warmup_steps",
            str(training.warmup_steps),
            f"must not exceed training.steps_per_stack = {shortest} (of the shortest stage)",
        )
    if training.mask_ratio_min > training.mask_ratio_max:
        yield Fault(
            "training.mask_ratio_min",
            str(training.mask_ratio_min),
            f"must not exceed training.mask_ratio_max = {training.mask_ratio_max}",
        )
    if training.progressive.training_objective == "clm" and config.cache.views > 1:
        yield Fault(
            "cache.views", str(config.cache.views), "clm has no masks: its views would be identical copies; use 0"
        )


def _growth_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth = config.training.progressive
    if growth.target_stacks > growth.max_stacks:
        yield Fault(
            "training.progressive.target_stacks",
            str(growth.target_stacks),
            f"must not exceed training.progressive.max_stacks = {growth.max_stacks}",
        )
    if len(growth.stacks) > growth.max_stacks:
        yield Fault(
            "training.progressive.stacks",
            f"{len(growth.stacks)} entries",
            f"at most training.progressive.max_stacks = {growth.max_stacks}",
        )


# Values of the schema that no code stands behind yet. A later version deletes lines from this table.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "training.progressive.enabled": (False,),
    "training.progressive.building_mode": ("prepend",),
    "training.progressive.trunk_strategy": ("qlora", "full"),
    "training.progressive.new_stack_precision": ("half", "bfloat16", "nvfp4", "qlora"),
    "training.progressive.training_objective": ("custom",),
    "training.progressive.qlora_enabled": (True,),
    "training.progressive.progressive_qlora": (True,),
    "training.progressive.time_interpretation": ("input", "depth"),
    "training.loss_weighting": ("elbo",),
    "training.activation_checkpointing": (True,),
    "cache.dtype": ("int8", "fp8"),
    "cache.mode": ("auto",),
}
# Keys that only matter inside a mode of the table above: setting them would change nothing.
_WITHOUT_EFFECT: dict[str, str] = {
    "training.progressive.trunk_trainable_top": "trunk_strategy: qlora",
    "training.progressive.qlora_rank": "qlora_enabled",
    "training.progressive.qlora_alpha": "qlora_enabled",
    "training.progressive.qlora_strategy": "qlora_enabled",
    "training.progressive.qlora_rank_pattern": "qlora_enabled",
    "training.progressive.qlora_alpha_pattern": "qlora_enabled",
    "training.progressive.qlora_configs": "qlora_enabled",
    "training.progressive.progressive_qlora_rank": "progressive_qlora",
    "training.progressive.progressive_qlora_alpha": "progressive_qlora",
    "training.progressive.time_embedding_dim": "time_interpretation: input",
    "training.progressive.time_encoding_type": "time_interpretation: input",
    "training.progressive.stack_time_mapping": "time_interpretation: depth",
    "training.progressive.time_mapping": "time_interpretation: depth",
    "training.progressive.time_per_stack": "time_interpretation: depth",
    "training.progressive.num_time_steps": "time_interpretation: depth or input",
    "training.joint_steps": "the joint anneal",
    "training.adapter_learning_rate": "qlora_enabled",
    "training.mask_ratio_min": "time_interpretation: depth or input",
    "training.mask_ratio_max": "time_interpretation: depth or input",
    "training.mask_ratio_table": "time_interpretation: depth or input",
    "training.time_sampling": "time_interpretation: input",
    "training.custom_loss": "training_objective: custom",
    "hardware.processes": "training with several processes",
}


def _not_built_faults(config: StackWiseConfig) -> Iterator[Fault]:
    for path, refused in _NOT_BUILT.items():
        value = _lookup(config, path)
        if value in refused:
            allowed = " or ".join(map(repr, _allowed(config, path, refused)))
            yield Fault(path, repr(value), f"this version does not build it yet; use {allowed}")
    for path, mode in _WITHOUT_EFFECT.items():
        if _lookup(config, path) != _default(config, path):
            yield Fault(path, repr(_lookup(config, path)), f"belongs to {mode}, which this version does not build yet")
    for index, stack in enumerate(config.training.progressive.stacks):
        here = f"training.progressive.stacks.{index}"
        if stack.precision not in ("default", "full"):
            yield Fault(f"{here}.precision", repr(stack.precision), "this version does not build it yet")
        if stack.mode == "prepend":
            yield Fault(f"{here}.mode", repr(stack.mode), "this version does not build it yet")
    if config.data.tokenizer != "byte":
        yield Fault("data.tokenizer", repr(config.data.tokenizer), "this version builds only 'byte' so far")


def _allowed(config: BaseModel, path: str, refused: tuple[Any, ...]) -> list[Any]:
    """Return the values of a key that are built."""
    *sections, name = path.split(".")
    section = _lookup(config, ".".join(sections))
    choices = get_args(type(section).model_fields[name].annotation) or (True, False)
    return [choice for choice in choices if choice not in refused]


def stage_steps(config: StackWiseConfig, stage: int) -> int:
    """Optimizer steps of a stage: the stack's override, or the common value."""
    overrides = config.training.progressive.stacks
    own = overrides[stage].steps if stage < len(overrides) else 0
    return own or config.training.steps_per_stack


def stage_blocks(config: StackWiseConfig, stage: int) -> int:
    """Blocks of a stage's stack: the stack's override, or the common value."""
    overrides = config.training.progressive.stacks
    own = overrides[stage].n_blocks if stage < len(overrides) else 0
    return own or config.model.blocks_per_stack


def schema_faults(
    schema: type[BaseModel], values: dict[str, Any], error: ValidationError
) -> tuple[list[Fault], dict[str, Any]]:
    """Turn pydantic's errors into faults.

    Returns:
        The faults, and a copy of `values` without the faulty keys, so that the rules between
        fields can be checked on what is left and told in the same breath.
    """
    faults: list[Fault] = []
    remainder = copy.deepcopy(values)
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            faults.append(Fault(path, repr(item["input"]), _unknown_key(schema, item["loc"])))
        else:
            message = item["msg"].removeprefix("Value error, ")
            faults.append(Fault(path, repr(item["input"]), message[0].lower() + message[1:]))
    # From the back, so that the places of list items before them stay right.
    for item in sorted(error.errors(include_url=False), key=_place, reverse=True):
        location = item["loc"]
        _remove(remainder, location[:-1] if item["type"] == "missing" else location)
    return faults, remainder


def _place(item: ErrorDetails) -> list[str]:
    return [f"{part:09d}" if isinstance(part, int) else part for part in item["loc"]]


def _unknown_key(schema: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section = schema
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return "there is no such key"
        section = annotation
    close = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(section.model_fields)}"
    return f"there is no such key; {hint}"


def _remove(values: Any, location: tuple[int | str, ...]) -> None:
    *parents, last = location
    try:
        for part in parents:
            values = values[part]
        del values[last]
    except (KeyError, IndexError, TypeError):
        return  # the key is missing, or stands below a value that is no section: nothing to take out


def _lookup(config: BaseModel, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _default(config: BaseModel, path: str) -> Any:
    return _lookup(type(config)(), path)
