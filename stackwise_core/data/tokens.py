"""Files of token ids: uint16 or uint32, bare as nanoGPT writes them, after the header of llm.c, or numpy's .npy.

Needs no torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stackwise_core.data.content import Content, FileContent, MadeContent, OnRead, Stamp, chunks_of, nobody, unchanged
from stackwise_core.data.files import ending
from stackwise_core.errors import CorpusError

TokenType = Literal["auto", "uint16", "uint32"]
_Integers = NDArray[np.uint16] | NDArray[np.uint32]
_WIDTHS = {"uint16": 2, "uint32": 4}
_HEADER_INTS = 256
_HEADER_BYTES = 4 * _HEADER_INTS
_HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Version and token type by the first integer of a header: GPT-2's tokens, also of modded-nanogpt, and Llama-3's."""
_ARRAY_TYPES = ("<u2", "<u4", "<i8")
_MOST_OF_A_HEADER = 10_000
"""Characters that numpy parses of the header of an array."""
_HIGHEST_HALF = 3
"""Upper half of the largest id of the largest vocabularies in use, 262,144."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The tokens of a file, which stay there."""

    content: Content
    width: int
    """Bytes of a token, little-endian."""
    start: int
    """Bytes of the file before the first token."""
    digest: str
    """Hash of type and tokens: a header does not change it, and int64 tokens have that of uint32."""
    stored_width: int
    """Bytes of a token in the file."""


def read_tokens(path: Path, token_type: str = "auto", on_read: OnRead = nobody) -> TokenFile:
    """Read the tokens of a file once, to see that it holds some and to hash them.

    Args:
        path: of a .bin or .npy.
        token_type: 'uint16' or 'uint32' of a .bin; 'auto' is what a header says, else uint16.
        on_read: is told of the bytes as they are hashed.

    Raises:
        CorpusError: the file cannot be read, its size or header is wrong, it looks like another type, or it changed
            meanwhile.
    """
    with unchanged(path) as stamp:
        if ending(path) == ".npy":
            content, stored_width, start = _array(path, stamp)
            kind, width = ("uint16", 2) if stored_width == 2 else ("uint32", 4)
            if stored_width > width:
                content = MadeContent(functools.partial(_narrowed, path, content), len(content) // 2)
        else:
            content, kind, start = _bare(path, stamp, token_type)
            width = stored_width = _WIDTHS[kind]
        # The prefix tells the digest from that of a text of the same bytes.
        digest = hashlib.sha256(f"{kind} tokens\0".encode())
        for chunk in chunks_of(content):
            digest.update(chunk)
            on_read(len(chunk))
    return TokenFile(content, width, start, digest.hexdigest(), stored_width)


def _array(path: Path, stamp: Stamp) -> tuple[FileContent, int, int]:
    """Return the content of an .npy, the bytes of a token and those of the header."""
    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file, max_header_size=_MOST_OF_A_HEADER)
        except (ValueError, EOFError) as error:
            reason = f"{(str(error).splitlines() or ['?'])[0]}; write it with numpy.save"
            raise CorpusError(f"data.source: {path} is no array of numpy: {reason}") from None
        start = file.tell()
    if dtype.str not in _ARRAY_TYPES or len(shape) != 1:
        what = f"an array of {dtype.name} and {len(shape)} dimensions"
        raise CorpusError(f"data.source: {path} holds {what}; give one of uint16, uint32 or int64 and 1 dimension")
    if stamp.size - start != shape[0] * dtype.itemsize:
        there = (stamp.size - start) / dtype.itemsize
        problem = f"has a header that promises {shape[0]:,} {dtype.name} tokens, and holds {there:,.10g}"
        raise CorpusError(f"data.source: {path} {problem}; it was cut off or damaged, write it again")
    return FileContent(path, start, stamp.size - start, stamp), dtype.itemsize, start


def _narrowed(path: Path, content: FileContent) -> Iterator[bytes]:
    """Yield int64 tokens as uint32."""
    first = 0
    for chunk in chunks_of(content):
        tokens = np.frombuffer(chunk, "<i8")
        wrong = (tokens < 0) | (tokens >= 2**32)
        if wrong.any():
            at = int(wrong.argmax())
            raise CorpusError(f"data.source: {path}: token {first + at:,} is {tokens[at]}, which no vocabulary has")
        first += len(tokens)
        yield tokens.astype("<u4").tobytes()


def _bare(path: Path, stamp: Stamp, token_type: str) -> tuple[FileContent, str, int]:
    """Return the content of a .bin, the type of its tokens and the bytes of the header."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    size = stamp.size
    found, start = _header(path, head, size)
    if found and token_type not in ("auto", found):
        raise CorpusError(f"data.source: {path} has a header of {found} tokens; set data.token_type: auto")
    kind = found or ("uint16" if token_type == "auto" else token_type)
    width, content = _WIDTHS[kind], FileContent(path, start, size - start, stamp)
    if len(content) % width:
        what = f"{size:,} bytes, no multiple of {width}" if width > 2 else f"{size:,} bytes, an odd number"
        raise CorpusError(f"data.source: {path} has {what}; a .bin holds {kind} tokens of {width} bytes each")
    if not found and (token_type == "auto" or width > 2) and _is_wider(content, width):
        remedy = "set data.token_type: uint32 (or uint16, if it is right)" if width == 2 else "write them as uint32"
        what = f"looks like integers of {16 * width} bits: read as {kind}, every second value is 0, or nearly"
        raise CorpusError(f"data.source: {path} {what}; {remedy}")
    return content, kind, start


def _header(path: Path, head: bytes, size: int) -> tuple[str, int]:
    """Return the token type that a header names and the length of the header [bytes]; ("", 0) if there is none."""
    if len(head) < _HEADER_BYTES:
        return "", 0
    integers = np.frombuffer(head, "<i4")
    magic, version, n_tokens = (int(value) for value in integers[:3])
    # llm.c numbers its formats by date, and leaves the rest of a header zero.
    if not 20230101 <= magic <= 20391231 or integers[8:].any():
        return "", 0
    if magic not in _HEADERS or version != _HEADERS[magic][0]:
        known = " or ".join(f"{known} (version {of[0]}, {of[1]} tokens)" for known, of in _HEADERS.items())
        problem = f"begins with the header {magic}, version {version}, which is not known"
        raise CorpusError(f"data.source: {path} {problem}; give one of {known}, or tokens without a header")
    kind = _HEADERS[magic][1]
    there = (size - _HEADER_BYTES) / _WIDTHS[kind]
    if there != n_tokens:
        problem = f"has a header that promises {n_tokens:,} {kind} tokens, and holds {there:,.10g}"
        raise CorpusError(f"data.source: {path} {problem}; it was cut off or damaged, write it again")
    return kind, _HEADER_BYTES


def _is_wider(content: Content, width: int) -> bool:
    """Return whether pairs of values look like single integers of twice the width, little-endian.

    Then every second value is the upper half of an id: mostly 0 and never above 3, which the others often are.
    """
    n_pairs, n_zeros, is_higher = 0, 0, False
    for chunk in chunks_of(content):
        values: _Integers = np.frombuffer(chunk, f"<u{width}")
        lower, upper = values[: len(values) // 2 * 2].reshape(-1, 2).T
        if not len(upper):
            continue
        if upper.max() > _HIGHEST_HALF:
            return False
        n_pairs += len(upper)
        n_zeros += int((upper == 0).sum())
        is_higher = is_higher or bool((lower > _HIGHEST_HALF).any())
    return is_higher and 2 * n_zeros >= n_pairs
