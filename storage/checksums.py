"""Recompute the checksums of a folder from its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from storage.manifest import MANIFEST

Files = Mapping[str, tuple[int, str]]
"""POSIX path relative to a folder -> (size in bytes, '<algorithm>:<hex>')."""
# Not crc32c: a crc32c over data followed by its own crc32c is one constant, whatever the data, so every
# shard of a shape would have the same checksum, and so would two stores with different numbers.
CHECKSUM = "sha256"
NOT_LISTED = "not in the sealed list"
"""What `verify_files` says of a file that is not in the list."""
_BLOCK_BYTES = 8 * 2**20
_ALGORITHMS: dict[str, Callable[[], Any]] = {"crc32c": google_crc32c.Checksum, "sha256": hashlib.sha256}


def checksum_bytes(data: np.ndarray, algorithm: str = CHECKSUM) -> str:
    """Checksum of contiguous uint8 `[size]`, as `checksum_file` would give of a file of these bytes."""
    state = _start(algorithm)
    state.update(data)
    return _spell(algorithm, state)


def checksum_file(path: Path, algorithm: str = CHECKSUM) -> str:
    """Checksum of a file's bytes, as `<algorithm>:<hex>`.

    Args:
        path: The file, read once in blocks of 8 MiB.
        algorithm: `sha256`, or `crc32c`, which tells nothing of files that hold crc32c of their own.

    Raises:
        ValueError: The algorithm is neither.
    """
    state = _start(algorithm)
    # An ndarray: google_crc32c refuses a memoryview of a writable buffer.
    block = np.empty(_BLOCK_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block.data):
            state.update(block[:n])
    return _spell(algorithm, state)


def verify_files(folder: Path, files: Files) -> list[str]:
    """Compare every byte of a folder with its sealed list.

    Args:
        folder: The artifact.
        files: What was sealed.

    Returns:
        One line per file that is missing, of another size, of other content, or not in the list (but for
        the manifest, which cannot list itself). Empty when all is well.
    """
    problems = (_problem(folder / name, *expected) for name, expected in sorted(files.items()))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    extra = sorted(present - files.keys() - {MANIFEST})
    return [line for line in problems if line] + [f"{folder / name}: {NOT_LISTED}" for name in extra]


def _start(algorithm: str) -> Any:
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"checksum algorithm must be one of {sorted(_ALGORITHMS)}, got {algorithm!r}")
    return _ALGORITHMS[algorithm]()


def _spell(algorithm: str, state: Any) -> str:
    return f"{algorithm}:{state.digest().hex()}"


def _problem(path: Path, size: int, checksum: str) -> str:
    """Say what is wrong with one file, or nothing."""
    algorithm = checksum.partition(":")[0]
    if not path.is_file():
        return f"{path}: missing"
    if (found := path.stat().st_size) != size:
        return f"{path}: {found} bytes, sealed with {size}"
    if algorithm not in _ALGORITHMS:
        return f"{path}: sealed with {checksum!r}, an unknown kind of checksum"
    if (now := checksum_file(path, algorithm)) != checksum:
        return f"{path}: checksum {now}, sealed with {checksum}"
    return ""
