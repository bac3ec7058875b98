"""What makes sense together: the faults of a configuration, each with path, value and remedy."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stackwise_core.config.stacks import growth_faults, stage_steps
from stackwise_core.config.time_steps import time_faults
from stackwise_core.config.unused import effect_faults
from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stackwise_core.config.schema import StackWiseConfig


def cross_field_faults(config: StackWiseConfig, *, corpus: bool = True) -> list[Fault]:
    """Return every broken rule of a configuration whose types and ranges are right; see `validate`."""
    return [
        *_model_faults(config),
        *(_tokenizer_faults(config) if corpus else ()),
        *_training_faults(config),
        *growth_faults(config),
        *time_faults(config),
        *effect_faults(config),
        *_hardware_faults(config),
    ]


def _model_faults(config: StackWiseConfig) -> Iterator[Fault]:
    model = config.model
    if model.d_model % model.n_heads:
        yield Fault("model.n_heads", str(model.n_heads), f"must divide model.d_model = {model.d_model}")
    elif (model.d_model // model.n_heads) % 2:
        width = model.d_model // model.n_heads
        yield Fault("model.n_heads", str(model.n_heads), f"gives heads of {width} channels; RoPE needs an even number")
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield Fault("model.n_kv_heads", str(model.n_kv_heads), f"must divide model.n_heads = {model.n_heads}")
    if config.training.progressive.training_objective == "clm" and model.attention == "bidirectional":
        yield Fault("model.attention", "'bidirectional'", "with clm every position would see its own target; use auto")


def _tokenizer_faults(config: StackWiseConfig) -> Iterator[Fault]:
    name, vocab_size = config.data.tokenizer, config.model.vocab_size
    try:
        tokenizer = load_tokenizer(name)
    except ConfigError as error:
        yield from error.faults
        return
    if vocab_size < tokenizer.vocab_size:
        which = "the byte tokenizer" if name == "byte" else f"data.tokenizer = {name!r}"
        yield Fault("model.vocab_size", str(vocab_size), f"{which} needs at least {tokenizer.vocab_size}")
    if tokenizer.mask_token is None and config.training.progressive.training_objective == "mlm":
        allowed = "it has neither [MASK] nor <mask>, which mlm needs; add one to it, or use training_objective: clm"
        yield Fault("data.tokenizer", repr(name), allowed)


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
    objective = training.progressive.training_objective
    if objective != "mlm" and config.cache.views > 1:
        allowed = f"{objective} has no masks: its views would be identical copies; use 0"
        yield Fault("cache.views", str(config.cache.views), allowed)


def _hardware_faults(config: StackWiseConfig) -> Iterator[Fault]:
    hardware, training = config.hardware, config.training
    if hardware.processes > 1 and hardware.device.startswith("cuda:"):
        allowed = f"hardware.processes = {hardware.processes} need a device each; use cuda"
        yield Fault("hardware.device", repr(hardware.device), allowed)
    most = training.batch_size // training.accumulation_steps
    if hardware.processes > most:
        allowed = f"each process needs a row of every part of a batch: at most batch_size / accumulation_steps = {most}"
        yield Fault("hardware.processes", str(hardware.processes), allowed)


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
