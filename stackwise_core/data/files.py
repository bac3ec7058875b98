"""The files that a source names, their kinds by their endings, and how they are opened. Needs no torch."""

from __future__ import annotations

import bz2
import functools
import glob
import gzip
import io
import lzma
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from stackwise_core.errors import CorpusError, shortened

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".bin", ".npy"), "token"),
}
"""The kind of a file by its ending; others are text, or refused."""
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_STANDING = "or name it .txt to train on it as it stands"
_REFUSED = {
    **dict.fromkeys((".csv", ".tsv"), f"write its texts as the field 'text' of jsonl or parquet, {_STANDING}"),
    **dict.fromkeys(
        (".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".db", ".sqlite", ".msgpack", ".tfrecord"),
        "write its texts as the field 'text' of jsonl or parquet",
    ),
    **dict.fromkeys(
        (".npz", ".pt", ".pth", ".pkl", ".pickle", ".safetensors", ".h5", ".hdf5", ".idx"),
        "write its tokens with numpy.save, as uint16 or uint32, into a .npy",
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, and name the files in it"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub"), "write its text into a .txt, jsonl or parquet file"),
}
"""What to do instead of training on the raw bytes of a structured file, by its ending."""

READ_ERRORS = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError)
"""What reading an opened file may raise."""


def paths_of(source: str) -> list[Path]:
    """Return the files that a source names, each once however often links or patterns reach it.

    Raises CorpusError if there is none, or if it names something that is no stored file.
    """
    if source == "stdlib":
        return _standard_library()
    try:
        if what := not_a_file(source):
            raise CorpusError(f"data.source: got {shortened(source)}; it is {what}, give a stored file")
        if Path(source).is_file():
            return [Path(source)]
        files = _distinct(path for path in sorted(_matches(source)) if path.is_file())
    except (OSError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"data.source: got {shortened(source)}; it cannot be looked up ({_reason(error)})") from None
    if not files:
        what = "it is a folder; add /**/*.txt" if Path(source).is_dir() else "no file matches"
        if "[" in source:
            what += "; brackets are a pattern, write [[] for the character ["
        raise CorpusError(f"data.source: got {shortened(source)}; {what} (seen from {Path.cwd()})")
    return files


def not_a_file(name: str) -> str:
    """Return what a path is if reading it could block or never end, such as 'a device'; '' otherwise."""
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return ""  # whoever opens it says why
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if stat.S_ISREG(mode) and os.path.realpath(name).startswith(("/proc/", "/sys/")):
        return "a file that the system makes while it is read"
    return kinds.get(stat.S_IFMT(mode), "")


def _distinct(paths: Iterator[Path]) -> list[Path]:
    """Return the paths without those of a file that an earlier one reaches: by a link, or a hard link."""
    found: dict[object, Path] = {}
    for path in paths:
        facts = path.stat()
        # Some network drives number no files.
        key = (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)
        found.setdefault(key, path)
    return list(found.values())


def _matches(pattern: str) -> set[Path]:
    """Return what a glob matches; a name that exists as it stands is that name, and links that lead back end."""
    path = Path(pattern)
    parts = path.relative_to(path.anchor).parts
    found = [Path(path.anchor)]
    for n, part in enumerate(parts, 1):
        step = functools.partial(_below, files=n == len(parts)) if part == "**" else functools.partial(_named, part)
        found = list(dict.fromkeys(match for folder in found for match in step(folder)))
    return set(found)


def _named(part: str, folder: Path) -> list[Path]:
    if os.path.lexists(folder / part):
        return [folder / part]
    return [folder / name for name in glob.glob(part, root_dir=folder)] if glob.has_magic(part) else []


def _below(folder: Path, files: bool) -> Iterator[Path]:
    """Yield a folder and all folders below it that are not hidden, each real one once, and with `files` their files."""
    seen, still = set[str](), [folder]
    while still:
        here = still.pop()
        real = os.path.realpath(here)
        if real in seen or not here.is_dir():
            continue
        seen.add(real)
        yield here
        inside = [here / name for name in sorted(glob.glob("*", root_dir=here), reverse=True)]
        still += [path for path in inside if path.is_dir()]
        yield from (path for path in inside if files and not path.is_dir())


def _standard_library() -> list[Path]:
    """Return the source files of the running Python's library, without its tests: some of them are not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    paths = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    if not paths:
        raise CorpusError(f"data.source: got 'stdlib'; {root} holds no sources, give data.source a text file")
    return sorted(paths)


def ending(path: Path) -> str:
    """Return the ending that tells the kind of a file, in small letters, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower()


def is_packed(path: Path) -> bool:
    """Return whether the ending of a file says that it is compressed."""
    return path.suffix.lower() in _PACKED


def holds_tokens(source: str) -> bool:
    """Return whether a source is named as files of tokens."""
    return KINDS.get(ending(Path(source))) == "token"


def common_kind(source: str, paths: list[Path]) -> str:
    """Return the kind of all files: text, jsonl, parquet or token; raises CorpusError if they differ or are refused."""
    for path in paths:
        if remedy := _REFUSED.get(ending(path)):
            raise CorpusError(f"data.source: {path} is not read as {ending(path)}; {remedy}")
    first = {KINDS.get(ending(path), "text"): path for path in reversed(paths)}
    if len(first) > 1:
        found = " and ".join(f"{kind} files ({path})" for kind, path in sorted(first.items()))
        raise CorpusError(
            f"data.source: got {shortened(source)}; it names {found}; name files of one kind, as by *.txt"
        )
    kind = next(iter(first))
    for path in paths:
        if kind in ("parquet", "token") and is_packed(path):
            raise CorpusError(f"data.source: {path} is compressed, and {kind} files are read in place; unpack it")
    return kind


def opened(path: Path) -> BinaryIO:
    """Open a file, decompressed if its ending says that it is compressed; reading it may raise READ_ERRORS."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return _opened_zst(path)
    readers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, readers.get(suffix, open)(path, "rb"))


def _opened_zst(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise CorpusError(f"data.source: {path} needs pyarrow to be read: pip install 'stackwise[parquet]'") from None
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def unreadable(path: Path, error: BaseException) -> CorpusError:
    """Return the error of a file whose reading raised another one."""
    return CorpusError(f"data.source: {path} cannot be read ({_reason(error)})")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
