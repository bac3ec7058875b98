"""Links that somebody planted in an artifacts folder: nothing outside of it is read, changed or removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.run.run import grow
from stackwise_core.config.schema import GROWTH
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError, ArtifactsFolderError
from storage.links import delete_path
from storage.local import trash
from storage.manifest import read_manifest
from support.damage import file_of
from support.runs import tiny

SMALL = {f"{GROWTH}.target_stacks": 2, "cache.keep": "all", "training.steps_per_stack": 2}
SMALL |= {"training.warmup_steps": 1, "validation.sampled_rows": 2, "validation.max_sequences": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = tiny(folder, SMALL)
    grow(config, str(folder / "a"))
    config.to_yaml(folder / "c.yaml")
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "a", tmp_path / "a"))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of the user beside the artifacts, which must stay as it is."""
    folder = tmp_path / "mine"
    (folder / "attempts").mkdir(parents=True)
    (folder / "letter.txt").write_text("mine")
    return folder


def is_whole(mine: Path) -> bool:
    return sorted(path.name for path in mine.rglob("*")) == ["attempts", "letter.txt"] and (
        (mine / "letter.txt").read_text() == "mine"
    )


OFTEN, SELDOM = ("trash", "work"), ("stacks", "locks", "runs", "quarantine", "pins", "prefect")


@pytest.mark.parametrize("room", [*OFTEN, *(pytest.param(room, marks=pytest.mark.slow) for room in SELDOM)])
def test_a_room_that_is_a_link_is_refused(room: str, made: Path, root: Path, mine: Path, capsys: Any) -> None:
    shutil.rmtree(root / room, ignore_errors=True)
    (root / room).symlink_to(mine)
    config = str(made / "c.yaml")
    for words in (["gc"], ["train", config], ["push", str(root.parent / "copy")], ["verify"], ["plan", config]):
        assert main([*words, "--artifacts", str(root)]) == 2
        assert f"{root / room}: is a link" in capsys.readouterr().err
    assert is_whole(mine)


def test_the_folder_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """As its owner makes one who keeps artifacts on another disk."""
    there = tmp_path / "here"
    there.symlink_to(root)
    assert main(["verify", "--artifacts", str(there)]) == main(["gc", "--artifacts", str(there)]) == 0
    Artifacts(there).open().discard(read_manifest(stack_of(root)).ref)
    assert not list((root / "stacks").glob("stack-1-*"))


def stack_of(root: Path) -> Path:
    return file_of(root, "stacks/stack-1-*")


@pytest.mark.parametrize("room", ["stacks", "trash"])
def test_what_is_thrown_away_is_found_by_descriptors(room: str, root: Path, mine: Path) -> None:
    """Even where a link came after the rooms were looked at."""
    name = stack_of(root).name
    (root / room).rename(root / "aside")
    (root / room).symlink_to(mine)
    (mine / name).mkdir()
    with pytest.raises(ArtifactCorruptError, match=f"{room}: is a link"):
        trash(root, root / "stacks" / name)
    (mine / name).rmdir()
    assert is_whole(mine)
    delete_path(root / room)
    assert is_whole(mine)


@pytest.mark.parametrize("words", [["verify"], ["push", "{}"], ["inspect", "stack-1"]])
def test_an_artifact_that_is_a_link_is_damage(words: list[str], root: Path, capsys: Any) -> None:
    folder, other = stack_of(root), root.parent / "other"
    folder.rename(other)
    folder.symlink_to(other)
    before = sorted(other.iterdir())
    assert main([word.format(root.parent / "copy") for word in words] + ["--artifacts", str(root)]) == 3
    assert f"{folder}: is a link" in "".join(capsys.readouterr())
    assert sorted(other.iterdir()) == before


@pytest.mark.parametrize("inside", ["stacks/stack-1-*/stack.safetensors", "activations/activations-0-*/store.zarr"])
def test_a_file_or_folder_of_an_artifact_that_is_a_link_is_damage(inside: str, root: Path, capsys: Any) -> None:
    path = file_of(root, inside)
    path.rename(root.parent / path.name)
    path.symlink_to(root.parent / path.name)
    assert main(["verify", "--artifacts", str(root)]) == 3
    assert "is a link, or behind one, and not followed" in capsys.readouterr().err
    assert main(["push", str(root.parent / "copy"), "--artifacts", str(root)]) == 3
    assert not list((root.parent / "copy").glob(f"{inside.partition('/')[0]}/*-1-*"))


@pytest.mark.parametrize("how", ["symlink_to", pytest.param("hardlink_to", marks=pytest.mark.slow)])
def test_a_run_overwrites_nothing_by_planted_links(how: str, made: Path, root: Path, mine: Path) -> None:
    """They wait in the place of every file that it is about to write."""
    letter, stack = mine / "letter.txt", stack_of(root)
    shutil.rmtree(stack)
    work, attempt = root / "work" / stack.name, root / "runs/tiny/attempts/0002"
    work.mkdir()
    attempt.mkdir()
    planted = [work / f"{name}.tmp" for name in ("manifest.json", "metrics.jsonl", "stack.safetensors")]
    planted += [attempt / f"{name}.tmp" for name in ("config.yaml", "plan.json", "start.json", "outcome.json")]
    planted += [root / "runs/tiny/current.tmp"]
    if how == "hardlink_to":  # a lock that is a symbolic link is refused
        planted += [root / "locks" / "plans"]
    else:
        (work / "scratch").symlink_to(mine)
    for path in planted:
        path.unlink(missing_ok=True)
        getattr(path, how)(letter)
    grow(tiny(made, SMALL), str(root))
    assert is_whole(mine)
    assert main(["verify", "--artifacts", str(root)]) == 0


def test_a_lock_that_is_a_link_is_refused(root: Path, mine: Path) -> None:
    (root / "locks" / "gc").unlink(missing_ok=True)
    (root / "locks" / "gc").symlink_to(mine / "letter.txt")
    with pytest.raises(ArtifactsFolderError, match="is a link"):
        Artifacts(root).lock("gc").try_acquire()
    assert is_whole(mine)


def test_a_run_that_is_a_link_is_named_and_keeps_gc_from_removing_what_it_made(
    root: Path, mine: Path, capsys: Any
) -> None:
    """The owner may have moved it, so it is not taken for a run that is not there."""
    run = root / "runs" / "tiny"
    run.rename(root.parent / "moved")
    run.symlink_to(root.parent / "moved")
    assert main(["status", "--artifacts", str(root)]) == 0
    assert f"{run}: is a link" in capsys.readouterr().out
    assert main(["gc", "--artifacts", str(root)]) == 3
    assert stack_of(root).exists()


def test_a_record_is_not_written_through_a_link(made: Path, root: Path, mine: Path) -> None:
    shutil.rmtree(root / "runs" / "tiny")
    (root / "runs" / "tiny").symlink_to(mine)
    with pytest.raises(ArtifactCorruptError, match="tiny: is a link"):
        grow(tiny(made, SMALL), str(root))
    assert is_whole(mine)
