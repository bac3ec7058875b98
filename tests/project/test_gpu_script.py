"""The script that measures a card, on a CPU: at toy size, with no more than an image with torch 2.11 has."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.record import Run, Section, append, begun, page, publish, results, run_sections
from benchmarks.gpu.wheels import CARRIED, repack
from benchmarks.harness import ROOT, Measure

ON_THE_IMAGE = ["torch", "transformers", "accelerate", "ml-dtypes", "rich", "pytest", "hypothesis"]
_BLOCKED = """
import sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name

allowed = set(sys.argv.pop(1).split(","))
for name, owners in packages_distributions().items():
    if not allowed & {canonicalize_name(owner) for owner in owners}:
        sys.modules[name] = None  # neither imported nor found

sys.path.append("tests")
from benchmarks.gpu.__main__ import main
from support.older_torch import older_torch

with older_torch():
    sys.exit(main())
"""


def with_requirements(names: list[str]) -> set[str]:
    """Return the names of distributions and of all that they need here."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # such as triton, where torch is built for a CPU
            continue
        names += [need.name for need in needed if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def test_every_section_runs_with_what_an_image_has_and_what_is_carried(tmp_path: Path) -> None:
    allowed = with_requirements(list(ON_THE_IMAGE)) | set(CARRIED) | {"stackwise"}
    assert with_requirements(list(CARRIED)) <= allowed
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    command = [sys.executable, "-c", _BLOCKED, ",".join(allowed), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {result["section"]: result for result in results(tmp_path / "gpu.jsonl")}
    assert "".join(found) == "".join(section.letter for section in script.SECTIONS) == "ABCDEFGHIJK"
    assert all(result["measures"] for result in found.values())
    proofs = [m for letter in "BCGHJ" for m in found[letter]["measures"] if m["met"] is not None]
    assert len(proofs) == 11
    assert [m for m in proofs if not m["met"]] == []
    assert "CPU" in done.stdout


# ---------------------------------------------------------------- what a section cannot do to the others


def _good(run: Run) -> Iterator[Measure]:
    yield Measure("case", "good", "ms", [2.0, 4.0], at_most=1.0)


def _waits(run: Run) -> Iterator[Measure]:
    yield Measure("case", "before the alarm", "ms", [1.0], at_least=0.5)
    signal.pause()


def _fails(run: Run) -> Iterator[Measure]:
    yield from _good(run)
    raise ValueError("no such kernel")


def test_an_alarm_and_an_error_stop_one_section(tmp_path: Path) -> None:
    sections = [Section("A", 0.001, "waits", _waits), Section("B", 60, "fails", _fails), Section("C", 60, "", _good)]
    file, run = tmp_path / "gpu.jsonl", Run(torch.device("cpu"), True, tmp_path)
    assert not run_sections(sections, run, file)
    waited, failed, good = results(file)
    assert waited["error"] == "stopped by its alarm after 0.02 s"
    assert [m["what"] for m in waited["measures"]] == ["before the alarm"]
    assert failed["error"] == "ValueError: no such kernel"
    assert failed["measures"] == good["measures"]
    assert good["error"] == ""
    assert (good["measures"][0]["median"], good["measures"][0]["met"]) == (3.0, False)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert run_sections(sections[2:], Run(torch.device("cpu"), True, tmp_path), tmp_path / "other.jsonl")


def test_a_section_in_which_the_process_ended_is_told_and_not_begun_again(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    append(file, {"section": "A", "title": "ceilings"})
    with file.open("a") as cut_off:
        cut_off.write('{"section": "B", "ti')
    assert begun(file) == {"A"}
    assert [result["error"] for result in results(file)] == ["the process ended in it"]


# ---------------------------------------------------------------- the page


def _results(file: Path) -> None:
    card: dict[str, Any] = {"card": "NVIDIA H200", "memory": 150_754_820_096, "cuda": "13.0", "toy": False}
    versions = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "python": "3.12.3", "commit": "abc", "date": "today"}
    append(file, {**card, **versions})
    measures = [Measure("8B shape", "step", "ms", [180.0], at_most=200), Measure("x", "y", "GB", [41.0], at_most=40)]
    append(
        file, {"section": "D", "title": "8B", "seconds": 70.0, "error": "", "measures": [m.dump() for m in measures]}
    )


def test_the_page_names_the_card_and_says_what_was_hit(tmp_path: Path) -> None:
    _results(tmp_path / "gpu.jsonl")
    document = tmp_path / "gpu.md"
    document.write_text((ROOT / "docs" / "gpu.md").read_text())
    publish(tmp_path / "gpu.jsonl", document)
    text = document.read_text()
    assert "**NVIDIA H200** with 151 GB, CUDA 13.0; torch 2.11.0+cu130" in text
    assert "| 8B shape | step | 180 ms | 180 to 180 | 1 | at most 200: met |" in text
    assert "| at most 40: **missed** |" in text
    publish(tmp_path / "none", document)
    assert document.read_text() == (ROOT / "docs" / "gpu.md").read_text().replace(
        page(script.PUBLISHED), page(tmp_path / "none")
    )


def test_the_published_page_is_that_of_the_published_results() -> None:
    assert f"-->\n\n{page(script.PUBLISHED)}\n\n<!--" in script.DOCUMENT.read_text()


def test_the_document_lists_every_section_and_its_seconds() -> None:
    text = script.DOCUMENT.read_text()
    assert all(f"| {s.seconds} | {s.letter}: " in text for s in script.SECTIONS)
    assert sum(section.seconds for section in script.SECTIONS) <= 480


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu"], "--quick"),
        (["--device", "cuda:99"], "torch sees"),
        (["--quick", "--device", "cpu", "--sections", "AZ"], "no section is called Z"),
        (["--publish"], "run without --publish first"),
    ],
)
def test_a_command_that_cannot_run_makes_nothing(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_repacked_wheel_has_the_named_libraries_and_all_that_is_no_library(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.whl"
    content = {"some/__init__.py": b"x = 1", "some/lib_cpu.so": b"cpu", "some/lib_cuda118.so": b"0" * 999}
    with zipfile.ZipFile(wheel, "w") as whole:
        for name, data in content.items():
            whole.writestr(name, data)
    repack(wheel, ["lib_cpu.so"])
    with zipfile.ZipFile(wheel) as kept:
        assert {name: kept.read(name) for name in kept.namelist()} == dict(list(content.items())[:2])
    assert list(tmp_path.iterdir()) == [wheel]
