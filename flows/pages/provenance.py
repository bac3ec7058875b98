"""The provenance of an artifact: everything it was made from, back to the data, each with its current state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.run.numbers import parameters, size
from stackwise_core.stages.identity import Kind, Ref
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactError
from storage.manifest import InputEntry, Manifest, read_manifest

_FACTS: dict[Kind, dict[str, Callable[[Any], str]]] = {
    "data": {
        "documents": "{:,} documents".format,
        "train_sequences": "{:,} sequences".format,
        "validation_sequences": "{:,} for validation".format,
    },
    "build": {"operator": str, "blocks": "{} blocks".format},
    "trunk": {"strategy": str, "stacks": "{} below".format},
    "stack": {
        "train_loss": "loss {:.4f}".format,
        "steps": "{:,} steps".format,
        "rack_parameters": lambda count: f"rack of {parameters(count)}",
    },
    "activations": {"boundary": "boundary {}".format, "train_rows": "{:,} rows".format, "store_bytes": size},
    "validation": {"validation_loss": "loss {:.4f}".format, "cache": "cache {}".format},
}
"""The facts to show of each kind of artifact, and how they are written."""


def phrase(entry: dict[str, Any]) -> str:
    """Return the facts of an entry in one line."""
    return ", ".join(_FACTS[entry["kind"]][name](value) for name, value in entry["facts"].items())


def trace(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, Any]]:
    """Return one entry for each artifact that this one comes from, in the order of their making, itself last.

    `state` is sealed, retired, absent, corrupt or replaced: sealed again since with other bytes than were read.
    The other fields of an unreadable artifact are empty.
    """
    entries: dict[str, dict[str, Any]] = {}
    for entry in manifest.inputs:
        _follow(artifacts, entry, entries)
    ref = manifest.ref
    entries[ref.sha256] = _entry(ref, manifest.digest, artifacts.state(ref).value, manifest)
    return list(entries.values())


def _follow(artifacts: Artifacts, read: InputEntry, entries: dict[str, dict[str, Any]]) -> None:
    """Add what an input was made from, then the input, unless it is listed already."""
    ref = read.ref
    if ref.sha256 in entries:
        return
    state = artifacts.state(ref)
    try:
        manifest = read_manifest(artifacts.folder(ref), ref)
    except ArtifactError:
        entries[ref.sha256] = _entry(ref, read.digest, state.value, None)
        return
    for entry in manifest.inputs:
        _follow(artifacts, entry, entries)
    replaced = state is State.SEALED and manifest.digest != read.digest
    entries[ref.sha256] = _entry(ref, read.digest, "replaced" if replaced else state.value, manifest)


def _entry(ref: Ref, digest: str, state: str, manifest: Manifest | None) -> dict[str, Any]:
    facts = manifest.facts if manifest else {}
    return {
        "name": ref.name,
        "kind": ref.kind,
        "digest": digest,
        "state": state,
        "created": manifest.created if manifest else "",
        "facts": {name: facts[name] for name in _FACTS[ref.kind] if name in facts},
        "made_from": [entry.ref.name for entry in manifest.inputs] if manifest else [],
    }
