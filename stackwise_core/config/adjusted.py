"""Values that are taken in place of those given, each with the key that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise_core.config.schema import ConfigSchema
from stackwise_core.config.stacks import progressive_adapter_of


def adjustments(config: ConfigSchema) -> Iterator[str]:
    """Yield a line for every value of a valid configuration in whose place another one is taken."""
    yield from _adapters(config)


def _adapters(config: ConfigSchema) -> Iterator[str]:
    growth = config.training.progressive
    given = (progressive_adapter_of(config, stack) for stack in range(growth.max_stacks))
    if not growth.progressive_qlora and (adapter := next(filter(None, given), None)):
        what = f"a progressive adapter of rank {adapter.rank} for trunk stacks without an adapter"
        yield f"taken: {what} (trunk_strategy: qlora)"
