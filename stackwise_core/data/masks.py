"""Masks as a pure function of seed, sequence id, view and position: independent of batches and of order.

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
"""The one view of validation sequences, the same in every run."""
VALIDATION_SEED = 20_260_101
"""Seed of the validation masks in every run."""

_SALT_MASKED, _SALT_KIND, _SALT_TOKEN, SALT_ORDER = range(1, 5)
_SALT_TIME, SALT_BATCHES = 6, 7  # 5 initialises stacks; salts are below 8
SALT_DEPTH = 0
_ELBO_SMALLEST_RATIO = 1e-3
"""Limits the loss weights of the diffusion bound, 1 / ratio, to a thousand."""


def hash_bits(seed: int, salt: int, *keys: IntArray | int) -> NDArray[np.uint64]:
    """Hash integer keys, broadcast against each other, to 64 bits by the SplitMix64 mixer.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
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
    """How time-as-input draws its steps, and the mask ratio of each step. Enters ids unchanged."""

    n_steps: int
    """T: steps are 0 .. T - 1."""
    sampling: Literal["per_batch", "per_sequence", "stratified"]
    ratio_min: float
    """Mask ratio of step 0; 0 if the table or the diffusion bound determines the ratios."""
    ratio_max: float
    table: tuple[float, ...] = ()
    """Mask ratio of every step; empty interpolates from min to max."""
    elbo: bool = False
    """Ratios and loss weights of the diffusion bound."""
    fixed: int = -1
    """The step of every sequence, to evaluate a rack at one noise level; -1 draws steps."""

    @property
    def by_batch(self) -> bool:
        """Whether the step of a row depends on its batch, which must then be the same in every epoch."""
        return self.sampling != "per_sequence"

    def ratios(self, steps: IntArray) -> FloatArray:
        """Return the mask ratio of each step: [...] to [...].

        For the diffusion bound it is r = (1 - 1e-3) t + 1e-3 in the middle of the step, t = (s + 1/2) / T (the schedule
        of LLaDA, Nie et al. 2025).
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
        """Draw the step of each sequence [B]: s = floor(T u), u uniform in [0, 1).

        `per_sequence`: u = hash(sequence, view). `per_batch`: u = hash(batch, view), the same for a whole batch.
        `stratified`: u = hash(batch, view) + slot / batch_size mod 1, so that a batch covers time evenly (Kingma et
        al. 2021, Variational diffusion models). Validation (a negative view) always draws per sequence.

        Args:
            seed: of the run, or of the validation.
            sequence_ids: [B].
            view: which draw.
            batches: number of each row's batch within the view [B]; needed unless steps are drawn per sequence.
            slots: position of each row in its batch [B]; needed together with `batches`.
            batch_size: rows of a batch.
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


class RatioSpan(BaseModel, frozen=True):
    """A range of mask ratios, of which each sequence draws one. Enters ids unchanged.

    The density rises evenly from `low` to `full_from`, is the same up to `full_to`, and falls evenly to `high`.
    """

    low: float
    full_from: float
    full_to: float
    high: float

    @property
    def up_to(self) -> float:
        """The ratio at which the next stack takes over: the middle of the fall, where both draw as often."""
        return (self.full_to + self.high) / 2

    @property
    def mean(self) -> float:
        """The mean of the ratios that are drawn."""
        rise, flat, fall = self._areas
        middles = (self.low + 2 * self.full_from) / 3, (self.full_from + self.full_to) / 2
        moment = rise * middles[0] + flat * middles[1] + fall * (2 * self.full_to + self.high) / 3
        return moment / (rise + flat + fall)

    @property
    def _areas(self) -> tuple[float, float, float]:
        """What lies below the density, which is 1 at most, in its three parts."""
        return (self.full_from - self.low) / 2, self.full_to - self.full_from, (self.high - self.full_to) / 2

    def ratios(self, u: FloatArray) -> FloatArray:
        """Return the ratios below which a share u, from 0 to 1, of all draws lies: [...] to [...]."""
        rise, flat, fall = self._areas
        area = u * (rise + flat + fall)
        left = (rise + flat + fall) - area
        rising = self.low + np.sqrt(2 * (self.full_from - self.low) * area)
        falling = self.high - np.sqrt(2 * (self.high - self.full_to) * left)
        drawn = np.where(area < rise, rising, np.where(left < fall, falling, self.full_from + (area - rise)))
        return drawn.clip(self.low, self.high)


class MaskSpec(BaseModel, frozen=True):
    """How inputs are corrupted in one stage. Its fields are its arguments, by keyword, and part of ids."""

    seed: int = Field(ge=0, lt=2**31)
    """Of the hash that says which positions are masked."""
    ratio: float = Field(ge=0.0, le=1.0)
    """Fraction of positions that is masked."""
    corruption: Literal["bert", "mask"]
    """What a masked input becomes: of ten, eight [MASK], one a random token and one itself (bert), or all [MASK]."""
    mask_token: int = Field(ge=0)
    """Id of [MASK]."""
    n_regular_tokens: int = Field(ge=1)
    """Number of ids that random replacements are drawn from, counted from 0 without special tokens."""
    time: TimeInput | None = None
    """For time-as-input: each sequence has the ratio of its step, and `ratio` is not used."""
    special_tokens: tuple[int, ...] = ()
    """Ids that are not regular, ascending; a tokenizer may have them anywhere."""
    span: RatioSpan | None = Field(default=None, exclude_if=lambda value: value is None)
    """For time-as-depth by intervals: each sequence draws its ratio. At `ratio` the stack is judged."""

    @property
    def mean_ratio(self) -> float:
        """The fraction of positions that is masked, averaged over the ratios or steps that are drawn."""
        if self.time is None:
            return self.span.mean if self.span else self.ratio
        ratios = self.time.ratios(np.arange(self.time.n_steps, dtype=np.int64))
        return float(ratios.mean() if self.time.fixed < 0 else ratios[self.time.fixed])

    def at_ratio(self, ratio: float) -> MaskSpec:
        """Return the same corruption at one ratio; for time-as-input, at the step with the nearest ratio."""
        if self.time is None:
            return self.model_copy(update={"ratio": ratio, "span": None})
        ratios = self.time.ratios(np.arange(self.time.n_steps, dtype=np.int64))
        fixed = {"fixed": int(np.abs(ratios - ratio).argmin()), "elbo": False, "table": tuple(ratios.tolist())}
        return self.model_copy(update={"time": self.time.model_copy(update=fixed)})

    def for_validation(self) -> MaskSpec:
        """Return the same corruption under the seed that every run validates with, a stack at its own ratio."""
        return self.model_copy(update={"seed": VALIDATION_SEED, "span": None})

    def masks(self, sequence_ids: IntArray, view: int, seq_len: int, steps: IntArray | None = None) -> BoolArray:
        """Return which positions are masked: [B, T] for sequence ids [B].

        Position p of sequence s is masked iff hash(seed, s, view, p) < ratio. So the masks of a lower ratio are
        contained in those of a higher one, and a row does not depend on its batch. Time-as-input, and only it, needs
        the time `steps` [B] of the sequences. With a span each sequence has a ratio of its own under each view.
        """
        if (self.time is None) != (steps is None):
            allowed = "the steps of time-as-input are needed" if steps is None else "this corruption has one ratio"
            raise ConfigError([Fault("steps", "None" if steps is None else "steps", allowed)])
        ratio = self.ratio if self.time is None or steps is None else self.time.ratios(steps)[:, None]
        if self.span:
            ratio = self.span.ratios(hash_uniform(self.seed, _SALT_TIME, sequence_ids, view))[:, None]
        return hash_uniform(self.seed, _SALT_MASKED, *_keys(sequence_ids, view, seq_len)) < ratio

    def corrupt(self, tokens: IntArray, masks: BoolArray, sequence_ids: IntArray, view: int) -> IntArray:
        """Return tokens [B, T], corrupted where masks [B, T] are true.

        `mask` puts [MASK] at all of these positions; `bert` puts [MASK] at 80 % of them, a random token at 10 % and
        keeps 10 % (Devlin et al. 2019, section 3.1).
        """
        if self.corruption == "mask":
            return np.where(masks, self.mask_token, tokens)
        keys = _keys(sequence_ids, view, tokens.shape[1])
        kind = hash_uniform(self.seed, _SALT_KIND, *keys)
        drawn = (hash_uniform(self.seed, _SALT_TOKEN, *keys) * self.n_regular_tokens).astype(np.int64)
        replacement = np.where(kind < 0.8, self.mask_token, np.where(kind < 0.9, self._regular_tokens(drawn), tokens))
        return np.where(masks, replacement, tokens)

    def _regular_tokens(self, numbers: IntArray) -> IntArray:
        """Return the n-th regular id for each n: [...] to [...]."""
        specials = np.asarray(self.special_tokens, dtype=np.int64)
        n_regular_before = specials - np.arange(len(specials))
        return numbers + np.searchsorted(n_regular_before, numbers, side="right")


def _keys(sequence_ids: IntArray, view: int, seq_len: int) -> tuple[IntArray, int, IntArray]:
    return sequence_ids[:, None], view, np.arange(seq_len, dtype=np.int64)[None, :]


def content_ids(tokens: IntArray) -> IntArray:
    """Return a 64-bit content hash of each row: [B]."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(tokens)]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
