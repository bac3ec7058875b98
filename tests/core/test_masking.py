"""Masks against the same definition written again with Python's integers, one position at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.data.masks import (
    SALT_ORDER,
    VALIDATION_SEED,
    VALIDATION_VIEW,
    BoolArray,
    IntArray,
    MaskSpec,
    TimeInput,
    hash_bits,
    hash_uniform,
)
from stackwise_core.errors import ConfigError

U64 = (1 << 64) - 1
MASKED, KIND, TOKEN, TIME = 1, 2, 3, 6  # salts
MASK, REGULAR = 256, 256

SEEDS = st.integers(0, 2**31 - 1)
IDS = st.integers(-(2**63), 2**63 - 1)
VIEWS = st.integers(-1, 1023)


def splitmix64(state: int) -> int:
    """The generator's output for a state, as published."""
    z = (state + 0x9E3779B97F4A7C15) & U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
    return z ^ (z >> 31)


def reference_bits(seed: int, salt: int, *keys: int) -> int:
    state = splitmix64(seed * 8 + salt)
    for key in keys:
        state = splitmix64(state ^ splitmix64(key & U64))
    return state


def reference_uniform(seed: int, salt: int, *keys: int) -> float:
    return (reference_bits(seed, salt, *keys) >> 11) / 2**53


def spec(seed: int = 0, ratio: float = 0.15, corruption: Any = "bert") -> MaskSpec:
    return MaskSpec(seed=seed, ratio=ratio, corruption=corruption, mask_token=MASK, n_regular_tokens=REGULAR)


def ids_of(*values: int) -> IntArray:
    return np.array(values, dtype=np.int64)


def masked_tokens(
    mask_spec: MaskSpec, n_sequences: int, seq_len: int, token: int = 7
) -> tuple[BoolArray, IntArray, IntArray]:
    """Masks, clean tokens (all equal) and corrupted tokens of many sequences."""
    ids = np.arange(n_sequences, dtype=np.int64)
    tokens = np.full((n_sequences, seq_len), token, dtype=np.int64)
    masks = mask_spec.masks(ids, 0, seq_len)
    return masks, tokens, mask_spec.corrupt(tokens, masks, ids, 0)


def assert_share(hits: int, trials: int, p: float) -> None:
    """Within five standard deviations of a binomial: a right hash fails once in two million choices of seed."""
    assert abs(hits - trials * p) < 5 * (trials * p * (1 - p)) ** 0.5


# ---------------------------------------------------------------- the hash


def test_reference_is_splitmix64() -> None:
    gamma = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # seed 1234567
    assert [splitmix64((1234567 + n * gamma) & U64) for n in range(3)] == published
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@given(SEEDS, st.integers(1, 7), st.lists(IDS, max_size=4))
def test_hash_equals_the_reference(seed: int, salt: int, keys: list[int]) -> None:
    assert hash_bits(seed, salt, *keys).item() == reference_bits(seed, salt, *keys)
    assert hash_uniform(seed, salt, *keys).item() == reference_uniform(seed, salt, *keys)
    assert 0 <= hash_uniform(seed, salt, *keys).item() < 1


def test_hash_goldens() -> None:
    """Every mask, order and initialisation that was ever stored depends on these bits: they may not change."""
    assert hash_bits(0, MASKED, 0, 0, 0).item() == 0x936EB4EE2CE635C
    assert hash_bits(0, KIND, 2**40, -1, 127).item() == 0x6D651B2A756BD62E
    assert hash_bits(2**31 - 1, TOKEN, -(2**63), 7, 1).item() == 0xDEE0475B9ACF966E
    assert hash_bits(3, SALT_ORDER, 1, 2).item() == 0x76B38F26D5DC3F56


# ---------------------------------------------------------------- masks and corruption


@settings(max_examples=60)
@given(
    SEEDS, st.floats(0.01, 1), st.sampled_from(["bert", "mask"]), IDS, VIEWS, st.lists(st.integers(0, 255), min_size=1)
)
def test_one_row_equals_the_definition(
    seed: int, ratio: float, corruption: str, sequence_id: int, view: int, row: list[int]
) -> None:
    mask_spec = spec(seed, ratio, corruption)
    expected_masks: list[bool] = []
    expected: list[int] = []
    for position, token in enumerate(row):
        keys = (sequence_id, view, position)
        masked = reference_uniform(seed, MASKED, *keys) < ratio
        kind = 0.0 if corruption == "mask" else reference_uniform(seed, KIND, *keys)
        drawn = int(reference_uniform(seed, TOKEN, *keys) * REGULAR)
        expected_masks.append(masked)
        expected.append(token if not masked or kind >= 0.9 else (MASK if kind < 0.8 else drawn))
    tokens, ids = np.array([row], dtype=np.int64), ids_of(sequence_id)
    masks = mask_spec.masks(ids, view, len(row))
    assert masks.tolist() == [expected_masks]
    assert mask_spec.corrupt(tokens, masks, ids, view).tolist() == [expected]
    assert tokens.tolist() == [row]  # the clean tokens are the targets


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), IDS, VIEWS)
def test_masks_are_nested_in_the_ratio(ratios: list[float], sequence_id: int, view: int) -> None:
    rows = [spec(ratio=ratio).masks(ids_of(sequence_id), view, 64) for ratio in sorted(ratios)]
    for lower, higher in itertools.pairwise(rows):
        assert not (lower & ~higher).any()


def test_ratio_one_masks_everything_and_zero_nothing() -> None:
    assert spec(ratio=1.0).masks(ids_of(*range(50)), 0, 200).all()
    assert not spec(ratio=0.0).masks(ids_of(*range(50)), 0, 200).any()


@given(st.lists(IDS, min_size=1, max_size=6), st.data())
def test_a_row_does_not_depend_on_its_batch(ids: list[int], data: st.DataObject) -> None:
    mask_spec, view = spec(ratio=0.5), data.draw(VIEWS)
    tokens = np.arange(len(ids) * 9, dtype=np.int64).reshape(len(ids), 9)
    masks = mask_spec.masks(ids_of(*ids), view, 9)
    corrupted = mask_spec.corrupt(tokens, masks, ids_of(*ids), view)
    chosen = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1))
    some = ids_of(*(ids[n] for n in chosen))
    assert np.array_equal(mask_spec.masks(some, view, 9), masks[chosen])
    assert np.array_equal(mask_spec.corrupt(tokens[chosen], masks[chosen], some, view), corrupted[chosen])


def test_a_position_does_not_depend_on_the_length() -> None:
    ids = ids_of(3, 5)
    assert np.array_equal(spec(ratio=0.5).masks(ids, 1, 400)[:, :50], spec(ratio=0.5).masks(ids, 1, 50))


def test_masks_differ_by_sequence_view_seed_and_position() -> None:
    """Independent halves agree at about half of the positions; equal ones would at all."""
    n = 20_000
    base = spec(ratio=0.5).masks(ids_of(1), 0, n)[0]
    others = {
        "sequence": spec(ratio=0.5).masks(ids_of(2), 0, n)[0],
        "view": spec(ratio=0.5).masks(ids_of(1), 1, n)[0],
        "seed": spec(seed=1, ratio=0.5).masks(ids_of(1), 0, n)[0],
        "position": np.roll(base, 1),
    }
    for other in others.values():
        assert_share(int((base == other).sum()), n, 0.5)


@pytest.mark.parametrize("ratio", [0.02, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("view", [VALIDATION_VIEW, 0, 5])
def test_share_of_masked_positions(ratio: float, view: int) -> None:
    masks = spec(ratio=ratio).masks(np.arange(400, dtype=np.int64), view, 500)
    assert_share(int(masks.sum()), masks.size, ratio)
    per_position, per_sequence = masks.sum(0), masks.sum(1)
    assert 0.2 < per_position.var() / (400 * ratio * (1 - ratio)) < 2
    assert 0.2 < per_sequence.var() / (500 * ratio * (1 - ratio)) < 2


def test_bert_shares() -> None:
    masks, tokens, corrupted = masked_tokens(spec(ratio=0.5), 400, 500)
    at = corrupted[masks]
    n = len(at)
    assert_share(int((at == MASK).sum()), n, 0.8)
    assert_share(int((at == 7).sum()), n, 0.1 + 0.1 / REGULAR)
    replaced = at[(at != MASK) & (at != 7)]
    assert_share(len(replaced), n, 0.1 - 0.1 / REGULAR)
    assert set(np.unique(at)) == {*range(REGULAR), MASK}  # every regular token, no [PAD], no [END]
    counts = np.bincount(replaced, minlength=REGULAR)
    counts = np.delete(counts[:REGULAR], 7)
    assert abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5
    assert np.array_equal(corrupted[~masks], tokens[~masks])


def test_mask_corruption_puts_the_mask_token_everywhere() -> None:
    masks, tokens, corrupted = masked_tokens(spec(ratio=0.3, corruption="mask"), 50, 100)
    assert np.array_equal(corrupted, np.where(masks, MASK, tokens))


def test_the_kind_of_corruption_is_drawn_apart_from_the_mask() -> None:
    """Were one hash used for both, low ratios would only ever see [MASK]."""
    masks, _, corrupted = masked_tokens(spec(ratio=0.05), 1000, 400)
    assert_share(int((corrupted[masks] == MASK).sum()), int(masks.sum()), 0.8)


def test_validation_does_not_depend_on_the_run() -> None:
    ids = ids_of(2**40, 2**40 + 1)
    rows = [spec(seed=seed).for_validation().masks(ids, VALIDATION_VIEW, 200) for seed in (0, 1, 12345)]
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])
    validation = spec(seed=9, ratio=0.4, corruption="mask").for_validation()
    assert (validation.seed, validation.ratio, validation.corruption) == (VALIDATION_SEED, 0.4, "mask")


# ---------------------------------------------------------------- time as an input


def time_of(sampling: Any = "per_sequence", n_steps: int = 10, **changes: Any) -> TimeInput:
    return TimeInput(n_steps=n_steps, sampling=sampling, ratio_min=0.1, ratio_max=0.9).model_copy(update=changes)


def timed(seed: int = 0, **changes: Any) -> MaskSpec:
    return spec(seed, ratio=0.0).model_copy(update={"time": time_of(**changes)})


def test_without_time_a_spec_dumps_as_before() -> None:
    """Ids hold this dump."""
    dumped = {"seed": 0, "ratio": 0.15, "corruption": "bert", "mask_token": MASK, "n_regular_tokens": REGULAR}
    assert spec().model_dump(exclude_defaults=True) == dumped


@given(SEEDS, st.lists(IDS, min_size=1, max_size=5), VIEWS, st.integers(1, 2000))
def test_steps_per_sequence_equal_the_definition(seed: int, ids: list[int], view: int, n_steps: int) -> None:
    steps = time_of(n_steps=n_steps).steps(seed, ids_of(*ids), view)
    assert steps.tolist() == [int(reference_uniform(seed, TIME, one, view) * n_steps) for one in ids]
    assert steps.dtype == np.int64


@given(SEEDS, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 6)), min_size=1), st.integers(0, 1023))
def test_steps_by_batch_equal_the_definition(seed: int, places: list[tuple[int, int]], view: int) -> None:
    batches, slots = ids_of(*(batch for batch, _ in places)), ids_of(*(slot for _, slot in places))
    ids = np.arange(len(places), dtype=np.int64)
    for sampling in ("per_batch", "stratified"):
        expected: list[int] = []
        for batch, slot in places:
            u = reference_uniform(seed, TIME, batch, view) + (slot / 7 if sampling == "stratified" else 0.0)
            expected.append(int((u - int(u)) * 10))
        assert time_of(sampling).steps(seed, ids, view, batches, slots, 7).tolist() == expected


@pytest.mark.parametrize("n_steps", [3, 8, 24])
def test_a_stratified_batch_covers_time_evenly(n_steps: int) -> None:
    """Of 24 rows each of n steps gets 24 / n, in every batch, while the offsets differ by batch and view."""
    slots = np.arange(24, dtype=np.int64)
    seen: set[tuple[int, ...]] = set()
    for batch, view in itertools.product(range(20), range(3)):
        steps = time_of("stratified", n_steps).steps(0, slots, view, np.full_like(slots, batch), slots, 24)
        assert np.bincount(steps, minlength=n_steps).tolist() == [24 // n_steps] * n_steps
        seen.add(tuple(steps.tolist()))
    assert len(seen) > n_steps // 2


@pytest.mark.parametrize("sampling", ["per_batch", "per_sequence", "stratified"])
def test_each_step_is_drawn_equally_often(sampling: str) -> None:
    batches = np.repeat(np.arange(5000, dtype=np.int64), 4)
    slots = np.tile(np.arange(4, dtype=np.int64), 5000)
    steps = time_of(sampling).steps(3, np.arange(20_000, dtype=np.int64), 0, batches, slots, 4)
    rows = steps if sampling == "per_sequence" else steps[slots == 1]
    for count in np.bincount(rows, minlength=10).tolist():
        assert_share(count, len(rows), 0.1)


@pytest.mark.parametrize("sampling", ["per_batch", "stratified"])
def test_validation_draws_per_sequence(sampling: str) -> None:
    ids, none = np.arange(50, dtype=np.int64), np.zeros(50, dtype=np.int64)
    expected = time_of("per_sequence").steps(VALIDATION_SEED, ids, VALIDATION_VIEW)
    assert time_of(sampling).steps(VALIDATION_SEED, ids, VALIDATION_VIEW).tolist() == expected.tolist()
    assert time_of(sampling).steps(VALIDATION_SEED, ids, VALIDATION_VIEW, none, none, 50).tolist() == expected.tolist()
    with pytest.raises(ConfigError, match="time_sampling: got '" + sampling):
        time_of(sampling).steps(0, ids, 0)


def test_each_sequence_has_the_masks_of_its_ratio() -> None:
    ids, steps = ids_of(4, -9, 2**50, 4), ids_of(0, 9, 4, 9)
    masks = timed(seed=6).masks(ids, 3, 300, steps)
    for row, step in enumerate(steps.tolist()):
        ratio = 0.1 + 0.8 * step / 9
        one = ids[row : row + 1]
        assert masks[row].tolist() == spec(6, ratio).masks(one, 3, 300)[0].tolist()
        assert_share(int(masks[row].sum()), 300, ratio)
    assert not (masks[0] & ~masks[3]).any()  # the same sequence: the lighter step's masks are in the heavier one's
    tokens = np.full((4, 300), 7, dtype=np.int64)
    assert timed(seed=6).corrupt(tokens, masks, ids, 3).tolist() == spec(6).corrupt(tokens, masks, ids, 3).tolist()


def test_a_table_and_the_bound_say_the_ratio() -> None:
    steps = ids_of(2, 0, 1)
    assert time_of(n_steps=3, table=(0.1, 0.7, 0.2)).ratios(steps).tolist() == [0.2, 0.1, 0.7]
    bound = time_of(n_steps=3, elbo=True).ratios(steps)
    assert bound.tolist() == pytest.approx([0.999 * (s + 0.5) / 3 + 0.001 for s in (2, 0, 1)], rel=1e-12)
    assert time_of(n_steps=1).ratios(ids_of(0)).tolist() == [0.1]


def test_the_mean_ratio_is_that_of_the_steps_or_of_the_one_that_is_fixed() -> None:
    assert spec(ratio=0.3).mean_ratio == 0.3
    assert timed(n_steps=3).mean_ratio == pytest.approx(0.5)
    at = [timed(n_steps=3, fixed=step).mean_ratio for step in range(3)]
    assert at == pytest.approx([0.1, 0.5, 0.9])


def test_steps_belong_to_time_as_an_input() -> None:
    with pytest.raises(ConfigError, match="steps: got None; the steps of time-as-input are needed"):
        timed().masks(ids_of(1), 0, 9)
    with pytest.raises(ConfigError, match="steps: got steps; this corruption has one ratio"):
        spec().masks(ids_of(1), 0, 9, ids_of(0))
