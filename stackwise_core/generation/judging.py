"""How well a rack predicts text, in units that do not depend on the tokenizer: bits per byte.

Special tokens are not text: neither their nats nor their bytes count. Letters: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.data.masks import BoolArray, FloatArray, IntArray, content_ids, hash_uniform
from stackwise_core.data.sequences import documents_in
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.generate import RackLike
from stackwise_core.generation.unmask import MOST_LOGITS, Denoiser, denoiser_for

_SALT = 0
_JUDGING = 0x6A7564


@dataclass(frozen=True)
class Judged:
    """Sums over the text that was predicted."""

    nats: float
    """Of all tokens together; of a masked rack an upper bound, estimated."""
    n_tokens: int
    n_bytes: int
    n_sequences: int
    error: float | None
    """Standard error of the nats per token, from sequence to sequence; None of one sequence."""

    @property
    def nats_per_token(self) -> float:
        """Mean negative log probability of a token."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """The size of the text, if the rack compressed it, over the size of its UTF-8."""
        return self.nats / (math.log(2) * self.n_bytes)

    @property
    def perplexity(self) -> float:
        """Of a token: exp of the nats per token."""
        return math.exp(min(self.nats_per_token, 700.0))  # beyond it no float is large enough


class TextOf:
    """Which tokens are text, and how many bytes of it they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look at the vocabulary once."""
        self._tokenizer, self._bytes = tokenizer, tokenizer.token_bytes()
        ids = np.arange(tokenizer.n_regular_tokens + len(tokenizer.special_tokens), dtype=np.int64)
        self._regular = np.setdiff1d(ids, tokenizer.special_tokens)[: tokenizer.n_regular_tokens]

    def is_text(self, tokens: IntArray) -> BoolArray:
        """Return which tokens are text: [...] to [...]."""
        return np.isin(tokens, self._regular)

    def n_bytes(self, row: IntArray, first: int = 0) -> int:
        """Return the bytes of a sequence [T] from token `first` on, as UTF-8."""
        if self._bytes is not None:
            part = row[first:]
            return int(self._bytes[part[self.is_text(part)]].sum())
        upto, whole = (self._tokenizer.decode(part[self.is_text(part)]) for part in (row[:first], row))
        return len(whole.encode()) - len(upto.encode())


class _Sums:
    """Adds up sequences."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int, int]] = []

    def add(self, nats: float, n_tokens: int, n_bytes: int) -> None:
        self.rows.append((nats, n_tokens, n_bytes))

    def judged(self) -> Judged:
        if not sum(n_bytes for _, _, n_bytes in self.rows):
            raise ConfigError([Fault("data", "no text of two tokens", "give more, or more sequences")])
        nats, tokens, n_bytes = (np.asarray(each, dtype=np.float64) for each in zip(*self.rows, strict=True))
        mean, n = nats.sum() / max(1.0, tokens.sum()), len(nats)
        spread = math.sqrt(float(np.square(nats - mean * tokens).sum()) / max(1, n - 1) / n)
        error = spread / max(1e-12, float(tokens.mean())) if n > 1 else None
        return Judged(float(nats.sum()), int(tokens.sum()), int(n_bytes.sum()), n, error)


@torch.inference_mode()
def judge_next_tokens(
    rack: RackLike, batches: Iterable[IntArray], text: TextOf, separated_by: int | None = None
) -> Judged:
    """Return how well a causal rack predicts every token of some sequences but their first, in batches [B, T].

    With `separated_by`, the token that ends a document, documents are kept apart, and the first token of each is not
    predicted.
    """
    sums = _Sums()
    for rows in batches:
        documents = None if separated_by is None else documents_in(rows, separated_by)
        nats_BT = token_nats(
            rack, rows[:, :-1], rows[:, 1:], documents=None if documents is None else documents[:, :-1]
        )
        for number, (row, nats) in enumerate(zip(rows, nats_BT, strict=True)):
            counted = text.is_text(row[1:])
            if documents is None:
                n_bytes = text.n_bytes(row, 1)
            else:
                counted &= documents[number, 1:] == documents[number, :-1]
                parts = np.split(row, np.flatnonzero(np.diff(documents[number])) + 1)
                n_bytes = sum(text.n_bytes(part, 1) for part in parts)
            sums.add(float(nats[counted].sum()), int(counted.sum()), n_bytes)
    return sums.judged()


@torch.inference_mode()
def judge_masked(
    denoisers: Sequence[Denoiser],
    batches: Iterable[IntArray],
    text: TextOf,
    mask_token: int,
    n_draws: int,
    separated_by: int | None = None,
) -> Judged:
    """Return an upper bound on the nats of some sequences, in batches [B, T], estimated by `n_draws` draws for each.

    -log p(x) <= T E[mean nats of the masked tokens], where the number of masked tokens is uniform in 1..T and so are
    their places (Hoogeboom et al. 2021, Autoregressive diffusion models, equation 4). The draws of a sequence are
    spread over the numbers, and depend on its tokens alone. Where depth is time, the depth of the number is asked.
    """
    sums = _Sums()
    for rows in batches:
        for row, key in zip(rows, content_ids(rows), strict=True):
            is_text, nats = text.is_text(row), 0.0
            documents = None if separated_by is None else documents_in(row[None], separated_by)
            for n_masked, places in _masks_of(int(key), len(row), n_draws):
                denoiser = denoiser_for(denoisers, n_masked, len(row))
                masked = row.copy()
                masked[places] = mask_token
                step = denoiser.time_step(n_masked / len(row))
                found = token_nats(denoiser.rack, masked[None], row[None], places, step, documents)
                nats += len(row) / n_masked * float(found[0][is_text[places]].sum())
            sums.add(nats / n_draws, int(is_text.sum()), text.n_bytes(row))
    return sums.judged()


def _masks_of(key: int, seq_len: int, n_draws: int) -> Iterable[tuple[int, IntArray]]:
    """Yield the number of masked tokens and their places for each draw of a sequence."""
    draws = np.arange(n_draws, dtype=np.int64)
    offset = hash_uniform(0, _SALT, _JUDGING, key, -1)[0]
    for draw, share in zip(draws.tolist(), (offset + draws / n_draws) % 1.0, strict=True):
        n_masked = 1 + int(share * seq_len)
        order = hash_uniform(0, _SALT, _JUDGING, key, draw, np.arange(seq_len, dtype=np.int64))
        yield n_masked, np.sort(np.argsort(order, kind="stable")[:n_masked])


def token_nats(
    rack: RackLike,
    inputs: IntArray,
    targets: IntArray,
    places: IntArray | None = None,
    time_step: int | None = None,
    documents: IntArray | None = None,
) -> FloatArray:
    """Return the negative log probability of targets [B, T] given inputs [B, T]: [B, T], or at some places [B, P]."""
    x_BTD = hidden(rack, inputs, time_step, documents)
    if places is not None:
        x_BTD, targets = x_BTD[:, places], targets[:, places]
    return nats_of(rack, x_BTD.flatten(0, 1), targets.ravel()).reshape(targets.shape)


def hidden(rack: RackLike, inputs: IntArray, time_step: int | None = None, documents: IntArray | None = None) -> Tensor:
    """Return the stream below the head for tokens [B, T]: [B, T, D]."""
    step = None if time_step is None else torch.full((len(inputs),), time_step)
    x_BTD = rack.embedding(torch.from_numpy(inputs).to(rack.embedding.weight.device), step)
    apart = None if documents is None else torch.from_numpy(documents)
    for stack in rack.stacks:
        x_BTD = stack(x_BTD) if apart is None else stack(x_BTD, None, apart)
    return x_BTD


def nats_of(rack: RackLike, hidden_PD: Tensor, targets_P: IntArray) -> FloatArray:
    """Return the negative log probability of a target at each place [P]; the logits of some are held at a time."""
    size, wanted_P = max(1, MOST_LOGITS // rack.shape.vocab_size), torch.from_numpy(targets_P).to(hidden_PD.device)
    losses: list[Tensor] = [
        F.cross_entropy(rack.head(some_PD).float(), target_P, reduction="none")
        for some_PD, target_P in zip(hidden_PD.split(size), wanted_P.split(size), strict=True)
    ]
    return torch.cat(losses).double().cpu().numpy()
