"""From text to token ids and back: bytes, or what a Hugging Face tokenizer.json says. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.masks import IntArray
from stackwise_core.errors import ConfigError, Fault

TokenArray = NDArray[np.uint16 | np.uint32]

_MOST_TOKENS = 2**24
"""The largest `model.vocab_size`."""
_MOST_TOKENS_PER_CHARACTER = 4  # where a token is a byte of UTF-8


class Tokenizer(ABC):
    """What packing, masking and ids need from a tokenizer."""

    name: str
    """'byte', or 'sha256:' and the hash of the file; enters ids."""
    vocab_size: int
    """One more than the largest id."""
    n_regular_tokens: int
    """Number of ids that stand for text and may be drawn as random replacements."""
    special_tokens: tuple[int, ...]
    """The ids below the largest regular one that are not regular, ascending; later ones may be left out."""
    mask_token: int | None
    pad_token: int
    """Fills an example that is shorter than its row."""
    end_token: int | None
    """Follows every document."""

    @abstractmethod
    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a UTF-8 text: [number of tokens], of `token_dtype(vocab_size)`."""

    @abstractmethod
    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens by their names."""


class ByteTokenizer(Tokenizer):
    """256 bytes and three special tokens; it encodes any text."""

    name = "byte"
    n_regular_tokens = 256
    special_tokens = ()
    mask_token, pad_token, end_token = 256, 257, 258
    vocab_size = 259

    def encode(self, text: bytes) -> NDArray[np.uint16]:
        """Return the bytes as token ids [len(text)]."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens as [MASK], [PAD], [END]."""
        names = {self.mask_token: b"[MASK]", self.pad_token: b"[PAD]", self.end_token: b"[END]"}
        pieces = [bytes([token]) if token < 256 else names.get(token, b"[?]") for token in map(int, tokens)]
        return b"".join(pieces).decode("utf-8", errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`, described by a tokenizer.json.

    The mask token is [MASK] or <mask>; the end token the first of [END], <|endoftext|>, </s>, [SEP] that exists; the
    pad token [PAD] or <pad>, else the end token, else 0.
    """

    def __init__(self, description: str) -> None:
        """Parse the text of a tokenizer.json; raises ValueError if it is not one or has no regular token."""
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(description)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from None
        # A file may ask for both, for batches of sentences; here the whole text is packed.
        self._library.no_truncation()
        self._library.no_padding()
        # A text that contains "[MASK]" must not become a masked position.
        self._library.encode_special_tokens = True
        if getattr(self._library.model, "dropout", None):
            raise ValueError("it drops merges at random (dropout), so that a text would have no one encoding")
        ids = self._library.get_vocab(with_added_tokens=True)
        self.name = f"sha256:{hashlib.sha256(description.encode()).hexdigest()}"
        self.mask_token = _first(ids, "[MASK]", "<mask>")
        self.end_token = _first(ids, "[END]", "<|endoftext|>", "</s>", "[SEP]")
        pad_token = _first(ids, "[PAD]", "<pad>")
        self.pad_token = next(token for token in (pad_token, self.end_token, 0) if token is not None)
        self.vocab_size = max(ids.values(), default=-1) + 1
        added = self._library.get_added_tokens_decoder()
        if self.vocab_size > _MOST_TOKENS:
            raise ValueError(f"its largest id is {self.vocab_size - 1:,}; at most {_MOST_TOKENS:,} tokens are possible")
        regular = set(ids.values()) - {token for token, entry in added.items() if entry.special}
        regular -= {self.mask_token, self.end_token, pad_token}
        if not regular:
            raise ValueError("its vocabulary is empty")
        self.n_regular_tokens = len(regular)
        # Ids missing from the vocabulary must not be drawn either.
        self.special_tokens = tuple(token for token in range(self.vocab_size) if token not in regular)

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a UTF-8 text, without the special tokens that a template would add around it."""
        try:
            ids = self._library.encode(text.decode("utf-8"), add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            allowed = f"it cannot encode the corpus ({error}); give one that knows every text, such as a byte-level one"
            raise ConfigError([Fault("data.tokenizer", self.name, allowed)]) from None
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens by their names."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=False)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names; raises ConfigError if its file is missing or damaged."""
    if name == "byte":
        return ByteTokenizer()
    try:
        return _parsed(Path(name).read_bytes().decode("utf-8"))
    except OSError as error:
        allowed = f"it cannot be read ({error.strerror}, seen from {Path.cwd()}); give a tokenizer.json, or use 'byte'"
    except ValueError as error:
        allowed = f"it is not a tokenizer.json ({error}); give one that the library tokenizers saved, or use 'byte'"
    raise ConfigError([Fault("data.tokenizer", repr(name), allowed)])


@functools.lru_cache(maxsize=4)
def _parsed(description: str) -> FileTokenizer:
    """Parse a tokenizer once; cached by the text of the file, so that a changed file is parsed again."""
    return FileTokenizer(description)


def _first(ids: dict[str, int], *names: str) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def decode_pieces(tokenizer: Tokenizer, tokens: IntArray) -> list[tuple[str, int]]:
    """Cut tokens [T] into the smallest pieces that decode to text: (text, number of tokens) in order.

    A character may be several tokens, and a token may decode differently after others: a piece is what it adds to the
    text. Joined, the pieces are `decode(tokens)`, if decoding only ever appends.
    """
    pieces, before, first = list[tuple[str, int]](), "", 0
    while first < len(tokens):
        longest = min(first + _MOST_TOKENS_PER_CHARACTER, len(tokens))
        texts = {end: tokenizer.decode(tokens[:end]) for end in range(first + 1, longest + 1)}
        # U+FFFD is decoded from bytes that are not, or not yet, a character.
        end = next((end for end, text in texts.items() if not text.endswith("\ufffd")), first + 1)
        pieces.append((texts[end][len(before) :], end - first))
        before, first = texts[end], end
    return pieces
