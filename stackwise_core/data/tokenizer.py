"""From text to token ids and back: bytes, or what a Hugging Face tokenizer.json says. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.coverage import Coverage
from stackwise_core.data.cuts import SEEN, Cuts
from stackwise_core.data.files import not_a_file
from stackwise_core.data.masks import IntArray
from stackwise_core.errors import ConfigError, Fault, shortened

TokenArray = NDArray[np.uint16 | np.uint32]

_MOST_TOKENS = 2**24
"""The largest `model.vocab_size`."""
_WHOLE = 2**20
"""Bytes of the longest text that is never cut."""
_PIECE = 2**18
"""Bytes of the pieces of a longer one, at least."""
_MOST_BYTES = 2**29
"""Of a tokenizer.json; those of the largest vocabularies are a tenth of it."""
_END_TOKENS = ("[END]", "<|endoftext|>", "</s>", "[SEP]")
_MORE_END_TOKENS = (
    *(
        "<|end_of_text|>",
        "<eos>",
        "[EOS]",
        "<EOS>",
        "<|eos|>",
        "<EOS_TOKEN>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    *("<|im_end|>", "<|eot_id|>", "<|eod|>", "<eod>"),
)
"""Names of the end tokens of others: Llama 3, Gemma, and so on. They are part of the tokenizer's name in ids."""
_KNOWS_ALL = "give a tokenizer that knows every text, such as a byte-level one"
_MOST_TOKENS_PER_CHARACTER = 4  # where a token is a byte of UTF-8


class _NoSuchTokenError(ValueError):
    """The end token is not in the vocabulary."""


class Tokenizer(ABC):
    """What packing, masking and ids need from a tokenizer."""

    name: str
    """'byte', or 'sha256:' and the hash of the file, and an end token that it does not imply; enters ids."""
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
    def encode_all(self, texts: Sequence[bytes], ended: Sequence[bool], begun: Sequence[bool] = ()) -> TokenArray:
        """Return the ids of texts, one after the other, with the end token, if there is one, after those `ended`.

        The start tokens stand before those `begun`, if it is given.
        """

    def pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Cut a text, given in chunks, so that the ids of the pieces, one after the other, are those of the whole."""
        yield b"".join(chunks)

    def encode_named(self, text: bytes) -> TokenArray:
        """Return the ids of a UTF-8 text in which the names of special tokens stand for them, as in a chat template."""
        return self.encode(text)

    @property
    def start_tokens(self) -> list[int]:
        """The ids that its own configuration puts before a text, such as a begin token."""
        return []

    @abstractmethod
    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens by their names."""

    @abstractmethod
    def token_bytes(self) -> IntArray | None:
        """Return the bytes of text that each regular id stands for [V]; None if that depends on the ids around it."""

    @abstractmethod
    def name_of(self, token: int | None) -> str | None:
        """Return what a token is called in the vocabulary; None for None, or where there is no such token."""

    @abstractmethod
    def token_named(self, name: str) -> int | None:
        """Return the id of a token, None if there is none of this name."""


class ByteTokenizer(Tokenizer):
    """256 bytes and three special tokens; it encodes any text."""

    name = "byte"
    n_regular_tokens = 256
    special_tokens = ()
    _END = 258
    mask_token, pad_token, end_token = 256, 257, _END
    vocab_size = 259
    _names: ClassVar = {mask_token: "[MASK]", pad_token: "[PAD]", end_token: "[END]"}

    def encode(self, text: bytes) -> NDArray[np.uint16]:
        """Return the bytes as token ids [len(text)]."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode_all(
        self, texts: Sequence[bytes], ended: Sequence[bool], begun: Sequence[bool] = ()
    ) -> NDArray[np.uint16]:
        """Return the bytes of texts, with [END] after those `ended`."""
        if all(ended):
            room = b"\0".join([*texts, b""])
        else:
            room = b"".join([part for text, end in zip(texts, ended, strict=True) for part in (text, b"\0" * end)])
        tokens = np.frombuffer(room, np.uint8).astype(np.uint16)
        is_end = np.array(ended, dtype=np.bool_)
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + is_end)[is_end] - 1
        tokens[ends] = ByteTokenizer._END
        return tokens

    def pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Leave a text as it comes."""
        yield from chunks

    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens as [MASK], [PAD], [END]."""
        names = {token: name.encode() for token, name in self._names.items()}
        pieces = [bytes([token]) if token < 256 else names.get(token, b"[?]") for token in map(int, tokens)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self) -> IntArray:
        """Return 1 for every byte."""
        return (np.arange(self.vocab_size) < self.n_regular_tokens).astype(np.int64)

    def name_of(self, token: int | None) -> str | None:
        """Return the name of a special token; bytes have none."""
        return None if token is None else self._names.get(token)

    def token_named(self, name: str) -> int | None:
        """Return the id of a special token."""
        return next((token for token, known in self._names.items() if known == name), None)


class FileTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`, described by a tokenizer.json.

    The mask token is [MASK] or <mask>; the end token the given one, else the first of the known names that exists; the
    pad token [PAD] or <pad>, else the end token, else 0.
    """

    def __init__(self, description: str, end_token: str = "") -> None:
        """Parse the text of a tokenizer.json; raises ValueError if it is not one or lacks a token that it needs."""
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
        if end_token and end_token not in ids:
            raise _NoSuchTokenError
        by_name = _first(ids, *_END_TOKENS)
        self.end_token = ids[end_token] if end_token else _first(ids, *_END_TOKENS, *_MORE_END_TOKENS)
        if self.end_token != by_name:
            self.name += f" end {self.end_token}"
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
        self._coverage = Coverage(self._library)
        self._cuts = Cuts(self._library)

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a UTF-8 text, without the special tokens that a template would add around it."""
        return self.encode_all([text], [False])

    def encode_all(self, texts: Sequence[bytes], ended: Sequence[bool], begun: Sequence[bool] = ()) -> TokenArray:
        """Return the ids of texts, with the end token after those `ended`; the library takes a thread for each CPU."""
        readable = [text.decode("utf-8") for text in texts]
        if dropped := next(filter(None, map(self._coverage.dropped_from, readable)), ""):
            allowed = f"it has no token for {dropped!r} (U+{ord(dropped):04X}) and would drop it from the corpus"
            raise ConfigError([Fault("data.tokenizer", self.name, f"{allowed}; {_KNOWS_ALL}")])
        try:
            found = self._library.encode_batch_fast(readable, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            allowed = f"it cannot encode the corpus ({error}); {_KNOWS_ALL}"
            raise ConfigError([Fault("data.tokenizer", self.name, allowed)]) from None
        ids, tail = list[int](), [] if self.end_token is None else [self.end_token]
        head = self.start_tokens if any(begun) else []
        for encoding, end, begin in zip(found, ended, begun or [False] * len(texts), strict=True):
            ids += head if begin else []
            ids += encoding.ids
            ids += tail if end else []
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Cut a text of more than a megabyte where the tokenizer itself begins a new word, if it does."""
        text, searched, is_long = b"", 0, False
        for chunk in chunks:
            text += chunk
            is_long = is_long or len(text) > _WHOLE
            while is_long and len(text) > max(_PIECE, searched) + SEEN:
                cut = self._cuts.within(text, max(_PIECE, searched))
                if not cut:
                    searched = len(text) - SEEN
                    break
                yield text[:cut]
                text, searched = text[cut:], 0
        yield text

    def decode(self, tokens: IntArray) -> str:
        """Return readable text, with special tokens by their names."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=False)

    def encode_named(self, text: bytes) -> TokenArray:
        """Return the ids of a UTF-8 text in which the names of special tokens stand for them."""
        self._library.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._library.encode_special_tokens = True

    @property
    def start_tokens(self) -> list[int]:
        """The ids that its post-processor puts before a text."""
        probe = self._library.encode("a", add_special_tokens=False).ids
        whole = self._library.encode("a", add_special_tokens=True).ids
        return whole[: next((n for n in range(len(whole)) if whole[n : n + len(probe)] == probe), 0)]

    def token_bytes(self) -> IntArray | None:
        """Return the bytes of each id of a byte-level vocabulary, in which a letter is a byte; None for others."""
        decoder: Any = json.loads(self._library.to_str())["decoder"]
        if not decoder or decoder["type"] != "ByteLevel":
            return None
        sizes, added = np.zeros(self.vocab_size, dtype=np.int64), self._library.get_added_tokens_decoder()
        for name, token in self._library.get_vocab(with_added_tokens=True).items():
            sizes[token] = len(name.encode()) if token in added else len(name)
        sizes[list(self.special_tokens)] = 0
        return sizes

    def name_of(self, token: int | None) -> str | None:
        """Return what a token is called in the vocabulary."""
        return None if token is None else self._library.id_to_token(token)

    def token_named(self, name: str) -> int | None:
        """Return the id of a token."""
        return self._library.token_to_id(name)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def load_tokenizer(name: str, end_token: str = "") -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names.

    Args:
        name: 'byte' or the path of a tokenizer.json.
        end_token: the name of the token that ends documents; empty takes what the files beside the tokenizer.json
            say, else a known name.

    Raises:
        ConfigError: a file is missing or damaged, or has no such token.
    """
    if name == "byte":
        if end_token not in ("", "[END]"):
            raise ConfigError([Fault("data.end_token", repr(end_token), "the byte tokenizer has [END]; leave it out")])
        return ByteTokenizer()
    beside = end = ""
    try:
        if what := not_a_file(name):
            raise OSError(errno.EINVAL, f"it is {what}")
        description = _read(Path(name))
        beside, end = ("", end_token) if end_token else _end_token_beside(Path(name))
        return _parsed(description, end)
    except OSError as error:
        problem = f"it cannot be read ({error.strerror}, seen from {Path.cwd()})"
    except _NoSuchTokenError:
        if end_token:
            allowed = f"data.tokenizer = {shortened(name)} has no such token; name one that it has"
            raise ConfigError([Fault("data.end_token", repr(end_token), allowed)]) from None
        allowed = f"it has no token {shortened(end)}, which {beside} names as eos_token; set data.end_token"
        raise ConfigError([Fault("data.tokenizer", repr(name), allowed)]) from None
    except ValueError as error:
        allowed = f"it is not a tokenizer.json ({error}); give one that the library tokenizers saved, or use 'byte'"
        raise ConfigError([Fault("data.tokenizer", repr(name), allowed)]) from None
    raise ConfigError([Fault("data.tokenizer", repr(name), f"{problem}; give a tokenizer.json, or use 'byte'")])


def _read(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MOST_BYTES:,} bytes")
    return path.read_bytes().decode("utf-8")


def _end_token_beside(path: Path) -> tuple[str, str]:
    """Return a file beside a tokenizer.json that names an end token, as transformers writes it, and the name.

    Both are empty if there is none. Raises OSError if such a file cannot be read.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = path.with_name(name)
        if path.name != "tokenizer.json" or not beside.is_file():
            continue
        with contextlib.suppress(ValueError, RecursionError):  # not JSON: of someone else
            found: Any = json.loads(_read(beside))
            token = found.get("eos_token") if isinstance(found, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                return name, token
    return "", ""


def _first(ids: dict[str, int], *names: str) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


@functools.lru_cache(maxsize=4)
def _parsed(description: str, end_token: str) -> FileTokenizer:
    """Parse a tokenizer once; cached by the text of the file, so that a changed file is parsed again."""
    return FileTokenizer(description, end_token)


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
