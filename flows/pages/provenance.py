"""The provenance of an artifact: everything it was made from, back to the data, each with its current state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.run.numbers import parameters, size
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
"""State of an input that is sealed, but with other bytes than were read, because it was made again since."""


_PHRASES: dict[str, Callable[[Any], str]] = {
    "documents": lambda count: f"{count:,} documents",
    "train_sequences": lambda count: f"{count:,} sequences",
    "validation_sequences": lambda count: f"{count:,} for validation",
    "operator": str,
    "blocks": lambda count: f"{count} blocks",
    "strategy": str,
    "stacks": lambda count: f"{count} below",
    "train_loss": lambda loss: f"loss {loss:.4f}",
    "steps": lambda count: f"{count:,} steps",
    "rack_parameters": lambda count: f"rack of {parameters(count)}",
    "boundary": lambda depth: f"boundary {depth}",
    "train_rows": lambda count: f"{count:,} rows",
    "store_bytes": size,
    "validation_loss": lambda loss: f"loss {loss:.4f}",
    "cache": lambda verdict: f"cache {verdict}",
}
"""How the facts of `_TELLING_FACTS` are written."""


def phrase(facts: dict[str, Any]) -> str:
    """Return the facts of an entry in one line."""
    return ", ".join(_PHRASES[name](value) for name, value in facts.items())


def trace(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, Any]]:
    """Return one entry per artifact that this one comes from, in the order of their making, itself last.

    `state` is sealed, retired, absent, corrupt or replaced; the other fields of an unreadable artifact are empty.
    """
    entries: dict[str, dict[str, Any]] = {}
    for entry in manifest.inputs:
        _follow(artifacts, entry, entries)
    entries[manifest.ref.sha256] = _entry(manifest, manifest.digest, artifacts.state(manifest.ref).value)
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
