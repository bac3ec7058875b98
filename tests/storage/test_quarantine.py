"""Quarantine: listed with its reason, put back only as it was sealed, dropped only by hand."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.artifacts import Artifacts, State
from storage.quarantine import find_quarantined, release
from support.commands import Run
from support.disk import die_everywhere
from support.house import files_of, on_disk, pretend


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts").open()


def test_it_is_listed_with_its_reason(artifacts: Artifacts, run: Run) -> None:
    assert run("quarantine").out == "nothing is in quarantine\n"
    plan = pretend(artifacts)
    path = Path(artifacts.quarantine(plan.stages[0].ref("activations"), "row 3 differs"))
    (entry,) = run("quarantine", "--json").document["quarantine"]
    assert (entry["path"], entry["reason"], entry["n_bytes"]) == (str(path), "row 3 differs", on_disk(path))
    assert abs(datetime.now(UTC) - datetime.fromisoformat(entry["since"])) < timedelta(hours=1)
    text = run("quarantine").out
    assert path.name in text
    assert "row 3 differs" in text


def test_released_it_is_as_it_was(artifacts: Artifacts, run: Run) -> None:
    plan = pretend(artifacts)
    ref = plan.stages[0].ref("activations")
    before = files_of(artifacts.root)
    artifacts.quarantine(ref, "row 3 differs")
    assert artifacts.state(ref) is State.ABSENT
    assert run("quarantine", "--release", ref.name).code == 0
    assert files_of(artifacts.root) == before
    assert artifacts.checked(ref)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "add", "manifest"])
def test_a_damaged_one_is_not_released(damage: str, artifacts: Artifacts, run: Run) -> None:
    ref = pretend(artifacts).stages[0].ref("activations")
    path = Path(artifacts.quarantine(ref, "row 3 differs"))
    touched = path / {"add": "extra", "manifest": "manifest.json"}.get(damage, "content")
    data = touched.read_bytes() if touched.exists() else b""
    if damage == "delete":
        touched.unlink()
    else:
        touched.write_bytes(data[:-1] + b"#" if damage == "flip" else data[:-5] or b"x")
    before = files_of(artifacts.root)
    result = run("quarantine", "--release", ref.name)
    assert result.code == 3
    assert str(touched) in result.err
    assert files_of(artifacts.root) == before


def test_it_is_not_put_over_another(artifacts: Artifacts, run: Run) -> None:
    plan = pretend(artifacts)
    ref = plan.stages[0].ref("activations")
    artifacts.quarantine(ref, "row 3 differs")
    pretend(artifacts, "again")  # remade since
    before = files_of(artifacts.root)
    result = run("quarantine", "--release", ref.name)
    assert result.code == 2
    assert f"{artifacts.folder(ref)} is there, sealed" in result.err
    assert files_of(artifacts.root) == before


def test_it_is_dropped_by_hand(artifacts: Artifacts, run: Run) -> None:
    plan = pretend(artifacts)
    refs = [plan.stages[stage].ref("activations") for stage in (0, 1)]
    paths = [Path(artifacts.quarantine(ref, "row 3 differs")) for ref in refs]
    assert run("quarantine", "--drop", "activations").code == 2  # which of the two?
    assert run("quarantine", "--drop", refs[0].name).code == 0
    assert [path.exists() for path in paths] == [False, True]
    assert not list((artifacts.root / "trash").iterdir())
    assert run("quarantine", "--drop", refs[0].name).code == 3
    assert run("quarantine", "--drop", "x", "--release", "y").code == 2


class Releasing:
    """A release over an unsealed folder, killed before each of its steps."""

    @staticmethod
    def prepare(folder: Path) -> None:
        artifacts = Artifacts(folder).open()
        ref = pretend(artifacts, training={"progressive": {"target_stacks": 2}}).stages[0].ref("activations")
        artifacts.quarantine(ref, "row 3 differs")
        artifacts.folder(ref).mkdir()

    @staticmethod
    def act(folder: Path) -> None:
        artifacts = Artifacts(folder)
        release(artifacts, find_quarantined(artifacts, "activations-0"))

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder).open()
        place = next((folder / "activations").glob("*/manifest.json"), None)
        assert place is not None or not finished
        if place is None:
            Releasing.act(folder)
        (found,) = (folder / "activations").glob("*/manifest.json")
        assert {path.name for path in found.parent.iterdir()} == {"manifest.json", "content", "sub"}
        assert not list((folder / "quarantine").iterdir())
        assert not list((artifacts.root / "trash").iterdir())


def test_killed_at_any_step_it_can_be_released_again() -> None:
    assert die_everywhere(Releasing)["rename"] >= 2
