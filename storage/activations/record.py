"""The record of a finished shard: its rows, its size, the hash of its bytes and the checksum of every chunk.

The chunks' own checksums say that a chunk is whole, the record's that it is this one: a shard, or a chunk, of
another place or of another attempt is whole too.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """What is on disk of one shard."""

    first_row: int
    n_rows: int
    size: int
    """[bytes]"""
    checksum: str
    """`sha256:<hex>` of the file."""
    chunks: np.ndarray
    """uint32 `[n_chunks]`: the crc32c of each; empty in a record of an early version, which did not say."""

    def dump(self) -> bytes:
        """Return it as a line of JSON; the chunks' checksums little-endian in base64."""
        chunks = base64.b64encode(self.chunks.astype("<u4").tobytes()).decode()
        rows = [self.first_row, self.n_rows]
        return json.dumps({"rows": rows, "size": self.size, "checksum": self.checksum, "crc32c": chunks}).encode()


def parse_record(data: bytes) -> Record:
    """Read what `dump` wrote.

    Raises:
        ValueError: it is no record.
    """
    try:
        found: dict[str, Any] = json.loads(data)
        first_row, n_rows = found["rows"]
        chunks = np.frombuffer(base64.b64decode(found.get("crc32c", ""), validate=True), "<u4")
        return Record(int(first_row), int(n_rows), int(found["size"]), str(found["checksum"]), chunks)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is no record of a shard ({error!r})") from None
