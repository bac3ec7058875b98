"""What may be cached at which boundary, why not otherwise, and whether it pays."""

from __future__ import annotations

from pydantic import BaseModel

from stackwise_core.config.schema import StackWiseConfig
from stackwise_core.config.stacks import stage_blocks
from stackwise_core.stages.costs import stack_flops, store_bytes
from stackwise_core.stages.resolve import resolve_mask, resolve_shape, resolve_views
from stackwise_core.stages.stages import StageSpec


class CacheDecision(BaseModel, frozen=True):
    """Whether the cache task of a stage writes a store, or the reason to show why not."""

    cached: bool
    reason: str = ""


def decide_cache(
    config: StackWiseConfig, writer: StageSpec, reader: StageSpec | None, corpus_bytes: int
) -> CacheDecision:
    """Decide what the cache task of a stage does: it writes what the next stage will read.

    What lies below the first stack that trains is frozen, so its output for a sequence under a view
    is the same in every epoch. Where gradients flow through the trunk, or it trains, nothing is.

    Args:
        config: valid.
        writer: the stage.
        reader: the next one; None after the last.
        corpus_bytes: of the text, from which rows are estimated; 0 if unknown.
    """
    if reader is None:
        later = "" if writer.mode == "joint" else "; raising target_stacks fills it"
        return CacheDecision(cached=False, reason=f"last stage: no stage reads it{later}")
    if reader.anatomy.boundary == 0:
        return CacheDecision(cached=False, reason=f"stage {reader.index} streams from tokens: {_why_live(reader)}")
    if not config.training.progressive.cache_activations:
        reason = "training.progressive.cache_activations is false: the trunk runs live"
        return CacheDecision(cached=False, reason=reason)
    if config.cache.mode == "auto" and (reason := _why_it_does_not_pay(config, writer, reader, corpus_bytes)):
        return CacheDecision(cached=False, reason=f"cache.mode is auto: {reason}")
    return CacheDecision(cached=True)


def _why_live(reader: StageSpec) -> str:
    if reader.mode == "joint":
        return "it trains everything together"
    if reader.mode == "prepend":
        return "gradients flow through the trunk to the prepended stack"
    if reader.strategy == "full":
        return "the whole trunk trains"
    return "adapters of every trunk stack train"


def _why_it_does_not_pay(config: StackWiseConfig, writer: StageSpec, reader: StageSpec, corpus_bytes: int) -> str:
    """Compare the frozen trunk's work with and without a store: by counts, as no id may depend on a clock."""
    reads = reader.optim.steps * reader.optim.batch_size
    rows = min(reads, resolve_views(config) * _training_rows(config, corpus_bytes)) if corpus_bytes else reads
    shape, seq_len = resolve_shape(config), config.data.seq_len
    flops = [stack_flops(shape, stage_blocks(config, stack), seq_len) for stack in reader.anatomy.below]
    live, filling = reads * sum(flops), rows * (flops[-1] if _advances(config, writer, reader) else sum(flops))
    if filling >= live:
        return f"filling {rows:,} rows costs as much as running the trunk for {reads:,} reads"
    n_bytes = store_bytes(rows, seq_len, shape.d_model, config.cache.dtype)
    if n_bytes > config.cache.max_gb * 2**30:
        return f"{n_bytes / 2**30:.1f} GiB exceed cache.max_gb = {config.cache.max_gb}"
    return ""


def _training_rows(config: StackWiseConfig, corpus_bytes: int) -> int:
    """Estimate the training sequences: a byte is at most a token."""
    rows = max(1, int(corpus_bytes * (1 - config.data.validation_fraction)) // config.data.seq_len)
    return min(rows, config.data.max_sequences) if config.data.max_sequences else rows


def _advances(config: StackWiseConfig, writer: StageSpec, reader: StageSpec) -> bool:
    """Say whether the boundary is one stack above the one that the writing stage reads, under the same corruption."""
    below = writer.anatomy.below
    same = resolve_mask(config, writer.anatomy.newest) == resolve_mask(config, reader.anatomy.newest)
    return bool(below) and same and reader.anatomy.below[:-1] == below
