"""Writing and flushing an activation store of 1 GiB, compared with plain files (the limit) and other formats.

All write the same rows of 256 x 512 bfloat16 from memory, and flush. Our writer adds a checksum to every chunk, a hash
and a record to every shard, and renames each shard into place, so that a kill loses one shard at most. Of the others,
tensorstore and zarr-python (the same codecs) and h5py (fletcher32) store checksums too.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks import store_peers as peers
from benchmarks.harness import Measure, interleaved, ratios


def measure(quick: bool) -> list[Measure]:
    n_rows, rounds = (512, 2) if quick else (4096, 7)
    data = list(peers.blocks(n_rows))
    writers = {"raw files": peers.write_raw, "ours": peers.write_ours, **peers.WRITERS}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name) / "written"

        def clear(_: str) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()

        candidates = {name: functools.partial(write, folder, data) for name, write in writers.items()}
        seconds = interleaved(candidates, rounds, before=clear)
    gigabytes = n_rows * peers.ROW_BYTES / 1e9
    measures = [Measure("1 GiB", name, "GB/s", [gigabytes / s for s in values]) for name, values in seconds.items()]
    for name in seconds:
        if name != "ours":
            goal = 0.8 if name == "raw files" else None
            measures.append(
                Measure("1 GiB", f"ours / {name}", "x", ratios(seconds[name], seconds["ours"]), at_least=goal)
            )
    return measures
