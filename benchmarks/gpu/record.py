"""Running sections one after the other, each under an alarm, and writing what they measure at once.

A section is a generator of measures: those that it has yielded when it fails, or when its time is up, are kept.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from benchmarks.harness import Measure, commit, number, table

T = TypeVar("T")
GRACE = 30.0
"""Seconds after its alarm after which a section that does not return to Python ends the process."""
BEGIN, END = "<!-- results: written by python -m benchmarks.gpu --publish -->", "<!-- end of the results -->"


@dataclass
class Run:
    """What all sections share."""

    device: torch.device
    quick: bool
    """Toy sizes, which show that a section works and measure nothing."""
    scratch: Path
    found: dict[tuple[str, str], float] = field(default_factory=dict)
    """Medians of the sections so far, by case and what."""

    def size(self, real: T, toy: T) -> T:
        """Return one of two sizes."""
        return toy if self.quick else real

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], rounds: int = 5, warmup: int = 2, calls: int = 1) -> list[float]:
        """Return the seconds of one call, measured over `calls` of them, in each round."""
        seconds: list[float] = []
        for n in range(self.size(rounds + warmup, 1)):
            self.wait()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            if n >= self.size(warmup, 0):
                seconds.append((time.perf_counter() - began) / calls)
        return seconds


@dataclass(frozen=True)
class Section:
    """One part of the script; it gets `seconds`, of which it needs fewer."""

    letter: str
    seconds: float
    title: str
    measure: Callable[[Run], Iterator[Measure]]


# ---------------------------------------------------------------- running


class OutOfTime(BaseException):
    """The alarm of a section; no `except Exception` of a library swallows it."""


def run_sections(sections: Sequence[Section], run: Run, path: Path) -> bool:
    """Run sections and append a line of JSON for each; return whether all of them ended well.

    A section that hangs outside Python ends the process.
    """
    for section in sections:
        head = {"section": section.letter, "title": section.title}
        seconds = section.seconds * run.size(1.0, 20.0)  # a CPU may be busy with other work
        append(path, head)
        print(f"\n{section.letter} {section.title}", flush=True)
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
        append(path, {**head, **measured(section, run, seconds)})
        faulthandler.cancel_dump_traceback_later()
    return all(line["error"] == "" for line in results(path))


def measured(section: Section, run: Run, limit: float) -> dict[str, Any]:
    """Return the measures of a section, its seconds, and why it ended early, or an empty string."""
    measures: list[Measure] = []
    error, began = "", time.monotonic()
    try:
        with alarm(limit):
            for measure in section.measure(run):
                measures.append(measure)
                run.found[measure.case, measure.what] = measure.median
                print(table([measure.dump()])[-1], flush=True)
    except OutOfTime:
        error = f"stopped by its alarm after {limit:g} s"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[:2000]
        traceback.print_exc()
    print(error or f"{time.monotonic() - began:.1f} s", flush=True)
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "error": error, "measures": [measure.dump() for measure in measures]}


@contextlib.contextmanager
def alarm(seconds: float) -> Generator[None]:
    """Raise OutOfTime in the block once `seconds` have passed; only in the main thread."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- the file


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON, durably: the next section may take the machine down."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; none if it is not there, and not one that a kill cut off."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def begun(path: Path) -> set[str]:
    """Return the letters of the sections that a file has a line of."""
    return {line["section"] for line in lines_of(path) if "section" in line}


def results(path: Path) -> list[dict[str, Any]]:
    """Return the last result of every section that began, by letter."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines_of(path):
        if "section" in line:
            cut_off = {"seconds": 0.0, "error": "the process ended in it", "measures": []}
            found[line["section"]] = {**cut_off, **line}
    return [found[letter] for letter in sorted(found)]


def facts(device: torch.device, quick: bool, of_commit: str) -> dict[str, Any]:
    """Describe the card, the versions and the time; needs no card, nor anything but torch and transformers."""
    cuda = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if cuda else "CPU",
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else 0,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "transformers": version("transformers"),
        "python": sys.version.split()[0],
        "commit": of_commit or commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "toy": quick,
    }


# ---------------------------------------------------------------- the page


def page(path: Path) -> str:
    """Return the results as Markdown; if there are none, how to make them."""
    lines = lines_of(path)
    if not lines:
        return "No result yet: nobody has run it on a card since it was written. `make gpu` prints how."
    where = lines[0]
    toy = ["Toy sizes: these numbers judge no goal.", ""] if where["toy"] else []
    memory = f" with {where['memory'] / 1e9:.0f} GB, CUDA {where['cuda']}" if where["cuda"] else ""
    about = (
        f"**{where['card']}**{memory}; torch {where['torch']}, transformers {where['transformers']}, "
        f"Python {where['python']}; commit {where['commit']}, {where['date']}."
    )
    parts = [about, "", *toy]
    for result in results(path):
        parts += [f"### {result['section']} {result['title']}", ""]
        if result["measures"]:
            parts += [*table(result["measures"]), ""]
        parts += [f"**{result['error']}**" if result["error"] else f"{number(result['seconds'])} s.", ""]
    return "\n".join(parts).rstrip()


def publish(path: Path, document: Path) -> None:
    """Put the results into the section of a document that is marked for them."""
    before, rest = document.read_text().split(BEGIN)
    _, after = rest.split(END)
    document.write_text(f"{before}{BEGIN}\n\n{page(path)}\n\n{END}{after}")
