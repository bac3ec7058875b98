"""`stackwise inspect`: what one artifact is, what it was made from, and the statistics of its content."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.arguments import add_common
from flows.pages.provenance import trace
from flows.run.maintenance import find_artifact
from flows.run.numbers import size
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, plain_table
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, State, artifacts_at
from storage.demand import TASK_KINDS, made_by
from storage.files import write_text
from storage.manifest import Manifest, read_manifest
from storage.runs import attempts, find_run

if TYPE_CHECKING:
    from flows.pages.drift import Boundary

_ROWS = 64
_PAGES = ("activations", "stack")
"""Kinds of artifact that have a page."""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    add_common(parser, show_artifact, json=True)
    help_text = (
        "folder or name of an artifact, of which a unique prefix is enough; RUN/STAGE for the stack of a stage, "
    )
    help_text += "RUN/STAGE/activations and so on; or RUN, to list what it made"
    parser.add_argument("uri", metavar="URI", help=help_text)
    parser.add_argument("--html", default="", metavar="FILE", help="write a web page about a store or a stack")
    help_text = "measure the drift of a store from URI2 instead of from the boundary below"
    parser.add_argument("--against", default="", metavar="URI2", help=help_text)
    help_text = f"how many rows of a store to read for its statistics ({_ROWS})"
    parser.add_argument("--rows", type=int, metavar="N", help=help_text)


def show_artifact(options: argparse.Namespace) -> int:
    """Show one artifact: what it is, what it was made from, and for a store its statistics and sample rows.

    Returns:
        3 if it is damaged, else 0.

    Raises:
        ArtifactError: it does not exist, one of its files is damaged, or a page needs data that was dropped.
        ConfigError: an option does not apply to this kind, or the page cannot be written.
    """
    named = artifacts_at(options.artifacts).existing()
    if attempts(named, options.uri):
        if options.html:
            allowed = (
                f"{options.uri} is a run: name what it made, such as {options.uri}/0; `stackwise report` has its page"
            )
            raise ConfigError([Fault("--html", repr(options.html), allowed)])
        return _list_run(named, options)
    folder = find_artifact(named, options.uri)
    manifest = read_manifest(folder)
    _check_options(options, manifest)
    artifacts = _home(named, folder, manifest)
    state = artifacts.state(manifest.ref)
    if options.html or options.against:
        artifacts.manifest(manifest.ref)  # raises unless it is sealed
    where = artifacts.where(manifest.ref) if artifacts.folder(manifest.ref) == folder else str(folder)
    document: dict[str, Any] = {"folder": where, "state": state.value, **manifest.model_dump(mode="json")}
    document["provenance"] = trace(artifacts, manifest)
    if state is State.SEALED:
        document |= _describe(options, artifacts, folder, manifest)
    if options.html:
        _write_page(options.html, document, artifacts, manifest)
    if options.json:
        say_json(document)
    elif options.html:
        say(f"{manifest.ref.name}: page in {options.html}")
    else:
        _print_artifact(document, manifest)
    return 3 if state is State.CORRUPT else 0


def _list_run(artifacts: Artifacts, options: argparse.Namespace) -> int:
    """Print what a run made, each with the address that this command takes."""
    plan = find_run(artifacts, options.uri).plan
    rows = [
        {"address": f"{options.uri}/{stage.index}/{kind}", "artifact": stage.ref(kind).name, "state": state}
        for stage in plan.stages
        for task in TASK_KINDS
        for kind in made_by(task, stage)
        if (state := artifacts.state(stage.ref(kind)).value)
    ]
    if options.json:
        say_json({"run": options.uri, "artifacts": rows})
        return 0
    table = plain_table("address", "artifact", "state")
    for row in rows:
        table.add_row(*row.values())
    plain_console().print(table)
    return 0


def _home(named: Artifacts, folder: Path, manifest: Manifest) -> Artifacts:
    """Return the artifacts folder that holds an artifact: if a path was given, it can differ from --artifacts."""
    if named.folder(manifest.ref) == folder:
        return named
    around = Artifacts(folder.parent.parent)
    return around if around.folder(manifest.ref) == folder else named


def _check_options(options: argparse.Namespace, manifest: Manifest) -> None:
    """Reject options that do not apply to this kind, before any data is read."""
    html, against, rows = options.html, options.against, options.rows
    kind, name = manifest.ref.kind, manifest.ref.name
    no_folder = html and not Path(html).absolute().parent.is_dir()
    no_store = kind != "activations"
    checks = (
        (html and kind not in _PAGES, "--html", html, f"{name} has no page; stores and stacks have"),
        (no_folder, "--html", html, "its folder does not exist; make it, or choose another"),
        (against and no_store, "--against", against, f"{name} is no store; two stores can be compared"),
        (rows is not None and no_store, "--rows", rows, f"{name} is no store, and has no rows"),
        (rows is not None and rows < 1 and not no_store, "--rows", rows, "read one row at least"),
    )
    faults = [Fault(option, repr(value), allowed) for wrong, option, value, allowed in checks if wrong]
    if faults:
        raise ConfigError(faults)


def _describe(options: argparse.Namespace, artifacts: Artifacts, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the sections of a sealed store or stack; the import of torch is left to the moment of need."""
    if manifest.ref.kind == "activations":
        from flows.pages.store import describe_store

        other = _other_store(artifacts, options.against) if options.against else None
        n_rows = _ROWS if options.rows is None else options.rows
        return describe_store(artifacts, folder, manifest, other, n_rows)
    if manifest.ref.kind == "stack" and (options.json or options.html):
        from flows.pages.stack import describe_stack

        return describe_stack(artifacts, manifest)
    return {}


def _other_store(artifacts: Artifacts, uri: str) -> Boundary:
    from flows.pages.drift import Boundary

    folder = find_artifact(artifacts, uri)
    manifest = read_manifest(folder)
    if manifest.ref.kind != "activations":
        raise ConfigError([Fault("--against", repr(uri), f"{manifest.ref.name} is no store; name one")])
    home = _home(artifacts, folder, manifest)
    home.manifest(manifest.ref)  # raises unless it is sealed
    return Boundary.of(home, folder, manifest)


def _write_page(path: str, document: dict[str, Any], artifacts: Artifacts, manifest: Manifest) -> None:
    if manifest.ref.kind == "activations":
        from flows.pages.store import store_page

        page = store_page(document)
    else:
        from flows.pages.stack import stack_page, validation_of

        page = stack_page(document, validation_of(artifacts, manifest))
    try:
        write_text(Path(path).absolute(), page)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([Fault("--html", repr(path), f"it cannot be written ({reason})")]) from None


def _print_artifact(document: dict[str, Any], manifest: Manifest) -> None:
    """Print one unwrapped line per fact, so that ids and folders can be copied; then the tables of a store."""
    lines: list[tuple[str, object]] = [
        ("artifact", manifest.ref.name),
        ("folder", document["folder"]),
        ("state", document["state"]),
        ("id", manifest.ref.sha256),
        ("digest", manifest.digest),
        ("created", manifest.created),
        ("bytes", f"{size(manifest.n_bytes)} in {len(manifest.files)} files"),
    ]
    lines += [("made from", f"{entry.ref.name} (digest {entry.digest[:12]})") for entry in manifest.inputs]
    for section in ("facts", "recipe", "fingerprint"):
        for key, value in document.get(section, {}).items():
            lines.append((f"{section}.{key}", json.dumps(value) if isinstance(value, (dict, list)) else value))
    width = max(len(key) for key, _ in lines) + 2
    say(*(f"{key:<{width}}{value}" for key, value in lines))
    if "store" in document:
        from flows.pages.tables import print_store

        print_store(document)
