"""The parts of a rack as a table, in a notebook."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stackwise_core.model.precision import count_parameters
from stackwise_core.notebook import table

_COLUMNS = ("part", "blocks", "stored as", "parameters", "in adapters", "training")


def parts_table(title: str, parts: Iterable[tuple[str, nn.Module]]) -> str:
    """Return a row for each part; `training` counts the parameters that have `requires_grad`."""
    rows = list[tuple[object, ...]]()
    for name, part in parts:
        blocks = getattr(part, "blocks", None)
        counts = count_parameters(part)
        stored = getattr(part, "precision", "full"), *counts.values()
        rows.append((name, len(blocks) if isinstance(blocks, nn.ModuleList) else None, *stored))
    return table(title, _COLUMNS, rows)
