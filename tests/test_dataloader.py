"""The batch dictionary, from any loader, with the trunk's activations from wherever they come."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stackwise_core.data import PackedSequences
from stackwise_core.dataloader import PackedBatches, ProgressiveDataLoader, content_ids
from stackwise_core.errors import ConfigError
from stackwise_core.masking import MaskSpec
from stackwise_core.order import RowOrder

T, D = 9, 4
MASKS = MaskSpec(seed=2, ratio=0.5, corruption="mask", mask_token=256, n_regular_tokens=256)
TOKENS = torch.randint(0, 256, (6, T), generator=torch.Generator().manual_seed(8))

COMMON = {"input_ids", "targets", "masks", "time_step", "stack_idx", "trunk_activations"}
COMMON |= {"training_objective", "sequence_ids"}


def activations_of(input_ids: Tensor) -> Tensor:
    """A trunk of four channels that depends on every input."""
    return torch.stack([input_ids.float() * (channel + 1) for channel in range(D)], dim=-1)


class CountingTrunk:
    """A callable trunk that remembers every row it was asked for."""

    def __init__(self) -> None:
        self.rows_seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor) -> Tensor:
        self.rows_seen += [tuple(row) for row in input_ids.tolist()]
        return activations_of(input_ids)


# ---------------------------------------------------------------- what a batch holds


def test_keys_of_a_masked_batch() -> None:
    (batch,) = ProgressiveDataLoader([TOKENS], MASKS, stack_idx=3)
    ids = batch["sequence_ids"].numpy()
    masks = MASKS.masks(ids, 0, T)
    assert set(batch) == COMMON
    assert batch["targets"].equal(TOKENS)
    assert batch["masks"].numpy().tolist() == masks.tolist()
    assert batch["input_ids"].tolist() == np.where(masks, 256, TOKENS.numpy()).tolist()
    assert (batch["stack_idx"], batch["training_objective"], batch["time_step"]) == (3, "mlm", None)
    assert batch["trunk_activations"] is None
    assert ids.tolist() == content_ids(TOKENS.numpy()).tolist()


def test_keys_of_a_causal_batch() -> None:
    (batch,) = ProgressiveDataLoader([TOKENS])
    assert set(batch) == COMMON | {"clm_mask", "combined_masks"}
    assert batch["input_ids"].equal(TOKENS)
    assert batch["targets"][:, :-1].equal(TOKENS[:, 1:])
    assert batch["training_objective"] == "clm"


def as_tensors(tokens: Tensor) -> Any:
    return list(tokens.split(2))


def as_tuples(tokens: Tensor) -> Any:
    return [(part, torch.zeros(len(part))) for part in tokens.split(2)]


def as_lists(tokens: Tensor) -> Any:
    return [[part] for part in tokens.split(2)]


def as_dicts(tokens: Tensor) -> Any:
    return [{"input_ids": part, "labels": part} for part in tokens.split(2)]


def as_arrays(tokens: Tensor) -> Any:
    return [part.numpy().astype(np.uint16) for part in tokens.split(2)]


def as_dataset(tokens: Tensor) -> Any:
    return DataLoader(TensorDataset(tokens), batch_size=2)


def as_collated(tokens: Tensor) -> Any:
    return DataLoader([{"input_ids": row} for row in tokens], batch_size=2)  # pyright: ignore[reportArgumentType]


def as_generator(tokens: Tensor) -> Any:
    return (part for part in tokens.split(2))


KINDS = [as_tensors, as_tuples, as_lists, as_dicts, as_arrays, as_dataset, as_collated, as_generator]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_spec", [None, MASKS])
def test_any_loader_gives_the_same_batches(kind: Callable[[Tensor], Any], mask_spec: MaskSpec | None) -> None:
    expected = list(ProgressiveDataLoader(as_tensors(TOKENS), mask_spec))
    batches = list(ProgressiveDataLoader(kind(TOKENS), mask_spec))
    assert len(batches) == len(expected) == 3
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert value.equal(other[key]) if isinstance(value, Tensor) else value == other[key]
        assert batch["input_ids"].dtype == torch.int64
    assert torch.cat([batch["targets"] for batch in batches]).equal(
        TOKENS if mask_spec else torch.cat([TOKENS[:, 1:], TOKENS[:, -1:]], 1)
    )


def test_ids_of_a_batch_are_kept() -> None:
    ids = torch.tensor([5, -3, 2**40, 0, 7, 1])
    (batch,) = ProgressiveDataLoader([{"input_ids": TOKENS, "sequence_ids": ids}], MASKS)
    assert batch["sequence_ids"].equal(ids)
    assert batch["masks"].numpy().tolist() == MASKS.masks(ids.numpy(), 0, T).tolist()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_content_ids_do_not_depend_on_position(order: list[int], batch_size: int) -> None:
    """So a shuffled loader corrupts each row as before, and finds it in a cache."""
    (whole,) = ProgressiveDataLoader([TOKENS], MASKS)
    shuffled = list(ProgressiveDataLoader(TOKENS[order].split(batch_size), MASKS))
    for key in ("sequence_ids", "input_ids", "masks"):
        assert torch.cat([batch[key] for batch in shuffled]).equal(whole[key][order])


def test_content_ids_tell_rows_apart_and_equal_rows_together() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, (2000, 8))
    ids = content_ids(tokens)
    by_row = {tuple(row): int(one) for row, one in zip(tokens.tolist(), ids, strict=True)}
    assert ids.dtype == np.int64
    assert [by_row[tuple(row)] for row in tokens.tolist()] == ids.tolist()
    assert len(set(by_row.values())) == len(by_row) > 1900
    assert content_ids(np.asfortranarray(tokens)).tolist() == ids.tolist()
    # Stores hold such ids: BLAKE2b of the row as little-endian 64-bit integers, as one such integer itself.
    for row, one in zip(tokens[:20].tolist(), ids.tolist(), strict=False):
        digest = hashlib.blake2b(struct.pack("<8q", *row), digest_size=8).digest()
        assert struct.unpack("<q", digest) == (one,)


# ---------------------------------------------------------------- views


def test_views_follow_the_passes() -> None:
    loader = ProgressiveDataLoader([TOKENS], MASKS, views=3)
    passes = [next(iter(loader)) for _ in range(7)]
    ids = passes[0]["sequence_ids"].numpy()
    for n, batch in enumerate(passes):
        assert batch["masks"].numpy().tolist() == MASKS.masks(ids, n % 3, T).tolist()


def test_a_view_of_the_batch_comes_first() -> None:
    loader = ProgressiveDataLoader([{"input_ids": TOKENS, "view": 5}], MASKS, views=3)
    for _ in range(2):
        (batch,) = loader
        assert batch["masks"].numpy().tolist() == MASKS.masks(batch["sequence_ids"].numpy(), 5, T).tolist()


def test_packed_batches_are_rows_in_the_shared_order() -> None:
    sequences = PackedSequences(TOKENS.numpy().astype(np.uint16), np.arange(6, dtype=np.int64) + 10)
    order = RowOrder(seed=4, n_rows=6, batch_size=2, views=2)
    batches = list(ProgressiveDataLoader(PackedBatches(sequences, order, 2, 9), MASKS))
    assert len(batches) == 7
    for batch, (rows, view) in zip(batches, order.batches(2, 9), strict=True):
        assert batch["sequence_ids"].tolist() == (rows + 10).tolist()
        assert batch["targets"].equal(TOKENS[rows])
        assert batch["masks"].numpy().tolist() == MASKS.masks(rows + 10, view, T).tolist()


# ---------------------------------------------------------------- trunk activations


def test_a_tensor_is_read_in_loader_order() -> None:
    stored = torch.randn(6, T, D)
    loader = ProgressiveDataLoader(TOKENS.split([1, 3, 2]), trunk_activations=stored)
    for _ in range(2):  # every pass from the first row
        parts = [batch["trunk_activations"] for batch in loader]
        assert [len(part) for part in parts] == [1, 3, 2]
        assert torch.cat(parts).equal(stored)
    with pytest.raises(ConfigError, match="trunk_activations: got 5 rows; one row for every row of the loader"):
        list(ProgressiveDataLoader(TOKENS.split(2), trunk_activations=stored[:5]))


def test_an_object_with_rows_is_asked_by_id_and_view() -> None:
    class Store:
        asked: list[tuple[list[int], int]] = []  # noqa: RUF012

        def rows(self, sequence_ids: Any, view: int) -> Tensor:
            self.asked.append((sequence_ids.tolist(), view))
            return torch.full((len(sequence_ids), T, D), float(view))

    store, ids = Store(), content_ids(TOKENS.numpy()).tolist()
    loader = ProgressiveDataLoader(TOKENS.split(4), MASKS, 1, store, views=2)
    batches = [*loader, *loader]
    assert store.asked == [(ids[:4], 0), (ids[4:], 0), (ids[:4], 1), (ids[4:], 1)]
    assert [batch["trunk_activations"].unique().tolist() for batch in batches] == [[0.0], [0.0], [1.0], [1.0]]


@pytest.mark.parametrize("cached", [True, False])
def test_a_callable_sees_the_corrupted_inputs(cached: bool) -> None:
    loader = ProgressiveDataLoader(TOKENS.split(4), MASKS, 1, CountingTrunk(), cache_activations=cached, views=2)
    for _ in range(5):
        for batch in loader:
            assert batch["trunk_activations"].equal(activations_of(batch["input_ids"]))


def test_recording_runs_the_trunk_once_per_row_and_view() -> None:
    trunk, live = CountingTrunk(), CountingTrunk()
    loaders = [
        ProgressiveDataLoader(TOKENS.split(4), MASKS, 1, source, cache_activations=source is trunk, views=3)
        for source in (trunk, live)
    ]
    inputs: set[tuple[int, ...]] = set()
    for _ in range(7):
        for recorded, computed in zip(*loaders, strict=True):
            assert recorded["trunk_activations"].equal(computed["trunk_activations"])
            inputs |= {tuple(row) for row in computed["input_ids"].tolist()}
    assert len(live.rows_seen) == 6 * 7
    assert len(trunk.rows_seen) == len(inputs) == 6 * 3
    assert set(trunk.rows_seen) == inputs


def test_recording_finds_rows_in_other_batches() -> None:
    trunk = CountingTrunk()
    batches = [TOKENS[:3], TOKENS[2:5], TOKENS[[5, 0, 3]]]
    loader = ProgressiveDataLoader(batches, None, 1, trunk, cache_activations=True)
    for batch in loader:
        assert batch["trunk_activations"].equal(activations_of(batch["input_ids"]))
    assert sorted(trunk.rows_seen) == sorted(tuple(row) for row in TOKENS.tolist())


# ---------------------------------------------------------------- wrong kinds


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"tokens": TOKENS}, r"a batch with \['tokens'\]; each batch needs input_ids"),
        (TOKENS[0], r"input_ids of int64 and shape \(9,\)"),
        (TOKENS[None], r"input_ids of int64 and shape \(1, 6, 9\)"),
        (5, r"input_ids of int64 and shape \(\)"),
        ([[1, 2], [3, 4]], r"input_ids of int64 and shape \(2,\)"),
    ],
)
def test_batches_of_a_wrong_kind_are_explained(raw: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^base_dataloader: got {says}"):
        list(ProgressiveDataLoader([raw]))


@pytest.mark.parametrize(
    "raw", ["text", None, {"input_ids": [[1, 2], [3]]}, torch.rand(2, T), {"input_ids": TOKENS, "sequence_ids": [1]}]
)
def test_batches_without_whole_tokens_are_explained(raw: Any) -> None:
    with pytest.raises(ConfigError, match=r"^base_dataloader"):
        list(ProgressiveDataLoader([raw], MASKS))


@pytest.mark.parametrize("source", [5, "store", [1.0], np.zeros((6, T, D))])
def test_activations_of_a_wrong_kind_are_explained(source: Any) -> None:
    kind = type(source).__name__
    with pytest.raises(ConfigError, match=rf"trunk_activations: got {kind}; a tensor, an object with rows\(\)"):
        list(ProgressiveDataLoader([TOKENS], trunk_activations=source))


def test_a_tensor_cannot_serve_several_views() -> None:
    with pytest.raises(ConfigError, match="views"):
        list(ProgressiveDataLoader([TOKENS], MASKS, 1, torch.zeros(6, T, D), views=2))
