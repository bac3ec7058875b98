"""Mixtures of sources: how many sequences each gives, which, and what the configuration and ids say of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.mixture import mixed_rows, mixture_counts, shares_of, sources_of
from stackwise_core.data.packing import sampled_rows
from stackwise_core.data.sequences import MixedRows
from stackwise_core.errors import ConfigError, CorpusError
from stackwise_core.stages.plan import RunPlan, SourceFacts, facts_together, plan_run

A, B = "a" * 64, "b" * 64


def weighted(**weights: float) -> list[dict[str, Any]]:
    return [{"source": f"{name}.txt", "weight": weight} for name, weight in weights.items()]


def planned(source: Any, *digests: str, **data: Any) -> RunPlan:
    config = StackWiseConfig.from_dict({"data": {"source": source, **data}})
    facts = [SourceFacts(digest, 1000) for digest in digests]
    return plan_run(config, *facts_together(config, facts), (), facts)


@pytest.mark.parametrize(
    ("sizes", "shares", "most", "expected"),
    [
        ((700, 300), (0.0, 0.0), 0, (700, 300)),  # by size: each once
        ((700, 300), (0.0, 0.0), 10, (7, 3)),
        ((700, 300), (0.5, 0.5), 0, (500, 500)),  # as long as all together
        ((10, 990), (0.9, 0.1), 0, (900, 100)),
        ((10, 990), (0.9, 0.1), 10**6, (900, 100)),  # max_sequences is a limit
        ((9, 9, 9), (1 / 3, 1 / 3, 1 / 3), 10, (4, 3, 3)),
        ((5, 10**6), (1e-9, 1 - 1e-9), 0, (1, 10**6 + 5)),  # none is left out
    ],
)
def test_an_epoch_has_the_shares(
    sizes: tuple[int, ...], shares: tuple[float, ...], most: int, expected: tuple[int, ...]
) -> None:
    assert tuple(mixture_counts(sizes, sizes, shares, most, spread=True)[0]) == expected


@pytest.mark.parametrize(
    ("validation", "shares", "most", "spread", "expected"),
    [
        ((70, 30), (0.0, 0.0), 0, True, (70, 30)),
        ((70, 30), (0.5, 0.5), 0, True, (30, 30)),  # no sequence is judged twice
        ((70, 30), (0.9, 0.1), 0, True, (69, 8)),
        ((700, 300), (0.5, 0.5), 100, True, (16, 16)),  # at least 32
        ((700, 300), (0.5, 0.5), 100, False, (300, 300)),
        ((1, 500), (0.5, 0.5), 0, True, (1, 1)),
    ],
)
def test_validation_has_the_same_shares_and_no_sequence_twice(
    validation: tuple[int, ...], shares: tuple[float, ...], most: int, spread: bool, expected: tuple[int, ...]
) -> None:
    train = tuple(19 * n for n in validation)
    assert tuple(mixture_counts(train, validation, shares, most, spread=spread)[1]) == expected


@pytest.mark.parametrize("spread", [True, False])
def test_rows_are_whole_passes_and_a_sample_and_any_part_has_the_shares(spread: bool) -> None:
    sizes, counts = (30, 150_000, 1000), (140_000, 30_000, 1000)
    parts = list(mixed_rows(sizes, counts, spread=spread))
    assert len(parts) > 1
    assert all(np.array_equal(*pair) for pair in zip(parts, mixed_rows(sizes, counts, spread=spread), strict=True))
    rows = np.concatenate(parts)
    of = np.searchsorted(np.cumsum(sizes), rows, side="right")
    assert tuple(np.bincount(of)) == counts
    for start in range(0, len(rows) - 1000, 9999):
        found = np.bincount(of[start : start + 1000], minlength=3)
        assert np.abs(found - 1000 * np.array(counts) / sum(counts)).max() <= 2
    often = Counter(rows[of == 0].tolist())
    assert set(often) == set(range(30))
    assert set(often.values()) == {4666, 4667}
    chosen = rows[of == 1] - 30
    expected = sampled_rows(150_000, 30_000, np.arange(30_000)) if spread else np.arange(30_000)
    assert np.array_equal(chosen, expected)
    assert len(set(chosen.tolist())) == 30_000
    assert np.array_equal(rows[of == 2] - 150_030, np.arange(1000))


def test_mixed_rows_are_those_of_the_arrays_one_after_the_other() -> None:
    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 9, (n, 4)).astype(np.uint16) for n in (3, 1, 5)]
    dense, rows = np.concatenate(parts), draw.integers(0, 9, 40)
    found = MixedRows(parts, rows)
    assert len(found) == 40
    assert found.dtype == np.uint16
    assert np.array_equal(found[:], dense[rows])
    assert np.array_equal(found[7:9], dense[rows[7:9]])
    wanted = draw.integers(0, 40, 11)
    assert np.array_equal(found[wanted], dense[rows[wanted]])


def test_the_id_of_a_single_source_is_that_of_its_name() -> None:
    alone = planned("a.txt", A)
    assert planned(["a.txt"], A) == planned(weighted(a=3), A) == alone
    assert "mixture" not in alone.data.dump()
    assert "sources" not in alone.model_dump()


def test_ids_tell_shares_and_not_how_they_are_written() -> None:
    plan = planned(weighted(a=1, b=3), A, B, max_sequences=9)
    assert planned(weighted(b=0.75, a=0.25), B, A, max_sequences=9).data == plan.data
    others = [planned(weighted(a=3, b=1), A, B, max_sequences=9), planned(["a.txt", "b.txt"], A, B, max_sequences=9)]
    assert len({each.data.sha256 for each in (plan, *others)}) == 3
    # Other weights pack nothing again, and neither does a run on one of them.
    assert all(each.sources == plan.sources for each in others)
    assert [each.data for each in plan.sources] == [planned("a.txt", A).data, planned("b.txt", B).data]
    assert {each.data.ref(-1) for each in plan.sources} < plan.recipes.keys()


def test_weights_are_normalised() -> None:
    assert shares_of(sources_of(weighted(a=1, b=3))) == [0.25, 0.75]
    assert shares_of(sources_of(["a", "b"])) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list is empty"),
        (3, "a path, a glob"),
        ([3], "entry 0 is 3"),
        ([""], "entry 0 is ''"),
        ([{"weight": 1}], "entry 0 is"),
        ([{"source": "a", "wait": 1}], "the key 'wait'"),
        ([{"source": "a", "weight": 0}, "b"], "weight 0; a number above 0"),
        ([{"source": "a", "weight": -1}], "weight -1"),
        ([{"source": "a", "weight": float("nan")}], "weight nan"),
        ([{"source": "a", "weight": True}], "weight True"),
        (["a", "b", "a"], "'a' stands there twice"),
        ([{"source": "a", "weight": 1}, "b"], "'b' has no weight"),
    ],
)
def test_bad_lists(source: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict({"data": {"source": source}})
    (fault,) = caught.value.faults
    assert fault.path == "data.source"
    assert message in fault.allowed


def test_two_names_of_the_same_texts() -> None:
    with pytest.raises(CorpusError, match=r"a\.txt and b\.txt hold the same texts"):
        planned(["a.txt", "b.txt"], A, A)


def test_a_configuration_keeps_its_list_and_a_form_gives_it_as_text() -> None:
    expected = [{"source": "a.txt", "weight": 1.0}, {"source": "b.txt", "weight": 2.0}]
    for source in (weighted(a=1, b=2), "[{source: a.txt, weight: 1}, {source: b.txt, weight: 2}]"):
        config = StackWiseConfig.from_dict({"data": {"source": source}})
        assert config.data.source == expected
        assert StackWiseConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    for glob in ("[ab].txt", "[ab]", "[0-9]*/[!x].jsonl"):
        assert StackWiseConfig.from_dict({"data": {"source": glob}}).data.source == glob
