"""What may be cached at which boundary, and why not otherwise."""

from __future__ import annotations

from pydantic import BaseModel

from stackwise_core.config import StackWiseConfig


class CacheDecision(BaseModel, frozen=True):
    """Whether the cache task of a stage writes a store, and the reason to show where it does not."""

    cached: bool
    reason: str


def decide_cache(config: StackWiseConfig, stage: int) -> CacheDecision:
    """Decide what the cache task of stage `stage` does: it writes what stage `stage` + 1 will read.

    With an appended stack on a frozen trunk and inputs corrupted at one ratio, the boundary at the
    top of the trunk is the same in every epoch of a view, so it may always be stored.
    """
    growth = config.training.progressive
    if stage + 1 >= growth.target_stacks:
        return CacheDecision(cached=False, reason="last stage: no stage reads it; raising target_stacks fills it")
    if not growth.cache_activations:
        return CacheDecision(
            cached=False, reason="training.progressive.cache_activations is false: the trunk runs live"
        )
    return CacheDecision(cached=True, reason=f"append on a frozen trunk: stage {stage + 1} reads boundary {stage + 1}")
