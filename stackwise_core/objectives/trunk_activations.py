"""Where the boundary below a new stack comes from: a tensor, a source of rows, or a function of the inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, default_collate

from stackwise_core.config.arguments import describe
from stackwise_core.data.masks import IntArray, content_ids
from stackwise_core.errors import ConfigError, Fault

_log = logging.getLogger("stackwise")


@runtime_checkable
class RowSource(Protocol):
    """Anything that returns the boundary activations of sequences under a view, such as a store."""

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        """Return the boundary activations of some sequences: [B, T, D]."""
        ...


@runtime_checkable
class ReadingSource(RowSource, Protocol):
    """A source that computes its rows from what it reads: the next can be read in a thread while some are computed."""

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        """Read what the rows of some sequences need, and return what computes them."""
        ...


Boundary = Tensor | RowSource | Callable[..., Tensor]
"""A tensor [N, T, D], a source of rows, or a function of the corrupted input_ids [B, T] and, where time is an input,
the steps [B]; where documents are kept apart, the steps or None, and the numbers of the documents [B, T]."""


class TensorRows:
    """A tensor of activations, and the sequences that its rows belong to."""

    def __init__(self, activations: Tensor) -> None:
        """Take activations [N, T, D]."""
        self.activations = activations
        self._contents: list[int] = []
        """Content ids of the loader's rows in its first pass, as far as it went."""

    def rows(self, ids: IntArray, first_row: int | None) -> Tensor:
        """Return the rows of sequence ids [B]; where a loader has none, those from `first_row` on: [B, T, D].

        Without ids of the loader's own, `ids` are content hashes: they must come in the same order in every pass.
        """
        n_rows = len(self.activations)
        if first_row is not None:
            self._check_same_order(ids, first_row)
            if first_row + len(ids) > n_rows:
                allowed = "one row for every row of the loader"
                raise ConfigError([Fault("trunk_activations", f"{n_rows} rows", allowed)])
            return self.activations[first_row : first_row + len(ids)]
        outside = ids[(ids < 0) | (ids >= n_rows)]
        if len(outside):
            allowed = (
                f"row i of trunk_activations belongs to sequence id i: number the sequences from 0 to {n_rows - 1}, "
                "or give an object with rows(sequence_ids, view)"
            )
            raise ConfigError([Fault("sequence_ids", str(outside[0]), allowed)])
        return self.activations[torch.from_numpy(ids)]

    def check_order(self, loader: Any) -> None:
        """Reject a loader without sequence ids whose order changes."""
        if _shuffles(loader):
            raise _misaligned("a tensor, with a loader that shuffles")

    def _check_same_order(self, contents: IntArray, first_row: int) -> None:
        for row, content in enumerate(contents.tolist(), first_row):
            if row == len(self._contents):
                self._contents.append(content)
            elif self._contents[row] != content:
                raise _misaligned(f"a tensor, with a loader whose row {row} is another than in its first pass")


def _misaligned(received: str) -> ConfigError:
    allowed = (
        "its rows would go to other sequences: do not shuffle, or give each batch sequence_ids, which number the rows "
        "of the tensor from 0, or give an object with rows(sequence_ids, view)"
    )
    return ConfigError([Fault("trunk_activations", received, allowed)])


def _shuffles(loader: Any) -> bool:
    """Return whether a loader of torch draws its rows by another sampler than a sequential one or a fixed list."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    return not isinstance(sampler, (SequentialSampler, list, tuple, range))


def never_has_ids(loader: Any) -> bool:
    """Return whether a loader's batches cannot have sequence ids; a collator of the user's may add them."""
    if not isinstance(loader, DataLoader) or loader.collate_fn is not default_collate or not _shuffles(loader):
        return False  # of other loaders the first batch tells
    try:
        first: Any = loader.dataset[0]
    except Exception:  # a user's dataset may have other keys, and raise anything
        return False
    return not isinstance(first, Mapping) or "sequence_ids" not in first


class RowCache:
    """Rows that a function computed, kept in RAM for later passes, up to a number of bytes."""

    def __init__(self, max_bytes: int | None) -> None:
        """Start empty; None sets no limit."""
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._kept: dict[tuple[int, int, int | None], tuple[int, Tensor]] = {}
        self.full = False
        """Whether a row was left out because of the limit."""

    def __len__(self) -> int:
        """Return the number of rows kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all rows."""
        self.n_bytes = 0
        self._kept.clear()

    def rows(
        self,
        live: Callable[..., Tensor],
        tokens: Tensor,
        steps: Tensor | None,
        ids: IntArray,
        view: int,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return the boundary of some sequences [B, T, D] on the CPU; only rows that are not kept are computed."""
        step_of: list[int | None] = [None] * len(ids) if steps is None else steps.tolist()
        keys = [(int(sequence_id), view, step) for sequence_id, step in zip(ids, step_of, strict=True)]
        contents: list[int] = content_ids(tokens.numpy()).tolist()
        new = [n for n, key in enumerate(keys) if key not in self._kept]
        computed: dict[int, Tensor] = {}
        if new:
            those = (None if each is None else each[new] for each in (steps, documents))
            rows = computed_rows(live, tokens[new], *those).detach().cpu()
            computed = dict(zip(new, rows, strict=True))
        for n, row in computed.items():
            self._keep(keys[n], contents[n], row)
        for key, content in zip(keys, contents, strict=True):
            if key in self._kept and self._kept[key][0] != content:
                allowed = "a different id for every sequence; two sequences came under this id"
                raise ConfigError([Fault("sequence_ids", str(key[0]), allowed)])
        return torch.stack([computed[n] if n in computed else self._kept[key][1] for n, key in enumerate(keys)])

    def _keep(self, key: tuple[int, int, int | None], content: int, row: Tensor) -> None:
        if key in self._kept:  # twice in one batch
            return
        if self.max_bytes is not None and self.n_bytes + row.nbytes > self.max_bytes:
            self._warn()
            return
        self._kept[key] = content, row.clone()  # a view would keep the whole batch in memory
        self.n_bytes += row.nbytes

    def _warn(self) -> None:
        if not self.full:
            _log.warning(
                "the activations of %d rows (%.3g GiB) fill the cache in RAM, whose limit is %.3g GiB; other rows are "
                "computed again in every pass: raise cache.max_gb (max_cache_bytes of a ProgressiveDataLoader), or "
                "turn cache_activations off",
                len(self),
                self.n_bytes / 2**30,
                (self.max_bytes or 0) / 2**30,
            )
        self.full = True


def computed_rows(
    live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None, documents: Tensor | None = None
) -> Tensor:
    """Return what a function gives for inputs [B, T] and, where time is an input, steps [B]: [B, T, D].

    Where documents are kept apart it is also given their numbers [B, T].
    """
    if documents is not None:
        return checked_boundary(live(tokens, steps, documents), tokens)
    return checked_boundary(live(tokens) if steps is None else live(tokens, steps), tokens)


def checked_boundary(boundary: Any, tokens: Tensor) -> Tensor:
    """Return the boundary of tokens [B, T] after checking its shape: a stack's own error would be less clear."""
    if not (isinstance(boundary, Tensor) and boundary.ndim == 3 and boundary.shape[:2] == tokens.shape):
        allowed = f"a tensor [B, T, D] is expected for each batch, here ({len(tokens)}, {tokens.shape[1]}, D)"
        raise ConfigError([Fault("trunk_activations", describe(boundary), allowed)])
    return boundary
