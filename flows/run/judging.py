"""What validation finds: losses of the rack, and whether cached rows are what the live rack computes."""

from __future__ import annotations

import numpy as np

from flows.run.boundaries import compare_store, stream_of
from flows.run.stage import Facts, Stage
from stackwise_core.data.masks import MaskSpec
from stackwise_core.errors import StackWiseError
from stackwise_core.objectives.batches import validation_batch
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.resolve import resolve_loss
from stackwise_core.training.evaluate import judge_rack
from storage.checkpoints import (
    load_embedding,
    load_head,
    load_stack,
)


class CacheMismatchError(StackWiseError):
    """Cached rows are not what the live rack computes; the store was quarantined."""


def judge(stage: Stage) -> Facts:
    """Return the validation losses of the rack up to this stage, with the rounded and the exact stream."""
    _, validation_sequences = stage.sequences
    plans, anatomy = stage.so_far, stage.plan.spec.anatomy
    objective = stage.config.training.progressive.training_objective
    rows = np.arange(min(len(validation_sequences), stage.plan.validation.sequences))
    masks = _masks_to_judge(stage)
    own, *grid = judge_rack(
        load_embedding(stage.artifacts, plans).to(stage.device),
        # One stack is in memory at a time, however deep the rack is.
        (load_stack(stage.artifacts, plans, index).to(stage.device) for index in anatomy.order),
        load_head(stage.artifacts, plans).to(stage.device),
        [validation_batch(validation_sequences, rows, mask, objective) for mask in masks],
        stream=stream_of(stage, plans, anatomy.below),
        boundary=anatomy.boundary,
        loss_function=resolve_loss(stage.config),
    )
    assert own["loss_positions"]  # check_validation refuses a run that would have none
    by_ratio = {
        str(round(mask.mean_ratio, 4)): loss["validation_loss_exact"]
        for mask, loss in zip(masks[1:], grid, strict=True)
        if mask and loss["loss_positions"]
    }
    return {"validation_sequences": len(rows), **own, **({"by_mask_ratio": by_ratio} if by_ratio else {})}


def _masks_to_judge(stage: Stage) -> list[MaskSpec | None]:
    """Return the stage's own corruption, then those at which all stages are compared."""
    own = stage.plan.stack.mask
    return [own, *(own.at_ratio(ratio) for ratio in stage.plan.validation.grid)] if own else [own]


def compare_cache(stage: Stage, ref: Ref) -> Facts:
    """Compare sampled rows; a store that is wrong is taken out of every reader's reach."""
    checked, differing = compare_store(stage, ref)
    if differing:
        reason = f"{len(differing)} of {checked} sampled rows differ from what tokens give: {differing[:5]}"
        folder = stage.artifacts.quarantine(ref, reason)
        raise CacheMismatchError(
            f"stage {stage.index}: {reason} (sequence id, view). The store is in {folder} for inspection; "
            "run the same command again to remake it"
        )
    return {"cache": "equals live", "cache_rows_checked": checked}
