"""Copies sealed artifacts and records of runs from one place to another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.failpoints import failpoint
from stackwise_core.files import sync, sync_tree
from stackwise_core.stages.identity import Ref
from stackwise_core.strict import read_bounded
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactCorruptError, ArtifactMissingError, StoreSpaceError
from storage.files import TEMPORARY_SUFFIX, checksum_file, explain_full_disk, write_bytes
from storage.links import remove_links
from storage.locks import OnWait, no_wait
from storage.manifest import MANIFEST, FileEntry
from storage.place import FOLDERS, OUTCOME, PLANS_LOCK, RUNS, SealedFolder
from storage.retirement import RETIRED
from storage.runs import Attempt, attempts

_RECORDS = ("config.yaml", "plan.json", OUTCOME, "start.json")
"""start.json comes last: without it an attempt does not exist."""


def to_copy(source: Artifacts, target: Artifacts, refs: Iterable[Ref], named: frozenset[Ref]) -> list[Ref]:
    """Return those of some artifacts that the target lacks, each after what it is made from. Changes nothing.

    What is retired at the target stays so unless it is `named`; what was never made at the source is left out.

    Raises:
        ArtifactCorruptError: one is damaged at either end, or the target has it with other bytes.
    """
    kinds = list(FOLDERS)
    wanted = sorted(set(refs), key=lambda ref: (ref.stage, kinds.index(ref.kind), ref.sha256))
    return [ref for ref in wanted if source.state(ref) is not State.ABSENT and _is_lacking(source, target, ref, named)]


def _is_lacking(source: Artifacts, target: Artifacts, ref: Ref, named: frozenset[Ref]) -> bool:
    here = _find(source, ref)
    if target.state(ref) is State.ABSENT:
        return True
    there = _find(target, ref)
    if there.manifest.digest != here.manifest.digest:
        raise ArtifactCorruptError(
            target.where(ref),
            f"holds other bytes than {source.where(ref)} ({there.manifest.digest[:12]}, "
            f"there {here.manifest.digest[:12]}): the same recipe, computed on another machine",
            "Nothing was copied. Use another folder, or remove it and what was made from it",
        )
    return there.retired and not here.retired and ref in named


def _find(artifacts: Artifacts, ref: Ref) -> SealedFolder:
    """Return a sealed or a retired artifact; raises as `Artifacts.sealed_folder`."""
    found = artifacts.lookup(ref).folder
    return found if found and found.retired else artifacts.sealed_folder(ref)


def check_room(source: Artifacts, target: Artifacts, refs: Iterable[Ref]) -> None:
    """Raise StoreSpaceError, with both sizes, if the copies would not fit on the target's disk."""
    n_bytes = sum(found.manifest.n_bytes for ref in refs if not (found := _find(source, ref)).retired)
    free = shutil.disk_usage(target.root).free
    if n_bytes > free:
        raise StoreSpaceError(f"{target.root}: {n_bytes:,} bytes are to be copied and {free:,} are free; nothing was")


def copy_artifact(source: Artifacts, target: Artifacts, ref: Ref, on_wait: OnWait = no_wait) -> int:
    """Copy one artifact: into work/, flushed, every checksum compared on arrival, then sealed.

    A copy that was killed goes on at the first file that has not arrived.

    Returns:
        How many bytes were added to the target.

    Raises:
        ArtifactCorruptError: what arrived is not what was sealed; the target is unchanged.
    """
    found = _find(source, ref)
    folder = source.folder(ref) if found.retired else source.place.fetch(found)
    work = target.root / "work" / f"{ref.name}.incoming"
    with target.lock(ref.name, on_wait=on_wait):
        if target.state(ref) is State.SEALED:
            return 0  # another process was first
        remove_links(work)
        work.mkdir(exist_ok=True)
        files = {} if found.retired else found.manifest.files
        _remove_unlisted(work, files.keys())
        for number, (name, entry) in enumerate(files.items()):
            failpoint(f"copy-{ref.kind}", number)
            _copy_file(folder / name, work / name, entry)
        sync_tree(work)
        if found.retired:
            write_bytes(work / RETIRED, read_bounded(folder / RETIRED))
        write_bytes(work / MANIFEST, found.manifest.model_dump_json(indent=1).encode())
        failpoint(f"copied-{ref.kind}", max(ref.stage, 0))
        target.adopt(ref, work)
    return sum(entry.size for entry in files.values())


def _remove_unlisted(work: Path, names: Iterable[str]) -> None:
    """Remove what an earlier copy left: half-written files, and those of the same id with other bytes."""
    keep = set(names)
    for path in work.rglob("*"):
        if not path.is_dir() and path.relative_to(work).as_posix() not in keep:
            path.unlink()


def _copy_file(source: Path, target: Path, entry: FileEntry) -> None:
    algorithm = entry.checksum.partition(":")[0]
    if target.is_file() and target.stat().st_size == entry.size and checksum_file(target, algorithm) == entry.checksum:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    with explain_full_disk(target, entry.size):
        try:
            shutil.copyfile(source, temporary)
        except FileNotFoundError:
            remedy = "It was removed while it was copied: run the same command again"
            raise ArtifactMissingError(source, "is gone", remedy) from None
        sync(temporary)
    if (arrived := checksum_file(temporary, algorithm)) != entry.checksum:
        temporary.unlink()
        remedy = "Nothing was put in place; run `stackwise verify` where it comes from"
        raise ArtifactCorruptError(source, f"arrived as {arrived}, sealed with {entry.checksum}", remedy)
    os.replace(temporary, target)


# ---------------------------------------------------------------- records of runs


def attempts_to_copy(source: Artifacts, target: Artifacts, run: str) -> list[Attempt]:
    """Return the attempts of a run that the target lacks.

    Raises:
        ConfigError: the target has another run of this name, or the run continued differently there.
    """
    there = {attempt.number: attempt for attempt in attempts(target, run)}
    missing: list[Attempt] = []
    for attempt in attempts(source, run):
        if attempt.number not in there:
            missing.append(attempt)
        elif any(attempt.read(name) != there[attempt.number].read(name) for name in ("plan.json", "start.json")):
            other = f"{there[attempt.number].folder} is of another run of that name; nothing was copied"
            raise ConfigError([Fault("RUN", repr(run), other)])
    return missing


def copy_run(source: Artifacts, target: Artifacts, run: str) -> None:
    """Copy the record of a run, after its artifacts."""
    with target.lock(PLANS_LOCK):
        for attempt in attempts_to_copy(source, target, run):
            for name in _RECORDS:
                _copy_record(target, run, attempt, name)
        for attempt in attempts(source, run):  # the attempt may still have been running when it was copied before
            _copy_record(target, run, attempt, OUTCOME)
        current = target.root / RUNS / run / "current"
        write_bytes(current, f"{attempts(target, run)[-1].folder.name}\n".encode())
        target.place.share(current)


def _copy_record(target: Artifacts, run: str, attempt: Attempt, name: str) -> None:
    """Copy a file of an attempt, if there is one and the target has none."""
    path = target.root / RUNS / run / "attempts" / attempt.folder.name / name
    if os.path.lexists(attempt.folder / name) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, attempt.read(name))
        target.place.share(path)
