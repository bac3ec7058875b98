"""Files of token ids: uint16 or uint32, bare as nanoGPT writes them, or after the header of llm.c. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stackwise_core.errors import CorpusError

TokenType = Literal["auto", "uint16", "uint32"]
_Integers = NDArray[np.uint16] | NDArray[np.uint32]
_WIDTHS = {"uint16": 2, "uint32": 4}
_HEADER_INTS = 256
_HEADER_BYTES = 4 * _HEADER_INTS
_HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Version and token type by the first integer of a header: GPT-2's tokens, also of modded-nanogpt, and Llama-3's."""
_CHUNK = 1 << 20
_HIGHEST_HALF = 3
"""Upper half of the largest id of the largest vocabularies in use, 262,144."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The tokens of a file, memory-mapped."""

    content: memoryview | bytes
    width: int
    """Bytes of a token, little-endian."""
    start: int
    """Bytes of the file before the first token."""
    digest: str
    """Hash of type and tokens: a header does not change it."""


def read_tokens(path: Path, token_type: str = "auto") -> TokenFile:
    """Map the tokens of a file.

    Args:
        path: of a .bin.
        token_type: 'uint16' or 'uint32'; 'auto' is what a header says, else uint16.

    Raises:
        CorpusError: the file cannot be read, its size or header is wrong, or it looks like another type.
    """
    try:
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, mode="r").data if size else b""
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    found, start = _header(path, content)
    if found and token_type not in ("auto", found):
        raise CorpusError(f"data.source: {path} has a header of {found} tokens; set data.token_type: auto")
    kind = found or ("uint16" if token_type == "auto" else token_type)
    width, content = _WIDTHS[kind], content[start:]
    if len(content) % width:
        what = f"{size:,} bytes, no multiple of {width}" if width > 2 else f"{size:,} bytes, an odd number"
        raise CorpusError(f"data.source: {path} has {what}; a .bin holds {kind} tokens of {width} bytes each")
    if not found and (token_type == "auto" or width > 2) and _is_wider(np.frombuffer(content, f"<u{width}")):
        remedy = "set data.token_type: uint32 (or uint16, if it is right)" if width == 2 else "write them as uint32"
        what = f"looks like integers of {16 * width} bits: read as {kind}, every second value is 0, or nearly"
        raise CorpusError(f"data.source: {path} {what}; {remedy}")
    # The prefix tells the digest from that of a text of the same bytes.
    digest = hashlib.sha256(f"{kind} tokens\0".encode())
    digest.update(content)
    return TokenFile(content, width, start, digest.hexdigest())


def _header(path: Path, content: memoryview | bytes) -> tuple[str, int]:
    """Return the token type that a header names and the length of the header [bytes]; ("", 0) if there is none."""
    if len(content) < _HEADER_BYTES:
        return "", 0
    integers = np.frombuffer(content[:_HEADER_BYTES], "<i4")
    magic, version, n_tokens = (int(value) for value in integers[:3])
    # llm.c numbers its formats by date, and leaves the rest of a header zero.
    if not 20230101 <= magic <= 20391231 or integers[8:].any():
        return "", 0
    if magic not in _HEADERS or version != _HEADERS[magic][0]:
        known = " or ".join(f"{known} (version {of[0]}, {of[1]} tokens)" for known, of in _HEADERS.items())
        problem = f"begins with the header {magic}, version {version}, which is not known"
        raise CorpusError(f"data.source: {path} {problem}; give one of {known}, or tokens without a header")
    kind = _HEADERS[magic][1]
    there = (len(content) - _HEADER_BYTES) / _WIDTHS[kind]
    if there != n_tokens:
        problem = f"has a header that promises {n_tokens:,} {kind} tokens, and holds {there:,.10g}"
        raise CorpusError(f"data.source: {path} {problem}; it was cut off or damaged, write it again")
    return kind, _HEADER_BYTES


def _is_wider(values: _Integers) -> bool:
    """Return whether pairs of values look like single integers of twice the width, little-endian.

    Then every second value is the upper half of an id: mostly 0 and never above 3, which the others often are.
    """
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2)
    n_zeros, is_higher = 0, False
    for at in range(0, len(pairs), _CHUNK):
        lower, upper = pairs[at : at + _CHUNK].T
        if upper.max() > _HIGHEST_HALF:
            return False
        n_zeros += int((upper == 0).sum())
        is_higher = is_higher or bool((lower > _HIGHEST_HALF).any())
    return is_higher and 2 * n_zeros >= len(pairs)
