"""Batches that are made while the one before trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from stackwise_core.objectives.losses import Batch


def prefetched(batches: Iterable[Batch], depth: int) -> Iterator[Batch]:
    """Yield the same batches in the same order, up to `depth` of them made ahead in one thread.

    While a batch is in use, `depth` others exist at most: a source that fills buffers again needs `depth + 1`.
    What the source raises is raised here, after the batches before it. A caller that stops early, stops it.

    Args:
        batches: iterated once, in the thread.
        depth: at least 1.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        iterator = iter(batches)
        ahead: deque[Future[Batch | None]] = deque(thread.submit(next, iterator, None) for _ in range(depth))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, iterator, None))
                yield batch
        finally:
            for future in ahead:
                future.cancel()
