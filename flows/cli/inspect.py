"""`stackwise inspect`: one artifact, as its manifest and its bytes tell it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pages.provenance import trace
from flows.run.numbers import size
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, State, artifacts_at
from storage.durable import write_text
from storage.errors import ArtifactMissingError
from storage.manifest import Manifest, read_manifest
from storage.runs import run_names

if TYPE_CHECKING:
    from flows.pages.boundaries import Boundary

_ROWS = 64
_PAGES = ("activations", "stack")
"""Kinds that have a page."""


@dataclass(frozen=True)
class Look:
    """How an artifact is looked at."""

    as_json: bool = False
    html: str = ""
    """File to write a page to; '' writes none."""
    against: str = ""
    """Another store to measure the drift from; '' takes the boundary below."""
    rows: int | None = None
    """Of a store, to read for its statistics; None is 64."""


def find_artifact(artifacts: Artifacts, uri: str) -> Path:
    """Return the folder of an artifact given by path, by name, or by a unique start of its name.

    Raises:
        ArtifactError: nothing answers to it, or it was never sealed.
        ConfigError: several do.
    """
    if (Path(uri) / "manifest.json").exists():
        return Path(uri).absolute()
    found = [folder for folder in artifacts.everything() if folder.name.startswith(Path(uri).name)]
    exact = [folder for folder in found if folder.name == Path(uri).name]
    if not found:
        if Path(uri).is_dir():
            read_manifest(Path(uri))  # raises: it has none
        runs = ", ".join(run_names(artifacts)) or "none"
        raise ArtifactMissingError(
            uri, f"is no artifact in {artifacts.uri}", f"See `stackwise status RUN`; runs: {runs}"
        )
    if len(exact or found) != 1:
        names = ", ".join(folder.name for folder in found[:5])
        raise ConfigError([Fault("URI", repr(uri), f"{len(found)} artifacts begin so in {artifacts.uri}: {names}")])
    return (exact or found)[0]


def show_artifact(root: str, uri: str, look: Look) -> int:
    """Show one artifact: what it is, what it was made from, its files, and for a store its numbers and rows.

    Returns:
        3 if it is damaged, else 0.

    Raises:
        ArtifactError: there is none, a file of it is damaged, or its data was dropped and a page needs it.
        ConfigError: what is asked for is not for this kind, or cannot be written.
    """
    named = artifacts_at(root).existing()
    folder = find_artifact(named, uri)
    manifest = read_manifest(folder)
    _check_look(manifest, look)
    artifacts = _home(named, folder, manifest)
    state = artifacts.state(manifest.ref)
    if look.html or look.against:
        artifacts.manifest(manifest.ref)  # raises where there is nothing to look at
    document = _describe(artifacts, folder, manifest, state, look)
    if look.html:
        _write_page(look.html, document)
    if look.as_json:
        print(json.dumps(document, indent=1))
    else:
        _print_artifact(document, manifest)
    return 3 if state is State.CORRUPT else 0


def _home(named: Artifacts, folder: Path, manifest: Manifest) -> Artifacts:
    """Return the artifacts folder that an artifact lies in, which need not be the one that was named."""
    if named.folder(manifest.ref) == folder:
        return named
    around = Artifacts(folder.parent.parent)
    return around if around.folder(manifest.ref) == folder else named


def _check_look(manifest: Manifest, look: Look) -> None:
    """Refuse what is only for other kinds, before anything is read."""
    faults: list[Fault] = []
    kind, name = manifest.ref.kind, manifest.ref.name
    if look.html and kind not in _PAGES:
        faults.append(Fault("--html", repr(look.html), f"{name} has no page; stores and stacks have"))
    if look.html and not Path(look.html).absolute().parent.is_dir():
        faults.append(Fault("--html", repr(look.html), "its folder does not exist; make it, or choose another"))
    if look.against and kind != "activations":
        faults.append(Fault("--against", repr(look.against), f"{name} is no store; two stores can be compared"))
    if look.rows is not None and kind != "activations":
        faults.append(Fault("--rows", str(look.rows), f"{name} is no store, and has no rows"))
    elif look.rows is not None and look.rows < 1:
        faults.append(Fault("--rows", str(look.rows), "read one row at least"))
    if faults:
        raise ConfigError(faults)


def _describe(artifacts: Artifacts, folder: Path, manifest: Manifest, state: State, look: Look) -> dict[str, Any]:
    where = artifacts.where(manifest.ref) if artifacts.folder(manifest.ref) == folder else str(folder)
    document: dict[str, Any] = {"folder": where, "state": state.value, **manifest.model_dump(mode="json")}
    document["provenance"] = trace(artifacts, manifest)
    if state is not State.SEALED:
        return document
    if manifest.ref.kind == "activations":
        from flows.pages.store import describe_store

        other = _other_store(artifacts, look.against)
        document |= describe_store(artifacts, folder, manifest, other, look.rows or _ROWS)
    elif manifest.ref.kind == "stack" and (look.as_json or look.html):
        from flows.pages.stack import describe_stack

        document |= describe_stack(artifacts.checked(manifest.ref), manifest)
    return document


def _other_store(artifacts: Artifacts, uri: str) -> Boundary | None:
    """Return the store to compare with, if one is named."""
    if not uri:
        return None
    folder = find_artifact(artifacts, uri)
    manifest = read_manifest(folder)
    if manifest.ref.kind != "activations":
        raise ConfigError([Fault("--against", repr(uri), f"{manifest.ref.name} is no store; name one")])
    from flows.pages.boundaries import Boundary

    home = _home(artifacts, folder, manifest)
    home.manifest(manifest.ref)  # raises where it is not sealed
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
    """Print a line per fact, unwrapped, so that ids and folders can be copied; then what is known of a store."""
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
