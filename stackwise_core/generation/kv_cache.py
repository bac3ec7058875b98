"""Keys and values of the tokens so far, so that a new token costs one position and not the whole text.

Letters: B sequences, T new positions, H heads, K key/value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_attention(
    q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, *, causal: bool, sees: Tensor | None = None
) -> Tensor:
    """Return what H heads see, of which as many share each of K heads of keys and values: [B, H, T, C].

    `sees` [B, 1, T, T] says which positions see which.
    """
    sharing = q_BHTC.shape[1] // k_BKTC.shape[1]
    if sharing > 1 and _must_not_share(q_BHTC):
        k_BKTC, v_BKTC = (each[:, :, None].expand(-1, -1, sharing, -1, -1).flatten(1, 2) for each in (k_BKTC, v_BKTC))
        sharing = 1
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKTC, v_BKTC, attn_mask=sees, is_causal=causal, enable_gqa=sharing > 1
    )


def _must_not_share(q_BHTC: Tensor) -> bool:
    """Return whether heads that share would be computed by torch's slowest kernel, which holds all scores [B, H, T, T].

    With CUDA that of the low types can share, but none of float32 does.
    """
    kind = q_BHTC.device.type
    return kind == "cuda" and q_BHTC.dtype == torch.float32 and not torch.is_autocast_enabled(kind)


class KVCache:
    """The keys and values of every block, for a batch of sequences that may begin at different columns.

    Sequences stand flush right: the newest token of all is in one column, and a shorter one begins later.
    """

    def __init__(self, lengths: Sequence[int], n_new: int, blocks: Sequence[int], device: torch.device) -> None:
        """Make room for prompts of these lengths and `n_new` more tokens each; `blocks` is their number per stack."""
        self.lengths, self.filled = list(lengths), 0
        longest = max(lengths)
        self.capacity = longest + n_new
        self.positions = 1 << (self.capacity - 1).bit_length()
        """Length of the rotary table: tables are kept, and should not be as many as there are lengths."""
        starts = torch.tensor([longest - length for length in lengths], device=device)
        self._ragged = len(set(lengths)) > 1
        columns = torch.arange(self.capacity, device=device)
        self._there = (columns >= starts[:, None])[:, None, None, :]  # [B, 1, 1, columns]
        self._starts, self._rows = starts, list[int]()
        self._rotary: Tensor | None = None
        self.stacks = [StackMemory(self, n) for n in blocks]

    def begin(self, rows: list[int]) -> None:
        """Expect the whole prompts of some rows, all of one length, in the next pass through the stacks."""
        self._rows, self._rotary = rows, None
        self.filled = max(self.lengths)

    def grow(self) -> None:
        """Expect one more token of every row in the next pass through the stacks."""
        self._rows, self._rotary = [], None
        self.filled += 1

    def angles(self, rotary: Tensor) -> Tensor:
        """Return the rotary table at the positions of the new tokens, out of one of `positions`."""
        if self._rotary is None:
            if self._rows:
                self._rotary = rotary[:, : self.lengths[self._rows[0]]]
            elif self._ragged:
                self._rotary = rotary[:, self.filled - 1 - self._starts][:, :, None, None, :]  # [2, B, 1, 1, C]
            else:
                self._rotary = rotary[:, self.filled - 1 : self.filled]
        return self._rotary

    def attend(self, held: BlockMemory, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """Keep the new keys and values, and return what the new positions see of all: [B, H, T, C]."""
        if held.keys is None or held.values is None:
            shape = (len(self.lengths), k_BKTC.shape[1], self.capacity, k_BKTC.shape[-1])
            # Zeros, where prompts are shorter: what stands in an empty column could be NaN, which no mask hides.
            make = torch.zeros if self._ragged else torch.empty
            held.keys, held.values = (make(shape, dtype=v_BKTC.dtype, device=v_BKTC.device) for _ in range(2))
        columns = slice(self.filled - k_BKTC.shape[2], self.filled)
        if self._rows:
            held.keys[self._rows, :, columns] = k_BKTC.to(v_BKTC.dtype)
            held.values[self._rows, :, columns] = v_BKTC
            return grouped_attention(q_BHTC, k_BKTC, v_BKTC, causal=True)
        held.keys[:, :, columns] = k_BKTC
        held.values[:, :, columns] = v_BKTC
        # One new position sees all columns, so that the heads that share keys can stand in the place of positions.
        B, H, _, C = q_BHTC.shape
        shared = q_BHTC.reshape(B, k_BKTC.shape[1], -1, C).to(v_BKTC.dtype)
        keys, values = held.keys[:, :, : self.filled], held.values[:, :, : self.filled]
        mask = self._there[..., : self.filled] if self._ragged else None
        return F.scaled_dot_product_attention(shared, keys, values, attn_mask=mask).view(B, H, 1, C)


class BlockMemory:
    """The keys and values of one block: [B, K, columns, C] each."""

    def __init__(self, cache: KVCache) -> None:
        """Begin empty; the first pass shows how much room is needed."""
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        """See `KVCache.attend`."""
        return self.cache.attend(self, q_BHTC, k_BKTC, v_BKTC)


class StackMemory:
    """What one stack needs of the cache."""

    def __init__(self, cache: KVCache, n_blocks: int) -> None:
        """Begin empty."""
        self.cache = cache
        self.blocks = [BlockMemory(cache) for _ in range(n_blocks)]
