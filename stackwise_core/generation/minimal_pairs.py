"""Minimal pairs: a good and a bad sentence that differ in one place, and which of them a rack finds more probable.

After BLiMP (Warstadt et al. 2020); the sentences are made here, from frames in which `[good|bad]` is that place. In
each phenomenon as many good sentences are longer than their bad ones as are shorter, so that a rack that only counts
letters is right in half of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stackwise_core.data.masks import IntArray
from stackwise_core.data.sources import parse_object
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.generate import RackLike
from stackwise_core.generation.judging import hidden, nats_of, token_nats
from stackwise_core.generation.unmask import Denoiser, denoiser_for

_Z = 1.959964
"""Of an interval that holds 95 % of a normal distribution."""
_PER_FRAME = 15
_MOST_AT_ONCE = 4096
"""Tokens that a rack reads at a time."""


class Pair(NamedTuple):
    """Two texts of which a rack should find the good one more probable."""

    phenomenon: str
    good: str
    bad: str
    where: str
    """What a message calls it."""


@dataclass(frozen=True)
class Share:
    """How often a rack prefers the good text of a pair."""

    n_right: int
    n: int

    @property
    def share(self) -> float:
        """The share of pairs in which the good text is the more probable one; half is chance."""
        return self.n_right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of 95 % for the share (Wilson 1927)."""
        shrink = 1 + _Z**2 / self.n
        middle = (self.share + _Z**2 / (2 * self.n)) / shrink
        half = _Z / shrink * math.sqrt(self.share * (1 - self.share) / self.n + _Z**2 / (4 * self.n**2))
        return middle - half, middle + half


# ---------------------------------------------------------------- the pairs

# Lists of 3, 5 and 15 words, so that 15 sentences of a frame are all different.
_PEOPLE = ("teacher", "doctor", "farmer", "neighbour", "driver")
_OTHERS = ("singer", "visitor", "lawyer")
_MEN, _KINGS = ("John", "Peter", "David", "Robert", "Thomas"), ("king", "uncle", "brother", "waiter", "prince")
_WOMEN = ("Mary", "Susan", "Anna", "Helen", "Laura")
_THINGS, _LARGE = ("book", "lamp", "chair", "picture", "basket"), ("house", "garden", "bridge")
_PLACES, _VERBS = ("station", "market", "school"), ("sing", "work", "walk")
_PARTS = {"base": ("eat", "take", "hide"), "part": ("eaten", "taken", "hidden")}
_VOWELS = ("apple", "umbrella", "orange", "egg", "island")
_CONSONANTS = ("pear", "ladder", "lemon", "nut", "river")
_ADJECTIVES = ("near the road", "in the village", "behind the wall")

_FRAMES: dict[str, tuple[tuple[str, dict[str, Sequence[str]]], ...]] = {
    "subject and verb": (
        ("The {n} [{v}s|{v}] every morning.", {"n": _PEOPLE, "v": _VERBS}),
        ("The {n}s [{v}|{v}s] every morning.", {"n": _PEOPLE, "v": _VERBS}),
    ),
    "subject and verb, a noun between": (
        ("The {n} near the {m}s [is|are] very old.", {"n": _THINGS, "m": _LARGE}),
        ("The {n}s near the {m} [are|is] very old.", {"n": _THINGS, "m": _LARGE}),
    ),
    "subject and verb, a clause between": (
        ("The {n} that the {m}s know [was|were] tired.", {"n": _PEOPLE, "m": _OTHERS}),
        ("The {n}s that the {m} knows [were|was] tired.", {"n": _PEOPLE, "m": _OTHERS}),
    ),
    "reflexive, gender": (
        ("{n} saw [himself|herself] at the {p}.", {"n": _MEN, "p": _PLACES}),
        ("{n} saw [herself|himself] at the {p}.", {"n": _WOMEN, "p": _PLACES}),
    ),
    "reflexive, number": (
        ("The {n} taught [himself|themselves] to {v}.", {"n": _KINGS, "v": _VERBS}),
        ("The {n}s taught [themselves|himself] to {v}.", {"n": _KINGS, "v": _VERBS}),
    ),
    "determiner and noun": (
        ("We bought [this|these] {n} at the {p}.", {"n": _THINGS, "p": _PLACES}),
        ("We bought [these|this] {n}s at the {p}.", {"n": _THINGS, "p": _PLACES}),
    ),
    "a and an": (
        ("They saw [an|a] {n} {a}.", {"n": _VOWELS, "a": _ADJECTIVES}),
        ("They saw [a|an] {n} {a}.", {"n": _CONSONANTS, "a": _ADJECTIVES}),
    ),
    "negative polarity": (
        ("The {n} has [often|ever] been at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
        ("The {n} has [now|ever] been at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
    ),
    "case of pronouns": (
        ("The {n} met [him|he] at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
        ("Then [he|him] met the {n} at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
    ),
    "form of the verb": (
        ("The {n} has [{part}|{base}] the cake.", {"n": _PEOPLE, **_PARTS}),
        ("The {n} will [{base}|{part}] the cake.", {"n": _PEOPLE, **_PARTS}),
    ),
    "there is": (
        ("There was [a|each] {n} at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
        ("There were [several|most] {n}s at the {p}.", {"n": _PEOPLE, "p": _PLACES}),
    ),
    "question and gap": (
        ("We know [what|that] the {n} bought for the {m}.", {"n": _PEOPLE, "m": _OTHERS}),
        ("We know [that|what] the {n} bought a chair for the {m}.", {"n": _PEOPLE, "m": _OTHERS}),
    ),
}


def shipped_pairs() -> Iterator[Pair]:
    """Yield 30 pairs of each phenomenon."""
    for phenomenon, frames in _FRAMES.items():
        for frame, words in frames:
            for number in range(_PER_FRAME):
                filled = frame.format(**{key: of[number % len(of)] for key, of in words.items()})
                good, bad = (re.sub(r"\[(.*)\|(.*)\]", place, filled) for place in (r"\1", r"\2"))
                yield Pair(phenomenon, good, bad, good)


def pairs_in(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file of jsonl: `good`, `bad`, perhaps `phenomenon`; raises ConfigError at another line."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = parse_object(line)
                    good, bad, phenomenon = row.get("good"), row.get("bad"), row.get("phenomenon", "")
                    if not (isinstance(good, str) and isinstance(bad, str)):
                        raise ValueError("has no texts `good` and `bad`")
                    if not isinstance(phenomenon, str):
                        raise ValueError("its `phenomenon` is not a string")
                    yield Pair(phenomenon, good, bad, f"{path}:{number}")
    except OSError as error:
        raise ConfigError([Fault("--pairs", repr(str(path)), f"it cannot be read ({error.strerror})")]) from None
    except ValueError as error:
        raise ConfigError([Fault("--pairs", f"{path}:{number}", f"{error}")]) from None


# ---------------------------------------------------------------- scores


@torch.inference_mode()
def next_token_scores(rack: RackLike, texts: Sequence[IntArray], start: Sequence[int]) -> list[float]:
    """Return the log probability of each text [T] after `start`; without a start, that of all tokens but the first."""
    rows = [np.concatenate([np.asarray(start, dtype=np.int64), text]) for text in texts]
    scores = [0.0] * len(rows)
    first = max(1, len(start))
    for numbers in _together(rows):
        # Behind the shorter ones stands some token: a causal rack does not see it in time.
        longest = max(len(rows[number]) for number in numbers)
        padded = np.stack([np.pad(rows[number], (0, longest - len(rows[number]))) for number in numbers])
        if longest > 1:
            nats = token_nats(rack, padded[:, :-1], padded[:, 1:])
            for number, of in zip(numbers, nats, strict=True):
                scores[number] = -float(of[first - 1 : len(rows[number]) - 1].sum())
    return scores


def _together(rows: Sequence[IntArray]) -> Iterator[list[int]]:
    """Yield the numbers of rows that are read at a time, those of like lengths together."""
    batch = list[int]()
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if batch and (len(batch) + 1) * len(rows[number]) > _MOST_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def masked_score(denoisers: Sequence[Denoiser], tokens: IntArray, mask_token: int) -> float:
    """Return the pseudo-log-likelihood of a text [T]: the log probability of each token given all others, summed.

    Salazar et al. 2020, Masked language model scoring, equation 1.
    """
    denoiser, length = denoiser_for(denoisers, 1, len(tokens)), len(tokens)
    total, size = 0.0, max(1, _MOST_AT_ONCE // length)
    for first in range(0, length, size):
        places = np.arange(first, min(first + size, length))
        rows, masked = np.arange(len(places)), np.tile(tokens, (len(places), 1))
        masked[rows, places] = mask_token
        x_BTD = hidden(denoiser.rack, masked, denoiser.time_step(1 / length))
        total -= float(nats_of(denoiser.rack, x_BTD[rows, places], tokens[places]).sum())
    return total


def shares(right: Iterable[tuple[str, bool]]) -> dict[str, Share]:
    """Return how often a rack is right by phenomenon, in the order in which they come."""
    found = dict[str, Share]()
    for phenomenon, is_right in right:
        before = found.get(phenomenon, Share(0, 0))
        found[phenomenon] = Share(before.n_right + is_right, before.n + 1)
    return found
