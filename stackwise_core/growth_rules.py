"""What makes sense of stacks, precisions, adapters and strategies together, and which keys matter when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from stackwise_core.errors import Fault

if TYPE_CHECKING:
    from stackwise_core.config import Precision, StackWiseConfig

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
    for stack in range(growth.target_stacks):
        precision, path = stage_precision(config, stack), _precision_path(config, stack)
        if precision in QUANTISED and growth.trunk_strategy == "full" and growth.enabled:
            allowed = "trunk_strategy full trains these weights, which would be quantised; use full, half or bfloat16"
            yield Fault(path, repr(precision), allowed)
        if precision == "qlora" and growth.enabled and stack and training.new_stack_init in ("random", "zero"):
            allowed = f"stack {stack} is NF4 and trains adapters only, so its weights must be a copy; use auto or copy"
            yield Fault("training.new_stack_init", repr(training.new_stack_init), allowed)
        if precision == "nvfp4":
            for name, width in _widths(config).items():
                if width % 16:
                    yield Fault(name, str(width), f"stack {stack} is NVFP4: 16 must divide it (or use bfloat16)")
        if precision == "nvfp4" and training.joint_steps and not (growth.qlora_enabled or growth.progressive_qlora):
            allowed = f"the joint anneal trains only adapters of a quantised stack, and stack {stack} has none"
            yield Fault("training.joint_steps", str(training.joint_steps), f"{allowed}; set {GROWTH}.qlora_enabled")


def _precision_path(config: StackWiseConfig, stack: int) -> str:
    overrides = config.training.progressive.stacks
    own = stack < len(overrides) and overrides[stack].precision != "default"
    return f"{GROWTH}.stacks.{stack}.precision" if own else f"{GROWTH}.new_stack_precision"


def _adapter_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth = config.training.progressive
    adapted = [stack for stack in range(growth.target_stacks) if has_adapter(config, stack)]
    if growth.qlora_strategy == "variable" and (missing := [c for c in adapted if c not in growth.qlora_configs]):
        given = ", ".join(map(str, sorted(growth.qlora_configs))) or "none"
        allowed = f"stacks {', '.join(map(str, missing))} need an entry of their own (given: {given})"
        yield Fault(f"{GROWTH}.qlora_configs", f"{len(growth.qlora_configs)} entries", allowed)
        return
    width, narrowest = min((width, name) for name, width in _widths(config).items())
    for stack in adapted:
        if (rank := adapter_size(config, stack)[0]) > width:
            path = f"{GROWTH}.qlora_configs" if growth.qlora_strategy == "variable" else f"{GROWTH}.qlora_rank"
            yield Fault(path, str(rank), f"of stack {stack} exceeds its narrowest layer ({narrowest}: {width})")
    if growth.progressive_qlora and growth.progressive_qlora_rank > width:
        received, path = str(growth.progressive_qlora_rank), f"{GROWTH}.progressive_qlora_rank"
        yield Fault(path, received, f"exceeds the narrowest layer of a stack ({narrowest}: {width})")


def _widths(config: StackWiseConfig) -> dict[str, int]:
    """Return the widths of a block's linear layers, by the key that sets each."""
    model = config.model
    heads = model.n_kv_heads or model.n_heads
    return {
        "model.d_model": model.d_model,
        "model.d_ff": feed_forward_width(config),
        "model.n_kv_heads": model.d_model // model.n_heads * heads,
    }


# ---------------------------------------------------------------- keys that matter only together with another

_Condition = Callable[["StackWiseConfig"], bool]


def _growth_is(**wanted: Any) -> _Condition:
    return lambda config: any(getattr(config.training.progressive, key) == value for key, value in wanted.items())


def _adapted(config: StackWiseConfig) -> bool:
    return any(has_adapter(config, stack) for stack in range(config.training.progressive.max_stacks))


def _any_adapter(config: StackWiseConfig) -> bool:
    return _adapted(config) or config.training.progressive.progressive_qlora


def _patterned(config: StackWiseConfig) -> bool:
    return _adapted(config) and config.training.progressive.qlora_strategy == "progressive"


def _by_rule(config: StackWiseConfig) -> bool:
    return _adapted(config) and config.training.progressive.qlora_strategy != "variable"


def _variable(config: StackWiseConfig) -> bool:
    return _adapted(config) and config.training.progressive.qlora_strategy == "variable"


def _masked(config: StackWiseConfig) -> bool:
    return config.training.progressive.training_objective == "mlm"


_ADAPTED = (_adapted, f"{GROWTH}.qlora_enabled: true, or a stack of precision qlora")
_BY_RULE = (_by_rule, f"{GROWTH}.qlora_enabled: true or precision qlora, and no qlora_strategy: variable")
_PATTERNED = (_patterned, f"{GROWTH}.qlora_strategy: progressive, on stacks that have adapters")
_ONLY_WITH: dict[str, tuple[_Condition, str]] = {
    f"{GROWTH}.trunk_trainable_top": (_growth_is(trunk_strategy="qlora"), f"{GROWTH}.trunk_strategy: qlora"),
    f"{GROWTH}.qlora_rank": _BY_RULE,
    f"{GROWTH}.qlora_alpha": _BY_RULE,
    f"{GROWTH}.trunk_strategy": (_growth_is(enabled=True), f"{GROWTH}.enabled: true"),
    "training.new_stack_init": (_growth_is(enabled=True), f"{GROWTH}.enabled: true"),
    "cache.mode": (_growth_is(cache_activations=True), f"{GROWTH}.cache_activations: true"),
    "cache.keep": (_growth_is(cache_activations=True), f"{GROWTH}.cache_activations: true"),
    f"{GROWTH}.qlora_strategy": _ADAPTED,
    f"{GROWTH}.qlora_rank_pattern": _PATTERNED,
    f"{GROWTH}.qlora_alpha_pattern": _PATTERNED,
    f"{GROWTH}.qlora_configs": (_variable, f"{GROWTH}.qlora_strategy: variable, on stacks that have adapters"),
    f"{GROWTH}.progressive_qlora_rank": (_growth_is(progressive_qlora=True), f"{GROWTH}.progressive_qlora: true"),
    f"{GROWTH}.progressive_qlora_alpha": (_growth_is(progressive_qlora=True), f"{GROWTH}.progressive_qlora: true"),
    "training.adapter_learning_rate": (_any_adapter, f"adapters: {GROWTH}.qlora_enabled or progressive_qlora"),
    "training.custom_loss": (_growth_is(training_objective="custom"), f"{GROWTH}.training_objective: custom"),
    "training.joint_learning_rate": (
        lambda config: config.training.joint_steps > 0,
        "training.joint_steps; there are none",
    ),
    "training.corruption": (_masked, f"{GROWTH}.training_objective: mlm"),
    "training.loss_weighting": (_masked, f"{GROWTH}.training_objective: mlm"),
}


def effect_faults(config: StackWiseConfig) -> Iterator[Fault]:
    """Yield the keys that were set although nothing of this configuration reads them."""
    for path, (matters, where) in _ONLY_WITH.items():
        value = _lookup(config, path)
        if value != _lookup(type(config)(), path) and not matters(config):
            yield Fault(path, repr(value), f"changes nothing here: it belongs to {where}; leave it out")


def _lookup(config: BaseModel, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
