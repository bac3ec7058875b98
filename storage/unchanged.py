"""Whether files are as they were, without reading them: by path, size, times and inode, as git's index knows them.

A file that was written at about the time when it was read may have changed again within the same tick of the clock:
such files are settled only later.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from storage.files import Files, verify_files

_TICK_NS = 2 * 10**9
"""The longest tick of a file system's clock."""


class Look(NamedTuple):
    """How some files looked at a moment."""

    sha256: str
    """Of all that is known of them without reading them."""
    settled: bool
    """Whether none was written so shortly before that it may have changed since without looking otherwise."""


def look_at(paths: Iterable[Path]) -> Look:
    """Look at files; raises OSError if one is not there."""
    now, digest, newest = time.time_ns(), hashlib.sha256(), 0
    for path in paths:
        found = os.stat(path)
        facts = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
        digest.update(f"{os.path.abspath(path)}\0{facts}\0".encode(errors="surrogateescape"))
        newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
    return Look(digest.hexdigest(), newest < now - _TICK_NS)


_verified: dict[Path, tuple[str, Look]] = {}


def verify_once(folder: Path, files: Files, digest: str) -> list[str]:
    """Do as `verify_files`, for a list of some digest, unless this process has done so and the files are as then."""
    try:
        look = look_at(sorted(folder.rglob("*")))
    except OSError:
        return verify_files(folder, files)
    if _verified.get(folder) == (digest, look):
        return []
    problems = verify_files(folder, files)
    if look.settled and not problems:
        _verified[folder] = digest, look
    return problems
