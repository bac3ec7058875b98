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
    "build": {"operator": str, "blocks": lambda count: f"{count} block{'' if count == 1 else 's'}"},
    "trunk": {"strategy": "strategy {}".format, "stacks": lambda count: f"{count} stack{'' if count == 1 else 's'}"},
    "stack": {
        "train_loss": "loss {:.4f}".format,
        "steps": "{:,} steps".format,
        "rack_parameters": lambda count: f"rack of {parameters(count)}",
    },
    "optimizer": {"tensors": "{:,} tensors".format},
    "cooldown": {"validation_loss": "cooled {:.4f}".format, "steps": "{:,} steps".format},
    "activations": {"boundary": "boundary {}".format, "train_rows": "{:,} rows".format, "store_bytes": size},
    "validation": {"validation_loss": "loss {:.4f}".format, "cache": "cache {}".format},
}
"""The facts to show of each kind of artifact, and how they are written."""


def phrase(entry: dict[str, Any]) -> str:
    """Return the facts of an entry in one line."""
    if entry["kind"] == "trunk" and entry["facts"].get("stacks") == 0:
        return "no stack"  # so that it is neither frozen nor trained
    return ", ".join(_FACTS[entry["kind"]][name](value) for name, value in entry["facts"].items())


def trace(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, Any]]:
    """Return one entry for each artifact that this one comes from, none before what it was made from, itself last.

    `state` is sealed, retired, absent, corrupt or replaced: sealed again since with other bytes than were read.
    The other fields of an unreadable artifact are empty.
    """
    ref = manifest.ref
    own = _entry(ref, manifest.digest, artifacts.state(ref).value, manifest)
    entries: dict[str, dict[str, Any]] = {}
    met = {ref.sha256}
    # What is left to list: an input, or an entry whose inputs come before it. No recursion, which 1000 stages exceed.
    left: list[InputEntry | dict[str, Any]] = [own, *reversed(manifest.inputs)]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            entries[each["name"]] = each
        elif each.ref.sha256 not in met:
            met.add(each.ref.sha256)
            entry, inputs = _read(artifacts, each)
            left += [entry, *reversed(inputs)]
    return list(entries.values())


def _read(artifacts: Artifacts, read: InputEntry) -> tuple[dict[str, Any], tuple[InputEntry, ...]]:
    """Return the entry of an input, and what it was made from."""
    ref, state = read.ref, artifacts.state(read.ref)
    try:
        manifest = read_manifest(artifacts.folder(ref), ref)
    except ArtifactError:
        return _entry(ref, read.digest, state.value, None), ()
    replaced = state is State.SEALED and manifest.digest != read.digest
    return _entry(ref, read.digest, "replaced" if replaced else state.value, manifest), manifest.inputs


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
