"""Which token comes next: the most likely one, or a draw that depends on the seed and the prompt alone.

Letters: B sequences, V vocabulary, N candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stackwise_core.data.masks import FloatArray, IntArray, content_ids, hash_uniform
from stackwise_core.errors import ConfigError, Fault

_SALT = 0
_GENERATION = 0x67656E
"""The first key of every hash that is drawn here; those of masks and orders begin with the number of a row."""
_FIRST_CANDIDATES = 256
"""The likeliest tokens, which nearly always hold the whole of `top_p`: the rest need no sorting then."""


Check = tuple[str, bool, str]
"""A key, whether its value fits, and what is allowed."""


def faults_of(settings: object, checks: Iterable[Check]) -> list[Fault]:
    """Return a fault for every value that does not fit."""
    return [Fault(key, repr(getattr(settings, key)), allowed) for key, fits, allowed in checks if not fits]


def common_checks(temperature: float, seed: int) -> tuple[Check, ...]:
    """Return the checks of what every way to generate has."""
    return (
        ("temperature", 0 <= temperature < float("inf"), "0 takes the most likely token; else above 0"),
        ("seed", 0 <= seed < 2**31, "from 0 to 2147483647"),
    )


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Applied in this order: repetition penalty, temperature, top_k, top_p, min_p.

    Raises ConfigError with every value that cannot be.
    """

    temperature: float = 0.0
    """Logits are divided by it before a draw; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that together have this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Draw among tokens of at least this share of the highest probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Tokens that occurred have their logit divided by it if positive, else multiplied (Keskar et al. 2019)."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        checks = (
            *common_checks(self.temperature, self.seed),
            ("top_k", self.top_k >= 0, "0 draws among all tokens; else 1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is none"),
        )
        faults = faults_of(self, checks)
        if self.temperature == 0:
            narrowing = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
            allowed = "temperature 0 takes the most likely token; set a temperature too, such as 1"
            given = [key for key, default in narrowing.items() if getattr(self, key) != default]
            faults += [Fault(key, repr(getattr(self, key)), allowed) for key in given]
        if faults:
            raise ConfigError(faults)


class Draws:
    """Uniform numbers in [0, 1) for every prompt: hashes of the seed, the prompt and what a number is for.

    So they are the same whatever other prompts are in the batch. Equal prompts differ by their number among themselves.
    """

    def __init__(self, seed: int, prompts: Sequence[Sequence[int]]) -> None:
        """Hash the prompts."""
        keys = [int(content_ids(np.asarray([prompt], dtype=np.int64))[0]) for prompt in prompts]
        before, nth = Counter[int](), list[int]()
        for key in keys:
            nth.append(before[key])
            before[key] += 1
        self._seed, self._keys, self._nth = seed, np.asarray(keys, dtype=np.int64), np.asarray(nth, dtype=np.int64)

    def uniform(self, places: IntArray, use: int = 0, rows: Sequence[int] | None = None) -> FloatArray:
        """Return the numbers of some prompts, all by default, at some places [N] for one use: [B, N]."""
        keys, nth = (each if rows is None else each[list(rows)] for each in (self._keys, self._nth))
        return hash_uniform(self._seed, _SALT, _GENERATION, keys[:, None], nth[:, None], use, places[None, :])


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Return the logits, those of tokens that were seen made less likely."""
    lowered = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered, logits_BV)


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Return the next token of each sequence: [B]. A draw inverts the cumulative distribution at `uniform_B`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    tokens_BN, probabilities_BN = candidates(logits_BV, sampling)
    cumulative_BN = _running_sum(probabilities_BN, torch.float64)
    # Of the last sum, not of 1, so that rounding cannot lead past the last candidate.
    wanted_B1 = (uniform_B * cumulative_BN[:, -1])[:, None]
    n_below_B1 = torch.searchsorted(cumulative_BN, wanted_B1, right=True)
    last_B1 = (probabilities_BN > 0).sum(-1, keepdim=True) - 1 if tokens_BN is not None else logits_BV.shape[-1] - 1
    chosen_B1 = n_below_B1.clamp_max(last_B1)
    return (chosen_B1 if tokens_BN is None else tokens_BN.gather(-1, chosen_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Return tokens [B, N], most likely first, and their probabilities [B, N], which are 0 for those left out.

    If none can be left out, the tokens are None, and the probabilities those of the vocabulary in its order.
    """
    scaled_BV, vocabulary = logits_BV.float() / sampling.temperature, logits_BV.shape[-1]
    everything = not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0
    if everything:
        return None, scaled_BV.softmax(-1)
    if 0 < sampling.top_k < vocabulary:
        scaled_BN, tokens_BN = scaled_BV.topk(sampling.top_k)
        return tokens_BN, _narrowed(scaled_BN, scaled_BN.softmax(-1), sampling)
    if sampling.top_p < 1 and vocabulary > _FIRST_CANDIDATES:
        scaled_BN, tokens_BN = scaled_BV.topk(_FIRST_CANDIDATES)
        share_BN = (scaled_BN - scaled_BV.logsumexp(-1, keepdim=True)).exp()
        if (share_BN.sum(-1) > sampling.top_p).all():
            return tokens_BN, _narrowed(scaled_BN, share_BN, sampling)
    scaled_BN, tokens_BN = scaled_BV.sort(-1, descending=True)
    return tokens_BN, _narrowed(scaled_BN, scaled_BN.softmax(-1), sampling)


def _narrowed(scaled_BN: Tensor, share_BN: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities of sorted candidates, of which the first is always kept."""
    kept_BN = torch.ones_like(share_BN, dtype=torch.bool)
    if sampling.top_p < 1:  # rounded sums reach 1 before the last token
        kept_BN = _running_sum(share_BN, share_BN.dtype) - share_BN < sampling.top_p
    if sampling.min_p > 0:
        kept_BN &= share_BN >= sampling.min_p * share_BN[:, :1]
    kept_BN[:, 0] = True
    return scaled_BN.masked_fill(~kept_BN, -torch.inf).softmax(-1)


def _running_sum(values_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums up to each place, added on the CPU: in CUDA's order the last bits change from call to call."""
    return values_BN.cpu().cumsum(-1, dtype=dtype).to(values_BN.device)
