"""Garbage collection: removes artifacts that no run reaches, and what dead processes left."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.failpoints import failpoint
from storage.artifacts import Artifacts
from storage.errors import ArtifactsFolderError, RunBusyError
from storage.files import TEMPORARY_SUFFIX
from storage.inventory import Found, Inventory, by_folder, is_artifact_name
from storage.local import NEWER_ROOMS, ROOMS, empty_trash
from storage.locks import OnWait, no_wait
from storage.place import QUARANTINE, RUNS
from storage.reachability import find_reachable, newest_first
from storage.runs import live_runs, run_names

_UNREACHED, _UNSEALED = "no run reaches it", "never sealed"


@dataclass(frozen=True)
class Removal:
    """Something that gc removes."""

    path: Path
    n_bytes: int
    why: str


@dataclass
class Collection:
    """What gc removes, in this order, and what it leaves for a person to decide on."""

    removals: list[Removal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Artifacts that stay because their manifests cannot be trusted."""

    @property
    def n_bytes(self) -> int:
        """Bytes that are freed."""
        return sum(removal.n_bytes for removal in self.removals)


def collect(artifacts: Artifacts, keep_last: int | None = None, *, newest_only: bool = False) -> Collection:
    """Remove what `plan_collection` finds, and return what was removed; after a kill the next gc finishes it.

    Bytes that this user may not delete stay in trash/, and a note says so.

    Raises:
        RunBusyError: a run or another gc is at work in a folder. Others as `plan_collection`; nothing was removed.
    """
    with contextlib.nullcontext() if artifacts.is_remote else exclusive(artifacts):
        plan = plan_collection(artifacts, keep_last, newest_only=newest_only)
        done = Collection(notes=plan.notes, damaged=plan.damaged)

        def is_wanted(name: str) -> bool:
            artifacts.place.refresh_records()  # the records that were to go went first
            return name in find_reachable(artifacts, newest_only=newest_only).names

        for number, removal in enumerate(plan.removals):
            failpoint("gc", number)
            if artifacts.place.collect(removal.path.relative_to(artifacts.root).as_posix(), is_wanted):
                done.removals.append(removal)
            else:
                done.notes.append(f"{removal.path.name}: a process began to use it meanwhile; it stays")
        failpoint("gc-empty", 0)
        empty_trash(artifacts.root)
        trash = artifacts.root / "trash"
        if left := sum(path.lstat().st_size for path in trash.rglob("*") if path.is_symlink() or not path.is_dir()):
            done.notes.append(f"{left:,} bytes in {trash} may not be deleted by this user")
    return done


def plan_collection(artifacts: Artifacts, keep_last: int | None = None, *, newest_only: bool = False) -> Collection:
    """Find what gc would remove now if nothing else were at work; nothing is changed.

    Records of runs go first, then what they reached, so that the next gc finds everything that a killed one left.

    Args:
        artifacts: of the place.
        keep_last: only so many runs count, those started last; the records of the others go too.
        newest_only: what only earlier attempts of a run planned goes too.

    Raises:
        ArtifactCorruptError: a run's record or a pin cannot be read, so it is unknown what must stay.
        ConfigError: there is no run at all, and `keep_last` does not say that everything may go.
    """
    return _Planner(artifacts).plan(keep_last, newest_only=newest_only)


class _Planner:
    """Finds what may go, by one listing."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts, self._place = artifacts, artifacts.place
        self._inventory = Inventory(artifacts)
        self._place.refresh_records()  # after the listing, which then shows nothing of runs that are not known
        self._in_use = self._place.names_in_use(self._inventory.entries)
        self._found = self._inventory.artifacts()
        self._collection = Collection()

    def plan(self, keep_last: int | None, *, newest_only: bool) -> Collection:
        runs = newest_first(self._artifacts)
        live = {name.removeprefix("run-") for name in self._in_use if name.startswith("run-")}
        kept = runs if keep_last is None else [name for name in runs if name in {*runs[:keep_last], *live}]
        reached = find_reachable(self._artifacts, kept, newest_only=newest_only).names
        all_stay = all(each.path.name in reached for each in self._found if each.manifest)
        if not runs and keep_last is None and not all_stay:
            problem = "holds artifacts and no run, so only pinned ones would stay; if that is meant, say --keep-last 0"
            raise ConfigError([Fault("--artifacts", self._artifacts.uri, problem)])
        gone = [name for name in runs if name not in kept]
        self._remove((f"{RUNS}/{name}", f"not among the last {keep_last} runs") for name in gone)
        self._remove(self._broken_records(gone))
        for each in self._found:
            self._judge(each, each.path.name in reached)
        self._judge_work(reached - {each.path.name for each in self._found if each.standing == "sealed"})
        self._remove(self._place.litter(self._inventory.entries))
        if aside := self._inventory.folders(QUARANTINE):
            self._collection.notes.append(f"{len(aside)} in quarantine stay: see `stackwise quarantine`")
        return self._collection

    def _remove(self, paths: Iterable[tuple[str, str]]) -> None:
        self._collection.removals += [
            Removal(self._artifacts.root / path, self._inventory.n_bytes(path), why) for path, why in paths
        ]

    def _broken_records(self, gone: list[str]) -> Iterator[tuple[str, str]]:
        """Yield attempts that were killed before they began, and half-written files of records that stay."""
        for name, entries in self._inventory.folders(RUNS).items():
            if name in gone:
                continue
            attempts = by_folder({path[9:]: each for path, each in entries.items() if path.startswith("attempts/")})
            never_began = [each for each in attempts if each.isdecimal() and "start.json" not in attempts[each]]
            for attempt in never_began:
                if not self._place.is_young(max(entry.modified for entry in attempts[attempt].values())):
                    yield f"{RUNS}/{name}/attempts/{attempt}", "an attempt that never began"
            for path in sorted(path for path in entries if path.endswith(TEMPORARY_SUFFIX)):
                if not any(path.startswith(f"attempts/{attempt}/") for attempt in never_began):
                    yield f"{RUNS}/{name}/{path}", "half-written"

    def _judge(self, found: Found, reached: bool) -> None:
        """Decide on what lies in a room of artifacts; what is damaged may belong to a run, so it stays."""
        where, name = self._artifacts.location(found.path), found.path.name
        if found.standing == "damaged":
            self._collection.damaged.append(f"{where}: {found.problem}; it stays, look at it and remove it yourself")
        elif found.standing == "foreign":
            self._collection.notes.append(f"{where}: {found.problem}; it stays")
        elif name in self._in_use:
            self._collection.notes.append(f"{name}: a process is at work on it; it stays")
        elif found.manifest is None or reached:
            self._remove(self._place.leftovers(found.key, found.manifest, found.entries, found.standing == "retired"))
        elif self._place.is_young(found.modified):
            self._collection.notes.append(f"{name}: no run reaches it, and it is younger than 24 hours; it stays")
        else:
            self._remove([(found.key, _UNREACHED)])

    def _judge_work(self, wanted: frozenset[str]) -> None:
        """Decide on what lies in work/ of a folder: an unfinished artifact that a run wants stays."""
        for name, entries in self._inventory.folders("work").items():
            if "" not in entries and name in wanted:
                where = self._place.location(f"work/{name}")
                self._collection.notes.append(f"{where}: unfinished; it stays, the run that wants it goes on from it")
            else:
                self._remove([(f"work/{name}", "left by a dead writer")])


def leftovers(artifacts: Artifacts) -> list[str]:
    """Return a line, with the remedy, for everything left over that gc would remove; none of it is damage.

    While a process is at work, only what no live process can be using is listed.
    """
    collection = plan_collection(artifacts, keep_last=len(run_names(artifacts)))
    found = [removal for removal in collection.removals if removal.why != _UNREACHED]
    if artifacts.place.is_held("gc"):
        found = [removal for removal in found if _is_unused(artifacts, removal)]
    return [f"{entry.path}: {entry.why}; `stackwise gc` removes it" for entry in found] + collection.notes


def _is_unused(artifacts: Artifacts, removal: Removal) -> bool:
    """Say whether no live process can be using something."""
    name = removal.path.name
    in_work = is_artifact_name(name) and removal.path.parent == artifacts.root / "work"
    return removal.why == _UNSEALED or (in_work and not artifacts.place.is_held(name))


# ---------------------------------------------------------------- the lock between gc and everything else


@contextlib.contextmanager
def exclusive(artifacts: Artifacts) -> Generator[None]:
    """Keep every run, copy and other gc out of a folder for as long as the block lasts.

    Raises:
        RunBusyError: one is at work; it is named.
        ArtifactsFolderError: this is not an artifacts folder, or it cannot be written.
    """
    lacking = [name for name in ROOMS if not (artifacts.root / name).is_dir() and name not in NEWER_ROOMS]
    if lacking:  # a mistyped folder: what lies in its work/ or trash/ is not ours
        raise ArtifactsFolderError(
            f"--artifacts {artifacts.root}: is not an artifacts folder (it has no {lacking[0]}/); nothing was removed"
        )
    lock = artifacts.lock("gc")
    with _explain_read_only(artifacts):
        free = lock.try_acquire()
    if not free:
        raise RunBusyError(
            f"{artifacts.root} is in use by {_user_of(artifacts)}; wait for its end, or stop it. Nothing was removed"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def without_gc(artifacts: Artifacts, on_wait: OnWait = no_wait) -> Generator[None]:
    """Keep gc out for as long as the block lasts, after waiting for one that is at work."""
    with contextlib.ExitStack() as stack:
        with _explain_read_only(artifacts):
            stack.enter_context(artifacts.lock("gc", shared=True, on_wait=on_wait))
        yield


def in_use_by(artifacts: Artifacts) -> str:
    """Name the processes that would keep gc out now; '' if there are none. Writes nothing."""
    return _user_of(artifacts) if artifacts.place.is_held("gc") else ""


def _user_of(artifacts: Artifacts) -> str:
    """Name the live runs, else the process that holds the lock exclusively."""
    if live := live_runs(artifacts):
        return ", ".join(f"run {name} ({holder})" for name, holder in live.items())
    gc = artifacts.place.lock_holder("gc")
    return f"`stackwise gc` ({gc})" if gc else "another process of StackWise"


@contextlib.contextmanager
def _explain_read_only(artifacts: Artifacts) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):  # ENOENT: it has no locks/
            raise
        raise ArtifactsFolderError(
            f"--artifacts {artifacts.root}: cannot be written ({error.strerror}); give a folder this user may write to"
        ) from None
