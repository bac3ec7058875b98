"""Recompute the checksums of a folder from its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np

MANIFEST = "manifest.json"
_BLOCK_BYTES = 8 * 2**20
_ALGORITHMS = {"crc32c": google_crc32c.Checksum, "sha256": hashlib.sha256}


def checksum_file(path: Path, algorithm: str = "crc32c") -> str:
    """Checksum of a file's bytes, as `<algorithm>:<hex>`.

    Args:
        path: The file, read once in blocks of 8 MiB.
        algorithm: `crc32c` (detects damage) or `sha256` (detects intent as well).

    Raises:
        ValueError: The algorithm is neither.
    """
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"checksum algorithm must be one of {sorted(_ALGORITHMS)}, got {algorithm!r}")
    state = _ALGORITHMS[algorithm]()
    # An ndarray: google_crc32c refuses a memoryview of a writable buffer.
    block = np.empty(_BLOCK_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            state.update(block[:n])
    digest = state.hexdigest()
    return f"{algorithm}:{digest.decode() if isinstance(digest, bytes) else digest}"


def verify_files(folder: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Compare every byte of a folder with its sealed list.

    Args:
        folder: The artifact.
        files: Posix path relative to `folder` -> (size in bytes, `<algorithm>:<hex>`).

    Returns:
        One line per file that is missing, of another size, of other content, or not in the list (but for
        the manifest, which cannot list itself). Empty when all is well.
    """
    problems = (_problem(folder / name, *expected) for name, expected in sorted(files.items()))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    extra = sorted(present - files.keys() - {MANIFEST})
    return [line for line in problems if line] + [
        f"{folder / name}: not in the sealed list" for name in extra
    ]


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
