"""What may be cached at which boundary, and why not otherwise."""

from __future__ import annotations

from pydantic import BaseModel

from stackwise_core.config import StackWiseConfig
from stackwise_core.resolve import StageSpec, resolve_stages


class CacheDecision(BaseModel, frozen=True):
    """Whether the cache task of a stage writes a store, and for whom, or the reason to show why not."""

    reader: StageSpec | None = None
    """The stage that reads it."""
    reason: str = ""


def decide_cache(config: StackWiseConfig, spec: StageSpec) -> CacheDecision:
    """Decide what the cache task of a stage does: it writes what the next stage will read.

    What lies below the first stack that trains is frozen, so its output for a sequence under a view
    is the same in every epoch. Where gradients flow through the trunk, or it trains, nothing is.
    """
    stages = resolve_stages(config)
    if spec.index + 1 >= len(stages):
        return CacheDecision(reason="last stage: no stage reads it; raising target_stacks fills it")
    reader = stages[spec.index + 1]
    if reader.anatomy.boundary == 0:
        return CacheDecision(reason=f"stage {reader.index} streams from tokens: {_why_live(reader)}")
    if not config.training.progressive.cache_activations:
        return CacheDecision(reason="training.progressive.cache_activations is false: the trunk runs live")
    return CacheDecision(reader=reader)


def _why_live(reader: StageSpec) -> str:
    if reader.mode == "joint":
        return "it trains everything together"
    if reader.mode == "prepend":
        return "gradients flow through the trunk to the prepended stack"
    if reader.strategy == "full":
        return "the whole trunk trains"
    return "adapters of every trunk stack train"
