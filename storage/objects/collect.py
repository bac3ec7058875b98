"""Garbage collection in a bucket, which nobody can have alone: by what runs plan, by leases and by age.

A run writes its planned ids before its first look at an artifact. So, of an artifact that no run plans: its
manifest is deleted, the records of runs are read again, and if a run that began meanwhile plans it, the manifest
is put back before a byte of data was touched. A run that begins later finds no manifest, and makes the artifact
as it makes any that is absent. What has no manifest yet, or is younger than the grace, may be somebody's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stackwise_core.failpoints import failpoint
from storage.collect import UNREACHED, Collection, Removal, keep_doubtful, what_stays
from storage.manifest import MANIFEST
from storage.objects import lease
from storage.objects.remote import RemoteArtifacts
from storage.objects.seals import delete_below
from storage.objects.survey import FoundObjects, Listing
from storage.reach import find_reach
from storage.runs import PLANS_LOCK, is_live

GRACE = timedelta(hours=24)
"""What is younger stays: its run may not have been heard of yet, or it may still be uploaded."""


def clock() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


def is_young(newest: datetime) -> bool:
    """Say whether something is within the grace. Times are the store's, which may differ by minutes from ours."""
    return clock() - newest < GRACE


def dead_leases(listing: Listing) -> Iterator[tuple[str, int]]:
    """Yield the key and the bytes of every lease that was last renewed before the grace began."""
    for name, entry in sorted(listing.below(lease.FOLDER).items()):
        if lease.is_stale(entry) and not is_young(entry.modified):
            yield f"{lease.FOLDER}/{name}", entry.size


def unbegun_attempts(listing: Listing) -> Iterator[tuple[str, int]]:
    """Yield the key and the bytes of every attempt at a run that was killed before it began."""
    for start in sorted({key.rpartition("/")[0] for key in listing.entries if key.startswith("runs/")}):
        below = listing.below(start)
        if start.split("/")[2:3] != ["attempts"] or "start.json" in below or not below:
            continue
        if not is_young(max(entry.modified for entry in below.values())):
            yield start, sum(entry.size for entry in below.values())


def plan_objects(artifacts: RemoteArtifacts, keep_last: int | None, *, newest_only: bool) -> Collection:
    """Find what a gc would remove now; see `plan_collection`. Nothing is changed."""
    listing = artifacts.listing()
    artifacts.refresh_runs()  # after the listing: what it shows was there before the last run that is known
    held, found = listing.held(), artifacts.survey(listing)
    live = {name.removeprefix("run-") for name in held if name.startswith("run-")}
    collection, kept, reached = what_stays(artifacts, found, keep_last, newest_only=newest_only, live=live)
    records = {
        run.path: sum(each.size for each in listing.below(f"runs/{run.path.name}").values())
        for run in collection.removals
    }
    collection.removals = [Removal(run.path, records[run.path], run.why) for run in collection.removals]
    never_began = [(key, n_bytes) for key, n_bytes in unbegun_attempts(listing) if key.split("/")[1] in kept]
    collection.removals += [
        Removal(artifacts.root / key, n_bytes, "an attempt that never began") for key, n_bytes in never_began
    ]
    for entry in found:
        _judge(artifacts, entry, reached, held, collection)
    collection.removals += [
        Removal(artifacts.root / key, n_bytes, "a lease of the dead") for key, n_bytes in dead_leases(listing)
    ]
    if aside := {key.partition("/")[0] for key in listing.below("quarantine")}:
        collection.notes.append(f"{len(aside)} in quarantine stay: see `stackwise quarantine`")
    return collection


def _judge(
    artifacts: RemoteArtifacts, entry: FoundObjects, reached: frozenset[str], held: set[str], collection: Collection
) -> None:
    """Decide on what lies below the key of an artifact."""
    if entry.standing in ("damaged", "foreign"):
        keep_doubtful(entry, artifacts.place(entry.path), collection)
        return
    if entry.path.name in held:
        collection.notes.append(f"{entry.path.name}: somebody is at work on it; it stays")
        return
    if entry.manifest is not None and entry.path.name not in reached:
        if is_young(entry.newest):
            collection.notes.append(f"{entry.path.name}: no run reaches it, and it is younger than 24 hours; it stays")
        else:
            collection.removals.append(Removal(entry.path, entry.n_bytes, UNREACHED))
        return
    for attempt in entry.other_attempts():
        if not is_young(attempt.newest):
            collection.removals.append(Removal(attempt.path, attempt.n_bytes, "left by a dead writer"))
    for path in entry.unlisted():
        size = entry.entries[path.relative_to(entry.path).as_posix()].size
        collection.removals.append(Removal(path, size, "data of a retired artifact"))


def collect_objects(artifacts: RemoteArtifacts, keep_last: int | None, *, newest_only: bool) -> Collection:
    """Remove what `plan_objects` finds, and return what was removed. Killed at any moment, the next gc finishes it."""
    plan = plan_objects(artifacts, keep_last, newest_only=newest_only)
    done = Collection(notes=plan.notes, damaged=plan.damaged)

    def is_wanted(name: str) -> bool:
        artifacts.refresh_runs()  # the records that were to go went first
        return name in find_reach(artifacts, newest_only=newest_only).names

    for number, removal in enumerate(plan.removals):
        failpoint("gc", number)
        if _remove(artifacts, removal.path, is_wanted):
            done.removals.append(removal)
        else:
            done.notes.append(f"{removal.path.name}: somebody began to use it meanwhile; it stays")
    artifacts.empty_trash()
    return done


def _remove(artifacts: RemoteArtifacts, path: Path, is_wanted: Callable[[str], bool]) -> bool:
    """Remove what a gc decided on, and what the scratch folder has of it; say whether it was removed.

    Args:
        artifacts: where.
        path: where the scratch folder mirrors it.
        is_wanted: says, by the records as they are now, whether a run plans an artifact of a name.
    """
    key = path.relative_to(artifacts.root).as_posix()
    room, name, *below = key.split("/")
    if room == lease.FOLDER:
        artifacts.bucket.delete([key])
        return True
    lock = artifacts.lock(PLANS_LOCK if room == "runs" else name)
    if not lock.try_acquire():
        return False  # somebody makes it, or copies it there, this moment
    try:
        if room == "runs":
            removed = _remove_run(artifacts, key)
        elif below:
            removed = _remove_part(artifacts, f"{room}/{name}", below)
        else:
            removed = _remove_artifact(artifacts, key, is_wanted)
        if removed and path.exists():
            artifacts.to_trash(path)
    finally:
        lock.release()
    return removed


def _remove_run(artifacts: RemoteArtifacts, key: str) -> bool:
    """Remove the record of a run that nobody began again, what makes its attempts exist first."""
    if is_live(artifacts, key.split("/")[1]):
        return False
    found = [f"{key}/{name}" for name in artifacts.bucket.list(key)]
    artifacts.bucket.delete([name for name in found if name.endswith("/start.json")])
    artifacts.bucket.delete(found)
    return True


def _remove_part(artifacts: RemoteArtifacts, key: str, below: list[str]) -> bool:
    """Remove an attempt, or a file of a retired one, unless it was sealed since."""
    look = artifacts.look(key)
    if look is not None and below[0] == look.manifest.attempt and (len(below) == 1 or not look.retired):
        return False
    part = "/".join((key, *below))
    artifacts.bucket.delete([part])
    delete_below(artifacts.bucket, part)
    return True


def _remove_artifact(artifacts: RemoteArtifacts, key: str, is_wanted: Callable[[str], bool]) -> bool:
    """Delete the manifest, ask again, and then either put it back or delete the data."""
    bucket, manifest = artifacts.bucket, f"{key}/{MANIFEST}"
    try:
        data, entry = bucket.read(manifest)
    except FileNotFoundError:
        return True  # another gc was first
    if is_young(entry.modified):
        return False  # sealed anew since it was listed
    bucket.delete([manifest])
    artifacts.forget()
    failpoint("gc-data", 0)
    if is_wanted(key.split("/")[1]):
        bucket.create(manifest, data)
        return False
    delete_below(bucket, key)
    return True
