"""From an artifact back to the data: everything it was made from, each with its state today."""

from __future__ import annotations

from typing import Any

from stackwise_core.stages.identity import Kind
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactError
from storage.manifest import InputEntry, Manifest, read_manifest

_TELLING_FACTS: dict[Kind, tuple[str, ...]] = {
    "data": ("documents", "train_sequences", "validation_sequences"),
    "build": ("operator", "blocks"),
    "trunk": ("strategy", "stacks"),
    "stack": ("train_loss", "steps", "rack_parameters"),
    "activations": ("boundary", "train_rows", "store_bytes"),
    "validation": ("validation_loss", "cache"),
}
REPLACED = "replaced"
"""It is sealed, but of other bytes than were read: it was made again since."""


def trace(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, Any]]:
    """Return one entry per artifact that this one comes from, what was made first first, itself last.

    `state` is sealed, retired, absent, corrupt or replaced; of what cannot be read, the rest is empty.
    """
    entries: dict[str, dict[str, Any]] = {}
    for entry in manifest.inputs:
        _follow(artifacts, entry, entries)
    entries[manifest.ref.sha256] = _entry(manifest, manifest.digest, artifacts.state(manifest.ref).value)
    return list(entries.values())


def _follow(artifacts: Artifacts, read: InputEntry, entries: dict[str, dict[str, Any]]) -> None:
    """Add what an input was made from, then the input, unless it is listed."""
    ref = read.ref
    if ref.sha256 in entries:
        return
    state = artifacts.state(ref)
    try:
        manifest = read_manifest(artifacts.folder(ref), ref)
    except ArtifactError:
        nothing = {"created": "", "facts": {}, "made_from": []}
        entries[ref.sha256] = {
            "name": ref.name,
            "kind": ref.kind,
            "digest": read.digest,
            "state": state.value,
            **nothing,
        }
        return
    for entry in manifest.inputs:
        _follow(artifacts, entry, entries)
    replaced = state is State.SEALED and manifest.digest != read.digest
    entries[ref.sha256] = _entry(manifest, read.digest, REPLACED if replaced else state.value)


def _entry(manifest: Manifest, digest: str, state: str) -> dict[str, Any]:
    ref, facts = manifest.ref, manifest.facts
    return {
        "name": ref.name,
        "kind": ref.kind,
        "digest": digest,
        "state": state,
        "created": manifest.created,
        "facts": {name: facts[name] for name in _TELLING_FACTS[ref.kind] if name in facts},
        "made_from": [entry.ref.name for entry in manifest.inputs],
    }
