"""An artifacts folder from a stranger: it is listed, inspected, verified and copied, and none of its code runs."""

from __future__ import annotations

import itertools
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
from storage.manifest import MANIFEST, InputEntry, read_manifest
from support.damage import COMMANDS, DAMAGES, FILES, applies, damaged, every_kind_of_file, file_of, seal
from support.records import rewrite
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
    small = {"training.steps_per_stack": 2, "validation.sampled_rows": 2}
    config = tiny(folder, {f"{GROWTH}.target_stacks": 2, "cache.keep": "all", **small})
    grow(config, str(folder / "a"))
    config.to_yaml(folder / "c.yaml")
    every_kind_of_file(folder / "a")
    return folder / "a"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copy(made.parent / "c.yaml", tmp_path)
    return Path(shutil.copytree(made, tmp_path / "a", symlinks=True))


def name_functions(root: Path) -> None:
    """Let the configuration of every attempt name functions of a module that lies beside the artifacts folder."""
    (root.parent / "code_of_a_stranger.py").write_text("raise AssertionError('code of a stranger runs')\n")
    for path in root.glob("runs/*/attempts/*/config.yaml"):
        values = load_yaml(path)
        apply_overrides(values, NAMED)
        rewrite(path, StackWiseConfig.model_validate(values).to_yaml())


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


# ---------------------------------------------------------------- whatever a file holds, a command ends with a line


def end_of(root: Path, pattern: str, damage: str, command: str) -> int:
    """Damage a file of an artifacts folder, run a command on it, and return how it ended."""
    name = damaged(root, pattern, damage)
    words = command.format(name=name, config=root.parent / "c.yaml", copy=root.parent / "copy").split()
    return main([*words, "--artifacts", str(root)])


RUN = "runs/tiny/attempts/0001"
CHOSEN = [
    ("stacks/stack-1-*/manifest.json", "deep", "verify", 3, "is no manifest (recursion limit exceeded"),
    ("validations/validation-1-*/manifest.json", "sealed facts nothings", "inspect {name}", 3, "a fact that cannot be"),
    ("data/*/manifest.json", "NaN", "push {copy}", 3, "is no manifest ("),
    ("activations/activations-0-*/manifest.json", "nasty", "status tiny", 0, "corrupt"),
    ("builds/build-1-*/manifest.json", "device", "gc --dry-run", 3, "is no manifest (is a link)"),
    ("trunks/trunk-1-*/manifest.json", "huge", "inspect {name}", 3, "has 1,099,511,627,776 bytes, more than"),
    ("activations/activations-0-*/records/*.json", "sealed file deep", "inspect {name}", 3, "recursion limit"),
    ("activations/activations-0-*/store.zarr/activations/c.0.0.0", "sealed file empty", "verify", 3, "is empty"),
    ("data/*/train_tokens.npy", "sealed file noise", "verify tiny", 3, "holds no sequences"),
    (f"{RUN}/plan.json", "digits", "status", 0, "plan.json: is damaged"),
    (f"{RUN}/start.json", "pipe", "status", 0, "start.json: is damaged (is not a plain file)"),
    (f"{RUN}/outcome.json", "lists", "verify", 3, "outcome.json: is damaged (state: "),
    ("pins/*.json", "null", "gc --keep-last 0", 3, "is not a pin"),
    ("locks/gc", "numbers", "gc --dry-run", 0, "would be freed"),
]


@pytest.mark.parametrize(("pattern", "damage", "command", "code", "said"), CHOSEN)
def test_a_damaged_file_is_told_in_a_line(
    pattern: str, damage: str, command: str, code: int, said: str, root: Path, capsys: Any
) -> None:
    """The worst of what `make test-slow` tries: a pipe, a link to a device and a terabyte are among it."""
    assert end_of(root, pattern, damage, command) == code
    told = "".join(capsys.readouterr())
    assert said in told


def test_an_artifact_that_says_it_was_made_from_itself_is_shown(root: Path) -> None:
    folder = file_of(root, "stacks/stack-1-*")
    manifest = read_manifest(folder)
    itself = InputEntry(ref=manifest.ref, digest=manifest.digest)
    seal(folder / MANIFEST, manifest.model_copy(update={"inputs": (*manifest.inputs, itself)}))
    assert main(["inspect", folder.name, "--artifacts", str(root)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("pattern", FILES)
def test_every_damage_is_told_in_lines(
    pattern: str, made: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every damage to every kind of file, each met by three of the commands in turn."""
    monkeypatch.setattr("flows.cli.train._run_flow", lambda *_: None)
    shutil.copy(made.parent / "c.yaml", tmp_path)
    commands = itertools.islice(itertools.cycle(COMMANDS), FILES.index(pattern), None)
    bad: list[str] = []
    for damage in (damage for damage in DAMAGES if applies(pattern, damage)):
        for command in itertools.islice(commands, 3):
            shutil.copytree(made, tmp_path / "a", symlinks=True)
            code, told = end_of(tmp_path / "a", pattern, damage, command), capsys.readouterr().err
            if code not in range(4) or "Traceback" in told:
                bad.append(f"{damage}: {command}: {told.splitlines()[-2:]}")
            shutil.rmtree(tmp_path / "a")
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    assert not bad
