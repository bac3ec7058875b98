"""The layout of an activation store on disk: sizes and names, without any I/O.

    <folder>/store.zarr/                     Zarr v3 group; its attributes describe the store, with format_version
        activations/   [rows, T, D]          one file per shard, c.<index>.0.0
        sequence_id/   [rows] int64          the sequence of each row
        view/          [rows] int32          the view of each row
        validation/                          a group with the same arrays
    <folder>/records/<group>-<index>.json    one per finished shard: rows, size, checksums

A quantised store, format version 2, adds to each group

        scale/         [rows, T] float32     one file per shard, c.<index>.0, of the same rows; records
                                             <group>-scale-<index>.json
        channel_mean/, channel_std/  [D] float32

and its values are activations * scale * channel_std + channel_mean.

T is the number of positions, D of channels. A *chunk* is a few rows with a checksum, the smallest unit that is
verified; a *shard* is one file of chunks followed by an index of them.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch

from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.model.stream import STREAM_DTYPES
from stackwise_core.strict import parse_object
from storage.errors import ArtifactCorruptError

FORMAT_VERSION: Final = 2
"""The newest version. Stores that are not quantised have version 1, so that older readers can read them."""
ZARR: Final = "store.zarr"
RECORDS: Final = "records"

Group = Literal["train", "validation"]
"""The rows of a store that train, and those that are withheld."""
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
GROUP_FOLDERS: Final[dict[Group, str]] = {"train": ZARR, "validation": f"{ZARR}/validation"}

Array = Literal["activations", "scale"]
"""The arrays that are cut into shards."""

ZARR_NAMES: Final[dict[StreamDtype, str]] = {"fp8": "float8_e4m3fn"}
"""Data types that have another name in Zarr."""

MIN_CHUNK_BYTES: Final = 64 * 2**10
MIN_SHARD_BYTES: Final = 64 * 2**20
MAX_SHARD_BYTES: Final = 2**30
SHARDS_OF_LARGE_STORE: Final = 64

# The store is little-endian, and rows are copied to it from memory without conversion.
assert sys.byteorder == "little", "activation stores need a little-endian machine"


@dataclass(frozen=True)
class GroupSpec:
    """The size of one group of rows, and how it is cut into chunks and shards.

    Raises:
        ValueError: A size is out of range or the dtype is not one of the stream's.
    """

    rows: int
    """May be 0."""
    seq_len: int
    d_model: int
    dtype: StreamDtype
    chunk_bytes: int = MIN_CHUNK_BYTES
    """Data bytes of a chunk. Rounded up to whole rows on construction."""
    shard_bytes: int = 0
    """Data bytes of a shard; 0 means a 64th of the group, but at least 64 MiB and at most 1 GiB. Rounded down to whole
    chunks on construction, at least one."""

    def __post_init__(self) -> None:
        """Round the two sizes, so that equal layouts are equal specs."""
        if self.rows < 0 or min(self.seq_len, self.d_model, self.chunk_bytes) < 1 or self.shard_bytes < 0:
            raise ValueError(f"sizes out of range: {self}")
        if self.dtype not in STREAM_DTYPES:
            raise ValueError(f"dtype must be one of {sorted(STREAM_DTYPES)}, got {self.dtype!r}")
        per_chunk = min(_ceil_div(self.chunk_bytes, self.row_bytes), max(self.rows, 1))
        object.__setattr__(self, "chunk_bytes", per_chunk * self.row_bytes)
        share = self.rows * self.row_bytes // SHARDS_OF_LARGE_STORE
        wanted = self.shard_bytes or min(max(share, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
        per_shard = min(max(wanted // self.chunk_bytes, 1), max(self.n_chunks, 1))
        object.__setattr__(self, "shard_bytes", per_shard * self.chunk_bytes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of a stored value."""
        return STREAM_DTYPES[self.dtype]

    @property
    def zarr_name(self) -> str:
        """The Zarr name of the stored type."""
        return ZARR_NAMES.get(self.dtype, self.dtype)

    @property
    def fill_value(self) -> float:
        """The value of padding: NaN if the type has it."""
        return 0 if self.dtype == "int8" else float("nan")

    @property
    def is_quantised(self) -> bool:
        """Whether values are standardised by channel and stored with a scale per position."""
        return self.dtype in QUANTISED_STREAMS

    @property
    def format_version(self) -> int:
        """The oldest format version that has this type."""
        return 2 if self.is_quantised else 1

    @property
    def arrays(self) -> dict[Array, GroupSpec]:
        """The arrays that are cut into shards; scales are described as rows of one channel."""
        if not self.is_quantised:
            return {"activations": self}
        row_bytes = self.seq_len * torch.float32.itemsize
        sizes = self.rows_per_chunk * row_bytes, self.rows_per_shard * row_bytes
        return {"activations": self, "scale": GroupSpec(self.rows, self.seq_len, 1, "float32", *sizes)}

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one row in all arrays together."""
        return sum(spec.row_bytes for spec in self.arrays.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of activations."""
        return self.seq_len * self.d_model * self.torch_dtype.itemsize

    @property
    def rows_per_chunk(self) -> int:
        """Row r is in chunk r // rows_per_chunk."""
        return self.chunk_bytes // self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Chunks in every shard but the last."""
        return self.shard_bytes // self.chunk_bytes

    @property
    def rows_per_shard(self) -> int:
        """Rows in every shard but the last."""
        return self.rows_per_chunk * self.chunks_per_shard

    @property
    def n_chunks(self) -> int:
        """Chunks in the group; the last may be partly padding."""
        return _ceil_div(self.rows, self.rows_per_chunk)

    @property
    def n_shards(self) -> int:
        """Shards in the group; the last may be shorter."""
        return _ceil_div(self.rows, self.rows_per_shard)

    def shard_range(self, index: int) -> range:
        """Rows of one shard."""
        first = index * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def chunks_in_shard(self, index: int) -> int:
        """Chunks of one shard, without the empty ones of a short last shard."""
        return _ceil_div(len(self.shard_range(index)), self.rows_per_chunk)


# Paths are POSIX paths relative to the folder of the store.


def shard_path(group: Group, index: int, array: Array = "activations") -> str:
    """Path of a shard."""
    return f"{GROUP_FOLDERS[group]}/{array}/c.{index}{'.0.0' if array == 'activations' else '.0'}"


def record_path(group: Group, index: int, array: Array = "activations") -> str:
    """Path of the record of a finished shard."""
    return f"{RECORDS}/{group}{'' if array == 'activations' else f'-{array}'}-{index:05d}.json"


def is_shard(name: str) -> bool:
    """Whether a path is that of a shard."""
    return name.startswith(f"{ZARR}/") and any(f"/{array}/c." in name for array in get_args(Array))


def is_metadata(name: str) -> bool:
    """Whether a path belongs to the Zarr group and is not a shard."""
    return name.startswith(f"{ZARR}/") and not is_shard(name)


def metadata_paths(group: Group, spec: GroupSpec) -> list[str]:
    """Paths of all metadata files of a group."""
    folder = GROUP_FOLDERS[group]
    of_rows, of_channels = ("sequence_id", "view"), ("channel_mean", "channel_std") if spec.is_quantised else ()
    documents = [f"{folder}/{array}/zarr.json" for array in (*spec.arrays, *of_rows, *of_channels)]
    chunks = [f"{folder}/{array}/c.0" for array in (*(of_rows if spec.rows else ()), *of_channels)]
    return [f"{folder}/zarr.json", *documents, *chunks]


def corrupt(folder: Path | str, path: Path | str, problem: str) -> ArtifactCorruptError:
    """Return an error about a file of the artifact in `folder`, with the remedy."""
    return ArtifactCorruptError(path, problem, f"delete {folder} and run the same command again: it will be remade")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Record:
    """What was written of one shard.

    A chunk's own checksum tells that it is intact; the one in the record, that it is the right chunk: a chunk of
    another shard or of another attempt is intact too.
    """

    first_row: int
    n_rows: int
    size: int
    """[bytes]"""
    checksum: str
    """`sha256:<hex>` of the file."""
    chunks: np.ndarray
    """crc32c of each chunk, uint32 `[n_chunks]`; empty in records of an early version, which lack it."""

    def dump(self) -> bytes:
        """Return the record as a line of JSON; the checksums of chunks are little-endian in base64."""
        chunks = base64.b64encode(self.chunks.astype("<u4").tobytes()).decode()
        rows = [self.first_row, self.n_rows]
        return json.dumps({"rows": rows, "size": self.size, "checksum": self.checksum, "crc32c": chunks}).encode()


def parse_record(data: bytes) -> Record:
    """Read what `dump` wrote; raises ValueError for anything else."""
    try:
        found = parse_object(data)
        first_row, n_rows = found["rows"]
        chunks = np.frombuffer(base64.b64decode(found.get("crc32c", ""), validate=True), "<u4")
        return Record(int(first_row), int(n_rows), int(found["size"]), str(found["checksum"]), chunks)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not the record of a shard ({error!r})") from None
