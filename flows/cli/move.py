"""`stackwise push` and `pull`: artifacts and runs between two artifacts folders. Needs no torch."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from flows.cli.inspect import find_artifact
from flows.run.numbers import size
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Ref
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.copying import attempts_to_copy, check_room, copy_artifact, copy_run, to_copy
from storage.errors import ArtifactsFolderError
from storage.manifest import read_manifest
from storage.reachability import made_from, pin, planned
from storage.runs import run_names


@dataclass
class _Load:
    """What is to be copied."""

    runs: list[str] = field(default_factory=list)
    named: list[Ref] = field(default_factory=list)
    refs: list[Ref] = field(default_factory=list)
    """All of it, the artifacts of the runs and what the named ones were made from included."""


def copy(from_root: str, to_root: str, names: list[str]) -> None:
    """Copy artifacts with all they were made from, and runs with all they planned; print what it came to.

    An artifact given by name is pinned at the target: no run reaches it there.

    Args:
        from_root: where they are.
        to_root: where they go; made if need be.
        names: artifacts and runs, a unique start of an artifact's name will do; none means everything.

    Raises:
        ArtifactError: one is missing or damaged, or there with other bytes; nothing is put in place then.
        ConfigError: source and target are one, or another run of a name is there.
    """
    source = artifacts_at(from_root).existing()
    if source.root.resolve() == artifacts_at(to_root).root.resolve():
        raise ConfigError([Fault("URI", repr(to_root), "another artifacts folder is expected than --artifacts")])
    with ExitStack() as stack:
        with suppress(ArtifactsFolderError):  # one that cannot be written: nobody removes anything there
            stack.enter_context(without_gc(source, _tell_waiting))
        load = _find(source, names)
        target = artifacts_at(to_root).open()
        stack.enter_context(without_gc(target, _tell_waiting))
        _copy(source, target, load)


def _find(source: Artifacts, names: list[str]) -> _Load:
    load, known = _Load(), run_names(source)
    if not names:
        load.runs = known
        load.refs = [read_manifest(folder).ref for folder in source.everything()]
    for name in names:
        if name in known:
            load.runs.append(name)
        else:
            load.named.append(read_manifest(find_artifact(source, name)).ref)
    load.refs += made_from(source, load.named)
    for run in load.runs:
        load.refs += planned(source, run)
    return load


def _copy(source: Artifacts, target: Artifacts, load: _Load) -> None:
    lacking = to_copy(source, target, load.refs, frozenset(load.named))
    for run in load.runs:
        attempts_to_copy(source, target, run)  # raises before the first byte
    check_room(source, target, lacking)
    n_bytes = _copy_artifacts(source, target, lacking)
    for ref in load.named:
        pin(target, ref)
    for run in load.runs:
        copy_run(source, target, run)
    # What was there and is not any more: before these records came, it was garbage to a gc of another machine.
    n_bytes += _copy_artifacts(source, target, to_copy(source, target, load.refs, frozenset(load.named)))
    there = len(set(load.refs)) - len(lacking)
    runs = f", runs {', '.join(load.runs)}" if load.runs else ""
    skipped = f", {there} there already or never made" if there else ""
    print(f"copied {len(lacking)} artifacts, {size(n_bytes)}{skipped}{runs}: {source.uri} -> {target.uri}")


def _copy_artifacts(source: Artifacts, target: Artifacts, refs: list[Ref]) -> int:
    n_bytes = 0
    for ref in refs:
        copied = copy_artifact(source, target, ref, _tell_waiting)
        print(f"{size(copied):>10}  {ref.name}")
        n_bytes += copied
    return n_bytes


def _tell_waiting(holder: str) -> None:
    print(f"waiting for {holder}", file=sys.stderr)
