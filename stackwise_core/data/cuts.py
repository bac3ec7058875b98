"""Where a long text may be cut without changing one token of it. Needs no torch."""

from __future__ import annotations

import re
from typing import Any

SEEN = 1 << 12
"""Bytes on both sides of a cut that are tokenised to see that it changes nothing."""
_MOST_TRIED = 64
_BETWEEN_WORDS = re.compile(rb"(?<=\S)(?=[ \n]\S)|(?<=\n)(?=\S)")


class Cuts:
    """The places at which a tokenizer of the library `tokenizers` begins a new word, whatever stands before.

    Its model sees one word of the pre-tokenizer at a time, and whether a word begins is decided by what stands near. So
    a cut is right if the words, and the ids, of the text around it are those of its two sides.
    """

    def __init__(self, library: Any) -> None:
        """Take a `tokenizers.Tokenizer`; without a pre-tokenizer its model sees the text as one word."""
        self._library, self._has_words = library, library.pre_tokenizer is not None

    def within(self, text: bytes, start: int) -> int:
        """Return a place after `start` and well before the end of a UTF-8 text, at which it may be cut; 0 if none."""
        if not self._has_words:
            return 0
        for tried, found in enumerate(_BETWEEN_WORDS.finditer(text, start, len(text) - SEEN)):
            cut = found.start()
            left, right = _character(text, cut - SEEN), _character(text, cut + SEEN)
            if self._is_harmless(text[left:cut].decode(), text[cut:right].decode()):
                return cut
            if tried == _MOST_TRIED:
                break
        return 0

    def _is_harmless(self, before: str, after: str) -> bool:
        if self._words(before) + self._words(after) != self._words(before + after):
            return False
        return self._ids(before) + self._ids(after) == self._ids(before + after)

    def _words(self, text: str) -> list[str]:
        normal = self._library.normalizer.normalize_str(text) if self._library.normalizer else text
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normal)]

    def _ids(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids


def _character(text: bytes, at: int) -> int:
    """Return the start of the character that holds the byte at a place."""
    at = min(max(at, 0), len(text))
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at
