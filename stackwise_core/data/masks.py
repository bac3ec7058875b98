"""Masks as a pure function of (seed, sequence id, view, position): no state, no order, no neighbours.

Letters: B sequences, T positions.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from stackwise_core.errors import ConfigError, Fault

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

VALIDATION_VIEW = -1
"""Validation sequences have one view of their own, the same in every run."""
VALIDATION_SEED = 20_260_101
"""Seed of the validation masks, whatever the seed of the run."""

_SALT_MASKED, _SALT_KIND, _SALT_TOKEN, SALT_ORDER = range(1, 5)
_SALT_TIME, SALT_BATCHES = 6, 7  # 5 initialises stacks; a salt is below 8
SALT_DEPTH = 0

_ELBO_SMALLEST_RATIO = 1e-3
"""So that no weight of the bound, 1 / ratio, exceeds a thousand."""


def hash_bits(seed: int, salt: int, *keys: IntArray | int) -> NDArray[np.uint64]:
    """Hash integer keys, broadcast against each other, to 64 well-mixed bits.

    Each key is folded in and finalised with the SplitMix64 mixer (Steele, Lea, Flood: Fast
    splittable pseudorandom number generators, OOPSLA 2014).
    """
    state = _mix(np.asarray([seed * 8 + salt], dtype=np.uint64))
    for key in keys:
        state = _mix(state ^ _mix(np.asarray(key, dtype=np.int64).astype(np.uint64)))
    return state


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hash_uniform(seed: int, salt: int, *keys: IntArray | int) -> NDArray[np.float64]:
    """Hash integer keys to uniform numbers in [0, 1)."""
    return (hash_bits(seed, salt, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class TimeInput(BaseModel, frozen=True):
    """How time-as-input draws its steps and what ratio each step means. A value: it enters ids as it stands."""

    n_steps: int
    """T: steps are 0 .. T - 1."""
    sampling: Literal["per_batch", "per_sequence", "stratified"]
    ratio_min: float
    """Mask ratio of step 0; 0 where a table or the bound's schedule says it."""
    ratio_max: float
    table: tuple[float, ...] = ()
    """Mask ratio of every step; empty interpolates from min to max."""
    elbo: bool = False
    """Ratios and loss weights of the diffusion bound."""
    fixed: int = -1
    """The step of every sequence, for judging a rack at one noise level; -1 draws them."""

    @property
    def by_batch(self) -> bool:
        """Whether a row's step depends on the batch it is in, which then must be the same in every epoch."""
        return self.sampling != "per_sequence"

    def ratios(self, steps: IntArray) -> FloatArray:
        """Return the mask ratio of each step: [...] to [...].

        The bound's ratio is that of the middle of the step, r = (1 - 1e-3) t + 1e-3 at t = (s + 1/2) / T
        (the schedule of LLaDA, Nie et al. 2025).
        """
        if self.elbo:
            return (1.0 - _ELBO_SMALLEST_RATIO) * (steps + 0.5) / self.n_steps + _ELBO_SMALLEST_RATIO
        if self.table:
            return np.asarray(self.table, dtype=np.float64)[steps]
        return self.ratio_min + (self.ratio_max - self.ratio_min) * steps / max(1, self.n_steps - 1)

    def steps(
        self,
        seed: int,
        sequence_ids: IntArray,
        view: int,
        batches: IntArray | None = None,
        slots: IntArray | None = None,
        batch_size: int = 0,
    ) -> IntArray:
        """Draw the step of each sequence: s = floor(T u), u uniform in [0, 1).

        `per_sequence`: u = hash(sequence, view). `per_batch`: u = hash(batch, view), one for the whole
        batch. `stratified`: that plus slot / batch_size, modulo 1, so that a batch covers time evenly
        (Kingma et al. 2021, Variational diffusion models). Validation, whose view is
        negative, has no batches and draws per sequence whatever the sampling.

        Args:
            seed: of the run, or of the validation.
            sequence_ids: [B].
            view: which draw.
            batches: number of each row's batch within the view: [B].
            slots: place of each row in its batch: [B].
            batch_size: rows of a batch.

        Returns:
            [B], int64.

        Raises:
            ConfigError: the sampling goes by batch and the batches are not given.
        """
        if self.fixed >= 0:
            return np.full(len(sequence_ids), self.fixed, dtype=np.int64)
        if view < 0 or not self.by_batch:
            u_B = hash_uniform(seed, _SALT_TIME, sequence_ids, view)
        elif batches is None or slots is None:
            allowed = "needs to know the batch of every row; use per_sequence where there are none"
            raise ConfigError([Fault("training.time_sampling", repr(self.sampling), allowed)])
        else:
            u_B = hash_uniform(seed, _SALT_TIME, batches, view)
            if self.sampling == "stratified":
                u_B = (u_B + slots / batch_size) % 1.0
        return (u_B * self.n_steps).astype(np.int64)


class MaskSpec(BaseModel, frozen=True):
    """How inputs are corrupted in one stage. A value: it enters ids as it stands."""

    seed: int = Field(ge=0, lt=2**31)
    ratio: float = Field(ge=0.0, le=1.0)
    """Share of the positions that is masked."""
    corruption: Literal["bert", "mask"]
    mask_token: int = Field(ge=0)
    n_regular_tokens: int = Field(ge=1)
    """Random replacements are drawn from so many ids, counted from 0: never a special token."""
    time: TimeInput | None = None
    """Time-as-input: each sequence has the ratio of its step, and `ratio` is not used."""
    special_tokens: tuple[int, ...] = ()
    """Ids that the count of regular ones skips, ascending; a tokenizer may have them anywhere."""

    @property
    def mean_ratio(self) -> float:
        """The share of positions that is masked, on average over time where time is an input."""
        if self.time is None:
            return self.ratio
        ratios = self.time.ratios(np.arange(self.time.n_steps, dtype=np.int64))
        return float(ratios.mean() if self.time.fixed < 0 else ratios[self.time.fixed])

    def at_ratio(self, ratio: float) -> MaskSpec:
        """Return the same corruption at one ratio: where time is an input, at the step whose ratio is nearest."""
        if self.time is None:
            return self.model_copy(update={"ratio": ratio})
        ratios = self.time.ratios(np.arange(self.time.n_steps, dtype=np.int64))
        fixed = {"fixed": int(np.abs(ratios - ratio).argmin()), "elbo": False, "table": tuple(ratios.tolist())}
        return self.model_copy(update={"time": self.time.model_copy(update=fixed)})

    def for_validation(self) -> MaskSpec:
        """Return the same corruption under the seed that every run validates with."""
        return self.model_copy(update={"seed": VALIDATION_SEED})

    def masks(self, sequence_ids: IntArray, view: int, seq_len: int, steps: IntArray | None = None) -> BoolArray:
        """Return which positions are masked.

        Position p of sequence s is masked iff hash(seed, s, view, p) < ratio, so the masks of a
        lower ratio are contained in those of a higher one, and a row never depends on its batch.

        Args:
            sequence_ids: [B].
            view: which draw.
            seq_len: T.
            steps: time step of each sequence, with time-as-input: [B].

        Returns:
            [B, T], True where masked.

        Raises:
            ConfigError: steps are missing, or there is no time-as-input to read them.
        """
        if (self.time is None) != (steps is None):
            allowed = "the steps of time-as-input are needed" if steps is None else "this corruption has one ratio"
            raise ConfigError([Fault("steps", "None" if steps is None else "steps", allowed)])
        ratio = self.ratio if self.time is None or steps is None else self.time.ratios(steps)[:, None]
        return hash_uniform(self.seed, _SALT_MASKED, *_keys(sequence_ids, view, seq_len)) < ratio

    def corrupt(self, tokens: IntArray, masks: BoolArray, sequence_ids: IntArray, view: int) -> IntArray:
        """Return the tokens with the masked positions corrupted.

        `mask` puts [MASK] everywhere; `bert` puts [MASK] at 80 %, a random token at 10 % and keeps
        10 % (Devlin et al. 2019, section 3.1).

        Args:
            tokens: [B, T].
            masks: [B, T].
            sequence_ids: [B].
            view: which draw.

        Returns:
            [B, T], a new array.
        """
        if self.corruption == "mask":
            return np.where(masks, self.mask_token, tokens)
        keys = _keys(sequence_ids, view, tokens.shape[1])
        kind = hash_uniform(self.seed, _SALT_KIND, *keys)
        drawn = (hash_uniform(self.seed, _SALT_TOKEN, *keys) * self.n_regular_tokens).astype(np.int64)
        replacement = np.where(kind < 0.8, self.mask_token, np.where(kind < 0.9, self._regular_tokens(drawn), tokens))
        return np.where(masks, replacement, tokens)

    def _regular_tokens(self, numbers: IntArray) -> IntArray:
        """Return the n-th regular id of each n: [...] to [...]. They are in order, with the specials left out."""
        specials = np.asarray(self.special_tokens, dtype=np.int64)
        n_regular_before = specials - np.arange(len(specials))
        return numbers + np.searchsorted(n_regular_before, numbers, side="right")


def _keys(sequence_ids: IntArray, view: int, seq_len: int) -> tuple[IntArray, int, IntArray]:
    return sequence_ids[:, None], view, np.arange(seq_len, dtype=np.int64)[None, :]


def content_ids(tokens: IntArray) -> IntArray:
    """Return a 64-bit content hash of each row: [B]."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(tokens)]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
