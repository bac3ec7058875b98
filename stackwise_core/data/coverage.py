"""Characters that a tokenizer would drop without a word: those that a BPE knows no token for. Needs no torch."""

from __future__ import annotations

import re
from typing import Any


class Coverage:
    """What a tokenizer of the library `tokenizers` has no token for, although it would encode the text around it.

    Only its BPE leaves out what it does not know: where it has no unknown token. Others raise an error.
    """

    def __init__(self, library: Any) -> None:
        """Read the vocabulary of a `tokenizers.Tokenizer`."""
        from tokenizers.models import BPE

        self._library, model = library, library.model
        self._drops = isinstance(model, BPE) and model.unk_token is None
        if not self._drops:
            return
        self._vocabulary = set[str](library.get_vocab(with_added_tokens=False))
        self._prefix, self._suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
        self._whole_words, self._byte_fallback = model.ignore_merges, model.byte_fallback
        added = [token.content for token in library.get_added_tokens_decoder().values() if not token.special]
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
        self._drops = not self._knows_every_byte()

    def dropped_from(self, text: str) -> str:
        """Return the first character of a text that would be dropped; '' if there is none."""
        missing = self._missing_from(text) if self._drops else set[str]()
        if not missing:
            return ""
        # One character may be several letters of the vocabulary, such as bytes.
        return next((each for each in dict.fromkeys(text) if missing & self._missing_from(each)), min(missing))

    def _knows_every_byte(self) -> bool:
        from tokenizers.pre_tokenizers import ByteLevel

        if self._byte_fallback and all(f"<0x{byte:02X}>" in self._vocabulary for byte in range(256)):
            return True
        letters, of_one = set(ByteLevel.alphabet()), set("".join(self._pieces("\N{GRINNING FACE}")))
        by_bytes = bool(of_one) and of_one <= letters
        return by_bytes and letters <= self._vocabulary and not (self._prefix or self._suffix)

    def _pieces(self, text: str) -> set[str]:
        """Return the words that the model is given for a text."""
        library = self._library
        normal = library.normalizer.normalize_str(text) if library.normalizer else text
        parts = self._added.split(normal) if self._added else [normal]
        if not library.pre_tokenizer:
            return set(parts)
        return {piece for part in parts for piece, _ in library.pre_tokenizer.pre_tokenize_str(part)}

    def _missing_from(self, text: str) -> set[str]:
        pieces = self._pieces(text)
        if self._whole_words:
            pieces -= self._vocabulary
        if not (self._prefix or self._suffix):
            return {letter for letter in set("".join(pieces)) if not self._is_known(letter, letter)}
        return {
            letter
            for piece in pieces
            for n, letter in enumerate(piece)
            if not self._is_known(letter, self._form(piece, n))
        }

    def _form(self, piece: str, n: int) -> str:
        """Return how the vocabulary spells the n-th letter of a word."""
        return (self._prefix if n else "") + piece[n] + (self._suffix if n == len(piece) - 1 else "")

    def _is_known(self, letter: str, form: str) -> bool:
        if form in self._vocabulary:
            return True
        return self._byte_fallback and all(f"<0x{byte:02X}>" in self._vocabulary for byte in letter.encode())
