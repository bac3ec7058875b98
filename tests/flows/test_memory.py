"""A machine without memory: one line says what was short, and what to do."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows.cli import main as command_line
from stackwise_core.errors import why_no_memory
from support.runs import tiny_values, write_corpus

_MAIN = "import sys; from flows.cli.main import main; sys.exit(main())"


def test_an_address_space_too_small_for_torch_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_values(write_corpus(tmp_path / "corpus.txt"))))
    command = [sys.executable, "-c", _MAIN, "train", str(config), "--artifacts", str(tmp_path / "a")]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (500 * 2**20, 500 * 2**20))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=600)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (1, "")
    assert last.startswith("stackwise: not enough ")
    assert last.endswith("; sealed artifacts are kept")
    assert "Traceback" not in done.stderr


def test_what_torch_cannot_allocate_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert why_no_memory(error.value) == "not enough memory"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("can't start new thread"),
            "not enough memory or processes for another thread (ulimit -v, ulimit -u)",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory on the device"),
        (OSError(12, "Cannot allocate memory"), "not enough memory"),
        (RuntimeError("shapes differ"), ""),
        (ValueError("cannot allocate memory"), ""),
    ],
)
def test_each_kind_of_memory_is_named(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(command_line, "parse", fails)
    assert command_line.main(["plan"]) == 1
    lines = capsys.readouterr().err.splitlines()
    if why:
        (line,) = lines
        assert line.startswith(f"stackwise: {why}; lower the sizes of the model")
    else:
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1] == "stackwise: an unexpected error, please report it; sealed artifacts are kept"
