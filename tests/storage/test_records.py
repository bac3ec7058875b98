"""The files of runs and pins are what was written, or are named; those of version 0.1 have no checksums."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError
from storage.reachability import pin, pins
from storage.records import sealed, unsealed
from storage.runs import Attempt, attempts, find_run
from support.commands import Run
from support.house import MORE, pretend

FILES = ("start.json", "outcome.json", "plan.json", "config.yaml")
VALUES = {"a": 'text with ", "seal": "', "b": [1.5e-05, None, {"é\ud800": True}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    artifacts = Artifacts(tmp_path_factory.mktemp("made") / "a").open()
    plan = pretend(artifacts)
    pretend(artifacts, "two", **MORE)
    pin(artifacts, plan.stages[0].ref("stack"))
    return artifacts.root


@pytest.fixture
def artifacts(made: Path, tmp_path: Path) -> Artifacts:
    shutil.copytree(made, tmp_path / "a")
    return Artifacts(tmp_path / "a")


def only(artifacts: Artifacts) -> Attempt:
    (found,) = attempts(artifacts, "one")
    return found


def without_checksums(folder: Path) -> None:
    """Write the records of an attempt as version 0.1 did."""
    for name in ("start.json", "outcome.json"):
        values = unsealed((folder / name).read_bytes())
        values.pop("files", None)
        (folder / name).write_text(json.dumps(values))


def test_a_record_is_read_as_it_was_written() -> None:
    assert json.loads(sealed(VALUES)).keys() == {"a", "b", "seal"}
    assert unsealed(sealed({"a": VALUES["a"]}).encode()) == {"a": VALUES["a"]}
    assert unsealed(b'{"sha256": "' + b"0" * 64 + b'"}\n') == {"sha256": "0" * 64}  # a pin of version 0.1
    for text in ("[]", "", "{", '{"seal": ""}', '{"seal": null}', '{"a": 1, "seal": "x"}'):
        with pytest.raises(ValueError, match=r"\w"):
            unsealed(text.encode())


def flips(data: bytes, most: int = 9_999) -> list[bytes]:
    """Return the bytes with one bit changed, each in another place: all of them, or a draw."""
    places = range(8 * len(data))
    chosen = places if len(places) <= most else random.Random(0).sample(places, most)
    return [bytes([*data[: at // 8], data[at // 8] ^ 1 << at % 8, *data[at // 8 + 1 :]]) for at in chosen]


def test_every_flipped_bit_of_a_record_is_found(artifacts: Artifacts) -> None:
    (path,) = artifacts.root.glob("pins/*.json")
    for data in (path.read_bytes(), *((only(artifacts).folder / name).read_bytes() for name in FILES[:2])):
        for changed in flips(data):
            with pytest.raises(ValueError, match=r"\w"):
                unsealed(changed)
    path.write_bytes(changed)
    told: list[str] = []
    assert (pins(artifacts, told.append), len(told)) == ([], 1)
    assert str(path) in told[0]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_a_run_is_named(name: str, artifacts: Artifacts) -> None:
    attempt = only(artifacts)
    path = attempt.folder / name
    assert attempt.damage() == []
    for changed in flips(path.read_bytes(), 8):
        path.write_bytes(changed)
        assert [line.partition(": ")[0] for line in only(artifacts).damage()] == [str(path)], changed


def test_runs_of_version_0_1_are_read(artifacts: Artifacts) -> None:
    attempt, before = only(artifacts), only(artifacts).start
    without_checksums(attempt.folder)
    (path,) = artifacts.root.glob("pins/*.json")
    (pinned,) = pins(artifacts)
    path.write_text(pinned.model_dump_json() + "\n")
    attempt = only(artifacts)
    assert attempt.damage() == []
    assert (attempt.start, pins(artifacts)) == (before, [pinned])
    (attempt.folder / "config.yaml").write_text("training: {")
    assert len(attempt.damage()) == 1


def test_a_pin_of_another_artifact_is_damaged(artifacts: Artifacts) -> None:
    (path,) = artifacts.root.glob("pins/*.json")
    path.rename(path.with_name("stack-1-0123456789ab.json"))
    with pytest.raises(ArtifactCorruptError, match="is not a pin"):
        pins(artifacts)


@pytest.mark.parametrize("name", ["plan.json", "config.yaml"])
def test_the_rest_of_a_folder_is_used_beside_a_damaged_run(name: str, artifacts: Artifacts, run: Run) -> None:
    path = only(artifacts).folder / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    here = ("--artifacts", artifacts.root)
    line = f"{path}: is damaged (it is not what was written). Remove "
    shown = run("status", *here)
    assert shown.code == 0
    assert f"one: {line}" in shown.out
    assert run("status", "two", *here).code == 0
    verified = run("verify", *here)
    assert verified.code == 3
    assert verified.err.count(line) == 1
    assert "holds no sequences" in verified.err  # nor is anything hidden behind what else is damaged
    assert verified.out.count("ok  ") == len(artifacts.everything())
    assert run("verify", "one", *here).code == 3
    assert line not in run("verify", "two", *here).err
    used = run("du", "--json", *here)
    assert used.code == 0
    decides = name == "plan.json"
    assert [each["name"] for each in json.loads(used.out)["runs"]] == (["two"] if decides else ["one", "two"])
    assert line in used.err or not decides
    assert run("why", "stack-2", *here).code in (0, 2)
    assert run("push", artifacts.root.with_name("copy"), "two", *here).code == 0
    assert run("gc", *here).code == (3 if decides else 0)  # it cannot know what must stay
    assert find_run(artifacts, "two").damage() == []
