"""Progress of a stage that is not sealed, without torch: the header of its checkpoint, the shards of its store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stackwise_core.stages.identity import Ref, canonical_json
from storage.artifacts import SCRATCH, Artifacts

STATE_FOLDER = f"{SCRATCH}/checkpoint"
_HEADER = "state.json"


def step_reached(artifacts: Artifacts, ref: Ref) -> int | None:
    """Return the step at which a stage would resume, or None if it has no checkpoint. Writes nothing."""
    header = read_header(artifacts.root / "work" / ref.name / STATE_FOLDER)
    return None if header is None else header["step"]


def bytes_written(artifacts: Artifacts, ref: Ref) -> int:
    """Return the bytes of a store's shards that are written already."""
    shards = (artifacts.root / "work" / ref.name / "store.zarr").rglob("c.*")
    return sum(path.stat().st_size for path in shards if path.is_file())


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write the header of a checkpoint and its hash."""
    (folder / _HEADER).write_text(json.dumps({"header": header, "sha256": _digest(header)}))


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the header of a checkpoint; None if there is none, or if it is damaged."""
    try:
        written = json.loads((folder / _HEADER).read_bytes())
        header: dict[str, Any] = written["header"]
        intact = written["sha256"] == _digest(header)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return header if intact else None


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(header).encode()).hexdigest()
