"""Garbage collection: what no run reaches, and what dead processes left, leaves the artifacts folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.failpoints import failpoint
from storage.alone import alone
from storage.durable import TEMPORARY_SUFFIX
from storage.layout import Artifacts
from storage.locks import is_held
from storage.reach import find_reach, newest_first
from storage.roots import as_remote
from storage.runs import run_names
from storage.survey import Found, bytes_below, is_artifact_name, survey

_HALF, UNREACHED, _UNSEALED = "half-written", "no run reaches it", "never sealed"


@dataclass(frozen=True)
class Removal:
    """Something that goes."""

    path: Path
    n_bytes: int
    why: str


@dataclass
class Collection:
    """What a gc removes, in the order it does, and what it leaves though somebody should look at it."""

    removals: list[Removal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Artifacts that stay because their manifests cannot be believed."""

    @property
    def n_bytes(self) -> int:
        """Bytes that are freed."""
        return sum(removal.n_bytes for removal in self.removals)


def plan_collection(artifacts: Artifacts, keep_last: int | None = None, *, newest_only: bool = False) -> Collection:
    """Find what a gc would remove now, with nobody else at work; nothing is changed.

    Runs go first, then what they reached: a gc that is killed leaves nothing that the next does not find.

    Args:
        artifacts: where.
        keep_last: only so many runs count, those started last; the records of the others go too.
        newest_only: what only earlier attempts of a run planned goes too.

    Raises:
        ArtifactCorruptError: a run's record or a pin cannot be read, so nobody knows what must stay.
        ConfigError: there is no run at all, and it was not said that all may go.
    """
    remote = as_remote(artifacts)
    if remote is not None:
        from storage.objects import collect as objects

        return objects.plan_objects(remote, keep_last, newest_only=newest_only)
    found = survey(artifacts)
    collection, kept, reached = what_stays(artifacts, found, keep_last, newest_only=newest_only)
    root = artifacts.root
    collection.removals += _of_runs(root / "runs", set(kept), set(run_names(artifacts)))
    for entry in found:
        _judge(entry, entry.path.name in reached, collection)
    sealed = {entry.path.name for entry in found if entry.standing == "sealed"}
    _of_work(root / "work", reached, sealed, collection)
    collection.removals += [_removal(path, "thrown away before") for path in sorted((root / "trash").glob("*"))]
    if aside := list((root / "quarantine").glob("*")):
        collection.notes.append(f"{len(aside)} in quarantine stay: see `stackwise quarantine`")
    return collection


def what_stays(
    artifacts: Artifacts,
    found: Iterable[Found],
    keep_last: int | None,
    *,
    newest_only: bool,
    live: Iterable[str] = (),
) -> tuple[Collection, list[str], frozenset[str]]:
    """Return the removal of runs that do not count, the runs that do, and the names of what these reach.

    Args:
        artifacts: where.
        found: what is there.
        keep_last: only so many runs count.
        newest_only: of each run only the newest attempt counts.
        live: runs that count however old they are.
    """
    runs = newest_first(artifacts)
    kept = runs if keep_last is None else [name for name in runs if name in {*runs[:keep_last], *live}]
    reached = find_reach(artifacts, kept, newest_only=newest_only).names
    if not runs and keep_last is None and any(entry.path.name not in reached for entry in found if entry.manifest):
        nothing = "holds artifacts and no run, so only what is pinned would stay; if that is meant, say --keep-last 0"
        raise ConfigError([Fault("--artifacts", artifacts.uri, nothing)])
    why, folder = f"not among the last {keep_last} runs", artifacts.root / "runs"
    removals = [_removal(folder / name, why) for name in runs if name not in kept]
    return Collection(removals), kept, reached


def collect(artifacts: Artifacts, keep_last: int | None = None, *, newest_only: bool = False) -> Collection:
    """Remove what `plan_collection` finds. Killed at any moment, the next gc or run finishes it.

    Returns:
        What was removed. Bytes that this user may not delete stay in trash/, and a note says so.

    Raises:
        RunBusyError: a run or another gc is at work. Others as `plan_collection`; nothing was removed then.
    """
    if (remote := as_remote(artifacts)) is not None:
        from storage.objects import collect as objects

        return objects.collect_objects(remote, keep_last, newest_only=newest_only)
    with alone(artifacts):
        collection = plan_collection(artifacts, keep_last, newest_only=newest_only)
        trash = artifacts.root / "trash"
        for number, removal in enumerate(collection.removals):
            failpoint("gc", number)
            if removal.path.parent != trash:
                artifacts.to_trash(removal.path)
        failpoint("gc-empty", 0)
        artifacts.empty_trash()
        if left := bytes_below(trash):
            collection.notes.append(f"{left:,} bytes in {trash} may not be deleted by this user")
    return collection


def _removal(path: Path, why: str) -> Removal:
    return Removal(path, bytes_below(path), why)


def _of_runs(folder: Path, kept: set[str], known: set[str]) -> Iterator[Removal]:
    """Yield attempts that were killed before they began, and half-written files of records that stay."""
    for attempt in sorted(folder.glob("*/attempts/*")):
        if attempt.parents[1].name in known - kept:
            continue
        if attempt.is_dir() and attempt.name.isdecimal() and not (attempt / "start.json").exists():
            yield _removal(attempt, "an attempt that never began")
        else:
            yield from _halves(attempt)
    for name in sorted(kept):
        yield from (_removal(path, _HALF) for path in sorted((folder / name).glob(f"*{TEMPORARY_SUFFIX}")))


def _halves(folder: Path) -> Iterator[Removal]:
    yield from (_removal(path, _HALF) for path in sorted(folder.glob(f"*{TEMPORARY_SUFFIX}")))


def _judge(entry: Found, reached: bool, collection: Collection) -> None:
    """Decide on what lies in a room of artifacts: what cannot be believed is not removed on its word."""
    if entry.standing in ("damaged", "foreign"):
        keep_doubtful(entry, str(entry.path), collection)
    elif entry.standing == "unsealed":
        collection.removals.append(_removal(entry.path, _UNSEALED))
    elif not reached:
        collection.removals.append(_removal(entry.path, UNREACHED))
    else:
        why = "data of a retired artifact" if entry.standing == "retired" else _HALF
        collection.removals += [_removal(path, why) for path in entry.unlisted()]


def keep_doubtful(entry: Found, where: str, collection: Collection) -> None:
    """Name what stays because nobody knows what it is."""
    if entry.standing == "damaged":
        collection.damaged.append(f"{where}: {entry.problem}; it stays, look at it and remove it yourself")
    else:
        collection.notes.append(f"{where}: {entry.problem}; it stays")


def _of_work(folder: Path, reached: frozenset[str], sealed: set[str], collection: Collection) -> None:
    """Decide on what lies in work/, nobody being at work: an unfinished artifact that a run wants stays."""
    for path in sorted(folder.glob("*")):
        if path.is_dir() and path.name in reached - sealed:
            collection.notes.append(f"{path}: unfinished; it stays, the run that wants it goes on from it")
        else:
            collection.removals.append(_removal(path, "left by a dead writer"))


def leftovers(artifacts: Artifacts) -> list[str]:
    """Return a line for everything that is left over, with the remedy; none of it is damage, and nobody reads it.

    While a process is at work, only what it has surely nothing to do with is told.

    Raises:
        ArtifactCorruptError: a run's record or a pin cannot be read.
    """
    collection = plan_collection(artifacts, keep_last=len(run_names(artifacts)))
    found = [removal for removal in collection.removals if removal.why != UNREACHED]
    if is_held(artifacts.root / "locks" / "gc"):
        found = [removal for removal in found if _is_nobodys(artifacts, removal)]
    return [f"{entry.path}: {entry.why}; `stackwise gc` removes it" for entry in found] + collection.notes


def _is_nobodys(artifacts: Artifacts, removal: Removal) -> bool:
    """Say whether no live process can be at work on something."""
    if removal.why == _UNSEALED:
        return True
    name = removal.path.name
    at_work = is_artifact_name(name) and removal.path.parent == artifacts.root / "work"
    return at_work and not is_held(artifacts.root / "locks" / name)
