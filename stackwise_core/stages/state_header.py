"""The header of a stage's checkpoint on disk: JSON with its hash. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stackwise_core.files import write_file
from stackwise_core.stages.identity import canonical_json
from stackwise_core.strict import MOST_OF_A_LIST, parse_object, read_bounded

_HEADER = "state.json"


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write the header of a checkpoint and its hash."""
    write_file(folder / _HEADER, json.dumps({"header": header, "sha256": _digest(header)}).encode())


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the header of a checkpoint; None if there is none, or if it is damaged."""
    try:
        written = parse_object(read_bounded(folder / _HEADER, MOST_OF_A_LIST))
        header = written["header"]
        intact = isinstance(header, dict) and written["sha256"] == _digest(header)
    except (OSError, ValueError, KeyError):
        return None
    return header if intact else None


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(header).encode()).hexdigest()
