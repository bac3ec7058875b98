"""Masked tokens, filled in: against a plain loop over the whole rack, in every order, by blocks and through time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stackwise_core.errors import ConfigError
from stackwise_core.generation.unmask import Denoiser, Unmasking, sureness_of, unmask
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import TimeShape
from support.racks import lively_rack

V, MASK, PAD = 30, 28, 29
ROWS = [[3, 1, MASK, 1, MASK, 9, MASK, MASK, 5, MASK, MASK], [MASK, MASK, 7], [1, 2, 3]]


def rack_of(seed: int = 1, **changes: Any) -> Rack:
    return lively_rack(V, 2, seed, causal=False, **changes)


@torch.no_grad()
def probabilities(rack: Rack, tokens: list[int], never: tuple[int, ...] = (MASK,)) -> np.ndarray:
    logits = rack(torch.tensor([tokens]))[0].double()
    logits[:, list(never)] = -torch.inf
    return logits.softmax(-1).numpy()


def sure(p: np.ndarray, order: str) -> float:
    largest, second = sorted(p)[-1], sorted(p)[-2]
    kept = p[p > 0]
    return {"confidence": largest, "margin": largest - second, "entropy": float((kept * np.log(kept)).sum())}[order]


def filled_in(rack: Rack, tokens: list[int], order: str, counts: list[int]) -> list[int]:
    """The same, position by position, committing so many tokens at each step."""
    tokens = list(tokens)
    for count in counts:
        p = probabilities(rack, tokens)
        masked = sorted((-sure(p[place], order), place) for place, token in enumerate(tokens) if token == MASK)
        for _, place in masked[:count]:
            tokens[place] = int(p[place].argmax())
    return tokens


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize(("steps", "counts"), [(0, [1] * 6), (1, [6]), (4, [2, 1, 1, 2]), (9, [1] * 6)])
def test_the_surest_come_first(order: Any, steps: int, counts: list[int]) -> None:
    rack = rack_of()
    found = rack.unmask(ROWS, MASK, order=order, steps=steps)
    assert found[0] == filled_in(rack, ROWS[0], order, counts)
    assert found[2] == ROWS[2]
    assert found == [rack.unmask([row], MASK, order=order, steps=steps)[0] for row in ROWS]
    assert found[0] != filled_in(rack, ROWS[0], order, [3, 3] if steps else [6])  # the number of steps matters


def test_how_sure_a_rack_is() -> None:
    """Orders disagree on which of three positions is the surest."""
    p = np.array([[0.62, 0.38, 0.0, 0.0], [0.6, 0.2, 0.1, 0.1], [0.61, 0.22, 0.17, 0.0]])
    orders: tuple[Any, ...] = ("confidence", "margin", "entropy")
    for order in orders:
        found = sureness_of(torch.from_numpy(p), torch.zeros(3, dtype=torch.long), order)
        assert found.tolist() == pytest.approx([sure(row, order) for row in p])
    assert [max(range(3), key=lambda n, o=order: sure(p[n], o)) for order in orders] == [0, 1, 0]


def test_blocks_are_filled_from_left_to_right() -> None:
    rack, row = rack_of(), ROWS[0]
    expected = list(row)
    for places in ([2, 4], [6, 7], [9, 10]):
        for _ in places:
            p = probabilities(rack, expected)
            _, place = max((p[place].max(), place) for place in places if expected[place] == MASK)
            expected[place] = int(p[place].argmax())
    assert rack.unmask([row], MASK, block_length=2)[0] == expected
    halves = [list(row)]
    for places in ([2, 4, 6, 7], [9, 10]):
        p = probabilities(rack, halves[0])
        for place in places:
            halves[0][place] = int(p[place].argmax())
    assert rack.unmask([row], MASK, block_length=4, steps=1) == halves


def test_draws_follow_the_distribution_and_their_seed() -> None:
    """One masked token among equal contexts: how often each token is drawn, within four deviations."""
    rack, n = rack_of(), 150
    found = rack.unmask([[3, MASK, 5]] * n, MASK, temperature=1.0)
    counts = np.bincount([row[1] for row in found], minlength=V)
    p = probabilities(rack, [3, MASK, 5])[1]
    assert (np.abs(counts - n * p) <= 4 * np.sqrt(n * p * (1 - p)) + 1).all()
    how: dict[str, Any] = {"temperature": 2.0, "order": "random", "seed": 5}
    assert rack.unmask(ROWS, MASK, **how)[0] == rack.unmask(ROWS[:1], MASK, **how)[0]
    assert rack.unmask(ROWS, MASK, **how) != rack.unmask(ROWS, MASK, **{**how, "seed": 6})


def test_an_order_at_random_visits_every_order() -> None:
    """Greedy tokens, so that only the order differs between seeds."""
    rack = rack_of()
    found = {tuple(rack.unmask(ROWS[:1], MASK, order="random", seed=seed)[0]) for seed in range(20)}
    assert len(found) > 5


def test_what_is_not_put_in() -> None:
    rack = rack_of()
    best = probabilities(rack, ROWS[1])[0].argmax()
    found = unmask([Denoiser(rack)], ROWS[1:2], MASK, Unmasking(steps=1), never=[int(best), PAD])
    assert found[0][0] == probabilities(rack, ROWS[1], (MASK, int(best), PAD))[0].argmax() != best


def test_guidance_moves_away_from_what_is_likely_without_the_given_tokens() -> None:
    """Against whole logits: tokens that were filled in are seen by both, given ones by the first alone."""
    rack, row, w = rack_of(), [3, 1, MASK, 9, MASK, MASK], 1.5
    expected = list(row)
    for _ in range(3):
        without = [MASK if given != MASK else token for given, token in zip(row, expected, strict=True)]
        with torch.no_grad():
            seen, blind = (rack(torch.tensor([tokens]))[0].double() for tokens in (expected, without))
        logits = (1 + w) * seen - w * blind
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1).numpy()
        place = max((place for place, token in enumerate(expected) if token == MASK), key=lambda at: p[at].max())
        expected[place] = int(p[place].argmax())
    assert rack.unmask([row], MASK, guidance=w) == [expected]
    assert expected != rack.unmask([row], MASK)[0]
    alone = [MASK] * 4
    assert rack.unmask([alone], MASK, guidance=w) == rack.unmask([alone], MASK)


def test_guidance_asks_the_depth_and_the_step_of_its_own_share() -> None:
    racks = [rack_of(seed) for seed in (1, 2)]
    read: list[tuple[int, int]] = []
    for number, rack in enumerate(racks):
        rack.embedding.register_forward_pre_hook(
            lambda _, given, number=number: read.append((number, int((given[0] == MASK).sum())))
        )
    tokens = [1, 2, 3, 4, 5, 6, MASK, MASK]
    unmask([Denoiser(racks[0], 0.9), Denoiser(racks[1], 0.3)], [tokens], MASK, Unmasking(guidance=1.0, steps=2))
    assert read == [(1, 2), (0, 8), (1, 1), (0, 7)]
    timed = rack_of(time=TimeShape(n_steps=2, dim=8, encoding="learned"))
    steps: list[int] = []
    timed.embedding.register_forward_pre_hook(lambda _, given: steps.append(int(given[1][0])))
    timed.unmask([tokens], MASK, step_ratios=(0.2, 0.9), guidance=1.0, steps=1)
    assert steps == [0, 1]


def test_time_as_input_follows_the_share_of_masked_tokens() -> None:
    rack = rack_of(time=TimeShape(n_steps=5, dim=8, encoding="learned"))
    steps: list[int] = []
    rack.embedding.register_forward_pre_hook(lambda _, given: steps.append(int(given[1][0])))
    rack.unmask([[1] * 2 + [MASK] * 8], MASK, step_ratios=(0.1, 0.25, 0.5, 0.75, 1.0), steps=4)
    assert steps == [3, 2, 2, 1]  # shares of 0.8, 0.6, 0.4 and 0.2
    with pytest.raises(ConfigError, match="step_ratios: got 0 ratios; this rack has 5 time steps; give the share"):
        rack.unmask(ROWS, MASK)


def test_time_as_depth_goes_from_the_noisiest_rack_to_the_cleanest() -> None:
    """8 of 10 tokens are masked: above 0.6, so the noisiest reads them; each leaves what the next covers."""
    racks = [rack_of(seed) for seed in (1, 2, 3)]
    denoisers = [Denoiser(rack, ratio) for rack, ratio in zip(racks, (0.6, 0.35, 0.15), strict=True)]
    tokens = [1, 2] + [MASK] * 8
    expected = list(tokens)
    for rack, n_left in zip(racks, (3, 1, 0), strict=True):
        expected = filled_in(rack, expected, "confidence", [expected.count(MASK) - n_left])
    assert unmask(denoisers, [tokens], MASK, Unmasking()) == [expected]
    few = [1, 2, 3, 4, 5, 6, 7, MASK, MASK, MASK]  # 0.3: the second covers it
    assert unmask(denoisers, [few], MASK, Unmasking()) == [
        filled_in(racks[2], filled_in(racks[1], few, "confidence", [2]), "confidence", [1])
    ]
    by_steps = list(tokens)
    for rack in [racks[0]] * 5 + [racks[1]] * 2 + [racks[2]]:  # 8, 7, 6, 5, 4; 3, 2; 1 masked
        by_steps = filled_in(rack, by_steps, "confidence", [1])
    assert unmask(denoisers, [tokens], MASK, Unmasking(steps=8)) == [by_steps]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"order": "best"}, "order: got 'best'; one of confidence, margin, entropy, random"),
        ({"steps": -1, "block_length": -2}, r"steps: got -1; 0 chooses them; else 1 or more\nblock_length: got -2"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"guidance": -0.5}, "guidance: got -0.5; 0 for no guidance, or a number above 0"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rack_of().unmask(ROWS, MASK, **how)
