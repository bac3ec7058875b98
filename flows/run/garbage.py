"""Garbage collection as the command and the flow run it, with its result as lines of text."""

from __future__ import annotations

from flows.run.numbers import size
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts
from storage.collect import Collection, collect, in_use_by, plan_collection


def collect_garbage(artifacts: Artifacts, keep_last: int | None, *, superseded: bool, dry_run: bool) -> Collection:
    """Remove what no run reaches, or only list it.

    Args:
        artifacts: the artifacts folder.
        keep_last: only this many runs count, the newest; the records of the others are removed too.
        superseded: of each run, only the newest attempt counts.
        dry_run: remove nothing.

    Raises:
        RunBusyError: a run or another gc is active.
        ArtifactCorruptError: a record that says what must be kept is damaged.
    """
    if keep_last is not None and keep_last < 0:
        raise ConfigError([Fault("--keep-last", str(keep_last), "a number of runs, 0 or more")])
    run = plan_collection if dry_run else collect
    collection = run(artifacts, keep_last, newest_only=superseded)
    if dry_run and not artifacts.is_remote and (others := in_use_by(artifacts)):
        collection.notes.append(f"now it would be refused: {artifacts.uri} is in use by {others}")
    return collection


def removal_lines(artifacts: Artifacts, collection: Collection) -> list[str]:
    """Return a line for each removal: its size, its path and the reason."""
    paths = [str(removal.path.relative_to(artifacts.root)) for removal in collection.removals]
    width = max(map(len, paths), default=0)
    return [
        f"{size(removal.n_bytes):>10}  {path:<{width}}  {removal.why}"
        for path, removal in zip(paths, collection.removals, strict=True)
    ]


def verdict(collection: Collection, *, dry_run: bool) -> str:
    """Return how much was freed."""
    verb = "would be freed; nothing was removed" if dry_run else "freed"
    return f"{size(collection.n_bytes)} ({collection.n_bytes:,} bytes) {verb}"
