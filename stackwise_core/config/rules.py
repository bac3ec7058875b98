"""The rules between fields: combinations that make no sense, each with path, value and what to change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from stackwise_core.config.functions import shown
from stackwise_core.config.schema import GROWTH, QUANTISED, ConfigSchema
from stackwise_core.config.stacks import feed_forward_width, n_time_steps, settings_of, stack_time_step
from stackwise_core.config.unused import is_used
from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.errors import ConfigError, Fault


def rule_faults(config: ConfigSchema, *, corpus: bool = True) -> list[Fault]:
    """Return every broken rule of a configuration whose types and ranges are right.

    Args:
        config: to check.
        corpus: whether `data` is used.
    """
    return [
        *_model_faults(config),
        *(_tokenizer_faults(config) if corpus else ()),
        *_training_faults(config),
        *growth_faults(config),
        *time_faults(config),
        *_hardware_faults(config),
    ]


def _model_faults(config: ConfigSchema) -> Iterator[Fault]:
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


def _tokenizer_faults(config: ConfigSchema) -> Iterator[Fault]:
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


def _training_faults(config: ConfigSchema) -> Iterator[Fault]:
    training, growth = config.training, config.training.progressive
    if training.batch_size % training.accumulation_steps:
        allowed = f"must divide training.batch_size = {training.batch_size}"
        yield Fault("training.accumulation_steps", str(training.accumulation_steps), allowed)
    rate, most = training.learning_rate, training.mask_ratio_max
    yield from _limited("training.min_learning_rate", training.min_learning_rate, "training.learning_rate", rate)
    shortest = min(_stage_lengths(config).items(), key=lambda item: item[1])
    yield from _limited("training.warmup_steps", training.warmup_steps, *shortest)
    if is_used(config, "training.mask_ratio_max"):
        yield from _limited("training.mask_ratio_min", training.mask_ratio_min, "training.mask_ratio_max", most)
    objective = growth.training_objective
    if objective != "mlm" and config.cache.views > 1:
        allowed = f"{objective} has no masks: its views would be identical copies; use 0"
        yield Fault("cache.views", str(config.cache.views), allowed)


def _stage_lengths(config: ConfigSchema) -> dict[str, int]:
    """Return the steps of all stages, by the keys that set them."""
    growth = config.training.progressive
    n_stages = growth.target_stacks if growth.enabled else 0
    entries = enumerate(growth.stacks[:n_stages])
    lengths = {f"{GROWTH}.stacks.{stack}.steps": own.steps for stack, own in entries if own.steps}
    common = {"training.steps_per_stack": config.training.steps_per_stack}
    return lengths if lengths and len(lengths) == n_stages else lengths | common


def _limited(path: str, value: float, limit_path: str, limit: float) -> Iterator[Fault]:
    if value > limit:
        yield Fault(path, str(value), f"must not exceed {limit_path} = {limit}")


# ---------------------------------------------------------------- growth


def growth_faults(config: ConfigSchema) -> Iterator[Fault]:
    """Yield every broken rule about stacks, precisions, adapters and trunk strategies."""
    growth = config.training.progressive
    yield from _limited(f"{GROWTH}.target_stacks", growth.target_stacks, f"{GROWTH}.max_stacks", growth.max_stacks)
    if growth.trunk_strategy == "qlora" and growth.enabled and not _trunk_has_adapters(config):
        allowed = f"no trunk stack has an adapter that could train; set {GROWTH}.qlora_enabled or progressive_qlora"
        yield Fault(f"{GROWTH}.trunk_strategy", "'qlora'", f"{allowed}, or use frozen")
    yield from _precision_faults(config)
    yield from _adapter_faults(config)


def _trunk_has_adapters(config: ConfigSchema) -> bool:
    growth = config.training.progressive
    trunk = range(growth.target_stacks - 1)
    return not trunk or growth.progressive_qlora or any(settings_of(config, stack).adapter for stack in trunk)


def _precision_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth, training = config.training.progressive, config.training
    precisions = {stack: settings_of(config, stack).precision for stack in range(growth.target_stacks)}
    if growth.trunk_strategy == "full" and growth.enabled:
        keys = {_precision_path(config, stack): kind for stack, kind in precisions.items() if kind in QUANTISED}
        for path, precision in keys.items():
            allowed = "trunk_strategy full trains these weights, which would be quantised; use full, half or bfloat16"
            yield Fault(path, repr(precision), allowed)
    copies = [stack for stack, precision in precisions.items() if precision == "qlora" and stack]
    if copies and growth.enabled and training.new_stack_init in ("random", "zero"):
        allowed = f"{_named(copies)} NF4 and train adapters only, so their weights must be copies; use auto or copy"
        yield Fault("training.new_stack_init", repr(training.new_stack_init), allowed)
    if packed := [stack for stack, precision in precisions.items() if precision == "nvfp4"]:
        for path, width in _widths(config).items():
            if width % 16:
                given = getattr(config.model, path.removeprefix("model."))
                what = "it" if given == width else f"the layers of width {width} that it gives"
                allowed = f"{_named(packed)} NVFP4: 16 must divide {what}; change it, or use bfloat16"
                yield Fault(path, str(given), allowed)
        if growth.enabled and training.joint_steps and not (growth.qlora_enabled or growth.progressive_qlora):
            allowed = f"the joint anneal trains only adapters of quantised stacks; {_named(packed)} NVFP4 without any"
            yield Fault("training.joint_steps", str(training.joint_steps), f"{allowed}; set {GROWTH}.qlora_enabled")


def _named(stacks: list[int]) -> str:
    """Return "stack 3 is", or "stacks 1, 2, 3, 4 and 9 more are": a rack may have a thousand."""
    first, n_more = ", ".join(map(str, stacks[:4])), len(stacks) - 4
    more = f" and {n_more} more" if n_more > 0 else ""
    return f"stack {first} is" if len(stacks) == 1 else f"stacks {first}{more} are"


def _precision_path(config: ConfigSchema, stack: int) -> str:
    overrides = config.training.progressive.stacks
    own = stack < len(overrides) and overrides[stack].precision != "default"
    return f"{GROWTH}.stacks.{stack}.precision" if own else f"{GROWTH}.new_stack_precision"


def _adapter_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    variable = growth.qlora_strategy == "variable"
    sizes = {stack: settings_of(config, stack).adapter for stack in range(growth.target_stacks)}
    adapters = {stack: size for stack, size in sizes.items() if size}
    if variable and (missing := [stack for stack in adapters if stack not in growth.qlora_configs]):
        given = ", ".join(map(str, sorted(growth.qlora_configs))) or "none"
        allowed = f"{_named(missing)} without an entry, and each adapter needs one (given: {given})"
        yield Fault(f"{GROWTH}.qlora_configs", f"{len(growth.qlora_configs)} entries", allowed)
        return
    narrowest, width = min(_widths(config).items(), key=lambda item: item[::-1])
    faults: dict[str, Fault] = {}
    for stack, (rank, alpha) in adapters.items():
        if rank > width:
            path = f"{GROWTH}.qlora_configs.{stack}.rank" if variable else f"{GROWTH}.qlora_rank"
            allowed = f"of stack {stack} exceeds its narrowest layer ({narrowest}: {width}); lower it"
            faults.setdefault(path, Fault(path, str(rank), allowed))
        if not math.isfinite(alpha):
            path = f"{GROWTH}.qlora_alpha_pattern"
            allowed = f"gives stack {stack} an infinite alpha; use another"
            faults.setdefault(path, Fault(path, repr(growth.qlora_alpha_pattern), allowed))
    yield from faults.values()
    if growth.enabled and growth.progressive_qlora and growth.progressive_qlora_rank > width:
        received, path = str(growth.progressive_qlora_rank), f"{GROWTH}.progressive_qlora_rank"
        yield Fault(path, received, f"exceeds the narrowest layer of a stack ({narrowest}: {width}); lower it")


def _widths(config: ConfigSchema) -> dict[str, int]:
    """Return the widths of a block's linear layers, by the key that sets each."""
    model = config.model
    widths = {"model.d_model": model.d_model, "model.d_ff": feed_forward_width(config)}
    grouped = model.n_kv_heads not in (0, model.n_heads) and model.d_model % model.n_heads == 0
    return widths | ({"model.n_kv_heads": model.d_model // model.n_heads * model.n_kv_heads} if grouped else {})


# ---------------------------------------------------------------- time


def time_faults(config: ConfigSchema) -> Iterator[Fault]:
    """Yield every broken rule about time, each with what to change."""
    interpretation = config.training.progressive.time_interpretation
    if interpretation == "depth":
        yield from _depth_faults(config)
    if interpretation == "input":
        yield from _input_faults(config)
    yield from _schedule_faults(config)
    yield from _elbo_faults(config)


def _depth_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    steps: list[int] = []
    try:
        for c in range(min(growth.target_stacks, growth.max_stacks)):
            steps.append(stack_time_step(config, c))
    except ConfigError as error:
        yield from error.faults  # only those of the first stack, since the stacks after it have the same
    linear, exponential = growth.stack_time_mapping == "linear", growth.stack_time_mapping == "exponential"
    for c, (step, following) in enumerate(itertools.pairwise(steps)):
        pair = f"stacks {c} and {c + 1}"
        if exponential and step == following:
            allowed = f"gives {pair} the same step {step}; raise {GROWTH}.num_time_steps (now {n_time_steps(config)})"
            yield Fault(f"{GROWTH}.stack_time_mapping", "'exponential'", allowed)
            return
        if not (linear or exponential) and following < step:
            key = "stack_time_mapping" if callable(growth.stack_time_mapping) else "time_mapping"
            allowed = f"falls from {step} to {following} between {pair}; steps must not decrease"
            yield Fault(f"{GROWTH}.{key}", shown(getattr(growth, key)), allowed)
            return


def _input_faults(config: ConfigSchema) -> Iterator[Fault]:
    growth = config.training.progressive
    if growth.training_objective != "mlm":
        allowed = f"time as an input needs corrupted inputs: use {GROWTH}.training_objective mlm, or depth or none"
        yield Fault(f"{GROWTH}.time_interpretation", "'input'", allowed)
    if growth.time_encoding_type == "sinusoidal" and growth.time_embedding_dim % 2:
        allowed = "a sinusoidal encoding pairs a sine with a cosine and needs an even number"
        yield Fault(f"{GROWTH}.time_embedding_dim", str(growth.time_embedding_dim), allowed)


def _schedule_faults(config: ConfigSchema) -> Iterator[Fault]:
    table, n_steps = config.training.mask_ratio_table, n_time_steps(config)
    if not table or not is_used(config, "training.mask_ratio_table"):
        return
    if len(table) != n_steps:
        allowed = f"needs a ratio for each of the {n_steps} time steps; change it or {GROWTH}.num_time_steps"
        yield Fault("training.mask_ratio_table", f"{len(table)} ratios", allowed)
    if config.training.progressive.time_interpretation == "depth" and sorted(table) != table:
        allowed = "must not decrease: the stack created first has the lightest noise"
        yield Fault("training.mask_ratio_table", repr(table), allowed)


def _elbo_faults(config: ConfigSchema) -> Iterator[Fault]:
    training = config.training
    if training.loss_weighting != "elbo":
        return
    needed = {
        f"{GROWTH}.time_interpretation": (training.progressive.time_interpretation, "input"),
        f"{GROWTH}.training_objective": (training.progressive.training_objective, "mlm"),
        "training.corruption": (training.corruption, "mask"),
    }
    wrong = [f"{path}: {wanted} (now {value})" for path, (value, wanted) in needed.items() if value != wanted]
    if wrong:
        yield Fault("training.loss_weighting", "'elbo'", f"needs {', '.join(wrong)}; set what is missing, or use mean")


# ---------------------------------------------------------------- hardware


def _hardware_faults(config: ConfigSchema) -> Iterator[Fault]:
    hardware, training = config.hardware, config.training
    if hardware.processes > 1 and hardware.device.startswith("cuda:"):
        allowed = f"hardware.processes = {hardware.processes} need a device each; use cuda"
        yield Fault("hardware.device", repr(hardware.device), allowed)
    most = training.batch_size // training.accumulation_steps
    if hardware.processes > most:
        allowed = f"each process needs a row of every part of a batch: at most batch_size / accumulation_steps = {most}"
        yield Fault("hardware.processes", str(hardware.processes), allowed)
