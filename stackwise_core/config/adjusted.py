"""Values that are taken in place of those given, each with the key that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise_core.config.schema import ConfigSchema
from stackwise_core.config.stacks import given_adapter, layer_widths, named, progressive_adapter_of, settings_of


def adjustments(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for every value of a valid configuration in whose place another one is taken."""
    yield from _trunk_adapters(config)
    yield from _ranks(config)


def _trunk_adapters(config: ConfigSchema) -> Iterator[str]:
    growth = config.training.progressive
    bare = (stack for stack in range(growth.max_stacks) if not settings_of(config, stack).progressive)
    given = (progressive_adapter_of(config, stack) for stack in bare)
    if not growth.progressive_qlora and (adapter := next(filter(None, given), None)):
        what = f"a progressive adapter of rank {adapter.rank} for trunk stacks without an adapter"
        yield f"taken: {what} (trunk_strategy: qlora)"


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
            given = sorted({ranks[stack] for stack in above})
            between = f"{given[0]} to {given[-1]}" if len(given) > 1 else f"{given[0]}"
            key = "rank" if growth.qlora_strategy == "variable" else "qlora_rank"
            yield f"taken: {key} {width} instead of {between} for {named(above)} {where}"
        if progressive > width:
            yield f"taken: progressive_qlora_rank {width} instead of {progressive} {where}"


def _model_value(config: ConfigSchema, path: str) -> int:
    return getattr(config.model, path.removeprefix("model."))
