"""What each stack has of its own, and what makes sense of stacks, precisions, adapters and strategies together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from stackwise_core.errors import Fault

if TYPE_CHECKING:
    from stackwise_core.config.schema import Precision, StackWiseConfig

GROWTH = "training.progressive"
QUANTISED: tuple[Precision, ...] = ("nvfp4", "qlora")


# ---------------------------------------------------------------- what one stack has of its own


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


def stage_mode(config: StackWiseConfig, stage: int) -> Literal["append", "prepend"]:
    """Say where a stage's stack is added: the stack's override, or the common value."""
    growth = config.training.progressive
    own = growth.stacks[stage].mode if stage < len(growth.stacks) else "default"
    return growth.building_mode if own == "default" else own


def stage_precision(config: StackWiseConfig, stage: int) -> Precision:
    """Precision of a stage's stack: the stack's override, or the common value."""
    growth = config.training.progressive
    own = growth.stacks[stage].precision if stage < len(growth.stacks) else "default"
    return growth.new_stack_precision if own == "default" else own


def has_adapter(config: StackWiseConfig, stack: int) -> bool:
    """Say whether a stack gets a 'stack' adapter at creation; NF4 without one could not train."""
    return config.training.progressive.qlora_enabled or stage_precision(config, stack) == "qlora"


def adapter_size(config: StackWiseConfig, stack: int) -> tuple[int, float]:
    """Rank and alpha of a stack's adapter by the strategy."""
    growth = config.training.progressive
    if growth.qlora_strategy == "variable":
        return growth.qlora_configs[stack].rank, growth.qlora_configs[stack].alpha
    if growth.qlora_strategy == "simplified":
        return growth.qlora_rank, growth.qlora_alpha
    rank = _by_pattern(growth.qlora_rank_pattern, growth.qlora_rank, stack)
    return int(rank), float(_by_pattern(growth.qlora_alpha_pattern, growth.qlora_alpha, stack))


def _by_pattern(pattern: str, value: float, stack: int) -> float:
    if pattern == "increasing":
        return value * 2**stack
    if pattern == "decreasing":
        return max(1, value // 2**stack if isinstance(value, int) else value / 2**stack)
    return value * (stack + 1) if pattern == "linear" else value


def feed_forward_width(config: StackWiseConfig) -> int:
    """Inner width of the feed-forward: as configured, else 8/3 of the model's, rounded up to 32."""
    return config.model.d_ff or -(-config.model.d_model * 8 // 3 // 32) * 32


# ---------------------------------------------------------------- rules


def growth_faults(config: StackWiseConfig) -> Iterator[Fault]:
    """Yield what is wrong with how the rack is to grow."""
    growth = config.training.progressive
    if growth.target_stacks > growth.max_stacks:
        allowed = f"must not exceed {GROWTH}.max_stacks = {growth.max_stacks}"
        yield Fault(f"{GROWTH}.target_stacks", str(growth.target_stacks), allowed)
    if len(growth.stacks) > growth.max_stacks:
        allowed = f"at most {GROWTH}.max_stacks = {growth.max_stacks}"
        yield Fault(f"{GROWTH}.stacks", f"{len(growth.stacks)} entries", allowed)
    if not growth.enabled and config.training.joint_steps:
        allowed = f"{GROWTH}.enabled is false: its one stage is joint already; use 0"
        yield Fault("training.joint_steps", str(config.training.joint_steps), allowed)
    if growth.trunk_strategy == "qlora" and growth.enabled and not _trunk_has_adapters(config):
        allowed = f"no trunk stack has an adapter that could train; set {GROWTH}.qlora_enabled or progressive_qlora"
        yield Fault(f"{GROWTH}.trunk_strategy", "'qlora'", f"{allowed}, or use frozen")
    yield from _precision_faults(config)
    yield from _adapter_faults(config)


def _trunk_has_adapters(config: StackWiseConfig) -> bool:
    growth = config.training.progressive
    trunk = range(growth.target_stacks - 1)
    return not trunk or growth.progressive_qlora or any(has_adapter(config, stack) for stack in trunk)


def _precision_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth, training = config.training.progressive, config.training
    precisions = {stack: stage_precision(config, stack) for stack in range(growth.target_stacks)}
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
        if training.joint_steps and not (growth.qlora_enabled or growth.progressive_qlora):
            allowed = f"the joint anneal trains only adapters of quantised stacks; {_named(packed)} NVFP4 without any"
            yield Fault("training.joint_steps", str(training.joint_steps), f"{allowed}; set {GROWTH}.qlora_enabled")


def _named(stacks: list[int]) -> str:
    """Return "stack 3 is", or "stacks 1, 2 and 3 more are": a rack may have a thousand."""
    shown, n_more = ", ".join(map(str, stacks[:4])), len(stacks) - 4
    return (
        f"stack {shown} is" if len(stacks) == 1 else f"stacks {shown}{f' and {n_more} more' if n_more > 0 else ''} are"
    )


def _precision_path(config: StackWiseConfig, stack: int) -> str:
    overrides = config.training.progressive.stacks
    own = stack < len(overrides) and overrides[stack].precision != "default"
    return f"{GROWTH}.stacks.{stack}.precision" if own else f"{GROWTH}.new_stack_precision"


def _adapter_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth = config.training.progressive
    variable = growth.qlora_strategy == "variable"
    adapted = [stack for stack in range(growth.target_stacks) if has_adapter(config, stack)]
    if variable and (missing := [c for c in adapted if c not in growth.qlora_configs]):
        given = ", ".join(map(str, sorted(growth.qlora_configs))) or "none"
        allowed = f"{_named(missing)} without an entry, and each adapter needs one (given: {given})"
        yield Fault(f"{GROWTH}.qlora_configs", f"{len(growth.qlora_configs)} entries", allowed)
        return
    width, narrowest = min((width, path) for path, width in _widths(config).items())
    faults: dict[str, Fault] = {}
    for stack in adapted:
        rank, alpha = adapter_size(config, stack)
        if rank > width:
            path = f"{GROWTH}.qlora_configs.{stack}.rank" if variable else f"{GROWTH}.qlora_rank"
            allowed = f"of stack {stack} exceeds its narrowest layer ({narrowest}: {width}); lower it"
            faults.setdefault(path, Fault(path, str(rank), allowed))
        if not math.isfinite(alpha):
            path = f"{GROWTH}.qlora_alpha_pattern"
            allowed = f"gives stack {stack} an alpha beyond all numbers; use another"
            faults.setdefault(path, Fault(path, repr(growth.qlora_alpha_pattern), allowed))
    yield from faults.values()
    if growth.progressive_qlora and growth.progressive_qlora_rank > width:
        received, path = str(growth.progressive_qlora_rank), f"{GROWTH}.progressive_qlora_rank"
        yield Fault(path, received, f"exceeds the narrowest layer of a stack ({narrowest}: {width}); lower it")


def _widths(config: StackWiseConfig) -> dict[str, int]:
    """Return the widths of a block's linear layers, by the key that sets each."""
    model = config.model
    widths = {"model.d_model": model.d_model, "model.d_ff": feed_forward_width(config)}
    grouped = model.n_kv_heads not in (0, model.n_heads) and model.d_model % model.n_heads == 0
    return widths | ({"model.n_kv_heads": model.d_model // model.n_heads * model.n_kv_heads} if grouped else {})
