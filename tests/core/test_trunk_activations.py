"""The boundary below a new stack: rows kept in RAM up to a limit, and a tensor that belongs to its loader's rows."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from stackwise_core.data.masks import MaskSpec
from stackwise_core.objectives.dataloader import ProgressiveDataLoader

T, D = 9, 4
ROW_BYTES = T * D * 2
MASKS = MaskSpec(seed=2, ratio=0.5, corruption="mask", mask_token=256, n_regular_tokens=256)
TOKENS = torch.randint(0, 256, (6, T), generator=torch.Generator().manual_seed(8))


def half_activations(input_ids: Tensor) -> Tensor:
    """A trunk of four channels in a type of two bytes, into one buffer as fast code does."""
    return torch.stack([input_ids.float() * (channel + 1) for channel in range(D)], dim=-1).half()


class Trunk:
    def __init__(self) -> None:
        self.n_rows = 0

    def __call__(self, input_ids: Tensor) -> Tensor:
        self.n_rows += len(input_ids)
        return half_activations(input_ids)


# ---------------------------------------------------------------- rows kept in RAM


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(None, 6), (6 * ROW_BYTES, 6), (6 * ROW_BYTES - 1, 5), (2 * ROW_BYTES + 1, 2), (ROW_BYTES - 1, 0), (0, 0)],
)
def test_rows_beyond_the_limit_are_computed_in_every_pass(
    limit: int | None, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    trunk = Trunk()
    loader = ProgressiveDataLoader(TOKENS.split(4), None, 1, trunk, cache_activations=True, max_cache_bytes=limit)
    assert (loader.cached_rows, loader.cache_bytes) == (0, 0)
    with caplog.at_level(logging.WARNING, "stackwise"):
        for _ in range(3):
            for batch in loader:
                assert batch["trunk_activations"].equal(half_activations(batch["input_ids"]))
    assert (loader.cached_rows, loader.cache_bytes) == (kept, kept * ROW_BYTES)
    assert trunk.n_rows == 6 + 2 * (6 - kept)
    messages = [record.getMessage() for record in caplog.records if record.name == "stackwise"]
    assert len(messages) == (kept < 6)
    for message in messages:
        assert f"the activations of {kept} rows" in message
        for remedy in ("cache.max_gb", "max_cache_bytes", "cache_activations"):
            assert remedy in message


def test_kept_rows_hold_no_memory_of_their_batches() -> None:
    """Nor do they change with a buffer that the trunk uses again."""
    buffer = torch.empty(6, T, D, dtype=torch.float16)

    def trunk(input_ids: Tensor) -> Tensor:
        buffer[: len(input_ids)] = half_activations(input_ids)
        return buffer[: len(input_ids)].requires_grad_()

    loader = ProgressiveDataLoader(
        TOKENS.split(4), None, 1, trunk, cache_activations=True, max_cache_bytes=3 * ROW_BYTES
    )
    list(loader)
    kept = [row for _, row in loader._cache._kept.values()]
    assert [row.untyped_storage().nbytes() for row in kept] == [ROW_BYTES] * 3
    assert torch.stack(kept).equal(half_activations(TOKENS[:3]))
    assert not any(row.requires_grad for row in kept)


def test_a_row_that_comes_twice_is_kept_once() -> None:
    loader = ProgressiveDataLoader([TOKENS[[0, 1, 0]]], None, 1, Trunk(), cache_activations=True)
    list(loader)
    assert (loader.cached_rows, loader.cache_bytes) == (2, 2 * ROW_BYTES)


def test_every_view_of_a_row_counts() -> None:
    loader = ProgressiveDataLoader([TOKENS], MASKS, 1, Trunk(), cache_activations=True, views=3)
    for n in range(1, 5):
        list(loader)
        assert loader.cached_rows == 6 * min(n, 3)
