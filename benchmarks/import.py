"""Import of a checkpoint of 135M parameters against a copy and a sha256 of the same bytes, and its peak memory.

The checkpoint has the shape of SmolLM2-135M and random weights. The memory is the largest resident set of a process of
its own, above that before the import; pages of the mapped checkpoint count.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from pathlib import Path

from benchmarks.export import copied
from benchmarks.generate import SHAPE, random_rack
from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.interop.checkpoint import Checkpoint
from stackwise_core.interop.hf_export import export_rack
from stackwise_core.stages.costs import base_parameters
from storage.artifacts import Artifacts
from storage.imports import import_checkpoint

BLOCKS_PER_STACK = 4
"""What 30 blocks are cut into."""


def measure(quick: bool) -> list[Measure]:
    found = list[Measure]()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "artifacts"
        for dtype in ("float32", "bfloat16"):
            folder = Path(scratch) / dtype
            export_rack(random_rack(), folder, dtype=dtype)
            shard = folder / "model.safetensors"

            def copy(shard: Path = shard) -> None:
                copied(shard, Path(scratch) / "copy")

            def import_again(folder: Path = folder) -> None:
                _import(folder, root)

            def forget(_: str) -> None:
                shutil.rmtree(root, ignore_errors=True)

            calls = {"import": import_again, "cp and sha256": copy}
            seconds = interleaved(calls, 2 if quick else 7, before=forget)
            found += [Measure(dtype, who, "s", values) for who, values in seconds.items()]
            ratio = ratios(seconds["cp and sha256"], seconds["import"])
            found.append(Measure(dtype, "speed of cp and sha256", "x", ratio, at_least=0.5))
            peaks = []
            for _ in range(1 if quick else 3):
                forget("")
                peaks.append(_peak(folder, root) / 2**20)
            stack = base_parameters(SHAPE, BLOCKS_PER_STACK) * (4 if dtype == "float32" else 2)
            at_most = (shard.stat().st_size + stack) / 2**20
            found.append(Measure(dtype, "peak memory above the base", "MiB", peaks, at_most=round(at_most)))
        shutil.rmtree(root)
    return found


def _import(folder: Path, root: Path) -> None:
    import_checkpoint(Artifacts(root).open(), "base", Checkpoint(folder))


def _peak(folder: Path, root: Path) -> float:
    """Return the bytes by which the largest resident set of a new process grows when it imports."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measured, args=(answers, folder, root))
    process.start()
    process.join()
    return answers.get()


def _measured(answers: multiprocessing.SimpleQueue[float], folder: Path, root: Path) -> None:
    before = _largest()
    _import(folder, root)
    answers.put(_largest() - before)


def _largest() -> float:
    """Return the largest resident set so far [bytes]: that of this program, not of the one that it was forked from."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024.0 * float(line.split()[1])
