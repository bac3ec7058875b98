"""Statistics of a store against dense recomputation, closed forms, and planted channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from storage.activations import statistics
from storage.activations.drift import Drift, measure_drift, shared_places
from storage.activations.format import Group, GroupSpec
from storage.activations.metadata import RowIndex, read_metadata
from storage.activations.reader import StoreReader
from storage.activations.statistics import (
    DEAD_FACTOR,
    OUTLIER_FACTOR,
    POSITION_QUANTILES,
    TOKEN_QUANTILES,
    Statistics,
    describe_rows,
    evenly_spaced,
)
from storage.activations.writer import StoreWriter

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over many blocks, the last one shorter."""
    monkeypatch.setattr(statistics, "_BLOCK_VALUES", 1000)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def reading(rows: Array) -> Any:
    return lambda places: torch.from_numpy(rows[places])


def describe(rows: Array) -> Statistics:
    n, t, d = rows.shape
    return describe_rows(reading(rows), np.arange(n), t, d)


def drift(*stores: Array) -> Drift:
    return measure_drift([reading(store) for store in stores], [np.arange(len(store)) for store in stores])


# ---------------------------------------------------------------- channels


def test_every_number_is_that_of_the_dense_formula() -> None:
    """Means far from zero, where one-pass sums would lose the variance."""
    rows = normal(37, 6, 9) ** 3 * np.geomspace(0.01, 100, 9) + 1e4
    tokens = rows.reshape(-1, 9)
    found = describe(rows)
    centred = tokens - tokens.mean(0)
    expected = {
        "mean": tokens.mean(0),
        "std": tokens.std(0),
        "rms": np.sqrt((tokens**2).mean(0)),
        "smallest": tokens.min(0),
        "largest": tokens.max(0),
        "kurtosis": (centred**4).mean(0) / tokens.var(0) ** 2,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found.channels, name), values, rtol=1e-9, err_msg=name)
    assert (found.n_rows, found.n_tokens, found.n_non_finite) == (37, 222, 0)
    np.testing.assert_allclose([found.mean, found.std], [tokens.mean(), tokens.std()], rtol=1e-12)
    singular = np.linalg.svd(centred, compute_uv=False) / np.sqrt(len(tokens))
    # The squares are what is summed: a relative error of 1e-16 of the largest, 1e8 times the smallest.
    np.testing.assert_allclose(found.spectrum.std, singular, atol=1e-7 * singular[0])
    norms = np.linalg.norm(rows, axis=2)
    # Norms are kept as float32.
    np.testing.assert_allclose(found.norm_by_position, norms.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.norm_quantiles, np.quantile(norms, TOKEN_QUANTILES), rtol=1e-6)
    by_position = np.quantile(norms, POSITION_QUANTILES, axis=0)
    np.testing.assert_allclose(found.norm_quantiles_by_position, by_position, rtol=1e-6)


def test_angles_and_histogram() -> None:
    rows = normal(30, 5, 4) + np.eye(4)[0]
    found = describe(rows)
    units = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    assert found.neighbour_cosine == pytest.approx((units[:, 1:] * units[:, :-1]).sum(2).mean())
    flat = units.reshape(-1, 4)
    cosines = flat @ flat.T
    assert found.pair_cosine == pytest.approx(cosines[~np.eye(len(flat), dtype=bool)].mean())
    counts, _ = np.histogram(rows, found.bin_edges)
    assert found.bin_counts.tolist() == counts.tolist()
    assert found.bin_counts.sum() + found.n_beyond == rows.size


def test_planted_channels_are_found() -> None:
    rows = normal(50, 8, 32)
    rows[..., 5] *= 40  # one that varies much
    rows[..., 17] += 300  # and one that does not, but lies far out
    rows[..., 3] = 2.0
    rows[..., 30] = 1.0 + normal(50, 8, seed=1) * DEAD_FACTOR / 10
    channels = describe(rows).channels
    assert channels.outliers.tolist() == [17, 5]
    assert channels.dead.tolist() == [3, 30]
    assert np.isnan(channels.kurtosis[3])
    assert channels.kurtosis[4] == pytest.approx(3, abs=1)


@pytest.mark.parametrize(("factor", "found"), [(0.99, []), (1.01, [7])])
def test_the_bound_of_an_outlier(factor: float, found: list[int]) -> None:
    rows = np.ones((4, 2, 8)) * np.array([1, -1])[:, None]
    rows[..., 7] *= OUTLIER_FACTOR * factor
    assert describe(rows).channels.outliers.tolist() == found


def test_channels_that_never_vary_do_not_hide_that_others_do() -> None:
    rows = np.zeros((20, 3, 10))
    rows[..., :2] = normal(20, 3, 2)
    channels = describe(rows).channels
    assert channels.dead.tolist() == list(range(2, 10))
    assert channels.outliers.tolist() == []
    assert describe(np.zeros((2, 3, 4))).channels.dead.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- directions


def test_rank_of_data_of_three_directions() -> None:
    spectrum = describe(normal(60, 5, 3) @ normal(3, 20, seed=1)).spectrum
    assert 1 < spectrum.stable_rank <= 3
    assert 1 < spectrum.effective_rank <= 3 + 1e-5  # the other 17 are rounding, 1e-8 of the largest
    assert spectrum.directions_for(0.9999) == 3


def test_rank_of_isotropic_and_of_one_direction() -> None:
    isotropic = describe(normal(400, 10, 12)).spectrum
    assert 11.9 < isotropic.effective_rank <= 12
    assert 10 < isotropic.stable_rank <= 12
    # Singular values 2 and 1: entropy of (2/3, 1/3), Frobenius norm 4 + 1 over 4.
    corners = np.array([[2, 1], [2, -1], [-2, 1], [-2, -1]], dtype=float)[:, None]
    two = describe(corners).spectrum
    assert two.std.tolist() == pytest.approx([2, 1])
    assert two.effective_rank == pytest.approx(3 / 4 ** (1 / 3))
    assert two.stable_rank == pytest.approx(1.25)
    assert [two.directions_for(share) for share in (0.5, 0.79, 0.81)] == [1, 1, 2]


# ---------------------------------------------------------------- what is not finite


def test_tokens_that_are_not_finite_are_counted_and_left_out() -> None:
    rows = normal(10, 4, 6)
    broken = rows.copy()
    broken[2, 1, :2] = np.nan
    broken[7, 3, 5] = np.inf
    found = describe(broken)
    kept = np.ones((10, 4), dtype=bool)
    kept[2, 1] = kept[7, 3] = False
    assert (found.n_non_finite, found.n_tokens) == (3, 38)
    np.testing.assert_allclose(found.channels.std, rows[kept].std(0))
    norms = np.linalg.norm(rows, axis=2)
    assert found.norm_by_position[1] == pytest.approx(np.delete(norms[:, 1], 2).mean(), rel=1e-6)


def test_nothing_finite_is_nothing_known() -> None:
    found = describe(np.full((3, 2, 4), np.nan))
    assert (found.n_tokens, found.n_non_finite, found.n_beyond) == (0, 24, 0)
    assert np.isnan([found.mean, found.std, found.pair_cosine, *found.norm_quantiles]).all()
    assert np.isnan(found.channels.largest).all()
    assert found.channels.outliers.tolist() == []


# ---------------------------------------------------------------- sampling


def test_rows_are_spread_over_the_store() -> None:
    assert evenly_spaced(5, 64).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert evenly_spaced(7, 1).tolist() == [0]
    assert evenly_spaced(0, 5).tolist() == []


def test_shared_rows_are_the_same_sequence_and_view() -> None:
    one = RowIndex(np.array([5, 3, 9, 3, 5]), np.array([0, 0, 0, 1, 1]))
    other = RowIndex(np.array([3, 5, 7, 3, 9]), np.array([1, 0, 0, 0, 1]))
    first, second = shared_places([one, other], 10)
    pairs = [(int(one.sequence_id[place]), int(one.view[place])) for place in first]
    assert pairs == [(3, 0), (5, 0), (3, 1)]
    assert pairs == [(int(other.sequence_id[place]), int(other.view[place])) for place in second]
    none = RowIndex(np.array([1]), np.array([0]))
    assert [len(places) for places in shared_places([one, none], 10)] == [0, 0]


def test_a_store_of_bfloat16_is_described_through_its_reader(tmp_path: Path) -> None:
    values = torch.from_numpy(normal(9, 4, 5)).to(torch.bfloat16)
    spec, none = GroupSpec(9, 4, 5, "bfloat16"), GroupSpec(0, 4, 5, "bfloat16")
    specs: dict[Group, GroupSpec] = {"train": spec, "validation": none}
    indices: dict[Group, Any] = {group: (np.arange(s.rows), np.zeros(s.rows, np.int32)) for group, s in specs.items()}
    writer = StoreWriter(tmp_path, specs, {}, indices)
    for shard in writer.missing_shards():
        writer.write_shard(shard, values)
    with StoreReader(tmp_path, writer.files()) as reader:
        places = evenly_spaced(9, 5)
        found = describe_rows(lambda rows: reader.read("train", rows), places, 4, 5)
    chosen = values[places].double().numpy().reshape(-1, 5)
    np.testing.assert_allclose(found.channels.std, chosen.std(0))
    assert len(read_metadata(tmp_path)[1]["train"].rows.view) == 9


# ---------------------------------------------------------------- drift


def dense_cka(x: Array, y: Array) -> float:
    """By the kernels [N, N], as HSIC defines it, not by features."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, l = (centre @ z @ z.T @ centre for z in (x, y))  # noqa: E741
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def test_cka_is_that_of_the_kernels() -> None:
    a, b = normal(25, 4, 6) + 3, normal(25, 4, 9, seed=1)
    b[..., :6] += a
    found = drift(a, b)
    assert found.cka[0, 1] == pytest.approx(dense_cka(a.reshape(-1, 6), b.reshape(-1, 9)))
    assert found.cka[1, 0] == found.cka[0, 1]
    assert 0.1 < found.cka[0, 1] < 0.9
    assert np.isnan(found.cosine[0, 1])
    assert (found.n_rows, found.n_tokens) == (25, 100)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    a = normal(40, 5, 8) * np.arange(1, 9)
    rotation = np.linalg.qr(normal(8, 8, seed=1))[0]
    found = drift(a, a, 7 * a @ rotation + 5, a @ normal(8, 8, seed=2))
    np.testing.assert_allclose(found.cka[:3, :3], 1, atol=1e-12)
    assert found.cka[0, 3] < 0.99  # any other linear map it does see
    assert found.cosine[0, 1] == pytest.approx(1)
    assert found.cosine[0, 2] < 0.9


def test_unrelated_boundaries_are_far_apart() -> None:
    """The expectation is about D / N: 4 / 4000."""
    found = drift(normal(400, 10, 4), normal(400, 10, 4, seed=1))
    assert found.cka[0, 1] < 0.005
    assert abs(found.cosine[0, 1]) < 0.05


def test_drift_where_there_is_nothing_to_compare() -> None:
    a = normal(5, 3, 4)
    found = drift(a, np.ones_like(a))
    assert found.cka[0, 0] == pytest.approx(1)
    assert np.isnan(found.cka[0, 1])
    broken = a.copy()
    broken[1, 2, 0] = np.nan
    assert drift(a, broken).n_tokens == 14
    assert drift(a, broken).cka[0, 1] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\[2, 3\] positions"):
        drift(a, a[:, :2])
