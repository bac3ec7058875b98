"""An artifacts folder from a stranger: it is listed, inspected, verified and copied, and none of its code runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import GROWTH
from stackwise_core.config.yaml import apply_overrides, load_yaml
from support.runs import tiny

NAMED = {
    f"{GROWTH}.training_objective": "custom",
    "training.custom_loss": "code_of_a_stranger:loss",
    f"{GROWTH}.time_interpretation": "depth",
    f"{GROWTH}.stack_time_mapping": "custom",
    f"{GROWTH}.time_mapping": "code_of_a_stranger:steps",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    folder = tmp_path_factory.mktemp("made")
    grow(tiny(folder, {f"{GROWTH}.target_stacks": 2, "cache.keep": "all"}), str(folder / "a"))
    return folder / "a"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "a", symlinks=True))


def name_functions(root: Path) -> None:
    """Let the configuration of every attempt name functions of a module that lies beside the artifacts folder."""
    (root.parent / "code_of_a_stranger.py").write_text("raise AssertionError('code of a stranger runs')\n")
    for path in root.glob("runs/*/attempts/*/config.yaml"):
        values = load_yaml(path)
        apply_overrides(values, NAMED)
        path.write_text(StackWiseConfig.model_validate(values).to_yaml())


READING = ("status", "status tiny", "verify", "verify tiny", "inspect activations-0", "inspect stack-1 --json", "du")
READING += ("why stack-1", "gc --dry-run", "gc", "quarantine", "push {}/copy", "pull {}/a")


@pytest.mark.parametrize("command", READING)
def test_no_command_that_reads_a_run_imports_what_it_names(
    command: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_functions(root)
    monkeypatch.chdir(root.parent)
    monkeypatch.syspath_prepend(root.parent)  # even where it could be found
    here = ["--artifacts", str(root.parent / "b" if command.startswith("pull") else root)]
    assert main([*command.format(root.parent).split(), *here]) == 0
    assert "code_of_a_stranger" not in sys.modules


def test_rows_are_derived_again_by_the_plan_that_the_run_recorded(root: Path, capsys: Any) -> None:
    name_functions(root)
    assert main(["verify", "--artifacts", str(root)]) == 0
    assert "0 cached rows" not in capsys.readouterr().out
