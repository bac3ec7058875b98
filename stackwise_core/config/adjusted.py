"""Values that are taken in place of those given, each with the key that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise_core.config.schema import ConfigSchema
from stackwise_core.config.sizes import accumulation_steps_of, batch_size_of, layer_widths
from stackwise_core.config.stacks import (
    clock_of,
    given_adapter,
    n_distinct_steps,
    n_time_steps,
    named,
    progressive_adapter_of,
    settings_of,
)


def adjustments(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for every value of a valid configuration in whose place another one is taken."""
    yield from _batches(config)
    yield from _schedules(config)
    yield from _time_steps(config)
    yield from _trunk_adapters(config)
    yield from _ranks(config)
    yield from _validations(config)


def _batches(config: ConfigSchema) -> Iterator[str]:
    training, rows = config.training, batch_size_of(config)
    if rows < training.batch_size:
        yield f"taken: batch_size {rows} instead of {training.batch_size} (data.max_sequences: {rows})"
    parts, share = accumulation_steps_of(config), rows // config.hardware.ranks
    if share < training.accumulation_steps:
        because = _processes(config) if share < parts else f"batch_size: {rows}"
        taken = min(parts, share)
        yield f"taken: accumulation_steps {taken} instead of {training.accumulation_steps} ({because})"


def _validations(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for each stage that is not validated inside, or not ended by it, as another is."""
    training = config.training
    joint = training.joint_steps > 0 or not training.progressive.enabled
    if config.validation.every and (patience := config.validation.patience) and training.schedule == "one_clock":
        yield f"taken: validation.patience 0 instead of {patience} in the last stage (training.schedule: one_clock)"
    if (every := config.validation.every) and config.hardware.shards(joint=joint):
        always = config.hardware.shard == "always"
        why = "hardware.shard: always" if always else _processes(config)
        yield f"taken: validation.every 0 instead of {every}{'' if always else ' in the joint stage'} ({why})"


def _processes(config: ConfigSchema) -> str:
    nodes, processes = config.hardware.nodes, config.hardware.processes
    return f"hardware.processes: {processes}" + (f", hardware.nodes: {nodes}" if nodes > 1 else "")


def _schedules(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for every length and rate of a stage that its warm-up or its minimum exceeds."""
    training, growth = config.training, config.training.progressive
    n_stages = growth.target_stacks if growth.enabled else 0
    own = {stack: entry.steps for stack, entry in enumerate(growth.stacks[:n_stages]) if entry.steps}
    if training.schedule == "one_clock":
        yield from _one_clock(config)
        return
    lengths = {"steps_per_stack": training.steps_per_stack} if len(own) < max(1, n_stages) else {}
    rates = {"learning_rate": training.learning_rate}
    if n_stages and training.joint_steps:
        lengths["joint_steps"], rates["joint_learning_rate"] = training.joint_steps, training.joint_learning_rate
    for key, steps in lengths.items():
        if steps < training.warmup_steps:
            yield f"taken: warmup_steps {steps} instead of {training.warmup_steps} ({key}: {steps})"
    if short := [stack for stack, steps in own.items() if steps < training.warmup_steps]:
        taken = _range([own[stack] for stack in short])
        yield f"taken: warmup_steps {taken} instead of {training.warmup_steps} for {named(short)} (steps: {taken})"
    for key, rate in rates.items():
        if rate < training.min_learning_rate:
            yield f"taken: min_learning_rate {rate} instead of {training.min_learning_rate} ({key}: {rate})"


def _one_clock(config: ConfigSchema) -> Iterator[str]:
    training, growth = config.training, config.training.progressive
    clock = clock_of(config, grows=growth.enabled)
    if (taken := clock.warmup_steps) < training.warmup_steps:
        yield f"taken: warmup_steps {taken} instead of {training.warmup_steps} (steps of the first stage: {taken})"
    if (taken := clock.decay_steps) < training.decay_steps:
        because = f"steps of the last stage: {clock.last_steps}"
        yield f"taken: decay_steps {taken} instead of {training.decay_steps} ({because})"
    if training.learning_rate < training.min_learning_rate:
        rate = training.learning_rate
        yield f"taken: min_learning_rate {rate} instead of {training.min_learning_rate} (learning_rate: {rate})"


def _time_steps(config: ConfigSchema) -> Iterator[str]:
    growth = config.training.progressive
    exponential = growth.time_interpretation == "depth" and growth.stack_time_mapping == "exponential"
    usual = growth.max_stacks * growth.time_per_stack
    taken = n_distinct_steps(growth.max_stacks, usual)
    if exponential and not growth.num_time_steps and n_time_steps(config) == taken > usual:
        because = f"stack_time_mapping: exponential, max_stacks: {growth.max_stacks}"
        yield f"taken: num_time_steps {taken} instead of {usual} ({because})"


def _trunk_adapters(config: ConfigSchema) -> Iterator[str]:
    growth = config.training.progressive
    bare = (stack for stack in range(growth.max_stacks) if not settings_of(config, stack).progressive)
    given = (progressive_adapter_of(config, stack) for stack in bare)
    if not growth.progressive_qlora and (adapter := next(filter(None, given), None)):
        what = f"a progressive adapter of rank {adapter.rank} for trunk stacks without an adapter"
        yield f"taken: {what} ({'trunk' if growth.trunk_strategy == 'qlora' else 'tail'}_strategy: qlora)"


def _ranks(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for every width of layers that is below the rank of an adapter on them."""
    growth, stacks = config.training.progressive, range(config.training.progressive.target_stacks)
    new = stacks[len(config.adopted) :]
    ranks = {n: given_adapter(growth, n).rank for n in new if settings_of(config, n).adapter}
    progressive = growth.progressive_qlora_rank if any(progressive_adapter_of(config, n) for n in stacks[:-1]) else 0
    # Every layer has d_model on one of its sides.
    narrow = {path: width for path, width in layer_widths(config).items() if width <= config.model.d_model}
    for path, width in narrow.items():
        where = f"in layers of width {width} ({path}: {_model_value(config, path)})"
        if above := [stack for stack, rank in ranks.items() if rank > width]:
            given = _range([ranks[stack] for stack in above])
            key = "rank" if growth.qlora_strategy == "variable" else "qlora_rank"
            yield f"taken: {key} {width} instead of {given} for {named(above)} {where}"
        if progressive > width:
            yield f"taken: progressive_qlora_rank {width} instead of {progressive} {where}"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low} to {high}" if low < high else f"{low}"


def _model_value(config: ConfigSchema, path: str) -> int:
    return getattr(config.model, path.removeprefix("model."))
