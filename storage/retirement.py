"""Retirement: the data of an artifact is dropped on purpose, and its manifest stays with a sealed statement of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from stackwise_core.stages.identity import Kind
from stackwise_core.strict import read_bounded
from storage.manifest import Manifest
from storage.records import sealed, unsealed

RETIRED = "retired.json"
RETIRABLE: frozenset[Kind] = frozenset({"activations", "optimizer"})
"""What can be derived again from the rest. A statement about anything else is none: it is only a stray file."""


def make_statement(manifest: Manifest) -> str:
    """Return what says that an artifact is retired now; raises ValueError if its kind never is."""
    if manifest.ref.kind not in RETIRABLE:
        raise ValueError(f"{manifest.ref.name}: artifacts of this kind are not retired")
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return sealed({"retired": since, "of": manifest.seal})


def states_retirement(data: bytes, manifest: Manifest) -> bool:
    """Say whether a file is a statement that this artifact was retired."""
    try:
        found = unsealed(data)
        datetime.fromisoformat(found["retired"])
    except (ValueError, KeyError, TypeError):
        return False
    # Version 0.1 did not say of which artifact.
    return manifest.ref.kind in RETIRABLE and found.get("of", manifest.seal) == manifest.seal


def is_retired(folder: Path, manifest: Manifest) -> bool:
    """Say whether a folder has a statement that the artifact in it was retired."""
    if manifest.ref.kind not in RETIRABLE:
        return False
    try:
        return states_retirement(read_bounded(folder / RETIRED), manifest)
    except (OSError, ValueError):
        return False
