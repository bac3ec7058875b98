"""The order of rows against brute force: what an epoch is, what a resumed run reads, what a store must hold."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.order import RowOrder
from stackwise_core.errors import StackWiseError
from stackwise_core.stages.resolve import resolve_order


@st.composite
def orders(draw: st.DrawFn) -> RowOrder:
    batch_size = draw(st.integers(1, 7))
    return RowOrder(
        seed=draw(st.integers(0, 2**31 - 1)),
        n_rows=draw(st.integers(batch_size, 40)),
        batch_size=batch_size,
        views=draw(st.integers(1, 5)),
        fixed_batches=draw(st.booleans()),
        block=draw(st.sampled_from([0, 0, 1, 3, 8, 100])),
    )


def as_lists(order: RowOrder, start: int, stop: int) -> list[tuple[list[int], int]]:
    return [(rows.tolist(), view) for rows, view, _ in order.batches(start, stop)]


@given(orders(), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(order: RowOrder, epoch: int) -> None:
    assert sorted(order.epoch_rows(epoch).tolist()) == list(range(order.n_rows))


@given(orders(), st.integers(0, 60))
def test_batches_are_slices_of_the_epochs(order: RowOrder, steps: int) -> None:
    whole = order.n_rows // order.batch_size
    assert order.steps_per_epoch == whole
    expected: list[tuple[list[int], int]] = []
    for epoch in range(steps // whole + 1):
        rows = order.epoch_rows(epoch).tolist()
        for n in range(whole):
            expected.append((rows[n * order.batch_size : (n + 1) * order.batch_size], epoch % order.views))
    assert as_lists(order, 0, steps) == expected[:steps]


@given(orders(), st.integers(0, 40), st.integers(0, 40))
def test_resuming_reads_the_tail(order: RowOrder, start: int, more: int) -> None:
    assert as_lists(order, start, start + more) == as_lists(order, 0, start + more)[start:]


@given(orders(), st.integers(0, 80), st.integers(0, 40))
def test_visited_is_what_the_steps_read(order: RowOrder, steps: int, first: int) -> None:
    read = {(row, view) for rows, view in as_lists(order, first, first + steps) for row in rows}
    rows, views = order.visited(steps, first)
    pairs = list(zip(rows.tolist(), views.tolist(), strict=True))
    assert pairs == sorted(read, key=lambda pair: (pair[1], pair[0]))


@pytest.mark.parametrize(
    ("steps", "first", "before", "expected"),
    [
        (25, 25, 25, 0),  # the other half of the epoch
        (50, 50, 50, 0),  # the other view
        (50, 100, 100, 100),
        (50, 150, 50, 0),
        (25, 100, 25, 0),
        (50, 125, 50, 25),  # half of the epoch before in the other view, and half of this in it
        (10**9, 10**9, 10**9, 200),
        (30, 30, 0, 0),
    ],
)
def test_how_much_is_read_again_is_what_can_be_expected(steps: int, first: int, before: int, expected: int) -> None:
    """Of 100 rows under two views, 50 steps to an epoch."""
    orders = [RowOrder(seed=seed, n_rows=100, batch_size=2, views=2) for seed in range(20)]
    assert orders[0].count_again(steps, first, before) == pytest.approx(expected, abs=1)
    if first < 1000:
        pairs = [
            [set(zip(*order.visited(*of), strict=True)) for of in ((steps, first), (before, first - before))]
            for order in orders
        ]
        found = [len(now & earlier) for now, earlier in pairs]
        assert sum(found) / len(found) == pytest.approx(expected, abs=2)


@given(orders(), st.integers(0, 80))
def test_count_visited_bounds_visited(order: RowOrder, steps: int) -> None:
    """Exact while no view comes round again, and where batches are fixed or leave no row over."""
    exact = len(order.visited(steps)[0])
    assert order.count_visited(steps) >= exact
    assert order.count_visited(steps) >= len(order.visited(steps, 3)[0])
    if order.fixed_batches or steps <= order.views * order.steps_per_epoch or order.n_rows % order.batch_size == 0:
        assert order.count_visited(steps) == exact


@given(orders())
@settings(max_examples=20)
def test_a_full_store_is_indexed_by_view_then_row(order: RowOrder) -> None:
    rows, views = order.visited(500 * order.views)
    if len(rows) == order.n_rows * order.views:
        assert (views * order.n_rows + rows).tolist() == list(range(len(rows)))


def test_orders_differ_by_epoch_and_seed_and_not_by_batch_size_or_views() -> None:
    order = RowOrder(seed=0, n_rows=100, batch_size=4, views=2)
    assert order.epoch_rows(0).tolist() != order.epoch_rows(1).tolist()
    assert order.epoch_rows(0).tolist() != order.model_copy(update={"seed": 1}).epoch_rows(0).tolist()
    other = order.model_copy(update={"batch_size": 7, "views": 5})
    assert order.epoch_rows(3).tolist() == other.epoch_rows(3).tolist()


def test_epochs_are_well_shuffled() -> None:
    """Over many epochs each row is as often in the first batch as any other: 5 standard deviations."""
    order = RowOrder(seed=3, n_rows=40, batch_size=10, views=1)
    counts = np.bincount(np.concatenate([order.epoch_rows(epoch)[:10] for epoch in range(2000)]), minlength=40)
    assert abs(counts - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("objective", "views", "expected"), [("mlm", 0, 8), ("clm", 0, 1), ("mlm", 3, 3), ("mlm", 1, 1), ("clm", 1, 1)]
)
def test_views_of_a_configuration(objective: str, views: int, expected: int) -> None:
    values = {"run": {"seed": 5}, "cache": {"views": views}, "training": {"batch_size": 6}}
    values["training"]["progressive"] = {"training_objective": objective}  # pyright: ignore[reportArgumentType]
    order = resolve_order(StackWiseConfig.from_dict(values), 50)
    assert order == RowOrder(seed=5, n_rows=50, batch_size=6, views=expected)
    assert [view for _, view, _ in order.batches(0, 8 * 9)] == [
        epoch % expected for epoch in range(9) for _ in range(8)
    ]


def test_fewer_rows_than_a_batch_is_explained() -> None:
    with pytest.raises(StackWiseError, match="batch_size"):
        list(resolve_order(StackWiseConfig(), 31).batches(0, 1))


# ---------------------------------------------------------------- batches fixed per view


@given(orders(), st.integers(0, 60))
def test_fixed_batches_are_the_same_in_every_epoch_of_a_view(order: RowOrder, start: int) -> None:
    order = order.model_copy(update={"fixed_batches": True})
    known: dict[tuple[int, int], list[int]] = {}
    numbers: dict[int, list[int]] = {}
    stop = start + 3 * order.views * order.steps_per_epoch
    for step, (rows, view, batch) in enumerate(order.batches(start, stop), start):
        assert known.setdefault((view, batch), rows.tolist()) == rows.tolist()
        numbers.setdefault(step // order.steps_per_epoch, []).append(batch)
        batches, slots = order.places(rows, view)
        assert batches.tolist() == [batch] * order.batch_size
        assert slots.tolist() == list(range(order.batch_size))
    for epoch in list(numbers)[1:-1]:  # the whole ones
        assert sorted(numbers[epoch]) == list(range(order.steps_per_epoch))
    assert len(known) == order.views * order.steps_per_epoch


def test_epochs_shuffle_the_fixed_batches_and_views_the_rows() -> None:
    order = RowOrder(seed=0, n_rows=120, batch_size=4, views=2, fixed_batches=True)
    epochs = [[batch for _, _, batch in order.batches(30 * n, 30 * n + 30)] for n in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    groups = [{tuple(rows.tolist()) for rows, _, _ in order.batches(30 * n, 30 * n + 30)} for n in range(4)]
    assert groups[0] == groups[2] != groups[1] == groups[3]
    other = order.model_copy(update={"seed": 1})
    assert {tuple(rows.tolist()) for rows, _, _ in other.batches(0, 30)} != groups[0]


def test_places_of_rows_that_fill_no_batch() -> None:
    order = RowOrder(seed=0, n_rows=11, batch_size=4, views=1, fixed_batches=True)
    batches, slots = order.places(np.arange(11, dtype=np.int64), 0)
    assert sorted(zip(batches.tolist(), slots.tolist(), strict=True)) == [(n // 4, n % 4) for n in range(11)]


def test_fixed_batches_are_part_of_the_value_and_of_no_id_before() -> None:
    order = RowOrder(seed=0, n_rows=9, batch_size=2, views=1)
    assert order.model_dump(exclude_defaults=True) == {"seed": 0, "n_rows": 9, "batch_size": 2, "views": 1}
    assert order != order.model_copy(update={"fixed_batches": True})


# ---------------------------------------------------------------- blocks


def block_order(**changes: object) -> RowOrder:
    return RowOrder(**{"seed": 5, "n_rows": 50 * 208, "batch_size": 40, "views": 2, "block": 50, **changes})


@pytest.mark.parametrize("fixed", [False, True])
def test_few_runs_of_a_store_are_open_at_once(fixed: bool) -> None:
    """A window of 16 blocks is read to its end before the next begins."""
    order = block_order(fixed_batches=fixed)
    for epoch in (0, 1, 2, 7):
        windows = np.split(order.epoch_rows(epoch) // 50, range(800, 10_400, 800))
        assert [len(np.unique(blocks)) for blocks in windows] == [16] * 13
    uniform = block_order(fixed_batches=fixed, block=0)
    assert len(np.unique(uniform.epoch_rows(0)[:800] // 50)) > 190


@pytest.mark.parametrize("fixed", [False, True])
def test_a_batch_is_as_mixed_as_sixteen_blocks_can_be(fixed: bool) -> None:
    """Two rows of a batch are of one block as often as two drawn from the window, 49 in 799, and not more."""
    order = block_order(fixed_batches=fixed)
    same = pairs = 0
    for rows, _, _ in order.batches(0, 260):  # the first epoch
        blocks = rows // 50
        equal = (blocks[:, None] == blocks[None, :]).sum() - len(rows)
        same, pairs = same + int(equal), pairs + len(rows) * (len(rows) - 1)
    assert same / pairs == pytest.approx(49 / 799, rel=0.03)  # of 405,600 pairs
    neighbours = sum(int((np.abs(np.diff(rows)) == 1).sum()) for rows, _, _ in order.batches(0, 260))
    assert neighbours < 2 * 260 * 39 * 2 / 799  # the corpus is not read in its order


def test_blocks_have_other_company_in_every_epoch() -> None:
    order = block_order()

    def company(epoch: int) -> set[tuple[int, int]]:
        windows = np.split(order.epoch_rows(epoch) // 50, range(800, 10_400, 800))
        return {(a, b) for w in windows for a in np.unique(w).tolist() for b in np.unique(w).tolist() if a < b}

    together = [company(epoch) for epoch in range(3)]
    expected = len(together[0]) ** 2 / (208 * 207 / 2)
    assert all(len(a & b) < 1.5 * expected for a, b in ((together[0], together[1]), (together[1], together[2])))


def test_the_configuration_says_the_block() -> None:
    config = StackWiseConfig()
    assert resolve_order(config, 100).block == 0
    config.training.shuffle_block = 7
    assert resolve_order(config, 100).block == 7


def test_an_order_that_is_sorted_part_by_part_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read first, and however few rows are sorted at a time."""
    orders = [
        RowOrder(seed=n, n_rows=n, batch_size=b, views=2) for n in (1, 2, 7, 8, 9, 33, 200) for b in (1, 3) if b <= n
    ]
    whole = [(order.epoch_rows(1).tolist(), as_lists(order, 0, 40), order.visited(40)) for order in orders]
    for most, at_once in ((3, 5), (8, 1000)):
        monkeypatch.setattr("stackwise_core.data.order._SORTED_ROWS", most)
        monkeypatch.setattr("stackwise_core.data.order._HASHED_ROWS", at_once)
        for order, (rows, batches, visited) in zip(orders, whole, strict=True):
            assert order.epoch_rows(1).tolist() == rows
            assert as_lists(order, 0, 40) == batches
            assert as_lists(order, 20, 40) == batches[20:]
            assert [found.tolist() for found in order.visited(40)] == [found.tolist() for found in visited]


def test_an_epoch_of_many_rows_takes_the_memory_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise_core.data.order._SORTED_ROWS", 1 << 10)
    monkeypatch.setattr("stackwise_core.data.order._HASHED_ROWS", 1 << 10)
    tracemalloc.start()
    try:
        assert len(as_lists(RowOrder(seed=1, n_rows=200_000, batch_size=8, views=1), 10_000, 10_010)) == 10
        assert tracemalloc.get_traced_memory()[1] < 200_000  # and not 8 bytes of each row
    finally:
        tracemalloc.stop()
