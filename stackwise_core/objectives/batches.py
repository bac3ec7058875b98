"""The batches of a stage, in the order in which it trains on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

import numpy as np

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import SALT_DEPTH, MaskSpec, hash_bits
from stackwise_core.data.order import RowOrder
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.objectives.dataloader import Boundary, ProgressiveDataLoader, one_pass
from stackwise_core.objectives.losses import Batch, batch_rows
from stackwise_core.objectives.raw_batch import raw_fields
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.stages.stages import StageSpec, resolve_joint_times

T = TypeVar("T")


def stage_batches(
    config: StackWiseConfig,
    spec: StageSpec,
    base: Iterable[Any],
    boundary: Boundary | None = None,
    *,
    first_step: int = 0,
    record: bool = False,
    ahead: int = 0,
) -> Iterable[Batch]:
    """Return the batches that a stage trains on, up to `ahead` of them made ahead in a thread.

    `base` yields the raw batches from `first_step` on, as `PackedBatches` and `RepeatedLoader` do; `boundary` is None
    where the live stacks begin at the tokens. With `record`, rows that a function computes are kept for later passes,
    as many as `cache.max_gb` allows.
    """
    masks = stage_masks(config, spec)
    if spec.mode == "joint" and (times := resolve_joint_times(config)):
        return _joint_batches(base, masks, [step for step, _ in times], config.run.seed, first_step)
    loader = ProgressiveDataLoader(
        base,
        masks[spec.anatomy.newest],
        spec.anatomy.newest,
        boundary,
        cache_activations=record,
        objective=config.training.progressive.training_objective,
        time_step=spec.time_step,
        max_cache_bytes=int(config.cache.max_gb * 2**30),
    )
    return prefetched(loader, ahead) if ahead else loader


def stage_masks(config: StackWiseConfig, spec: StageSpec) -> dict[int, MaskSpec | None]:
    """Return how a stage corrupts its inputs, by the stack that a step trains.

    That is the newest stack, but in joint training over depth as time any of them.
    """
    stacks = range(len(resolve_joint_times(config))) if spec.mode == "joint" else ()
    return {stack: resolve_mask(config, stack) for stack in stacks or (spec.anatomy.newest,)}


def _joint_batches(
    base: Iterable[Batch], masks: dict[int, MaskSpec | None], time_steps: Sequence[int], seed: int, first_step: int
) -> Iterator[Batch]:
    """Yield batches of joint training where depth is time: each step draws one stack and trains at its ratio.

    The stack is hash(seed, step); stacks that were created after it are left out of that step.
    """
    for step, fields in enumerate(base, first_step):
        stack = int(hash_bits(seed, SALT_DEPTH, step)[0] % np.uint64(len(masks)))
        yield from ProgressiveDataLoader([fields], masks[stack], stack, time_step=time_steps[stack])


class PackedBatches:
    """The raw batches of packed sequences from one step to another, in the order all stages share."""

    def __init__(
        self, sequences: PackedSequences, order: RowOrder, start: int, stop: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Yield the batches of steps start to stop - 1; of several ranks, each reads its share of every batch."""
        self.sequences, self.order, self.start, self.stop = sequences, order, start, stop
        size = order.batch_size
        self.slots = slice(rank * size // ranks, (rank + 1) * size // ranks)

    def __iter__(self) -> Iterator[Batch]:
        """Yield input_ids [B, T], sequence_ids [B] and the view.

        If the order has fixed batches, also the number of the batch in its view (`batch`), the positions of the rows
        in the batch (`slots` [B]) and the batch's size (`batch_rows`).
        """
        slots = np.arange(self.order.batch_size, dtype=np.int64)[self.slots]
        for rows, view, number in self.order.batches(self.start, self.stop):
            batch: Batch = {**self.sequences.fields(rows[self.slots]), "view": view}
            if self.order.fixed_batches:
                batch |= {"batch": number, "slots": slots, "batch_rows": len(rows)}
            yield batch


class RepeatedLoader:
    """The raw batches of a user's loader, pass after pass without end, from one step on."""

    def __init__(
        self, loader: Iterable[Any], views: int, order_step: int = 0, first_step: int = 0, keep_rows: int = 0
    ) -> None:
        """Skip `order_step` batches, which are of earlier stages, and `first_step` of this one.

        Pass e has view e modulo `views`, unless the loader gives its own. The batches with the stage's first
        `keep_rows` rows, skipped or not, are kept in `kept`, since a loader need not yield the same rows twice.
        """
        self.loader, self.views, self.keep_rows = loader, views, keep_rows
        self.order_step, self.first_step = order_step, order_step + first_step
        self.kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches as dicts."""
        step = 0
        for number in count():
            for batch, raw in enumerate(one_pass(self.loader)):
                fields = {"view": number % self.views, "batch": batch, **raw_fields(raw)}
                n_kept = sum(len(kept["input_ids"]) for kept in self.kept)
                if step >= self.order_step and n_kept < self.keep_rows:
                    self.kept.append(fields)
                if step >= self.first_step:
                    yield fields
                step += 1


def first_rows(batches: Iterable[Batch], n_rows: int) -> Iterator[Batch]:
    """Yield batches until there are `n_rows` rows; the last batch is cut."""
    for batch in batches if n_rows else ():
        yield batch_rows(batch, slice(n_rows))
        n_rows -= len(batch["input_ids"])
        if n_rows <= 0:
            return


def prefetched(batches: Iterable[T], depth: int) -> Generator[T]:
    """Yield the same batches, or other things, in the same order, up to `depth` of them made ahead in one thread.

    While a batch is in use, at most `depth` others exist: a source that reuses buffers needs `depth + 1` of them.
    An error of the source is raised after the batches before it. When the caller stops early, so does the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        iterator = iter(batches)
        ahead: deque[Future[T | None]] = deque(thread.submit(next, iterator, None) for _ in range(depth))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, iterator, None))
                yield batch
        finally:
            for future in ahead:
                future.cancel()
