"""What steps measured, without what differs from one machine or attempt to the next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stackwise_core.training.watch import CLOCKED
from support.runs import folder_of


def unclocked(records: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the records without times, speeds and memory, which they all have."""
    found = [dict(record) for record in records]
    for record in found:
        for name in CLOCKED:
            record.pop(name, None)
    return found


def metrics_of(root: Path, stage: int) -> list[dict[str, Any]]:
    """Return the records of a sealed stage."""
    return [json.loads(line) for line in (folder_of(root, "stack", stage) / "metrics.jsonl").read_text().splitlines()]
