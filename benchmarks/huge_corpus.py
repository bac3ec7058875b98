"""A corpus of 10 GB packs and trains in the memory that one of 1 GB takes, and a rerun reads none of it.

Memory is as in `corpora`. Bytes at 1 and 10 GB; a tokenizer.json at 0.1 and 1 GB, since it takes a minute for each
100 MB of a core. About 50 GB of free disk are needed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.corpora import bpe, grow, memory, rerun
from benchmarks.harness import Measure


def measure(quick: bool) -> list[Measure]:
    unit = 10**6 if quick else 10**8
    measures = list[Measure]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = grow(folder, "txt", 2**16)
        for kind in ("txt", "jsonl"):
            peaks = [_grow(folder, kind, n * unit, measures) for n in (10, 100)]
            measures += memory(kind, base, *peaks)
            measures += rerun(folder, kind, 100 * unit, 5)
            _clear(folder)
        bpe(folder / "tokenizer.json")
        peaks = [_grow(folder, "jsonl", n * unit, measures, str(folder / "tokenizer.json")) for n in (1, 10)]
        measures += memory("tokenizer.json, jsonl", base, *peaks)
    return measures


def _grow(folder: Path, kind: str, n_bytes: int, measures: list[Measure], tokenizer: str = "byte") -> tuple[int, float]:
    began = time.perf_counter()
    peak = grow(folder, kind, n_bytes, tokenizer)
    case = (
        f"{kind} of {n_bytes / 1e6:,.0f} MB"
        if tokenizer == "byte"
        else f"tokenizer.json, {kind} of {n_bytes / 1e6:,.0f} MB"
    )
    measures.append(Measure(case, "writing it, packing and training", "s", [time.perf_counter() - began]))
    return n_bytes, peak


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "artifacts")
    for path in folder.glob("*.*"):
        path.unlink()
