"""Safetensors files written tensor by tensor, so that a model of any size is written with the memory of one tensor.

The library `safetensors` writes a dictionary that is whole in memory. The format is eight bytes for the length of a
JSON header, the header, and the bytes of the tensors (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from stackwise_core.files import write_file
from stackwise_core.strict import MOST_OF_A_LIST, parse_object, read_bounded

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_OF_A_FILE = 5 * 10**9
"""Bytes of one file, as on Hugging Face."""
_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
"""In the order of the library, which writes the last first."""
_ALIGNED = 8
_SYNCED_AT_ONCE = 2**25


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]


def write_tensors(
    folder: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> dict[str, str]:
    """Write tensors in one type, as one file or as several with an index; return the sha256 of each file.

    `tensors` yields them in the order of `entries`, each once: it is asked for the next when one is written.

    Raises:
        OSError: a file cannot be written; the error names it.
    """
    files, waiting, hashes = _by_file(entries, dtype), iter(tensors), dict[str, str]()
    for name, members in files.items():
        hashes[name] = _write_file(folder / name, _contents(members, waiting, dtype))
    if len(files) > 1:
        total = sum(_n_bytes(entry, dtype) for entry in entries)
        where = {entry.name: name for name, members in files.items() for entry in members}
        data = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()
        write_file(folder / INDEX, data)
        hashes[INDEX] = hashlib.sha256(data).hexdigest()
    return hashes


def total_bytes(entries: Iterable[Entry], dtype: torch.dtype) -> int:
    """Return the bytes of all tensors in a type."""
    return sum(_n_bytes(entry, dtype) for entry in entries)


def _by_file(entries: Sequence[Entry], dtype: torch.dtype) -> Mapping[str, list[Entry]]:
    files: list[list[Entry]] = [[]]
    room = MOST_OF_A_FILE
    for entry in entries:
        if files[-1] and _n_bytes(entry, dtype) > room:
            files.append([])
            room = MOST_OF_A_FILE
        files[-1].append(entry)
        room -= _n_bytes(entry, dtype)
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{n:05}-of-{len(files):05}.safetensors": members for n, members in enumerate(files, 1)}


def _n_bytes(entry: Entry, dtype: torch.dtype) -> int:
    return math.prod(entry.shape) * dtype.itemsize


def write_named(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of any types as the bytes that the library would make of them; return the sha256.

    Tensors that are views of a mapped file go from there to the other, without a copy in memory.
    """
    return _write_file(path, _library_contents(tensors))


def _write_file(path: Path, contents: Iterable[bytes | memoryview]) -> str:
    """Write the parts of a file to the disk; return the sha256."""
    digest, unsynced = hashlib.sha256(), 0
    try:
        # Others hash what this thread writes, and bring it to the disk; one part waits at most.
        with path.open("wb") as file, ThreadPoolExecutor(2) as others:
            hashed: Future[None] | None = None
            synced: Future[None] | None = None
            for data in contents:
                if hashed:
                    hashed.result()
                hashed = others.submit(digest.update, data)
                file.write(data)
                unsynced += len(data)
                if unsynced >= _SYNCED_AT_ONCE and (synced is None or synced.done()):
                    synced, unsynced = others.submit(os.fsync, file.fileno()), 0
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def _contents(
    entries: list[Entry], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Generator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + _n_bytes(entry, dtype)
        header[entry.name] = {"dtype": _CODES[dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    yield _header(json.dumps(header))
    for entry, (name, tensor) in zip(entries, tensors, strict=False):  # the rest of the tensors is for other files
        assert (name, tuple(tensor.shape)) == entry
        yield _bytes_of(tensor.detach().cpu().to(dtype))


def _library_contents(tensors: Mapping[str, Tensor]) -> Generator[bytes | memoryview]:
    """Yield a file with the widest types first and names in their order, as the library does."""
    order = sorted(tensors, key=lambda name: (-list(_CODES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        sizes = {"shape": tuple(tensors[name].shape), "data_offsets": (begin, end)}
        header[name] = {"dtype": _CODES[tensors[name].dtype], **sizes}
    yield _header(json.dumps(header, separators=(",", ":")))
    for name in order:
        yield _bytes_of(tensors[name].detach())


def _header(text: str) -> bytes:
    data = text.encode()
    data += b" " * (-len(data) % _ALIGNED)
    return len(data).to_bytes(8, "little") + data


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class TensorFiles:
    """The tensors of a folder, in one file or several, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read which file holds which."""
        self._folder, self._open = folder, dict[str, Any]()
        index = folder / INDEX
        self._where = parse_object(read_bounded(index, MOST_OF_A_LIST))["weight_map"] if index.exists() else {}

    def read(self, name: str) -> Tensor:
        """Return a tensor in the type in which it is there."""
        file = self._where.get(name, SINGLE)
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, "pt")
        return self._open[file].get_tensor(name)
