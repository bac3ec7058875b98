"""How values and text of a corpus are written in documents, tables and pages."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from stackwise_core.data.packing import FIRST_VALIDATION_ID

_SIGNS = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}
_SIGNS_ON_ONE_LINE = {"\n": "↵", "\t": "→", "\r": "␍"}


def printable(text: str) -> str:
    """Replace characters that move a cursor, change the direction of writing, or are not assigned."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return character
    return "\ufffd"


def visible(text: str, *, one_line: bool = False) -> str:
    """Return text with signs for line ends and tabs, which still take effect unless it is for one line."""
    signs = _SIGNS_ON_ONE_LINE if one_line else _SIGNS
    return "".join(signs.get(character) or printable(character) for character in text)


def sequence_name(sequence_id: int) -> str:
    """Return a sequence id for people: those of the validation split are numbered from 2^40."""
    if sequence_id < FIRST_VALIDATION_ID:
        return f"{sequence_id:,}"
    return f"2⁴⁰ + {sequence_id - FIRST_VALIDATION_ID:,}"


def number(value: float | None) -> str:
    """Return four digits of a number, with a minus sign, or - if it is None."""
    return "-" if value is None else f"{value:.4g}".replace("-", "\u2212")


def minute(created: str) -> str:
    """Return a recorded time (UTC) to the minute, or - if there is none."""
    return created.replace("T", " ")[:16] or "-"


def shape(lengths: Sequence[int], by: str = "\u00d7") -> str:
    """Return the shape of an array."""
    return f" {by} ".join(f"{length:,}" for length in lengths)


def rounded(value: float) -> float | None:
    """Return a number for a JSON document: six significant digits, None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def listed(values: NDArray[Any]) -> list[Any]:
    """Return an array for a JSON document: nested lists of rounded numbers."""
    return [listed(row) if row.ndim else rounded(float(row)) for row in values]
