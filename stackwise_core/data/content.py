"""The bytes of documents: in memory, at their place in a file, or made anew whenever they are read. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stackwise_core.errors import CorpusError

CHUNK = 1 << 20
"""Bytes that are read at a time."""


OnRead = Callable[[int], None]
"""Is told how many bytes were read since it was told last."""


def nobody(n_bytes: int) -> None:
    """Tell nobody."""


class Stamp(NamedTuple):
    """What changes whenever a file is written; git's index knows files by the same facts."""

    size: int
    mtime_ns: int
    device: int
    inode: int


def stamp_of(file: int | Path) -> Stamp:
    """Return the stamp of an open file or of a path; raises OSError."""
    found = os.stat(file)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def changed(name: Path | str) -> CorpusError:
    """Return the error of a file that is not what it was when its reading began."""
    remedy = "run the same command again when nothing writes to it any more"
    return CorpusError(f"data.source: {name} changed while it was being read; {remedy}")


@contextlib.contextmanager
def unchanged(path: Path) -> Generator[Stamp]:
    """Yield the stamp of a file, and raise CorpusError if it has another one when the block ends."""
    try:
        before = stamp_of(path)
        yield before
        after = stamp_of(path)
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    if before != after:
        raise changed(path)


@dataclass(frozen=True, slots=True)
class FileContent:
    """A range of a file that stays where it is; reading it raises CorpusError once the file has changed."""

    path: Path
    start: int
    size: int
    stamp: Stamp

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.size

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, a chunk at a time."""
        with unchanged(self.path) as stamp, self.path.open("rb", buffering=0) as file:
            if stamp != self.stamp:
                raise changed(self.path)
            for at in range(start, stop, CHUNK):
                wanted = min(CHUNK, stop - at)
                chunk = os.pread(file.fileno(), wanted, self.start + at)
                if len(chunk) < wanted:
                    raise changed(self.path)
                yield chunk


@dataclass(frozen=True, slots=True)
class SpooledContent:
    """A range of a file of our own that has no name, so that nobody else writes to it."""

    file: int
    start: int
    size: int

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.size

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, a chunk at a time."""
        for at in range(start, stop, CHUNK):
            yield os.pread(self.file, min(CHUNK, stop - at), self.start + at)


@dataclass(frozen=True, slots=True)
class MadeContent:
    """Bytes that are made anew at each reading, in order: what a compressed file or a table holds."""

    make: Callable[[], Iterator[bytes]]
    size: int

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.size


Content = bytes | FileContent | SpooledContent | MadeContent


def chunks_of(content: Content, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a content from `start` to `stop`, or all of them, in pieces of at most about a megabyte."""
    stop = len(content) if stop is None else stop
    if isinstance(content, bytes):
        for at in range(start, stop, CHUNK):
            yield content[at : min(at + CHUNK, stop)]
    elif isinstance(content, MadeContent):
        at = 0
        for piece in content.make():
            if at < stop and at + len(piece) > start:
                yield piece[max(0, start - at) : stop - at]
            at += len(piece)
    else:
        yield from content.chunks(start, stop)
