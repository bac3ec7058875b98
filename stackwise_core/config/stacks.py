"""The settings of one stack: the common values, unless `stacks` or `qlora_configs` give it other ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from stackwise_core.config.schema import ConfigSchema, Precision, ProgressiveConfig, StackOverride


class AdapterSize(NamedTuple):
    """Size of a LoRA adapter, whose output is multiplied by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class StackSettings:
    """How one stack is built, and how long its stage trains."""

    n_blocks: int
    precision: Precision
    mode: Literal["append", "prepend"]
    steps: int
    adapter: AdapterSize | None
    """Of its 'stack' adapter. A stack of precision qlora always has one: NF4 alone could not train."""


_COMMON = StackOverride()


def settings_of(config: ConfigSchema, stack: int) -> StackSettings:
    """Return the settings of a stack, named by its creation index."""
    growth = config.training.progressive
    own = growth.stacks[stack] if stack < len(growth.stacks) else _COMMON
    precision = growth.new_stack_precision if own.precision == "default" else own.precision
    return StackSettings(
        n_blocks=own.n_blocks or config.model.blocks_per_stack,
        precision=precision,
        mode=growth.building_mode if own.mode == "default" else own.mode,
        steps=own.steps or config.training.steps_per_stack,
        adapter=_adapter_size(growth, stack) if growth.qlora_enabled or precision == "qlora" else None,
    )


def _adapter_size(growth: ProgressiveConfig, stack: int) -> AdapterSize:
    own = growth.qlora_configs.get(stack)
    if growth.qlora_strategy == "variable" and own:  # a stack without an entry is rejected by the rules
        return AdapterSize(own.rank, own.alpha)
    if growth.qlora_strategy != "progressive":
        return AdapterSize(growth.qlora_rank, growth.qlora_alpha)
    rank = _by_pattern(growth.qlora_rank_pattern, growth.qlora_rank, stack)
    return AdapterSize(int(rank), float(_by_pattern(growth.qlora_alpha_pattern, growth.qlora_alpha, stack)))


def _by_pattern(pattern: str, value: float, stack: int) -> float:
    if pattern == "increasing":
        return value * 2**stack
    if pattern == "decreasing":
        return max(1, value // 2**stack if isinstance(value, int) else value / 2**stack)
    return value * (stack + 1) if pattern == "linear" else value


def feed_forward_width(config: ConfigSchema) -> int:
    """Return the inner width of the feed-forward: d_ff, or 8/3 of d_model rounded up to 32."""
    return config.model.d_ff or -(-config.model.d_model * 8 // 3 // 32) * 32
