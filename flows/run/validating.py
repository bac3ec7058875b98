"""Judging a stage, without Prefect: its validation losses, and whether its cache is what tokens give."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from flows.run.events import Judged, emit
from flows.run.inputs import rows_from_tokens, rows_to_store, stream_of
from flows.run.stage import Facts, Made, Stage, make
from stackwise_core.errors import NonFiniteLossError, StackWiseError
from stackwise_core.model.blocks import Stack
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.resolve import resolve_loss
from stackwise_core.training.evaluate import differing_rows, judge_rack
from stackwise_core.training.stage_model import StageModel
from storage.checkpoints import load_embedding, load_head, load_stack
from storage.files import write_text
from storage.stores import open_store

_Item = TypeVar("_Item")


class CacheMismatchError(StackWiseError):
    """Cached rows differ from what the live rack computes; the store was quarantined."""


def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the losses of the rack so far, and compare cached rows with what tokens give.

    Raises `CacheMismatchError` if they differ: the store is in quarantine, and the next run remakes it.
    """

    def work(folder: Path) -> Made:
        compared = _check_store(stage, activations) if activations else {"cache": "none"}
        recipe = stage.plan.validation
        assert recipe
        facts: Facts = {**losses_of(stage, recipe.sequences, recipe.grid), **compared}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    inputs = [stage.run_plan.data_ref, *stage.stacks_below, stack, *([activations] if activations else [])]
    return make(stage, "validate", inputs, work)


def compare_store(stage: Stage, ref: Ref) -> tuple[int, list[tuple[int, int]]]:
    """Recompute sampled rows of a store from tokens, through the whole rack.

    Returns the number of rows that were compared, and the (sequence id, view) pairs that differ.
    """
    rows = rows_to_store(stage)
    assert stage.plan.validation
    sample = rows.sample(stage.plan.validation.sampled_rows)
    exact = stage.device.type == "cpu"  # CUDA kernels may sum in another order
    with open_store(stage.artifacts, ref) as reader:
        live = rows_from_tokens(stage)
        each = _counted(stage, sample, len(sample), "cached rows compared")
        return len(sample), differing_rows(reader, live, each, rows.dtype, exact=exact)


def _counted(stage: Stage, items: Iterable[_Item], of: int, what: str) -> Generator[_Item]:
    """Yield items, and say after each how many are done."""
    for done, item in enumerate(items, 1):
        yield item
        emit(Judged(stage.index, done, of, what))


def _check_store(stage: Stage, ref: Ref) -> Facts:
    """Compare sampled rows; a store that differs goes into quarantine."""
    checked, differing = compare_store(stage, ref)
    if differing:
        reason = f"{len(differing)} of {checked} sampled rows differ from what tokens give: {differing[:5]}"
        folder = stage.artifacts.quarantine(ref, reason)
        raise CacheMismatchError(
            f"stage {stage.index}: {reason} (sequence id, view). The store is in {folder} for inspection; "
            "run the same command again to remake it"
        )
    return {"cache": "equals live", "cache_rows_checked": checked}


def losses_of(stage: Stage, n_rows: int, grid: Sequence[float], trained: StageModel | None = None) -> Facts:
    """Return the validation losses of the rack up to this stage, with the rounded and the exact stream.

    What `trained` has is taken from there, and all else from the artifacts.
    """
    _, sequences = stage.sequences
    plans, anatomy = stage.so_far, stage.plan.spec.anatomy
    objective = stage.config.training.progressive.training_objective
    rows = np.arange(min(len(sequences), n_rows))
    live = {stack.creation_index: stack for stack in trained.live_stacks()} if trained else dict[int, Stack]()
    embedding = trained.embedding if trained else None
    mask = stage.plan.mask
    # The stage's own corruption, then those at which all stages are compared.
    masks = [mask, *(mask.at_ratio(ratio) for ratio in grid)] if mask else [None]
    # Loaded one by one, so that memory does not grow with the rack.
    stacks = (live.get(index) or load_stack(stage.artifacts, plans, index, stage.device) for index in anatomy.order)
    own, *others = judge_rack(
        embedding or load_embedding(stage.artifacts, plans, stage.device),
        _counted(stage, stacks, len(anatomy.order), "stacks"),
        trained.head if trained else load_head(stage.artifacts, plans, stage.device),
        [validation_batch(sequences.fields(rows), mask, objective) for mask in masks],
        stream=stream_of(stage, plans, anatomy.below),
        boundary=anatomy.boundary,
        loss_function=resolve_loss(stage.config),
    )
    assert own["loss_positions"]  # check_validation rejects a run that would have none
    if not math.isfinite(lost := own["validation_loss"]):
        remedy = f"lower training.learning_rate (now {stage.plan.spec.optim.learning_rate})"
        raise NonFiniteLossError(f"stage {stage.index}: validation loss {lost}; {remedy}")
    by_ratio = {
        str(round(mask.mean_ratio, 4)): loss["validation_loss_exact"]
        for mask, loss in zip(masks[1:], others, strict=True)
        if mask and loss["loss_positions"]
    }
    return {"validation_sequences": len(rows), **own, **({"by_mask_ratio": by_ratio} if by_ratio else {})}
