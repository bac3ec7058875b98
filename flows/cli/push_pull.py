"""`stackwise push` and `pull`: copy artifacts and runs between two artifacts folders."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, suppress

from flows.cli.arguments import Run, add_common, print_waiting
from flows.run.maintenance import find_artifact
from flows.run.numbers import size
from flows.run.say import say
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
    _add_arguments(parser, _push, "the folder or bucket to copy to; a folder is created if needed")


def add_pull(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pull`."""
    _add_arguments(parser, _pull, "the folder or bucket to copy from")


def _add_arguments(parser: argparse.ArgumentParser, run: Run, uri: str) -> None:
    add_common(parser, run)
    parser.add_argument("uri", metavar="URI", help=uri)
    names = "artifacts, with everything they were made from, and runs; default: everything"
    parser.add_argument("names", nargs="*", metavar="ID|RUN", help=names)


def _push(options: argparse.Namespace) -> None:
    copy(options.artifacts, options.uri, options.names)


def _pull(options: argparse.Namespace) -> None:
    copy(options.uri, options.artifacts, options.names)


def copy(from_root: str, to_root: str, names: list[str]) -> None:
    """Copy artifacts with everything they were made from, and runs with everything they planned.

    An artifact given by name (a unique prefix is enough) is pinned at the target, because no run reaches it there.
    Without names, everything is copied. The target is created if needed.

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
        known = run_names(source)
        runs = [name for name in names if name in known] if names else known
        named = [read_manifest(find_artifact(source, name)).ref for name in names if name not in known]
        refs = [] if names else [read_manifest(folder).ref for folder in source.everything()]
        refs += [*made_from(source, named), *(ref for run in runs for ref in planned(source, run))]
        target = artifacts_at(to_root).open()
        stack.enter_context(without_gc(target, print_waiting))
        _copy(source, target, refs, frozenset(named), runs)


def _copy(source: Artifacts, target: Artifacts, refs: list[Ref], named: frozenset[Ref], runs: list[str]) -> None:
    lacking = to_copy(source, target, refs, named)
    for run in runs:
        attempts_to_copy(source, target, run)  # raises before the first byte
    check_room(source, target, lacking)
    n_bytes = _copy_artifacts(source, target, lacking)
    for ref in named:
        pin(target, ref)
    for run in runs:
        copy_run(source, target, run)
    # Copy again what vanished meanwhile: until the records arrived, the gc of another machine saw it as garbage.
    n_bytes += _copy_artifacts(source, target, to_copy(source, target, refs, named))
    there = len(set(refs)) - len(lacking)
    skipped = f", {there} there already or never made" if there else ""
    of_runs = f", runs {', '.join(runs)}" if runs else ""
    say(f"copied {len(lacking)} artifacts, {size(n_bytes)}{skipped}{of_runs}: {source.uri} -> {target.uri}")


def _copy_artifacts(source: Artifacts, target: Artifacts, refs: list[Ref]) -> int:
    n_bytes = 0
    for ref in refs:
        copied = copy_artifact(source, target, ref, print_waiting)
        say(f"{size(copied):>10}  {ref.name}")
        n_bytes += copied
    return n_bytes
