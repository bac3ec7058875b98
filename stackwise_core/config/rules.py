"""The rules between fields: combinations that make no sense, each with path, value and what to change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.functions import shown
from stackwise_core.config.schema import GROWTH, QUANTISED, ConfigSchema, HardwareConfig
from stackwise_core.config.sizes import batch_size_of, layer_widths
from stackwise_core.config.stacks import (
    n_time_steps,
    named,
    operator_of,
    progressive_adapter_of,
    settings_of,
    stack_time_step,
    step_above,
)
from stackwise_core.config.unused import is_used
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.mixture import sources_of
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault


def rule_faults(config: ConfigSchema, *, corpus: bool = True) -> list[Fault]:
    """Return every broken rule of a configuration of right types and ranges; `corpus` tells whether it uses `data`.

    What depends on a rack that is still to be adopted is checked when it has been read.
    """
    if config.model.from_ and not config.adopted:
        return [*_adoption_faults(config, corpus=corpus), *_hardware_faults(config)]
    return [
        *_model_faults(config),
        *(_tokenizer_faults(config) if corpus else ()),
        *_training_faults(config),
        *growth_faults(config),
        *time_faults(config),
        *_hardware_faults(config),
    ]


def device_fault(hardware: HardwareConfig, n_devices: int) -> Fault | None:
    """Return what a machine of so many CUDA devices lacks of those that are asked for."""
    if hardware.device == "cpu" or (hardware.device == "auto" and not n_devices):
        return None
    there = f"this machine has {n_devices or 'no'} CUDA device{'s' if n_devices > 1 else ''}"
    if int(hardware.device.partition(":")[2] or 0) >= n_devices:
        return Fault("hardware.device", repr(hardware.device), f"{there}; use auto or cpu")
    if hardware.processes > n_devices:
        allowed = f"{there}, and each process needs its own; lower it, or set hardware.device: cpu"
        return Fault("hardware.processes", str(hardware.processes), allowed)
    return None


def _fault(config: ConfigSchema, path: str, allowed: str) -> Fault:
    return Fault(path.removesuffix("_"), shown(_value(config, path)), allowed)


def _value(config: ConfigSchema, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, (list, dict)) else getattr(value, name)
    return value


def _adoption_faults(config: ConfigSchema, *, corpus: bool) -> Iterator[Fault]:
    growth, folder = config.training.progressive, repr(config.model.from_)
    if not corpus:
        allowed = "a run adopts a rack; in the library, ProgressiveRackBuilder.load(folder) opens it"
        yield Fault("model.from", folder, allowed)
    if not growth.enabled:
        allowed = "a rack is adopted to grow; use true, and training.joint_steps to train all stacks together"
        yield _fault(config, f"{GROWTH}.enabled", allowed)


def _model_faults(config: ConfigSchema) -> Iterator[Fault]:
    model = config.model
    if model.head_dim % 2:
        yield _fault(config, "model.head_dim", "RoPE turns pairs of channels and needs an even number")
    if not model.head_dim and model.d_model % model.n_heads:
        yield _fault(config, "model.n_heads", f"must divide model.d_model = {model.d_model}")
    elif not model.head_dim and (width := model.d_model // model.n_heads) % 2:
        yield _fault(config, "model.n_heads", f"gives heads of {width} channels; RoPE needs an even number")
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield _fault(config, "model.n_kv_heads", f"must divide model.n_heads = {model.n_heads}")
    if config.training.progressive.training_objective == "clm" and model.attention == "bidirectional":
        remedy = f"the rack in {model.from_} has it; use mlm" if model.from_ else "use auto"
        yield _fault(config, "model.attention", f"with clm every position would see its own target; {remedy}")


def _tokenizer_faults(config: ConfigSchema) -> Iterator[Fault]:
    name = config.data.tokenizer
    try:
        tokenizer = tokenizer_of(config)
    except ConfigError as error:
        yield from error.faults
        return
    if 0 < config.model.vocab_size < tokenizer.vocab_size:
        which = "the byte tokenizer" if name == "byte" else f"data.tokenizer = {name!r}"
        yield _fault(
            config, "model.vocab_size", f"{which} needs at least {tokenizer.vocab_size}; 0 takes what it needs"
        )
    yield from _documents_faults(config, tokenizer)
    if tokenizer.mask_token is None and config.training.progressive.training_objective == "mlm":
        allowed = "it has neither [MASK] nor <mask>, which mlm needs; add one to it, or use training_objective: clm"
        yield _fault(config, "data.tokenizer", allowed)


def _documents_faults(config: ConfigSchema, tokenizer: Tokenizer) -> Iterator[Fault]:
    if config.data.documents == "concat" or not is_used(config, "data.documents"):
        return
    tokens = next((source.name for source in sources_of(config.data.source) if holds_tokens(source.name)), None)
    if config.data.tokenizer == "byte" and tokens:
        allowed = f"what ends a document in {tokens} is not known; name the tokenizer that made it as data.tokenizer"
        yield _fault(config, "data.documents", allowed)
    elif tokenizer.end_token is None:
        allowed = "the tokenizer has no end token, so documents cannot be told apart; name one with data.end_token"
        yield _fault(config, "data.documents", allowed)


def _training_faults(config: ConfigSchema) -> Iterator[Fault]:
    if is_used(config, "training.mask_ratio_max"):
        yield from _limited(config, "training.mask_ratio_min", "training.mask_ratio_max")
    yield from _validation_faults(config)


def _validation_faults(config: ConfigSchema) -> Iterator[Fault]:
    """Yield a fault where nothing could decide when a stage ends, or which of its weights are kept."""
    validation, training, hardware = config.validation, config.training, config.hardware
    joint, clock = training.joint_steps > 0 or not training.progressive.enabled, training.schedule == "one_clock"
    decides = {
        "validation.patience": bool(validation.every and validation.patience),
        "validation.keep": bool(validation.every) and validation.keep == "best",
    }
    for path, used in decides.items():
        if used and validation.cooldown_steps and is_used(config, "validation.cooldown_steps"):
            allowed = f"it goes on from the last planned step, which with {path} need not be what is kept; use 0"
            yield _fault(config, "validation.cooldown_steps", allowed)
        decides_joint = joint and not (clock and path == "validation.patience")
        growth = training.progressive.enabled and hardware.shards(joint=False)
        if used and (growth or (decides_joint and hardware.shards(joint=True))):
            which = "a stage" if growth else "the joint stage"
            allowed = f"the {hardware.ranks} processes that share out {which} do not validate inside it"
            yield _fault(config, path, f"{allowed}; use hardware.shard: never, or leave this out")


def _limited(config: ConfigSchema, path: str, limit_path: str) -> Iterator[Fault]:
    limit = _value(config, limit_path)
    if _value(config, path) > limit:
        yield _fault(config, path, f"must not exceed {limit_path} = {limit}")


def growth_faults(config: ConfigSchema) -> Iterator[Fault]:
    """Yield every broken rule about stacks, precisions, adapters and trunk strategies."""
    yield from _limited(config, f"{GROWTH}.target_stacks", f"{GROWTH}.max_stacks")
    yield from _precision_faults(config)
    yield from _residual_warmup_faults(config)
    yield from _tail_faults(config)
    yield from _adapter_faults(config)


def _precision_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth, training = config.training.progressive, config.training
    precisions = {stack: settings_of(config, stack).precision for stack in range(growth.target_stacks)}
    if growth.trunk_strategy == "full" and growth.enabled:
        allowed = "trunk_strategy full trains these weights, which would be quantised; use full, half or bfloat16"
        quantised = [_precision_path(config, stack) for stack, kind in precisions.items() if kind in QUANTISED]
        for path in dict.fromkeys(quantised):
            yield _fault(config, path, allowed)
    copies = [stack for stack, precision in precisions.items() if precision == "qlora" and stack]
    if copies and growth.enabled and training.new_stack_init in ("random", "zero"):
        allowed = f"{_are(copies)} NF4 and train adapters only, so their weights must be copies; use auto or copy"
        yield _fault(config, "training.new_stack_init", allowed)
    if copies and growth.enabled and training.new_stack_noise and is_used(config, "training.new_stack_noise"):
        allowed = f"{_are(copies)} NF4 and train adapters only, so their weights must be copies; use 0"
        yield _fault(config, "training.new_stack_noise", allowed)
    if held := [stack for stack in copies if config.model.norm_outputs and _begins_as_zero(config, stack)]:
        allowed = f"{_are(held)} NF4 and train adapters only: norms of outputs, which copy_zero zeroes, would stay zero"
        yield _fault(config, "training.new_stack_init", f"{allowed}; use copy")
    if packed := [stack for stack, precision in precisions.items() if precision == "nvfp4"]:
        for path, width in layer_widths(config).items():
            if width % 16:
                what = "it" if _value(config, path) == width else f"the layers of width {width} that it gives"
                yield _fault(config, path, f"{_are(packed)} NVFP4: 16 must divide {what}; change it, or use bfloat16")
        bare = [n for n in packed if not (settings_of(config, n).adapter or progressive_adapter_of(config, n))]
        if growth.enabled and training.joint_steps and bare:
            allowed = f"the joint anneal trains only adapters of quantised stacks; {_are(bare)} NVFP4 without any"
            yield _fault(config, "training.joint_steps", f"{allowed}; set {GROWTH}.qlora_enabled")


def _begins_as_zero(config: ConfigSchema, stack: int) -> bool:
    return stack >= len(config.adopted) and operator_of(config, settings_of(config, stack)) == "copy_zero"


def _residual_warmup_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth, warmup = config.training.progressive, config.training.residual_warmup_steps
    for stack in range(max(1, len(config.adopted)), growth.target_stacks if growth.enabled else 0):
        if warmup > (steps := settings_of(config, stack).steps):
            allowed = f"the stage of stack {stack} has {steps} steps: at most as many, or more steps"
            yield _fault(config, "training.residual_warmup_steps", allowed)
            return


def _tail_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth, order = config.training.progressive, list[int]()
    for stack in range(min(growth.target_stacks, growth.max_stacks)):
        settings = settings_of(config, stack)
        place = stack - settings.above(stack)
        tail = order[place:] if settings.mode == "insert" and stack >= len(config.adopted) else []
        order.insert(place, stack)
        quantised = [other for other in tail if settings_of(config, other).precision in QUANTISED]
        bare = [other for other in quantised if settings_of(config, other).adapter is None]
        if bare and growth.tail_strategy == "full" and growth.enabled:
            where = f"in the tail above stack {stack}, without an adapter to train"
            allowed = f"{_are(bare)} quantised (new_stack_precision), {where}"
            yield _fault(config, f"{GROWTH}.tail_strategy", f"{allowed}; use frozen or qlora")
            return


def _are(stacks: list[int]) -> str:
    return f"{named(stacks)} {'is' if len(stacks) == 1 else 'are'}"


def _precision_path(config: ConfigSchema, stack: int) -> str:
    if stack < len(config.adopted):
        return "model.from_"
    overrides = config.training.progressive.stacks
    own = stack < len(overrides) and overrides[stack].precision != "default"
    return f"{GROWTH}.stacks.{stack}.precision" if own else f"{GROWTH}.new_stack_precision"


def _adapter_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    variable = growth.qlora_strategy == "variable"
    stacks = range(len(config.adopted), growth.target_stacks)
    adapters = {stack: adapter for stack in stacks if (adapter := settings_of(config, stack).adapter)}
    if variable and (missing := [stack for stack in adapters if stack not in growth.qlora_configs]):
        given = ", ".join(map(str, sorted(growth.qlora_configs))) or "none"
        allowed = f"{_are(missing)} without an entry, and each adapter needs one (given: {given})"
        yield Fault(f"{GROWTH}.qlora_configs", f"{len(growth.qlora_configs)} entries", allowed)
        return
    if infinite := [stack for stack, adapter in adapters.items() if not math.isfinite(adapter.alpha)]:
        allowed = f"gives stack {infinite[0]} an infinite alpha; use another"
        yield _fault(config, f"{GROWTH}.qlora_alpha_pattern", allowed)


def time_faults(config: ConfigSchema) -> Iterator[Fault]:
    """Yield every broken rule about time, each with what to change."""
    if config.training.progressive.time_interpretation == "depth":
        yield from _depth_faults(config)
    if config.training.progressive.time_interpretation == "input":
        yield from _input_faults(config)
    yield from _schedule_faults(config)
    yield from _elbo_faults(config)


def _depth_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    steps: list[int] = []
    try:
        for c in range(min(growth.target_stacks, growth.max_stacks)):
            steps.append(stack_time_step(config, c))
        by_intervals = growth.stack_time_span == "interval" and is_used(config, f"{GROWTH}.stack_time_span")
        if by_intervals and (above := step_above(config, len(steps) - 1)) is not None:
            steps.append(above)
    except ConfigError as error:
        yield from error.faults  # only those of the first stack, since the stacks after it have the same
    linear, exponential = growth.stack_time_mapping == "linear", growth.stack_time_mapping == "exponential"
    for c, (step, following) in enumerate(itertools.pairwise(steps)):
        pair = f"stacks {c} and {c + 1}"
        if exponential and step == following:
            remedy = f"raise {GROWTH}.num_time_steps" if growth.num_time_steps else "give mask_ratio_table more ratios"
            allowed = f"gives {pair} the same step {step}; {remedy} (now {n_time_steps(config)})"
            yield _fault(config, f"{GROWTH}.stack_time_mapping", allowed)
            return
        if not (linear or exponential) and following < step:
            key = "stack_time_mapping" if callable(growth.stack_time_mapping) else "time_mapping"
            allowed = f"falls from {step} to {following} between {pair}; steps must not decrease"
            yield _fault(config, f"{GROWTH}.{key}", allowed)
            return


def _input_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    if growth.training_objective != "mlm":
        allowed = f"time as an input needs corrupted inputs: use {GROWTH}.training_objective mlm, or depth or none"
        yield _fault(config, f"{GROWTH}.time_interpretation", allowed)
    if growth.time_encoding_type == "sinusoidal" and growth.time_embedding_dim % 2:
        allowed = "a sinusoidal encoding pairs a sine with a cosine and needs an even number"
        yield _fault(config, f"{GROWTH}.time_embedding_dim", allowed)


def _schedule_faults(config: ConfigSchema) -> Iterator[Fault]:
    table, n_steps = config.training.mask_ratio_table, n_time_steps(config)
    if not table or not is_used(config, "training.mask_ratio_table"):
        return
    if len(table) != n_steps:
        allowed = f"needs a ratio for each of the {n_steps} time steps; change it or {GROWTH}.num_time_steps"
        yield Fault("training.mask_ratio_table", f"{len(table)} ratios", allowed)
    if config.training.progressive.time_interpretation == "depth" and sorted(table) != table:
        allowed = "must not decrease: the stack created first has the lightest noise"
        yield _fault(config, "training.mask_ratio_table", allowed)


def _elbo_faults(config: ConfigSchema) -> Iterator[Fault]:
    needs = {
        f"{GROWTH}.time_interpretation": "input",
        f"{GROWTH}.training_objective": "mlm",
        "training.corruption": "mask",
    }
    values = {path: _value(config, path) for path in needs}
    wrong = [f"{path}: {needed} (now {values[path]})" for path, needed in needs.items() if values[path] != needed]
    if wrong and config.training.loss_weighting == "elbo":
        yield _fault(config, "training.loss_weighting", f"needs {', '.join(wrong)}; set what is missing, or use mean")


def _hardware_faults(config: ConfigSchema) -> Iterator[Fault]:
    hardware, most = config.hardware, batch_size_of(config)
    if hardware.nodes > 1 and not hardware.rendezvous:
        yield _fault(config, "hardware.rendezvous", f"hardware.nodes = {hardware.nodes} need HOST:PORT of the first")
    if hardware.ranks > 1 and hardware.device.startswith("cuda:"):
        yield _fault(config, "hardware.device", f"{hardware.ranks} processes need a device each; use cuda")
    growth = config.training.progressive
    joint = bool(config.training.joint_steps) or not growth.enabled
    if hardware.shards(joint=joint) and config.training.optimizer == "adamw8bit":
        what = "all training" if hardware.shard == "always" else "joint training"
        allowed = f"several processes shard the matrices of {what}, which adamw8bit needs whole; use adamw"
        yield _fault(config, "training.optimizer", f"{allowed}, or set hardware.shard to never")
    if hardware.ranks > most:
        key, others = ("processes", 1) if hardware.processes > most else ("nodes", hardware.processes)
        yield _fault(config, f"hardware.{key}", f"each process needs a row of every batch: at most {most // others}")
