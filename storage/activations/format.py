"""What an activation store looks like on disk: sizes, names, and nothing that does I/O.

    <folder>/store.zarr/                     Zarr v3 group, attributes of the store + format_version
        activations/   [rows, T, D]          one file per shard, c.<index>.0.0
        sequence_id/   [rows] int64          which sequence a row was computed from
        view/          [rows] int32          which corruption of it
        validation/                          a group with the same arrays
    <folder>/records/<group>-<index>.json    one per finished shard: rows, size, checksum

A quantised store, format version 2, has in each group also

        scale/         [rows, T] float32     one file per shard, c.<index>.0, of the same rows; records
                                             <group>-scale-<index>.json
        channel_mean/, channel_std/  [D] float32

and its values are activations * scale * channel_std + channel_mean.

T is the number of positions, D the channels. A *row* is one sequence, a *chunk* the smallest unit that
is read and checked, a *shard* one file of chunks followed by an index of them.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

# For their effect: zarr-python knows the data types from here on.
import storage.activations.dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]
from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.model.stream import STREAM_DTYPES
from storage.errors import ArtifactCorruptError

FORMAT_VERSION: Final = 2
"""The newest. Stores whose values are stored as they are have version 1: older readers read them."""
ZARR: Final = "store.zarr"
RECORDS: Final = "records"

Group = Literal["train", "validation"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
GROUP_FOLDERS: Final[dict[Group, str]] = {"train": ZARR, "validation": f"{ZARR}/validation"}

Array = Literal["activations", "scale"]
"""Those that are cut into shards."""

ZARR_NAMES: Final[dict[StreamDtype, str]] = {"fp8": "float8_e4m3fn"}
"""Of the data types whose name is another in Zarr."""

MIN_CHUNK_BYTES: Final = 64 * 2**10
MIN_SHARD_BYTES: Final = 64 * 2**20
MAX_SHARD_BYTES: Final = 2**30
SHARDS_OF_LARGE_STORE: Final = 64

# Rows are copied as they lie in memory, and the store is little-endian.
assert sys.byteorder == "little", "activation stores need a little-endian machine"


@dataclass(frozen=True)
class GroupSpec:
    """One group of rows and how it is cut into chunks and shards.

    Attributes:
        rows: Number of rows; may be 0.
        seq_len: Positions per row, T.
        d_model: Channels per position, D.
        dtype: Of every stored value.
        chunk_bytes: Data bytes wanted in a chunk. Rounded up to whole rows on construction.
        shard_bytes: Data bytes wanted in a shard; 0 takes a 64th of the group, but 64 MiB at least and
            1 GiB at most. Rounded down to whole chunks on construction, at least one.

    Raises:
        ValueError: A size is out of range or the dtype is not one of the stream's.
    """

    rows: int
    seq_len: int
    d_model: int
    dtype: StreamDtype
    chunk_bytes: int = MIN_CHUNK_BYTES
    shard_bytes: int = 0

    def __post_init__(self) -> None:
        """Make the two wanted sizes exact, so that equal layouts are equal specs."""
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
        """The stored dtype as torch knows it."""
        return STREAM_DTYPES[self.dtype]

    @property
    def zarr_name(self) -> str:
        """The stored dtype as Zarr calls it."""
        return ZARR_NAMES.get(self.dtype, self.dtype)

    @property
    def fill_value(self) -> float:
        """What stands where no row is: NaN, if there is one."""
        return 0 if self.dtype == "int8" else float("nan")

    @property
    def is_quantised(self) -> bool:
        """Whether values are stored with a scale per position, standardised by statistics of the channels."""
        return self.dtype in QUANTISED_STREAMS

    @property
    def format_version(self) -> int:
        """The oldest that can say this."""
        return 2 if self.is_quantised else 1

    @property
    def arrays(self) -> dict[Array, GroupSpec]:
        """The arrays that are cut into shards, those of the scales as if they were rows of one channel."""
        if not self.is_quantised:
            return {"activations": self}
        row_bytes = self.seq_len * torch.float32.itemsize
        sizes = self.rows_per_chunk * row_bytes, self.rows_per_shard * row_bytes
        return {"activations": self, "scale": GroupSpec(self.rows, self.seq_len, 1, "float32", *sizes)}

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one row in all arrays."""
        return sum(spec.row_bytes for spec in self.arrays.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of activations."""
        return self.seq_len * self.d_model * self.torch_dtype.itemsize

    @property
    def rows_per_chunk(self) -> int:
        """Rows that are checked together: row r lies in chunk r // rows_per_chunk."""
        return self.chunk_bytes // self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Chunks in a whole shard."""
        return self.shard_bytes // self.chunk_bytes

    @property
    def rows_per_shard(self) -> int:
        """Rows in a whole shard."""
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
        """Chunks of one shard that hold a row."""
        return _ceil_div(len(self.shard_range(index)), self.rows_per_chunk)


def shard_path(group: Group, index: int, array: Array = "activations") -> str:
    """Posix path of a shard, relative to the store's folder."""
    others = ".0.0" if array == "activations" else ".0"
    return f"{GROUP_FOLDERS[group]}/{array}/c.{index}{others}"


def is_shard(name: str) -> bool:
    """Whether a path that is relative to the store's folder is a shard's."""
    return name.startswith(f"{ZARR}/") and any(f"/{array}/c." in name for array in get_args(Array))


def is_metadata(name: str) -> bool:
    """Whether a path that is relative to the store's folder is part of the Zarr group, and not a shard."""
    return name.startswith(f"{ZARR}/") and not is_shard(name)


def record_path(group: Group, index: int, array: Array = "activations") -> str:
    """Posix path of the record of a finished shard, relative to the store's folder."""
    return f"{RECORDS}/{group}{'' if array == 'activations' else f'-{array}'}-{index:05d}.json"


def metadata_paths(group: Group, spec: GroupSpec) -> list[str]:
    """Posix paths of every file of a group but its shards, relative to the store's folder."""
    folder = GROUP_FOLDERS[group]
    of_rows, of_channels = ("sequence_id", "view"), ("channel_mean", "channel_std") if spec.is_quantised else ()
    arrays = (*spec.arrays, *of_rows, *of_channels)
    whole = (*(of_rows if spec.rows else ()), *of_channels)
    chunks = [f"{folder}/{array}/c.0" for array in whole]
    return [f"{folder}/zarr.json", *(f"{folder}/{array}/zarr.json" for array in arrays), *chunks]


def corrupt(folder: Path | str, path: Path | str, problem: str) -> ArtifactCorruptError:
    """An error that names the file and the way out; `folder` is the artifact's."""
    return ArtifactCorruptError(path, problem, f"delete {folder} and run the same command again: it will be remade")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---------------------------------------------------------------- records
#
# A chunk's own checksum says that it is intact, the record's that it is this one: a chunk of another place or of
# another attempt is intact too.


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
