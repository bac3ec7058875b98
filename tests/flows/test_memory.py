"""A machine without memory: one line says what was short, and what to do."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows.cli import main as command_line
from flows.cli import plan as planning
from flows.pages.run import describe_run
from flows.pages.run_page import tables
from flows.run import run as running
from stackwise_core.errors import ConfigError, OutOfMemoryError, size, why_no_memory
from stackwise_core.training import peak, training
from storage.artifacts import artifacts_at
from support.commands import Run
from support.runs import folder_of, grown, tiny, tiny_values, write_corpus

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


# ---------------------------------------------------------------- a stage that is too large


def test_a_stage_without_memory_says_what_it_takes_and_goes_on_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None
) -> None:
    config = tiny(tmp_path, {"training.progressive.target_stacks": 1})
    real, plain = training.train_step, training.train_step

    def fails(*given: Any, **named: Any) -> Any:
        if given[4] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(*given, **named)

    monkeypatch.setattr(training, "train_step", fails)
    with pytest.raises(OutOfMemoryError) as told:
        grown(config, tmp_path / "a")
    said = str(told.value)
    assert said.startswith("stage 0: not enough memory on the device. It takes about ")
    assert " logits " in said
    assert "training.activation_checkpointing=true saves " in said
    assert "The checkpoint at step 4 stands: the stage goes on from it with training.activation_checkpointing" in said
    assert told.value.exit_code == 1
    monkeypatch.setattr(training, "train_step", plain)
    monkeypatch.setattr(peak, "WATCHED", 5)
    config.training.activation_checkpointing = True
    recorder = grown(config, tmp_path / "a")
    assert "stage 0 goes on from its checkpoint at step 4" in recorder.messages
    facts = json.loads((folder_of(tmp_path / "a", "stack", 0) / "manifest.json").read_text())["facts"]
    assert facts["memory_bytes_forecast"] > 4 * 4 * facts["trainable_parameters"]
    assert facts["memory_bytes_peak"] == pytest.approx(facts["memory_bytes_forecast"], rel=0.1)
    described = describe_run(artifacts_at(str(tmp_path / "a")), "tiny")
    (held,) = [table for table in tables(described) if table.title == "Memory and disk"]
    assert held.rows[0][1:3] == [size(facts["memory_bytes_forecast"]), size(facts["memory_bytes_peak"])]


def test_a_stage_larger_than_its_device_is_named_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, quick_disk: None
) -> None:
    values = {**tiny_values(write_corpus(tmp_path / "corpus.txt")), "run": {"name": "large"}}
    values["training"]["progressive"]["target_stacks"] = 1
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(values))
    for module in (planning, running):
        monkeypatch.setattr(module, "device_memory", lambda asked: (False, 100_000))
    (note,) = run("plan", tmp_path / "large.yaml", "--json").document["notes"]
    assert note.startswith("stage 0 may not fit: about ")
    assert "the device has 97.7 KiB: training.activation_checkpointing=true saves " in note
    assert note in grown(tiny(tmp_path, {"training.progressive.target_stacks": 1}), tmp_path / "a").messages
    monkeypatch.setattr(running, "device_memory", lambda asked: (True, 50_000))
    with pytest.raises(
        ConfigError, match=r"stage 0 with .* of weights, gradients and moments; the device has 48\.8 KiB"
    ):
        grown(tiny(tmp_path, {"training.progressive.target_stacks": 1}), tmp_path / "b")
