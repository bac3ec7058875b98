"""`stackwise push` and `pull`: copy artifacts and runs between two artifacts folders."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from flows.cli.arguments import add_artifacts, print_waiting
from flows.run.lookup import find_artifact
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


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    _add_arguments(parser, "the folder or bucket to copy to; a folder is created if needed")
    parser.set_defaults(run=_push)


def add_pull(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pull`."""
    _add_arguments(parser, "the folder or bucket to copy from")
    parser.set_defaults(run=_pull)


def _add_arguments(parser: argparse.ArgumentParser, uri: str) -> None:
    add_artifacts(parser)
    parser.add_argument("uri", metavar="URI", help=uri)
    names = "artifacts, with everything they were made from, and runs; default: everything"
    parser.add_argument("names", nargs="*", metavar="ID|RUN", help=names)


def _push(options: argparse.Namespace) -> None:
    copy(options.artifacts, options.uri, options.names)


def _pull(options: argparse.Namespace) -> None:
    copy(options.uri, options.artifacts, options.names)


@dataclass
class _Load:
    """What to copy."""

    runs: list[str] = field(default_factory=list)
    named: list[Ref] = field(default_factory=list)
    refs: list[Ref] = field(default_factory=list)
    """Everything, including the artifacts of the runs and the inputs of the named artifacts."""


def copy(from_root: str, to_root: str, names: list[str]) -> None:
    """Copy artifacts with everything they were made from, and runs with everything they planned.

    An artifact given by name is pinned at the target, because no run reaches it there.

    Args:
        from_root: the artifacts folder to copy from.
        to_root: the artifacts folder to copy to; created if needed.
        names: artifacts (unique prefixes are enough) and runs; an empty list copies everything.

    Raises:
        ArtifactError: one is missing or damaged, or exists at the target with other bytes; the target is not changed.
        ConfigError: source and target are the same, or the target has a different run of that name.
    """
    source = artifacts_at(from_root).existing()
    if source.root.resolve() == artifacts_at(to_root).root.resolve():
        raise ConfigError([Fault("URI", repr(to_root), "another artifacts folder is expected than --artifacts")])
    with ExitStack() as stack:
        with suppress(ArtifactsFolderError):  # a read-only source: no process can remove anything there
            stack.enter_context(without_gc(source, print_waiting))
        load = _find(source, names)
        target = artifacts_at(to_root).open()
        stack.enter_context(without_gc(target, print_waiting))
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
    # Copy again what vanished meanwhile: until the records arrived, another machine's gc saw it as garbage.
    n_bytes += _copy_artifacts(source, target, to_copy(source, target, load.refs, frozenset(load.named)))
    there = len(set(load.refs)) - len(lacking)
    runs = f", runs {', '.join(load.runs)}" if load.runs else ""
    skipped = f", {there} there already or never made" if there else ""
    print(f"copied {len(lacking)} artifacts, {size(n_bytes)}{skipped}{runs}: {source.uri} -> {target.uri}")


def _copy_artifacts(source: Artifacts, target: Artifacts, refs: list[Ref]) -> int:
    n_bytes = 0
    for ref in refs:
        copied = copy_artifact(source, target, ref, print_waiting)
        print(f"{size(copied):>10}  {ref.name}")
        n_bytes += copied
    return n_bytes
