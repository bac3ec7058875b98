"""Masks as a pure function of (seed, sequence id, view, position): no state, no order, no neighbours.

Letters: B sequences, T positions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

VALIDATION_VIEW = -1
"""Validation sequences have one view of their own, the same in every run."""
VALIDATION_SEED = 20_260_101
"""Seed of the validation masks, whatever the seed of the run."""

_SALT_MASKED, _SALT_KIND, _SALT_TOKEN, SALT_ORDER = range(1, 5)


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


class MaskSpec(BaseModel, frozen=True):
    """How inputs are corrupted in one stage. A value: it enters ids as it stands."""

    seed: int
    ratio: float
    corruption: Literal["bert", "mask"]
    mask_token: int
    n_regular_tokens: int
    """Random replacements are drawn from [0, n_regular_tokens): never a special token."""

    def for_validation(self) -> MaskSpec:
        """Return the same corruption under the seed that every run validates with."""
        return self.model_copy(update={"seed": VALIDATION_SEED})

    def masks(self, sequence_ids: IntArray, view: int, seq_len: int) -> BoolArray:
        """Return which positions are masked.

        Position p of sequence s is masked iff hash(seed, s, view, p) < ratio, so the masks of a
        lower ratio are contained in those of a higher one, and a row never depends on its batch.

        Args:
            sequence_ids: [B].
            view: which draw.
            seq_len: T.

        Returns:
            [B, T], True where masked.
        """
        return hash_uniform(self.seed, _SALT_MASKED, *_keys(sequence_ids, view, seq_len)) < self.ratio

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
        drawn = hash_uniform(self.seed, _SALT_TOKEN, *keys) * self.n_regular_tokens
        replacement = np.where(kind < 0.8, self.mask_token, np.where(kind < 0.9, drawn.astype(np.int64), tokens))
        return np.where(masks, replacement, tokens)


def _keys(sequence_ids: IntArray, view: int, seq_len: int) -> tuple[IntArray, int, IntArray]:
    return sequence_ids[:, None], view, np.arange(seq_len, dtype=np.int64)[None, :]
