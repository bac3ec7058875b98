"""`stackwise inspect`: what one artifact is, what it was made from, and the statistics of its content."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.arguments import add_artifacts, add_json
from flows.pages.provenance import trace
from flows.run.lookup import find_artifact
from flows.run.numbers import size
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, State, artifacts_at
from storage.files import write_text
from storage.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from flows.pages.drift import Boundary

_ROWS = 64
_PAGES = ("activations", "stack")
"""Kinds that have a page."""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    add_artifacts(parser)
    help_text = "folder or name of an artifact; a unique prefix of its name is enough"
    parser.add_argument("uri", metavar="URI", help=help_text)
    add_json(parser)
    parser.add_argument("--html", default="", metavar="FILE", help="write a web page about a store or a stack")
    help_text = "measure the drift of a store from URI2 instead of from the boundary below"
    parser.add_argument("--against", default="", metavar="URI2", help=help_text)
    help_text = f"how many rows of a store to read for its statistics ({_ROWS})"
    parser.add_argument("--rows", type=int, metavar="N", help=help_text)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    wanted = _Wanted(options.json, options.html, options.against, options.rows)
    return show_artifact(options.artifacts, options.uri, wanted)


@dataclass(frozen=True)
class _Wanted:
    as_json: bool
    html: str
    """File to write a page to; '' writes none."""
    against: str
    """Another store to measure the drift from; '' takes the boundary below."""
    rows: int | None
    """How many rows of a store to read for its statistics."""


def show_artifact(root: str, uri: str, wanted: _Wanted) -> int:
    """Show one artifact: what it is, what it was made from, and for a store its statistics and sample rows.

    Returns:
        3 if it is damaged, else 0.

    Raises:
        ArtifactError: it does not exist, a file of it is damaged, or a page needs data that was dropped.
        ConfigError: an option does not apply to this kind, or the page cannot be written.
    """
    named = artifacts_at(root).existing()
    folder = find_artifact(named, uri)
    manifest = read_manifest(folder)
    _check_wanted(manifest, wanted)
    artifacts = _home(named, folder, manifest)
    state = artifacts.state(manifest.ref)
    if wanted.html or wanted.against:
        artifacts.manifest(manifest.ref)  # raises unless it is sealed
    document = _describe(artifacts, folder, manifest, state, wanted)
    if wanted.html:
        _write_page(wanted.html, document)
    if wanted.as_json:
        print(json.dumps(document, indent=1))
    else:
        _print_artifact(document, manifest)
    return 3 if state is State.CORRUPT else 0


def _home(named: Artifacts, folder: Path, manifest: Manifest) -> Artifacts:
    """Return the artifacts folder that holds an artifact, which can differ from --artifacts if a path was given."""
    if named.folder(manifest.ref) == folder:
        return named
    around = Artifacts(folder.parent.parent)
    return around if around.folder(manifest.ref) == folder else named


def _check_wanted(manifest: Manifest, wanted: _Wanted) -> None:
    """Reject options that do not apply to this kind, before anything is read."""
    faults: list[Fault] = []
    kind, name = manifest.ref.kind, manifest.ref.name
    if wanted.html and kind not in _PAGES:
        faults.append(Fault("--html", repr(wanted.html), f"{name} has no page; stores and stacks have"))
    if wanted.html and not Path(wanted.html).absolute().parent.is_dir():
        faults.append(Fault("--html", repr(wanted.html), "its folder does not exist; make it, or choose another"))
    if wanted.against and kind != "activations":
        faults.append(Fault("--against", repr(wanted.against), f"{name} is no store; two stores can be compared"))
    if wanted.rows is not None and kind != "activations":
        faults.append(Fault("--rows", str(wanted.rows), f"{name} is no store, and has no rows"))
    elif wanted.rows is not None and wanted.rows < 1:
        faults.append(Fault("--rows", str(wanted.rows), "read one row at least"))
    if faults:
        raise ConfigError(faults)


def _describe(artifacts: Artifacts, folder: Path, manifest: Manifest, state: State, wanted: _Wanted) -> dict[str, Any]:
    where = artifacts.where(manifest.ref) if artifacts.folder(manifest.ref) == folder else str(folder)
    document: dict[str, Any] = {"folder": where, "state": state.value, **manifest.model_dump(mode="json")}
    document["provenance"] = trace(artifacts, manifest)
    if state is not State.SEALED:
        return document
    if manifest.ref.kind == "activations":
        from flows.pages.store import describe_store

        other = _other_store(artifacts, wanted.against)
        document |= describe_store(artifacts, folder, manifest, other, wanted.rows or _ROWS)
    elif manifest.ref.kind == "stack" and (wanted.as_json or wanted.html):
        from flows.pages.stack import describe_stack

        document |= describe_stack(artifacts.checked(manifest.ref), manifest)
    return document


def _other_store(artifacts: Artifacts, uri: str) -> Boundary | None:
    """Return the store of --against, if it is given."""
    if not uri:
        return None
    folder = find_artifact(artifacts, uri)
    manifest = read_manifest(folder)
    if manifest.ref.kind != "activations":
        raise ConfigError([Fault("--against", repr(uri), f"{manifest.ref.name} is no store; name one")])
    from flows.pages.drift import Boundary

    home = _home(artifacts, folder, manifest)
    home.manifest(manifest.ref)  # raises unless it is sealed
    return Boundary.of(home, folder, manifest)


def _write_page(path: str, document: dict[str, Any]) -> None:
    from flows.pages.stack import stack_page
    from flows.pages.store_page import store_page

    text = store_page(document) if document["ref"]["kind"] == "activations" else stack_page(document)
    try:
        write_text(Path(path).absolute(), text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([Fault("--html", repr(path), f"it cannot be written ({reason})")]) from None


def _print_artifact(document: dict[str, Any], manifest: Manifest) -> None:
    """Print a line per fact, unwrapped, so that ids and folders can be copied; then the tables of a store."""
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
    for key, value in lines:
        print(f"{key:<{width}}{value}")
    if "store" in document:
        from flows.pages.tables import print_store

        print_store(document)
