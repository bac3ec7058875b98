"""Numbers as a JSON document holds them: six digits, and null for what is not a number."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray


def rounded(value: float) -> float | None:
    """Return a number to six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def listed(values: NDArray[Any]) -> list[Any]:
    """Return an array as nested lists of rounded numbers."""
    return [listed(row) if row.ndim else rounded(float(row)) for row in values]
