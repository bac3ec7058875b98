"""Export of a model of 135M parameters, read back and compared, against a copy and a sha256 of the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.generate import random_rack
from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.interop.hf_export import export_rack

_HUNK = 2**22


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rack, found = random_rack(), list[Measure]()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            out = Path(folder) / dtype

            def export(out: Path = out, dtype: str = dtype) -> None:
                export_rack(rack, out, dtype=dtype, force=True)  # pyright: ignore[reportArgumentType]

            def copy(out: Path = out) -> None:
                copied(out / "model.safetensors", Path(folder) / "copy")

            export()
            seconds = interleaved({"export": export, "cp and sha256": copy}, 2 if quick else 7)
            found += [Measure(dtype, who, "s", values) for who, values in seconds.items()]
            ratio = ratios(seconds["cp and sha256"], seconds["export"])
            found.append(Measure(dtype, "speed of cp and sha256", "x", ratio, at_least=0.5))
    return found


def copied(source: Path, target: Path) -> str:
    """Copy a file to the disk, as an export is, and return its hash."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.sha256()
        while data := file.read(_HUNK):
            digest.update(data)
    return digest.hexdigest()
