"""Scores of texts against dense recomputations, the interval against R, and what the shipped pairs are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from stackwise_core.generation.minimal_pairs import Share, masked_score, next_token_scores, shares, shipped_pairs
from stackwise_core.generation.unmask import Denoiser
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import TimeShape
from support.racks import lively_rack

MASK = 20


@torch.no_grad()
def log_probability(rack: Rack, inputs: list[int], place: int, target: int, *steps: torch.Tensor) -> float:
    return float(rack(torch.tensor([inputs]), *steps)[0, place].double().log_softmax(-1)[target])


@pytest.mark.parametrize("start", [[], [19], [19, 18]])
def test_texts_of_any_lengths_have_the_score_that_each_has_alone(
    start: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackwise_core.generation.minimal_pairs._MOST_AT_ONCE", 16)
    rack, texts = lively_rack(24, causal=True), [[3, 4, 5], [6], [1, 2, 3, 4, 5, 6, 7], [8, 9], [4, 4, 4, 4]]
    expected = []
    for text in texts:
        row = [*start, *text]
        places = range(max(1, len(start)), len(row))
        expected.append(sum(log_probability(rack, row, place - 1, row[place]) for place in places))
    found = next_token_scores(rack, [np.array(text) for text in texts], start)
    assert found == pytest.approx(expected, rel=1e-5)
    assert (found[1] == 0.0) == (not start)


def test_each_token_of_a_pseudo_log_likelihood_sees_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise_core.generation.minimal_pairs._MOST_AT_ONCE", 8)
    text = [3, 4, 5, 3]
    holes = [[MASK if place == hole else token for place, token in enumerate(text)] for hole in range(4)]
    rack = lively_rack(24, causal=False)
    expected = sum(log_probability(rack, row, hole, text[hole]) for hole, row in enumerate(holes))
    assert masked_score([Denoiser(rack)], np.array(text), MASK) == pytest.approx(expected, rel=1e-5)
    timed = lively_rack(24, causal=False, time=TimeShape(n_steps=3, dim=8, encoding="learned"))
    step = torch.tensor([1])  # its share, 0.3, is the nearest to a quarter
    expected = sum(log_probability(timed, row, hole, text[hole], step) for hole, row in enumerate(holes))
    found = masked_score([Denoiser(timed, step_ratios=(0.05, 0.3, 0.9))], np.array(text), MASK)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_depth_of_little_noise_is_asked() -> None:
    racks = [lively_rack(24, seed=seed, causal=False) for seed in (1, 2)]
    both = [Denoiser(racks[0], 0.9), Denoiser(racks[1], 0.5)]
    assert masked_score(both, np.array([1, 2, 3]), MASK) == masked_score(
        [Denoiser(racks[1])], np.array([1, 2, 3]), MASK
    )


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_the_interval_is_that_of_wilson(right: int, n: int, low: float, high: float) -> None:
    """Values of R's prop.test(right, n, correct = FALSE)."""
    assert Share(right, n).interval == pytest.approx((low, high), abs=1e-4)


def test_the_shipped_pairs_differ_in_one_word_and_favour_no_length() -> None:
    pairs = list(shipped_pairs())
    assert len({(pair.good, pair.bad) for pair in pairs}) == len(pairs) == 360
    assert set(Counter(pair.phenomenon for pair in pairs).values()) == {30}
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert sum(one != other for one, other in zip(good, bad, strict=True)) == 1
        assert "{" not in pair.good + pair.bad
        assert "[" not in pair.good + pair.bad
    longer = Counter((pair.phenomenon, np.sign(len(pair.good) - len(pair.bad))) for pair in pairs)
    assert set(longer.values()) <= {15, 30}
    assert all((phenomenon, -sign) in longer for phenomenon, sign in longer)


def test_shares_by_phenomenon() -> None:
    found = shares([("b", True), ("a", False), ("b", False), ("b", True)])
    assert found == {"b": Share(2, 3), "a": Share(0, 1)}
    assert list(found) == ["b", "a"]
