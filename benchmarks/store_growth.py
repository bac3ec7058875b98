"""Time and memory to open a store and read a first batch, for stores of up to 50 GiB.

Shards are sparse files with a real index and one real chunk each: everything that opening reads exists, the rest takes
no disk space. "opening" is measured in a new process, without imports; the first batch touches 32 shards. Memory is
what the reader adds to the private memory of the process, without pages of mapped files. Rows of 256 x 512 bfloat16.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, Measure
from storage.activations.format import GroupSpec, Record, metadata_paths, record_path, shard_path
from storage.activations.metadata import GroupMetadata, RowIndex, write_metadata
from storage.files import checksum_file

GIB = 2**30
SEQ_LEN, D_MODEL = 256, 512
ROW_BYTES = SEQ_LEN * D_MODEL * 2

_CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
import storage.activations.reader as r
torch.set_num_threads(1)
folder = Path(sys.argv[1])
files = {name: tuple(entry) for name, entry in json.loads((folder.parent / "files.json").read_text()).items()}
def resident():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
rows = np.array(json.loads(sys.argv[2]))
out = r.empty_aligned((len(rows), 256, 512), torch.bfloat16)
out.zero_()
before, began = resident(), time.perf_counter()
reader = r.StoreReader(folder, files)
opened = time.perf_counter() - began
reader.read("train", rows, out)
print(json.dumps([opened, time.perf_counter() - began, resident() - before]))
"""


def measure(quick: bool) -> list[Measure]:
    sizes, rounds = ((1, 4), 2) if quick else ((1, 5, 20, 50), 5)
    measures: list[Measure] = []
    for gib in sizes:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            folder = Path(name) / "store"
            spec = GroupSpec(gib * GIB // ROW_BYTES, SEQ_LEN, D_MODEL, "bfloat16")
            files = _sparse_store(folder, spec)
            (folder.parent / "files.json").write_text(json.dumps(files))
            rows = [shard * spec.rows_per_shard for shard in range(min(32, spec.n_shards))]
            command = [sys.executable, "-c", _CHILD, str(folder), json.dumps(rows)]
            runs = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(rounds + 1)][1:]
        case = f"{gib} GiB, {spec.rows:,} rows in {spec.n_shards} shards"
        opened, first, memory = zip(*runs, strict=True)
        measures += [
            Measure(case, "opening", "ms", [1e3 * s for s in opened]),
            Measure(case, "opening and a first batch", "ms", [1e3 * s for s in first]),
            Measure(case, "memory", "MiB", [n / 2**20 for n in memory]),
            Measure(case, "memory per row", "B", [n / spec.rows for n in memory]),
        ]
    return measures


def _sparse_store(folder: Path, spec: GroupSpec) -> dict[str, tuple[int, str]]:
    """Write a store with only the data that opening it and one chunk per shard need."""
    import torch

    from storage.activations.shard import encode_shard, shard_file_bytes

    nothing = GroupSpec(0, SEQ_LEN, D_MODEL, "bfloat16")
    ids = np.arange(spec.rows, dtype=np.int64)
    train = GroupMetadata(spec, RowIndex(ids, np.zeros(spec.rows, np.int32)))
    empty = GroupMetadata(nothing, RowIndex(ids[:0], np.zeros(0, np.int32)))
    write_metadata(folder / "store.zarr", {}, {"train": train, "validation": empty})
    names = [*metadata_paths("train", spec), *metadata_paths("validation", nothing)]
    files = {name: ((folder / name).stat().st_size, checksum_file(folder / name)) for name in names}

    def zeros(n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Lay out a shard of zeros, and return its bytes and the checksums of its chunks."""
        image = np.empty(shard_file_bytes(spec, n_rows), np.uint8)
        rows = torch.zeros(n_rows, SEQ_LEN, D_MODEL, dtype=torch.bfloat16)
        return image, encode_shard(spec, rows, image)

    whole = zeros(spec.rows_per_shard)
    stride = spec.chunk_bytes + 4
    for shard in range(spec.n_shards):
        n_chunks = spec.chunks_in_shard(shard)
        image, crcs = whole if n_chunks == spec.chunks_per_shard else zeros(n_chunks)
        path = folder / shard_path("train", shard)
        with path.open("wb") as file:
            file.truncate(image.nbytes)
            file.write(image[:stride].data)
            file.seek(n_chunks * stride)
            file.write(image[n_chunks * stride :].data)
        rows = spec.shard_range(shard)
        checksum = "sha256:" + 64 * "0"  # not compared at open
        files[shard_path("train", shard)] = (image.nbytes, checksum)
        record = Record(rows.start, len(rows), image.nbytes, checksum, crcs).dump()
        name = record_path("train", shard)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(record)
        files[name] = (len(record), checksum_file(folder / name))
    return files
