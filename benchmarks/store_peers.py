"""The same rows in other formats, each written and read in the way its documentation shows.

All hold the same bits: `[rows, T, D]` of bfloat16, as two-byte integers in formats without bfloat16.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.activations.format import GroupSpec
from storage.activations.reader import empty_aligned

Rows = np.ndarray
ReadBatch = Callable[[np.ndarray], object]

SEQ_LEN, D_MODEL, BATCH = 256, 512, 32
ROW_BYTES = SEQ_LEN * D_MODEL * 2


def blocks(n_rows: int) -> Iterator[Rows]:
    """Yield random rows, one shard at a time: uint16 `[n, T, D]`. Every call yields the same."""
    generator = np.random.default_rng(0)
    for first in range(0, n_rows, 255):
        n = min(255, n_rows - first)
        values = generator.integers(0, 2**63, n * ROW_BYTES // 8, dtype=np.int64)
        yield values.view(np.uint16).reshape(n, SEQ_LEN, D_MODEL) & 0x7F7F  # no NaN: they are compared with ==


def flush(path: Path) -> None:
    """Flush what was written to the disk."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def evict(path: Path) -> None:
    """Evict a file, or all files below a folder, from the page cache, so that the next read is cold."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---------------------------------------------------------------- writing: to the disk, flushed


def write_raw(folder: Path, data: list[Rows]) -> None:
    """Whole shards as plain files: the limit of the disk."""
    folder.mkdir()
    for number, rows in enumerate(data):
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT)
        view = memoryview(rows).cast("B")
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)


def write_memmap(folder: Path, data: list[Rows]) -> None:
    folder.mkdir()
    shape = (sum(map(len, data)), SEQ_LEN, D_MODEL)
    target = np.memmap(folder / "rows", np.uint16, "w+", shape=shape)
    _copy_blocks(data, target)
    target.flush()
    flush(folder)


def write_ours(folder: Path, data: list[Rows]) -> dict[str, tuple[int, str]]:
    """With checksums, records and flushes; the next shard is encoded while one is written, as in a stage."""
    from storage.activations.fill import StoreRows, fill_store, write_shards

    n_rows = sum(map(len, data))
    nothing = np.empty(0, np.int64)
    rows = StoreRows(np.arange(n_rows), np.zeros(n_rows, np.int64), nothing, SEQ_LEN, D_MODEL, "bfloat16", {})

    class Source:
        def rows(self, sequence_ids: np.ndarray, view: int) -> torch.Tensor:
            block, first = divmod(int(sequence_ids[0]), len(data[0]))
            part = data[block][first : first + len(sequence_ids)]
            if len(part) < len(sequence_ids):
                part = np.concatenate([part, data[block + 1][: len(sequence_ids) - len(part)]])
            return torch.from_numpy(part).view(torch.bfloat16)

    write = functools.partial(write_shards, rows, Source())
    return fill_store(write, folder, rows, lambda done, total: None, lambda: False)[1]


def write_zarr(folder: Path, data: list[Rows], shard_rows: int = 255) -> None:
    """zarr-python with the same codecs."""
    import zarr

    from storage.activations.metadata import codec_chain

    n_rows = sum(map(len, data))
    spec = GroupSpec(n_rows, SEQ_LEN, D_MODEL, "bfloat16")
    array = zarr.create_array(
        folder,
        shape=(n_rows, SEQ_LEN, D_MODEL),
        dtype="bfloat16",
        chunks=(shard_rows, SEQ_LEN, D_MODEL),
        serializer=codec_chain(spec),
        filters=None,
        compressors=None,
    )
    _copy_blocks([torch.from_numpy(rows).view(torch.bfloat16) for rows in data], array, as_bfloat16)
    flush(folder)


def as_bfloat16(rows: torch.Tensor) -> np.ndarray:
    import ml_dtypes

    return rows.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def write_tensorstore(folder: Path, data: list[Rows], shard_rows: int = 255) -> None:
    import ml_dtypes
    import tensorstore

    inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "create": True,
        "metadata": {
            "shape": [sum(map(len, data)), SEQ_LEN, D_MODEL],
            "data_type": "bfloat16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, SEQ_LEN, D_MODEL]}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": [1, SEQ_LEN, D_MODEL], "codecs": inner, "index_codecs": inner},
                }
            ],
        },
    }
    array = tensorstore.open(spec).result()
    first = 0
    for rows in data:
        array[first : first + len(rows)].write(rows.view(ml_dtypes.bfloat16)).result()
        first += len(rows)
    flush(folder)


def write_h5py(folder: Path, data: list[Rows]) -> None:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "rows.h5", "w") as file:
        shape = (sum(map(len, data)), SEQ_LEN, D_MODEL)
        array = file.create_dataset("x", shape, np.uint16, chunks=(1, SEQ_LEN, D_MODEL), fletcher32=True)
        _copy_blocks(data, array)
    flush(folder)


def write_safetensors(folder: Path, data: list[Rows]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"x": torch.from_numpy(np.concatenate(data)).view(torch.bfloat16)}, folder / "rows.safetensors")
    flush(folder)


def write_datasets(folder: Path, data: list[Rows]) -> None:
    """Rows as a column of two-dimensional arrays, as in the documentation."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"x": datasets.Array2D((SEQ_LEN, D_MODEL), "uint16")})
    parts = [datasets.Dataset.from_dict({"x": rows}, features=features) for rows in data]
    datasets.concatenate_datasets(parts).save_to_disk(folder)
    flush(folder)


def write_flat_datasets(folder: Path, data: list[Rows]) -> None:
    """Rows as flat lists of a fixed size: undocumented, but Arrow reads it without a copy."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    tables = []
    for rows in data:
        flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), SEQ_LEN * D_MODEL)
        tables.append(pyarrow.table({"x": flat}))
    datasets.Dataset(pyarrow.concat_tables(tables)).save_to_disk(folder)
    flush(folder)


def _copy_blocks(data: list[Any], target: Any, convert: Callable[[Any], np.ndarray] = lambda rows: rows) -> None:
    first = 0
    for rows in data:
        target[first : first + len(rows)] = convert(rows)
        first += len(rows)


WRITERS: dict[str, Callable[[Path, list[Rows]], object]] = {
    "memmap": write_memmap,
    "tensorstore": write_tensorstore,
    "zarr-python": write_zarr,
    "h5py": write_h5py,
    "safetensors": write_safetensors,
    "HF datasets": write_datasets,
    "HF datasets, flat": write_flat_datasets,
}


# ---------------------------------------------------------------- reading a batch by row numbers


def read_memmap(folder: Path) -> tuple[ReadBatch, ReadBatch]:
    """Plain `np.take`, and into a reused page-aligned buffer: the limit."""
    rows = np.memmap(folder / "rows", np.uint16, "r").reshape(-1, SEQ_LEN, D_MODEL)
    out = empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16).view(torch.uint16).numpy()
    return lambda ix: np.take(rows, ix, axis=0), lambda ix: np.take(rows, ix, axis=0, out=out, mode="clip")


def read_tensorstore(folder: Path) -> ReadBatch:
    import tensorstore

    context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    array = tensorstore.open(spec, context=context).result()
    return lambda ix: array[ix].read().result()


def read_zarr(folder: Path) -> ReadBatch:
    import zarr

    array = zarr.open_array(folder, mode="r")
    return lambda ix: array.oindex[ix]


def read_h5py(folder: Path) -> ReadBatch:
    import h5py

    array = h5py.File(folder / "rows.h5", "r")["x"]
    out = empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16).view(torch.uint16).numpy()

    def read(ix: np.ndarray) -> np.ndarray:  # row by row: a list of indices must be sorted, and is slower
        for place, row in enumerate(ix.tolist()):
            array.read_direct(out, np.s_[row], np.s_[place])
        return out

    return read


def read_safetensors(folder: Path) -> ReadBatch:
    from safetensors import safe_open

    rows = safe_open(folder / "rows.safetensors", framework="pt").get_slice("x")
    out = empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16)

    def read(ix: np.ndarray) -> torch.Tensor:
        for place, row in enumerate(ix.tolist()):
            out[place] = rows[row]
        return out

    return read


def read_datasets(folder: Path) -> ReadBatch:
    import datasets

    rows = datasets.load_from_disk(folder).with_format("numpy", dtype=np.uint16)
    return lambda ix: rows[ix]["x"]


READERS: dict[str, Callable[[Path], ReadBatch]] = {
    "tensorstore": read_tensorstore,
    "zarr-python": read_zarr,
    "h5py": read_h5py,
    "safetensors": read_safetensors,
    "HF datasets": read_datasets,
    "HF datasets, flat": read_datasets,
}
