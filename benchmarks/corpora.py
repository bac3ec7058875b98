"""Corpora of any size: memory, whatever there is to read; the speed of packing; a rerun with nothing to do.

Memory is the largest resident set of a process that packs a corpus and trains a small model on it, less that of one
with a tiny corpus. Packing is measured in CPU time, since disks differ.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarks.harness import ROOT, Measure
from stackwise_core.data.packing import pack, read_corpus
from stackwise_core.data.tokenizer import load_tokenizer

_MOST_MIB = 1024.0
_FLAT = 1.1
_BYTES_PER_SECOND = 200.0
_OF_ITS_OWN_SPEED = 0.8
_RERUN_SECONDS, _RERUN_MIB = 3.0, 250.0

# Grows a rack without Prefect, and prints the largest resident set [KiB].
_GROW = """
import json, resource, sys
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
grow(StackWiseConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# Runs a command of `stackwise`, and prints the same of it.
_COMMAND = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(quick: bool) -> list[Measure]:
    small, large = (2**22, 2**25) if quick else (2**28, 2**31)
    measures = list[Measure]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = grow(folder, "txt", 2**16)
        for kind in ("txt", "jsonl"):
            measures += memory(kind, base, *((size, grow(folder, kind, size)) for size in (small, large)))
        measures += rerun(folder, "txt", large, 3 if quick else 11)
        measures += _packing(folder, small // 2 if quick else small // 8, 3 if quick else 7)
    return measures


def memory(kind: str, base: float, *peaks: tuple[int, float]) -> list[Measure]:
    """Return the peaks [MiB] of a small and of a large corpus, each with its size, against that of a tiny one."""
    (small, first), (large, second) = peaks
    case, over = f"{kind} of {large / 1e6:,.0f} MB", "memory over that of a tiny corpus"
    return [
        Measure(case, over, "MiB", [second - base], at_most=_MOST_MIB),
        Measure(case, f"memory against {small / 1e6:,.0f} MB", "x", [second / first], at_most=_FLAT),
    ]


def _texts(n_bytes: int) -> Iterator[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randrange(1, 9))) for _ in range(5000)]
    halves = [" ".join(draw.choices(words, k=100)) for _ in range(2000)]
    while n_bytes > 0:
        text = f"{draw.choice(halves)} {n_bytes} {draw.choice(halves)}\n"
        yield text
        n_bytes -= len(text)


def _corpus(folder: Path, kind: str, n_bytes: int) -> Path:
    path = folder / f"{n_bytes}.{kind}"
    if not path.exists():
        with path.open("w") as file:
            for text in _texts(n_bytes):
                file.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
    return path


def _config(source: Path, tokenizer: str = "byte") -> dict[str, object]:
    progressive = {"training_objective": "clm", "target_stacks": 1}
    return {
        "run": {"name": source.name.replace(".", "-")},
        "data": {"source": str(source), "tokenizer": tokenizer, "seq_len": 256},
        "model": {"d_model": 16, "n_heads": 2, "blocks_per_stack": 1},
        "training": {"batch_size": 8, "steps_per_stack": 4, "warmup_steps": 1, "progressive": progressive},
        "hardware": {"device": "cpu", "threads": 1},
    }


def grow(folder: Path, kind: str, n_bytes: int, tokenizer: str = "byte") -> float:
    """Return the peak memory of packing and training [MiB]."""
    source = _corpus(folder, kind, n_bytes)
    return _peak(_GROW, json.dumps(_config(source, tokenizer)), str(folder / "artifacts"))


def _peak(code: str, *arguments: str) -> float:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1]) / 1024


def rerun(folder: Path, kind: str, n_bytes: int, rounds: int) -> list[Measure]:
    """Measure `stackwise train` on the run that is complete."""
    source, path = _corpus(folder, kind, n_bytes), folder / "run.json"
    path.write_text(json.dumps(_config(source)))
    stackwise = str(Path(sys.executable).with_name("stackwise"))
    train = [stackwise, "train", str(path), "--artifacts", str(folder / "artifacts")]
    peaks, seconds = list[float](), list[float]()
    for _ in range(rounds):
        began = time.perf_counter()
        peaks.append(_peak(_COMMAND, *train))
        seconds.append(time.perf_counter() - began)
    case = f"rerun, {kind} of {n_bytes / 1e6:,.0f} MB"
    return [
        Measure(case, "everything sealed", "s", seconds, at_most=_RERUN_SECONDS),
        Measure(case, "memory", "MiB", peaks, at_most=_RERUN_MIB),
    ]


def bpe(path: Path) -> Tokenizer:
    """Train a tokenizer of 4,000 tokens, and save it."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_texts(2**21), trainer)
    library.save(str(path))
    return library


def _packing(folder: Path, n_bytes: int, rounds: int) -> list[Measure]:
    """Measure packing by bytes, and by a tokenizer.json against the tokenizer itself."""
    texts = list(_texts(n_bytes))
    library = bpe(folder / "tokenizer.json")
    corpus = read_corpus(str(_corpus(folder, "jsonl", n_bytes)))
    batches = [texts[at : at + 2000] for at in range(0, len(texts), 2000)]
    speeds, ratios = list[float](), list[float]()
    for _ in range(rounds):
        _, by_bytes = _timed(lambda: pack(corpus, load_tokenizer("byte"), 256, 0, 0.05))
        speeds.append(corpus.n_bytes / 1e6 / by_bytes)
        own, _ = _timed(lambda: [library.encode_batch(batch) for batch in batches])
        packed, _ = _timed(lambda: pack(corpus, load_tokenizer(str(folder / "tokenizer.json")), 256, 0, 0.05))
        ratios.append(own / packed)
    case = f"packing, {n_bytes / 1e6:,.0f} MB of rows of 1 kB"
    return [
        Measure(case, "bytes", "MB/s of CPU time", speeds, at_least=_BYTES_PER_SECOND),
        Measure(case, "tokenizer.json, against its own batches", "x", ratios, at_least=_OF_ITS_OWN_SPEED),
    ]


def _timed(work: object) -> tuple[float, float]:
    """Return the seconds of a call, and those of CPU time."""
    assert callable(work)
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu
