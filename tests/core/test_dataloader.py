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

from stackwise_core.data.masks import VALIDATION_VIEW, MaskSpec, TimeInput, content_ids
from stackwise_core.data.order import RowOrder
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Stack, TokenEmbedding, initialise
from stackwise_core.model.stream import EXACT
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.stages.resolve import ModelShape, TimeShape
from stackwise_core.training.boundary import InputsFromTokens, LiveTrunk, RowsFromTokens, advance

T, D = 9, 4
MASKS = MaskSpec(seed=2, ratio=0.5, corruption="mask", mask_token=256, n_regular_tokens=256)
TOKENS = torch.randint(0, 256, (6, T), generator=torch.Generator().manual_seed(8))

COMMON = {"input_ids", "targets", "masks", "time_step", "stack_idx", "trunk_activations"}
COMMON |= {"training_objective", "sequence_ids", "view"}


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


@settings(max_examples=30)
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
    for batch, (rows, view, _) in zip(batches, order.batches(2, 9), strict=True):
        assert batch["sequence_ids"].tolist() == (rows + 10).tolist()
        assert batch["targets"].equal(TOKENS[rows])
        assert batch["masks"].numpy().tolist() == MASKS.masks(rows + 10, view, T).tolist()


# ---------------------------------------------------------------- trunk activations


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
        ([[1, 2], [3]], "input_ids of rows that differ in length"),
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
    shown = repr(source) if isinstance(source, (int, str)) else type(source).__name__
    with pytest.raises(ConfigError, match=rf"trunk_activations: got {shown}.*; a tensor .* an object with rows\(\)"):
        ProgressiveDataLoader([TOKENS], trunk_activations=source)


def test_a_tensor_cannot_serve_several_views() -> None:
    with pytest.raises(ConfigError, match="views"):
        list(ProgressiveDataLoader([TOKENS], MASKS, 1, torch.zeros(6, T, D), views=2))


# ---------------------------------------------------------------- time as an input


def timed(sampling: Any, n_steps: int = 20, elbo: bool = False) -> MaskSpec:
    time = TimeInput(n_steps=n_steps, sampling=sampling, ratio_min=0.2, ratio_max=0.9, elbo=elbo)
    return MASKS.model_copy(update={"time": time, "ratio": 0.0})


def steps_of(mask_spec: MaskSpec, batch: Any, view: int, number: int) -> list[int]:
    assert mask_spec.time is not None
    ids, slots = batch["sequence_ids"].numpy(), np.arange(len(batch["sequence_ids"]))
    return mask_spec.time.steps(2, ids, view, np.full_like(slots, number), slots, len(ids)).tolist()


@pytest.mark.parametrize("sampling", ["per_batch", "per_sequence", "stratified"])
def test_every_sequence_has_its_step(sampling: str) -> None:
    mask_spec = timed(sampling)
    loader = ProgressiveDataLoader(TOKENS.split(4), mask_spec, views=2)
    seen: set[int] = set()
    for number_of_pass in range(4):
        for number, batch in enumerate(loader):
            steps = batch["time_step"]
            assert steps.dtype == torch.int64
            assert steps.tolist() == steps_of(mask_spec, batch, number_of_pass % 2, number)
            masks = mask_spec.masks(batch["sequence_ids"].numpy(), number_of_pass % 2, T, steps.numpy())
            assert batch["masks"].numpy().tolist() == masks.tolist()
            assert "loss_weights" not in batch
            seen |= set(steps.tolist())
    assert len(seen) >= 4


def test_a_batch_may_say_its_number() -> None:
    raw = [{"input_ids": TOKENS, "view": 3, "batch": number} for number in (7, 0, 7)]
    first, other, again = ProgressiveDataLoader(raw, timed("per_batch", 10**6))
    assert (
        first["time_step"].tolist() == again["time_step"].tolist() == steps_of(timed("per_batch", 10**6), first, 3, 7)
    )
    assert first["time_step"].tolist() != other["time_step"].tolist()


def test_the_bound_brings_its_weights() -> None:
    (batch,) = ProgressiveDataLoader([TOKENS], timed("stratified", elbo=True))
    ratios = [0.999 * (step + 0.5) / 20 + 0.001 for step in batch["time_step"].tolist()]
    assert batch["loss_weights"].tolist() == pytest.approx([1 / ratio for ratio in ratios], rel=1e-6)


def test_packed_batches_say_their_number_if_it_lasts() -> None:
    sequences = PackedSequences(TOKENS.numpy().astype(np.uint16), np.arange(6, dtype=np.int64))
    order = RowOrder(seed=4, n_rows=6, batch_size=2, views=2, fixed_batches=True)
    numbers = [batch["batch"] for batch in PackedBatches(sequences, order, 1, 14)]
    assert numbers == [number for _, _, number in order.batches(1, 14)]
    changing = order.model_copy(update={"fixed_batches": False})
    assert all("batch" not in batch for batch in PackedBatches(sequences, changing, 0, 9))


def timed_trunk() -> LiveTrunk:
    time = TimeShape(n_steps=20, dim=6, encoding="sinusoidal")
    shape = ModelShape(vocab_size=257, d_model=8, n_heads=2, n_kv_heads=2, d_ff=16, causal=False, time=time)
    embedding, stack = TokenEmbedding(shape), Stack(shape, 1)
    for module in (embedding, stack):
        initialise(module, 1)
    return LiveTrunk(embedding, [stack], EXACT)


@pytest.mark.parametrize("sampling", ["per_batch", "per_sequence", "stratified"])
def test_a_row_is_the_same_live_recorded_and_refilled(sampling: str) -> None:
    """A store is filled by id and view alone: what the batch decides must be found from those."""
    mask_spec, trunk = timed(sampling), timed_trunk()
    train = PackedSequences(TOKENS.numpy().astype(np.uint16), np.arange(6, dtype=np.int64) + 10)
    validation = PackedSequences(train.tokens, np.arange(6, dtype=np.int64) + FIRST_VALIDATION_ID)
    order = RowOrder(seed=4, n_rows=6, batch_size=2, views=2, fixed_batches=sampling != "per_sequence")
    refilled = RowsFromTokens(InputsFromTokens(train, validation, mask_spec, order), trunk)
    packed = PackedBatches(train, order, 0, 14)
    steps: dict[tuple[int, int], int] = {}
    for batch, raw in zip(
        ProgressiveDataLoader(packed, mask_spec, 1, trunk, cache_activations=True), packed, strict=True
    ):
        ids, view = raw["sequence_ids"], raw["view"]
        entering = trunk.embedding(batch["input_ids"], batch["time_step"])
        assert batch["trunk_activations"].equal(advance(trunk.stacks, entering, EXACT))
        for n, step in enumerate(batch["time_step"].tolist()):
            assert steps.setdefault((int(ids[n]), view), step) == step
            assert refilled.rows(ids[n : n + 1], view).equal(batch["trunk_activations"][n : n + 1])
    assert len(set(steps.values())) > 2


@pytest.mark.parametrize("sampling", ["per_batch", "per_sequence"])
def test_validation_rows_need_no_batches(sampling: str) -> None:
    trunk = timed_trunk()
    sequences = PackedSequences(TOKENS.numpy().astype(np.uint16), np.arange(6, dtype=np.int64) + FIRST_VALIDATION_ID)
    order = RowOrder(seed=4, n_rows=2, batch_size=2, views=2, fixed_batches=True)
    rows = RowsFromTokens(InputsFromTokens(sequences, sequences, timed(sampling), order), trunk).rows
    ids = sequences.sequence_ids
    whole = rows(ids, VALIDATION_VIEW)
    assert rows(ids[[5, 2]], VALIDATION_VIEW).equal(whole[[5, 2]])
    expected = RowsFromTokens(InputsFromTokens(sequences, sequences, timed("per_sequence")), trunk).rows(
        ids, VALIDATION_VIEW
    )
    assert whole.equal(expected)


def test_recording_tells_steps_apart() -> None:
    """In a loader that shuffles, a row comes with another step: its old activations are not its new ones."""
    calls: list[int] = []

    def trunk(input_ids: Tensor, time_step: Tensor) -> Tensor:
        calls.extend(time_step.tolist())
        return activations_of(input_ids) + time_step[:, None, None]

    loader = ProgressiveDataLoader(TOKENS.split(1), timed("per_batch"), 1, trunk, cache_activations=True)
    for tokens in (TOKENS, TOKENS.flip(0), TOKENS):
        loader.base_dataloader = tokens.split(1)
        for batch in loader:
            expected = activations_of(batch["input_ids"]) + batch["time_step"][:, None, None]
            assert batch["trunk_activations"].equal(expected)
    assert 6 < len(calls) <= 12


def test_the_step_of_a_stack_is_in_its_batches() -> None:
    """A live trunk does not get it: it is no input."""
    trunk = CountingTrunk()
    for spec in (None, MASKS):
        for batch in ProgressiveDataLoader(TOKENS.split(4), spec, 2, trunk, time_step=6):
            assert batch["time_step"] == 6
    assert len(trunk.rows_seen) == 12


def test_steps_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="time_step: got 5; with time as an input"):
        ProgressiveDataLoader([TOKENS], timed("per_batch"), time_step=5)


# ---------------------------------------------------------------- the custom objective


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("masked", [False, True])
def test_custom_targets_and_masks(name: str, masked: bool) -> None:
    raw = {"input_ids": TOKENS, name: TOKENS.flip(1), **({"masks": TOKENS > 99} if masked else {})}
    (batch,) = ProgressiveDataLoader([raw], objective="custom", trunk_activations=activations_of)
    assert set(batch) == COMMON
    assert batch["input_ids"].equal(TOKENS)
    assert batch["targets"].equal(TOKENS.flip(1))
    assert batch["masks"].equal(TOKENS > 99 if masked else torch.ones(6, T, dtype=torch.bool))
    assert (batch["training_objective"], batch["time_step"]) == ("custom", None)
    assert batch["trunk_activations"].equal(activations_of(TOKENS))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (TOKENS, r"got a batch with \['input_ids'\]; the custom objective needs targets .* 'targets' or 'labels'"),
        ({"input_ids": TOKENS, "target": TOKENS}, r"got a batch with \['input_ids', 'target'\]; the custom"),
        ({"input_ids": TOKENS, "targets": TOKENS.float()}, "targets of float32"),
        ({"input_ids": TOKENS, "labels": TOKENS, "masks": TOKENS}, "masks of int64; booleans"),
        ({"input_ids": TOKENS, "targets": TOKENS[:4]}, r"targets: got \(4, 9\)"),
    ],
)
def test_custom_batches_of_a_wrong_kind_are_explained(raw: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list(ProgressiveDataLoader([raw], objective="custom"))


@pytest.mark.parametrize("spec", [None, MASKS])
@pytest.mark.parametrize("name", ["masks", "targets"])
def test_other_objectives_do_not_ignore_given_masks_and_targets(spec: MaskSpec | None, name: str) -> None:
    raw = {"input_ids": TOKENS, name: TOKENS > 5}
    with pytest.raises(ConfigError, match=rf"got a batch with \['{name}'\]; (mlm|clm) makes its own"):
        list(ProgressiveDataLoader([raw], spec))


@pytest.mark.parametrize(("objective", "spec"), [("mlm", None), ("clm", MASKS), ("custom", MASKS)])
def test_an_objective_and_a_strategy_that_contradict_are_refused(objective: Any, spec: MaskSpec | None) -> None:
    with pytest.raises(ConfigError, match=f"objective: got '{objective}'; a masking_strategy goes with mlm"):
        ProgressiveDataLoader([TOKENS], spec, objective=objective)


# ---------------------------------------------------------------- shares of ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("sampling", [None, "per_batch", "per_sequence", "stratified"])
def test_the_shares_of_all_ranks_are_the_batch(sampling: Any, ranks: int) -> None:
    """Masks and time steps too: a rank's rows stand where they stand in the whole batch."""
    by_time = {"time": TimeInput(n_steps=5, sampling=sampling, ratio_min=0.2, ratio_max=0.9)} if sampling else {}
    masks = MASKS.model_copy(update=by_time)
    tokens = np.random.default_rng(0).integers(0, 256, (40, T)).astype(np.uint16)
    sequences = PackedSequences(tokens, np.arange(40, dtype=np.int64))
    order = RowOrder(seed=1, n_rows=40, batch_size=8, views=2, fixed_batches=sampling in ("per_batch", "stratified"))

    def batches(rank: int, ranks: int) -> list[dict[str, Any]]:
        return list(ProgressiveDataLoader(PackedBatches(sequences, order, 3, 12, rank, ranks), masks, views=2))

    shares = [batches(rank, ranks) for rank in range(ranks)]
    for number, whole in enumerate(batches(0, 1)):
        parts = [share[number] for share in shares]
        for name in ("input_ids", "targets", "masks", "sequence_ids", *(["time_step"] if sampling else [])):
            assert torch.cat([part[name] for part in parts]).equal(whole[name]), name
        assert min(len(part["input_ids"]) for part in parts) >= 8 // ranks
