"""Push and pull: what arrives is what was sealed, nothing is made again, and a kill costs a file at most."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.push_pull import copy
from stackwise_core.errors import ConfigError
from storage import copying
from storage.artifacts import Artifacts, State
from storage.collect import collect, without_gc
from storage.errors import ArtifactCorruptError, RunBusyError, StoreSpaceError
from storage.manifest import MANIFEST, Manifest
from storage.reachability import pins
from support.commands import Run
from support.disk import die_everywhere
from support.house import files_of, plan_of, pretend, put
from support.runs import digests, files_below, folder_of, grown, manifests, tiny

Reference = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def source(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "source").open()


@pytest.fixture
def target(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "target")


def names(artifacts: Artifacts) -> set[str]:
    return {folder.name for folder in artifacts.everything()}


# ---------------------------------------------------------------- runs


def test_a_run_that_was_pulled_is_complete_and_grows_on(tmp_path: Path, reference: Reference, run: Run) -> None:
    """Nothing is made again at the target: bytes, status and what training finds are those of the source."""
    theirs, ours = reference(), tmp_path / "artifacts"
    result = run("pull", theirs, "tiny")
    assert result.code == 0
    assert digests(ours) == digests(theirs)
    for name in digests(theirs):
        (there,), (here,) = theirs.glob(f"*/{name}/{MANIFEST}"), ours.glob(f"*/{name}/{MANIFEST}")
        assert files_below(here.parent) == files_below(there.parent)
    for command in (("status", "tiny", "--json"), ("status", "--json")):
        there = run(*command, "--artifacts", theirs).document
        here = run(*command).document
        assert {**here, "artifacts": ""} == {**there, "artifacts": ""}
    assert grown(tiny(tmp_path), ours).made == []
    again = grown(tiny(tmp_path, {"training.progressive.target_stacks": 4}), ours)
    assert [task for task in again.made if task.startswith("train")] == ["train 3"]
    assert run("verify").code == 0


def test_what_is_there_is_not_copied_again(source: Artifacts, target: Artifacts, run: Run) -> None:
    plan = pretend(source)
    assert run("push", target.root, "one", "--artifacts", source.root).code == 0
    before = files_of(target.root)
    again = run("push", target.root, "one", "--artifacts", source.root)
    assert again.out.startswith(f"copied 0 artifacts, 0 B, {len(plan.recipes)} there already or never made, runs one")
    assert files_of(target.root) == before


def test_a_run_that_went_on_is_brought_up_to_date(source: Artifacts, target: Artifacts) -> None:
    pretend(source)
    copy(str(source.root), str(target.root), ["one"])
    more = pretend(source, training={"progressive": {"target_stacks": 4}})
    copy(str(source.root), str(target.root), ["one"])
    assert names(target) == names(source) >= {ref.name for ref in more.recipes}
    assert files_below(target.root / "runs") == files_below(source.root / "runs")


def test_a_run_is_copied_while_it_is_live_and_its_end_later(source: Artifacts, target: Artifacts) -> None:
    pretend(source)
    outcome = source.root / "runs/one/attempts/0001/outcome.json"
    text = outcome.read_text()
    outcome.unlink()
    copy(str(source.root), str(target.root), ["one"])
    outcome.write_text(text)
    copy(str(source.root), str(target.root), ["one"])
    assert files_below(target.root / "runs") == files_below(source.root / "runs")


def test_another_run_of_that_name_is_not_overwritten(source: Artifacts, target: Artifacts) -> None:
    pretend(source)
    pretend(target.open(), training={"learning_rate": 0.1})
    before = files_of(target.root)
    with pytest.raises(ConfigError, match="is of another run of that name; nothing was copied"):
        copy(str(source.root), str(target.root), ["one"])
    assert files_of(target.root) == before


def test_what_was_retired_stays_so(source: Artifacts, target: Artifacts) -> None:
    plan = pretend(source)
    ref = plan.stages[0].ref("activations")
    whole = files_of(source.root)
    source.retire(ref)
    copy(str(source.root), str(target.root), ["one"])
    assert target.state(ref) is State.RETIRED
    # Where it is there in full, it is fetched if it is asked for by name, and not along with others.
    (source.folder(ref) / "retired.json").unlink()
    put_back = {name: data for name, data in whole.items() if ref.name in name}
    for name, data in put_back.items():
        (source.root / name).parent.mkdir(exist_ok=True)
        (source.root / name).write_bytes(data)
    copy(str(source.root), str(target.root), ["one"])
    assert target.state(ref) is State.RETIRED
    copy(str(source.root), str(target.root), [ref.name])
    assert target.checked(ref)


# ---------------------------------------------------------------- artifacts


def test_an_artifact_comes_with_all_it_was_made_from_and_is_kept_from_gc(
    source: Artifacts, target: Artifacts, run: Run
) -> None:
    plan = pretend(source)
    ref = plan.stages[1].ref("stack")
    result = run("pull", source.root, "stack-1", "--artifacts", target.root)
    assert result.code == 0
    expected = {ref.name, plan.data_ref.name, *(plan.stages[1].ref(kind).name for kind in ("build", "trunk"))}
    expected |= {plan.stages[0].ref(kind).name for kind in ("build", "trunk", "stack", "activations", "validation")}
    assert names(target) == expected
    assert pins(target) == [ref]
    assert collect(target, keep_last=0).removals == []
    assert {name: data for name, data in files_of(target.root).items() if "-" in name and "pins" not in name} == {
        name: data for name, data in files_of(source.root).items() if name.split("/")[1] in expected
    }


def test_without_names_everything_goes(source: Artifacts, target: Artifacts) -> None:
    pretend(source)
    pretend(source, "two", training={"learning_rate": 0.9})
    copy(str(source.root), str(target.root), [])
    assert files_of(target.root) == files_of(source.root)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_what_is_damaged_does_not_arrive(damage: str, source: Artifacts, target: Artifacts, run: Run) -> None:
    plan = pretend(source)
    folder = source.folder(plan.stages[0].ref("stack"))
    path = folder / ("manifest.json" if damage == "manifest" else "content")
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(
            data[:-1] if damage == "cut" else data.replace(data[40:41], b"#", 1) if damage == "flip" else data[:-9]
        )
    result = run("push", target.root, "one", "--artifacts", source.root)
    assert result.code == 3
    assert str(path) in result.err
    assert not target.folder(plan.stages[0].ref("stack")).exists()
    assert not list((target.root / "runs").glob("*"))
    path.write_bytes(data)
    assert run("push", target.root, "one", "--artifacts", source.root).code == 0
    assert names(target) == names(source)
    assert all(target.checked(ref) for ref in plan.recipes)
    assert not list((target.root / "work").iterdir())


def test_a_byte_that_changes_on_the_way_is_found(
    source: Artifacts, target: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretend(source)

    def copyfile(here: Path, there: Path) -> None:
        there.write_bytes(here.read_bytes()[:-1] + b"#")

    with monkeypatch.context() as patch:
        patch.setattr(copying.shutil, "copyfile", copyfile)
        with pytest.raises(ArtifactCorruptError, match="arrived as sha256:"):
            copy(str(source.root), str(target.root), ["one"])
    assert names(target) == set()
    copy(str(source.root), str(target.root), ["one"])
    assert all(target.checked(ref) for ref in plan.recipes)


def test_other_bytes_of_one_id_are_not_mixed(source: Artifacts, target: Artifacts) -> None:
    """The same recipe, computed on another machine: what was made from the one does not fit the other."""
    plan = pretend(source)
    ref = plan.stages[0].ref("stack")
    work = target.open().work(ref)
    (work / "content").write_text("other weights")
    target.seal(ref, plan.recipes[ref], (), {}, {})
    before = files_of(target.root)
    with pytest.raises(ArtifactCorruptError, match=r"holds other bytes than .* Nothing was copied"):
        copy(str(source.root), str(target.root), ["one"])
    assert files_of(target.root) == before


def test_a_strangers_list_does_not_lead_out_of_the_folder(source: Artifacts, target: Artifacts, tmp_path: Path) -> None:
    plan = pretend(source)
    ref = plan.data_ref
    manifest = json.loads((source.folder(ref) / MANIFEST).read_text())
    manifest["files"]["../../../escaped"] = {**manifest["files"]["content"], "content": False}
    (source.root.parent / "escaped").write_bytes((source.folder(ref) / "content").read_bytes())
    forged = Manifest.model_validate({**manifest, "seal": ""})
    forged = forged.model_copy(update={"seal": forged.expected_seal()})
    (source.folder(ref) / MANIFEST).write_text(forged.model_dump_json())
    deep = Artifacts(tmp_path / "deep" / "target")
    with pytest.raises(ArtifactCorruptError, match="leads out of its folder"):
        copy(str(source.root), str(deep.root), [ref.name])
    assert not (tmp_path / "deep/escaped").exists()


def test_too_little_room_is_told_before_the_first_byte(
    source: Artifacts, target: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(source)
    free = shutil.disk_usage(source.root)._replace(free=10)
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda path: free)
    with pytest.raises(StoreSpaceError, match="bytes are to be copied and 10 are free"):
        copy(str(source.root), str(target.root), [])
    assert names(target) == set()


def test_what_cannot_be_copied(source: Artifacts, target: Artifacts, run: Run, tmp_path: Path) -> None:
    pretend(source)
    assert run("push", source.root, "--artifacts", source.root).code == 2
    assert run("push", tmp_path / "source" / ".." / "source", "--artifacts", source.root).code == 2
    assert run("pull", tmp_path / "nowhere", "--artifacts", target.root).code == 2
    assert run("push", target.root, "nothing", "--artifacts", source.root).code == 3
    assert run("push", target.root, "stack-", "--artifacts", source.root).code == 2
    assert not target.root.exists()


def test_a_source_that_cannot_be_written_is_read(
    source: Artifacts, target: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(source)
    real = os.open

    def read_only(path: object, flags: int, *rest: object, **named: object) -> int:
        if str(path).startswith(str(source.root)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    copy(str(source.root), str(target.root), [])
    assert names(target) == names(source)


def test_gc_does_not_remove_what_is_being_copied(
    source: Artifacts, target: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(source)
    real, refused = copying._copy_file, []

    def copy_file(*arguments: object) -> None:
        for artifacts in (source, target):
            with pytest.raises(RunBusyError, match="in use by another process"):
                collect(artifacts, keep_last=0)
        refused.append(True)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(copying, "_copy_file", copy_file)
    copy(str(source.root), str(target.root), [])
    assert refused


# ---------------------------------------------------------------- killed


class Pushing:
    """A push of a run, killed before each of its steps."""

    SECTIONS = {"training": {"progressive": {"target_stacks": 1}}}  # noqa: RUF012

    @staticmethod
    def prepare(folder: Path) -> None:
        source = folder.with_name("source")
        if not source.exists():
            artifacts = Artifacts(source).open()
            plan = pretend(artifacts, **Pushing.SECTIONS)
            for ref in plan.recipes.keys() - {plan.data_ref, plan.stages[0].ref("stack")}:
                artifacts.discard(ref)  # two are enough; what is not there is not missed
        Artifacts(folder).open()

    @staticmethod
    def act(folder: Path) -> None:
        copy(str(folder.with_name("source")), str(folder), ["one"])

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        source, target = Artifacts(folder.with_name("source")), Artifacts(folder)
        refs = [ref for ref in plan_of(**Pushing.SECTIONS)[1].recipes if source.sealed(ref)]

        def whole() -> bool:
            return {target.state(ref) for ref in refs} == {State.SEALED}

        assert len(refs) == 2
        assert all(target.checked(ref) for ref in refs if target.state(ref) is not State.ABSENT)
        assert whole() or not (folder / "runs/one/attempts/0001/start.json").exists()
        assert whole() or not finished
        Pushing.act(folder)
        assert all(target.checked(ref) for ref in refs)
        collect(target)
        assert files_of(folder) == files_of(source.root)


def test_killed_at_any_step_it_goes_on() -> None:
    died = die_everywhere(Pushing)
    assert died["rename"] >= 12


def test_a_copy_goes_on_at_the_first_file_that_has_not_arrived(
    source: Artifacts, target: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretend(source)
    ref = plan.stages[0].ref("stack")
    real, copied = copying.shutil.copyfile, list[str]()

    def copyfile(here: Path, there: Path) -> None:
        if ref.name in str(here):
            if len(copied) == 1:
                copied.append("killed")
                raise KeyboardInterrupt
            copied.append(here.name)
        real(here, there)

    monkeypatch.setattr(copying.shutil, "copyfile", copyfile)
    with pytest.raises(KeyboardInterrupt):
        copy(str(source.root), str(target.root), ["one"])
    copy(str(source.root), str(target.root), ["one"])
    assert copied == ["content", "killed", "more"]
    assert target.checked(ref)


def test_a_killed_training_at_the_target_does_not_mix_with_what_arrives(source: Artifacts, target: Artifacts) -> None:
    plan = pretend(source)
    ref = plan.stages[0].ref("stack")
    (target.open().work(ref) / "content").write_text("of a checkpoint")
    with without_gc(target):
        pass
    copy(str(source.root), str(target.root), ["one"])
    assert target.checked(ref)
    assert (target.root / "work" / ref.name / "content").exists()
    collect(target)  # what is sealed needs no checkpoint
    assert not list((target.root / "work").iterdir())


def test_manifests_arrive_as_they_are(source: Artifacts, target: Artifacts) -> None:
    plan = pretend(source)
    put_later = plan.stages[2].ref("stack")
    shutil.rmtree(source.folder(put_later))
    put(source, plan, put_later)
    copy(str(source.root), str(target.root), [])
    assert manifests(target.root) == manifests(source.root)


def test_a_training_run_of_a_kind_finds_its_folder(reference: Reference, tmp_path: Path) -> None:
    root = tmp_path / "a"
    copy(str(reference()), str(root), ["stack-1"])
    assert folder_of(root, "stack", 1).name == folder_of(reference(), "stack", 1).name
    # Only what is above it has to be made.
    made = grown(tiny(tmp_path), root).made
    assert [task for task in made if task.startswith("train")] == ["train 2"]
