"""What gc removes and never does, no matter what else is running and where it is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import Kind
from storage.artifacts import Artifacts, State
from storage.collect import collect, leftovers, plan_collection, without_gc
from storage.errors import ArtifactCorruptError, ArtifactsFolderError, RunBusyError
from storage.manifest import MANIFEST
from storage.reachability import pin, unpin
from storage.runs import run_names
from support.commands import Run
from support.disk import die_everywhere
from support.house import MORE, files_of, freeable, held_elsewhere, plan_of, planned, pretend, put
from support.records import change
from support.runs import folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


def names(artifacts: Artifacts) -> set[str]:
    return {folder.name for folder in artifacts.everything()}


# ---------------------------------------------------------------- what goes


def test_what_a_run_reaches_stays(artifacts: Artifacts) -> None:
    pretend(artifacts)
    pretend(artifacts, "two", **MORE)
    before = files_of(artifacts.root)
    assert collect(artifacts).removals == []
    assert files_of(artifacts.root) == before


def test_what_no_run_reaches_goes(artifacts: Artifacts) -> None:
    one, two = pretend(artifacts), pretend(artifacts, "two", **MORE)
    assert planned(two) - planned(one)
    shutil.rmtree(artifacts.root / "runs/two")
    before = freeable(artifacts.root)
    forecast = plan_collection(artifacts)
    assert {removal.path.name for removal in forecast.removals} == planned(two) - planned(one)
    assert freeable(artifacts.root) == before
    done = collect(artifacts)
    assert done.removals == forecast.removals
    assert before - freeable(artifacts.root) == forecast.n_bytes > 0
    assert names(artifacts) == planned(one)


def test_every_attempt_of_a_run_counts_unless_superseded_ones_are_given_up(artifacts: Artifacts) -> None:
    first = pretend(artifacts, training={"learning_rate": 0.1})
    second = pretend(artifacts, training={"learning_rate": 0.2})
    assert collect(artifacts).removals == []
    collect(artifacts, newest_only=True)
    assert names(artifacts) == planned(second) != planned(first)
    assert len(list((artifacts.root / "runs/one/attempts").iterdir())) == 2


def test_only_the_last_runs_count(artifacts: Artifacts) -> None:
    plans = {name: pretend(artifacts, name, training={"learning_rate": rate}) for name, rate in RATES.items()}
    for day, name in enumerate(("b", "a", "c")):  # the order in which they were started
        start = artifacts.root / f"runs/{name}/attempts/0001/start.json"
        change(start, started=f"2026-01-0{day + 1}T00:00:00+00:00")
    before = freeable(artifacts.root)
    done = collect(artifacts, keep_last=2)
    assert run_names(artifacts) == ["a", "c"]
    assert names(artifacts) == planned(plans["a"], plans["c"])
    assert before - freeable(artifacts.root) == done.n_bytes
    collect(artifacts, keep_last=0)
    assert names(artifacts) == set()
    assert run_names(artifacts) == []


RATES = {"a": 0.1, "b": 0.2, "c": 0.3}


def test_without_any_run_not_everything_goes_unasked(artifacts: Artifacts) -> None:
    pretend(artifacts)
    shutil.rmtree(artifacts.root / "runs/one")
    before = files_of(artifacts.root)
    with pytest.raises(ConfigError, match="holds artifacts and no run"):
        collect(artifacts)
    assert files_of(artifacts.root) == before


def test_what_dead_writers_left_goes_and_what_a_run_goes_on_from_stays(artifacts: Artifacts) -> None:
    plan = pretend(artifacts)
    root, wanted, sealed = artifacts.root, plan.stages[2].ref("stack"), plan.stages[1].ref("stack")
    shutil.rmtree(artifacts.folder(wanted))
    (artifacts.work(wanted) / "checkpoint").write_text("go on from here")
    stranger = plan_of(training={"learning_rate": 0.9})[1].stages[0].ref("stack")
    leave = {
        root / "work" / sealed.name / "half": "of a forced attempt that was killed",
        root / "work" / stranger.name / "half": "nobody wants it",
        root / "work" / f"{sealed.name}.incoming" / "content": "of a copy",
        root / "work" / f"{sealed.name}.retired.json": "{}",
        root / "trash" / "x.1.0" / "data": "thrown away",
        root / "runs/one/attempts/0002/plan.json": "{}",
        root / "runs/one/attempts/0001/outcome.json.tmp": "{",
        root / "runs/half/attempts/0001/config.yaml": "",
        artifacts.folder(sealed) / "stack.tmp": "x",
        artifacts.folder(stranger) / "stack.safetensors": "never sealed",
    }
    keep = files_of(root)
    for path, text in leave.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = freeable(root)
    done = collect(artifacts)
    assert files_of(root) == keep
    assert before - freeable(root) == done.n_bytes == sum(map(len, leave.values()))
    (note,) = done.notes
    assert note.startswith(f"{root / 'work' / wanted.name}: unfinished; it stays")


def test_the_data_of_a_retired_artifact_that_a_kill_left(artifacts: Artifacts) -> None:
    plan = pretend(artifacts)
    ref = plan.stages[0].ref("activations")
    artifacts.mark_retired(ref)
    done = collect(artifacts)
    assert {removal.path.name for removal in done.removals} == {"content", "sub"}
    assert artifacts.state(ref) is State.RETIRED
    assert {path.name for path in artifacts.folder(ref).iterdir()} == {MANIFEST, "retired.json"}


def test_locks_and_quarantine_stay(artifacts: Artifacts) -> None:
    plan = pretend(artifacts)
    aside = Path(artifacts.quarantine(plan.stages[0].ref("activations"), "row 3 differs"))
    locks = {path.name for path in (artifacts.root / "locks").iterdir()}
    done = collect(artifacts, keep_last=0)
    assert aside.exists()
    assert any("1 in quarantine stay" in note for note in done.notes)
    assert {path.name for path in (artifacts.root / "locks").iterdir()} == locks


@pytest.mark.parametrize("edit", [('"files": {', '"files": {"x": {"size": 1, "checksum": ""}, '), ('"ref"', '"fer"')])
def test_an_edited_manifest_is_not_believed(edit: tuple[str, str], artifacts: Artifacts, run: Run) -> None:
    plan = pretend(artifacts)
    folder = artifacts.folder(plan.stages[2].ref("stack"))
    manifest = folder / MANIFEST
    assert edit[0] in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(*edit, 1))
    result = run("gc", "--keep-last", "0", "--artifacts", artifacts.root)
    assert result.code == 0
    assert f"{folder}: " in result.err
    assert "it stays" in result.err
    assert names(artifacts) == {folder.name}


def test_what_is_not_ours_stays(artifacts: Artifacts, tmp_path: Path) -> None:
    plan = pretend(artifacts)
    (artifacts.root / "stacks/notes").mkdir()
    (artifacts.root / "stacks/notes/a.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    folder = artifacts.folder(plan.stages[2].ref("stack"))
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    copy = artifacts.root / "stacks/stack-9-0123456789ab"
    shutil.copytree(elsewhere, copy)
    collect(artifacts, keep_last=0)
    assert (artifacts.root / "stacks/notes/a.txt").exists()
    assert (elsewhere / "content").exists()
    assert folder.is_symlink()
    assert copy.exists()


@pytest.mark.parametrize("what", ["plan.json", "start.json", "pin"])
def test_a_record_that_cannot_be_read_stops_gc(what: str, artifacts: Artifacts) -> None:
    """Nobody knows then what must stay."""
    plan = pretend(artifacts)
    pretend(artifacts, "two", **MORE)
    pin(artifacts, plan.stages[0].ref("stack"))
    (found,) = artifacts.root.glob("pins/*") if what == "pin" else artifacts.root.glob(f"runs/two/attempts/*/{what}")
    found.write_text(found.read_text()[:-9])
    before = files_of(artifacts.root)
    with pytest.raises(ArtifactCorruptError) as error:
        collect(artifacts)
    assert str(found) in str(error.value)
    assert files_of(artifacts.root) == before


# ---------------------------------------------------------------- pins


def test_a_pin_keeps_an_artifact_and_all_it_was_made_from(artifacts: Artifacts) -> None:
    plan = pretend(artifacts)
    ref = plan.stages[1].ref("stack")
    pin(artifacts, ref)
    collect(artifacts, keep_last=0)
    kinds: list[Kind] = ["build", "trunk", "stack", "activations", "validation"]
    below = {plan.stages[0].ref(kind).name for kind in kinds} - {plan.stages[0].ref("build").name}
    # A stack names the stack below, not what that was made by; their own manifests do.
    below |= {plan.stages[0].ref("build").name, plan.data_ref.name}
    own = {plan.stages[1].ref(kind).name for kind in ("build", "trunk", "stack")}
    assert names(artifacts) == below | own
    assert artifacts.state(ref) is State.SEALED
    unpin(artifacts, ref.name[:-3])
    collect(artifacts, keep_last=0)
    assert names(artifacts) == set()


def test_a_damaged_artifact_that_is_pinned_stops_gc(artifacts: Artifacts) -> None:
    plan = pretend(artifacts)
    ref = plan.stages[1].ref("stack")
    pin(artifacts, ref)
    manifest = artifacts.folder(ref) / MANIFEST
    manifest.write_text(manifest.read_text()[:-5])
    before = files_of(artifacts.root)
    with pytest.raises(ArtifactCorruptError, match="is no manifest"):
        collect(artifacts, keep_last=0)
    assert files_of(artifacts.root) == before


def test_pinning_by_command(artifacts: Artifacts, run: Run) -> None:
    name = pretend(artifacts).stages[1].ref("stack").name
    where = ("--artifacts", artifacts.root)
    assert name in run("gc", "--pin", "stack-1", *where).out
    collect(artifacts, keep_last=0)
    assert name in names(artifacts)
    assert run("gc", "--pin", "nothing", *where).code == 3
    assert run("gc", "--unpin", "stack-2", *where).code == 3
    assert run("gc", "--unpin", "stack-1", *where).out == "nothing is pinned\n"


# ---------------------------------------------------------------- others at work


def test_gc_refuses_while_a_run_is_live(artifacts: Artifacts, run: Run) -> None:
    pretend(artifacts)
    with held_elsewhere(artifacts, "run") as process:
        before = files_of(artifacts.root)
        result = run("gc", "--keep-last", 0, "--artifacts", artifacts.root)
        assert result.code == 2
        assert f"is in use by run live (process {process.pid} on " in result.err
        assert files_of(artifacts.root) == before
        listed = run("gc", "--dry-run", "--artifacts", artifacts.root)
        assert listed.code == 0
        assert f"refused: {artifacts.root} is in use by run live (process {process.pid} on " in listed.err
    assert "refused" not in run("gc", "--dry-run", "--artifacts", artifacts.root).err
    assert run("gc", "--keep-last", 0, "--artifacts", artifacts.root).code == 0
    assert names(artifacts) == set()


def test_a_live_run_keeps_its_leftovers_from_verify(artifacts: Artifacts) -> None:
    """What a live process makes is none; what a dead one left of an artifact nobody makes is."""
    plan = pretend(artifacts)
    refs = [plan.stages[1].ref("stack"), plan.stages[2].ref("stack")]
    for ref in refs:
        (artifacts.work(ref) / "half").touch()
    (artifacts.root / "trash/x.1.0").touch()
    with without_gc(artifacts), artifacts.lock(refs[0].name):
        (line,) = leftovers(artifacts)
    assert line.startswith(str(artifacts.root / "work" / refs[1].name))
    assert len(leftovers(artifacts)) == 3


def test_two_gc_at_once(artifacts: Artifacts) -> None:
    pretend(artifacts)
    with held_elsewhere(artifacts, "gc") as process:
        with pytest.raises(RunBusyError, match=rf"`stackwise gc` \(process {process.pid} on .* since 2.*wait"):
            collect(artifacts, keep_last=0)
        told: list[str] = []
        # A run waits for its end instead: it has nothing to lose by it.
        lock = artifacts.lock("gc", shared=True, on_wait=told.append, should_stop=lambda: bool(told))
        with pytest.raises(Exception, match="stopped on request"), lock:
            raise AssertionError("gc holds it")
        assert told[0].startswith(f"process {process.pid} on ")


def test_a_command_that_finds_all_there_keeps_gc_out(
    tmp_path: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at what is there and its saying so, nothing goes."""
    from flows.cli import train as start

    config = tiny(tmp_path)
    shutil.copytree(reference(), tmp_path / "artifacts")
    asked: list[str] = []

    def register(artifacts: Artifacts, *_: Any) -> None:
        with pytest.raises(RunBusyError):
            collect(artifacts, keep_last=0)
        asked.append("register")

    monkeypatch.setattr(start, "register_complete", register)
    start.train(config, [], str(tmp_path / "artifacts"), -1, "", contextlib.nullcontext(lambda event: None))
    assert asked == ["register"]


# ---------------------------------------------------------------- folders that will not do


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    for room in ("work", "trash", "locks"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactsFolderError, match="is not an artifacts folder"):
        collect(Artifacts(tmp_path), keep_last=0)
    assert len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("command", [("gc",), ("gc", "--pin", "stack-1"), ("quarantine", "--drop", "x")])
def test_a_read_only_folder(
    command: tuple[str, ...], artifacts: Artifacts, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(artifacts)
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    result = run(*command, "--artifacts", artifacts.root)
    assert result.code == 2
    (line,) = result.faults
    assert line.startswith(f"--artifacts {artifacts.root}: cannot be written (Read-only file system)")
    assert run("gc", "--dry-run", "--artifacts", artifacts.root).code == 0
    assert run("du", "--artifacts", artifacts.root).code == 0


# ---------------------------------------------------------------- killed


class Collecting:
    """A gc that removes a run, artifacts, work and trash, killed before each of its steps."""

    template: ClassVar[Path | None] = None
    """Made once: every kill begins with a copy of it."""

    @staticmethod
    def prepare(folder: Path) -> None:
        if Collecting.template is None:
            Collecting.template = folder.with_name("template")
            Collecting.fill(Collecting.template)
        shutil.copytree(Collecting.template, folder, dirs_exist_ok=True)

    @staticmethod
    def fill(folder: Path) -> None:
        artifacts = Artifacts(folder).open()
        pretend(artifacts, "old", **MORE)
        start = folder / "runs/old/attempts/0001/start.json"
        change(start, started="2026-01-01T00:00:00+00:00")
        plan = pretend(artifacts, "one")
        (artifacts.work(plan_of("old", **MORE)[1].stages[2].ref("stack")) / "half").write_text("x")
        artifacts.mark_retired(plan.stages[0].ref("activations"))

    @staticmethod
    def act(folder: Path) -> None:
        collect(Artifacts(folder), keep_last=1)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts, (_, plan) = Artifacts(folder), plan_of("one")

        def kept_is_whole() -> None:
            for ref in plan.recipes:
                retired = ref == plan.stages[0].ref("activations")
                assert artifacts.state(ref) is (State.RETIRED if retired else State.SEALED)
                assert retired or artifacts.checked(ref)

        kept_is_whole()
        assert {artifacts.state(ref) for ref in plan_of("old", **MORE)[1].recipes} <= {
            State.SEALED,
            State.RETIRED,
            State.ABSENT,
        }
        # The next gc mends it, even one that keeps every run it finds, if the old one's record is gone.
        gone = "old" not in run_names(artifacts)
        before = freeable(folder)
        done = collect(artifacts, keep_last=None if gone else 1)
        assert before - freeable(folder) == done.n_bytes
        assert not finished or done.removals == []
        assert names(artifacts) == planned(plan)
        assert not list((folder / "trash").iterdir())
        assert not list((folder / "work").iterdir())
        kept_is_whole()


def test_killed_at_any_step_the_next_gc_mends_it() -> None:
    died = die_everywhere(Collecting)
    assert died["rename"] >= 6
    assert died["remove"] >= 10


# ---------------------------------------------------------------- an open reader


def test_a_reader_of_what_gc_removes_gives_right_rows_or_an_error(tmp_path: Path) -> None:
    import torch

    from storage.activations.reader import StoreReader
    from storage.errors import ArtifactError
    from storage.manifest import read_manifest

    root = tmp_path / "artifacts"
    grown(tiny(tmp_path, {"cache.keep": "all"}), root)
    folder = folder_of(root, "activations", 1)
    files = read_manifest(folder).checksums()
    places = list(range(4))
    with StoreReader(folder, files) as reader, StoreReader(folder, files) as opened_only:
        expected = reader.read("train", places).clone()
        collect(Artifacts(root))
        assert torch.equal(reader.read("train", places), expected)
        collect(Artifacts(root), keep_last=0)
        assert not folder.exists()
        for unreachable in (reader, opened_only):
            try:
                rows = unreachable.read("train", places)
            except ArtifactError as error:
                assert str(folder) in str(error)  # noqa: PT017
            else:
                assert torch.equal(rows, expected)


def test_put_is_what_a_run_makes(artifacts: Artifacts) -> None:
    """The folders of these tests are as real ones are."""
    plan = pretend(artifacts)
    ref = plan.stages[0].ref("stack")
    shutil.rmtree(artifacts.folder(ref))
    put(artifacts, plan, ref)
    assert artifacts.checked(ref) == artifacts.folder(ref)


def test_a_link_that_was_left_in_work_goes_and_not_what_it_leads_to(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").write_text("mine")
    link = artifacts.root / "work/stack-1-0123456789ab"
    link.symlink_to(tmp_path / "elsewhere")
    collect(artifacts)
    assert not link.is_symlink()
    assert not list((artifacts.root / "trash").iterdir())
    assert (tmp_path / "elsewhere/thesis.txt").exists()


def test_only_one_who_holds_a_lock_alone_is_named(artifacts: Artifacts) -> None:
    """Those who share it do not sign: the text is of whoever held it alone before."""
    collect(artifacts)
    with without_gc(artifacts):
        assert artifacts.place.lock_holder("gc") is None
    with artifacts.lock("gc"):
        holder = artifacts.place.lock_holder("gc")
    assert holder is not None
    assert holder.pid == os.getpid()
