"""The boundary below a new stack: rows kept in RAM up to a limit, and a tensor that belongs to its loader's rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stackwise_core.data.masks import MaskSpec
from stackwise_core.errors import ConfigError
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


# ---------------------------------------------------------------- a tensor

STORED = half_activations(TOKENS)
NUMBERED = [{"input_ids": row, "sequence_ids": n} for n, row in enumerate(TOKENS)]
"""Row i of `STORED` belongs to sequence id i."""
MISALIGNED = "trunk_activations: got a tensor, with a loader .*; its rows would go to other sequences: do not shuffle"


def assert_aligned(loader: Any, passes: int = 3, n_rows: int = 6) -> None:
    wrapped = ProgressiveDataLoader(loader, trunk_activations=STORED)
    for _ in range(passes):
        rows = 0
        for batch in wrapped:
            assert batch["trunk_activations"].equal(half_activations(batch["input_ids"]))
            rows += len(batch["input_ids"])
        assert rows == n_rows


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(TOKENS)


IN_ORDER: dict[str, Callable[[], Any]] = {
    "a list": lambda: list(TOKENS.split([1, 3, 2])),
    "plain": lambda: DataLoader(TOKENS, batch_size=4),  # pyright: ignore
    "rows": lambda: DataLoader([{"input_ids": row} for row in TOKENS], batch_size=4),  # pyright: ignore
    "batch sampler": lambda: DataLoader(
        TensorDataset(TOKENS), batch_sampler=BatchSampler(SequentialSampler(TOKENS), 4, drop_last=False)
    ),
    "a fixed list of rows": lambda: DataLoader(TOKENS, batch_size=4, sampler=list(range(6))),  # pyright: ignore
    "fixed batches": lambda: DataLoader(TOKENS, batch_sampler=[[0, 1], [2], [3, 4, 5]]),  # pyright: ignore
    "a stream": lambda: DataLoader(Stream(), batch_size=4),
}


@pytest.mark.parametrize("kind", IN_ORDER)
def test_a_tensor_follows_the_order_of_a_loader_without_ids(kind: str) -> None:
    assert_aligned(IN_ORDER[kind]())


def test_a_tensor_needs_a_row_for_every_row() -> None:
    with pytest.raises(ConfigError, match="trunk_activations: got 5 rows; one row for every row of the loader"):
        list(ProgressiveDataLoader(TOKENS.split(2), trunk_activations=STORED[:5]))


def sampled(sampler: Any, dataset: Any = TOKENS) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, sampler=sampler)


SHUFFLED: dict[str, Callable[[Any], Any]] = {
    "shuffle": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "random": lambda data: sampled(RandomSampler(data), data),
    "subset": lambda data: sampled(SubsetRandomSampler([3, 1, 2, 0, 5, 4]), data),
    "weighted": lambda data: sampled(WeightedRandomSampler([1.0] * 6, 6), data),
    "distributed": lambda data: sampled(DistributedSampler(data, num_replicas=1, rank=0), data),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False)),
}


@pytest.mark.parametrize("kind", SHUFFLED)
@pytest.mark.parametrize("dataset", [TOKENS, TensorDataset(TOKENS), [{"input_ids": row} for row in TOKENS]])
def test_a_shuffled_loader_without_ids_is_refused_at_once(kind: str, dataset: Any) -> None:
    with pytest.raises(ConfigError, match=MISALIGNED):
        ProgressiveDataLoader(SHUFFLED[kind](dataset), trunk_activations=STORED)
    ProgressiveDataLoader(SHUFFLED[kind](dataset), trunk_activations=half_activations)  # asked by its inputs


@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_tensor_follows_the_ids_of_a_shuffled_loader(kind: str) -> None:
    assert_aligned(SHUFFLED[kind](NUMBERED))


def test_a_collator_may_add_the_ids_or_not() -> None:
    """Only its batches say so."""

    def numbered(rows: list[tuple[int, Tensor]]) -> dict[str, Any]:
        return {"input_ids": torch.stack([row for _, row in rows]), "sequence_ids": [n for n, _ in rows]}

    rows: Any = list(enumerate(TOKENS))
    assert_aligned(DataLoader(rows, batch_size=4, shuffle=True, collate_fn=numbered))
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=lambda rows: torch.stack([row for _, row in rows]))
    wrapped = ProgressiveDataLoader(loader, trunk_activations=STORED)
    with pytest.raises(ConfigError, match=MISALIGNED):
        next(iter(wrapped))


def test_a_dataset_without_a_row_zero_is_asked_by_its_batches() -> None:
    keyed: Any = {f"row {n}": row for n, row in enumerate(NUMBERED)}
    assert_aligned(DataLoader(keyed, batch_size=4, sampler=SubsetOf(list(keyed))))


class SubsetOf:
    """A sampler of keys that is no list."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys[::-1])

    def __len__(self) -> int:
        return len(self.keys)


class Reordered:
    """A loader of one's own that yields its rows in another order from its second pass on."""

    def __init__(self, order: list[int]) -> None:
        self.orders = itertools.chain([list(range(6))], itertools.repeat(order))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(TOKENS[next(self.orders)].split(2))


@pytest.mark.parametrize(("order", "row"), [([1, 0, 2, 3, 4, 5], 0), ([0, 1, 2, 3, 5, 4], 4), ([0, 1, 3, 3, 4, 5], 2)])
def test_another_order_in_a_later_pass_is_refused(order: list[int], row: int) -> None:
    wrapped = ProgressiveDataLoader(Reordered(order), trunk_activations=STORED)
    list(wrapped)
    found: list[Tensor] = []
    with pytest.raises(ConfigError, match=f"got a tensor, with a loader whose row {row} is another than in its first"):
        found.extend(batch["input_ids"] for batch in wrapped)
    assert len(found) == row // 2


def test_a_first_pass_that_broke_off_is_still_the_first() -> None:
    wrapped = ProgressiveDataLoader(Reordered([0, 1, 2, 3, 5, 4]), trunk_activations=STORED)
    next(iter(wrapped))
    list(wrapped)  # its rows 2 to 5 are the first that come there
    list(wrapped)


@pytest.mark.parametrize("outside", [-1, 6, 2**40])
def test_an_id_outside_the_tensor_is_refused(outside: int) -> None:
    batch = {"input_ids": TOKENS, "sequence_ids": torch.tensor([0, 1, 2, 3, 4, outside])}
    says = f"sequence_ids: got {outside}; row i of .*: number the sequences from 0 to 5, or give an object with rows"
    with pytest.raises(ConfigError, match=says):
        list(ProgressiveDataLoader([batch], trunk_activations=STORED))
