"""Measure StackWise on a GPU: every section of docs/gpu.md, a line of JSON each, in FOLDER/gpu.jsonl."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import card, proofs, ranks, stages, stores
from benchmarks.gpu.record import Run, Section, append, begun, facts, page, publish, run_sections
from benchmarks.harness import RESULTS, ROOT
from stackwise_core.config.schema import HardwareConfig
from stackwise_core.training.hardware import use_hardware

# In the order of their value, with the seconds that each may take: eight minutes together.
SECTIONS = (
    Section("A", 25, "ceilings of the card", card.ceilings),
    Section("B", 40, "tests that need a card", proofs.gpu_tests),
    Section("C", 50, "growth in bf16: undisturbed twice, and stopped and resumed", proofs.resumed_growth),
    Section("D", 90, "a later stage of 8B shape", stages.later_stage),
    Section("E", 45, "a stage of 70B shape in 40 GB", stages.large_stage),
    Section("F", 60, "a stage fed by its cache", stores.feeding),
    Section("G", 30, "rows of a cache, filled, live and checked", stores.equal_rows),
    Section("H", 50, "peak memory of twelve stages", stores.flat_memory),
    Section("I", 35, "NF4 and NVFP4", card.low_storage),
    Section("J", 20, "NCCL with one process", ranks.one_rank),
    Section("K", 30, "a checkpoint of D's state", stages.checkpoint_stall),
)
PUBLISHED, DOCUMENT = RESULTS / "gpu.jsonl", ROOT / "docs" / "gpu.md"


def main() -> int:
    """Run the sections, or publish the results of an earlier run; 1 if a section failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="of gpu.jsonl; goes on in it")
    letters = "".join(section.letter for section in SECTIONS)
    parser.add_argument("--sections", default="", metavar=letters, help="only these, also again (default: all left)")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that every section works")
    parser.add_argument("--commit", default="", help="of the code, where its folder is no git repository")
    parser.add_argument("--publish", action="store_true", help="put FOLDER/gpu.jsonl into docs/gpu.md")
    options = parser.parse_args()
    path = options.out / "gpu.jsonl"
    if options.publish:
        if not path.exists():
            parser.error(f"{path} is not there: run without --publish first")
        shutil.copyfile(path, PUBLISHED)
        publish(PUBLISHED, DOCUMENT)
        return 0
    if unknown := sorted(set(options.sections) - set(letters)):
        parser.error(f"no section is called {', '.join(unknown)}; there are {letters}")
    device = torch.device(options.device)
    if device.type == "cpu" and not options.quick:
        parser.error("--device cpu goes with --quick: at full size it would take days")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # NCCL wants a number
        if device.index >= torch.cuda.device_count():
            parser.error(f"--device {options.device}: torch sees {torch.cuda.device_count()} CUDA devices")
    use_hardware(HardwareConfig(device=str(device)))  # cuBLAS is told to be deterministic before it is used
    options.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        append(path, facts(device, options.quick, options.commit))
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-", ignore_cleanup_errors=True) as scratch:
        run = Run(device, options.quick, Path(scratch))
        wanted = options.sections or set(letters) - begun(path)
        good = run_sections([section for section in SECTIONS if section.letter in wanted], run, path)
    print(f"\n{page(path)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
