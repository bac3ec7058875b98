"""Where the boundary below a new stack comes from: a tensor, a source of rows, or a function of the inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

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


Boundary = Tensor | RowSource | Callable[..., Tensor]
"""A tensor [N, T, D] in loader order, a source of rows, or a function of the corrupted input_ids [B, T] and, where
time is an input, the steps [B]."""


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

    def rows(
        self, live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None, ids: IntArray, view: int
    ) -> Tensor:
        """Return the boundary of some sequences [B, T, D] on the CPU; only rows that are not kept are computed."""
        step_of: list[int | None] = [None] * len(ids) if steps is None else steps.tolist()
        keys = [(int(sequence_id), view, step) for sequence_id, step in zip(ids, step_of, strict=True)]
        contents: list[int] = content_ids(tokens.numpy()).tolist()
        new = [n for n, key in enumerate(keys) if key not in self._kept]
        computed: dict[int, Tensor] = {}
        if new:
            rows = computed_rows(live, tokens[new], None if steps is None else steps[new]).detach().cpu()
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


def computed_rows(live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None) -> Tensor:
    """Return what a function gives for inputs [B, T] and, where time is an input, steps [B]: [B, T, D]."""
    return checked_boundary(live(tokens) if steps is None else live(tokens, steps), tokens)


def checked_boundary(boundary: Any, tokens: Tensor) -> Tensor:
    """Return the boundary of tokens [B, T] after checking its shape: a stack's own error would be less clear."""
    if not (isinstance(boundary, Tensor) and boundary.ndim == 3 and boundary.shape[:2] == tokens.shape):
        allowed = f"a tensor [B, T, D] is expected for each batch, here ({len(tokens)}, {tokens.shape[1]}, D)"
        raise ConfigError([Fault("trunk_activations", describe(boundary), allowed)])
    return boundary
