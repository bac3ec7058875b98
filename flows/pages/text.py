"""Text of a corpus where it must stay readable on one line or in a page."""

from __future__ import annotations

from flows.pages.markup import printable
from stackwise_core.data.packing import FIRST_VALIDATION_ID

_SIGNS = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}
_SIGNS_ON_ONE_LINE = {"\n": "↵", "\t": "→", "\r": "␍"}


def number(value: float | None) -> str:
    """Return four digits of a number, with a true minus; - where it is not known."""
    return "-" if value is None else f"{value:.4g}".replace("-", "\u2212")


def sequence_name(sequence_id: int) -> str:
    """Return a sequence id for people: those of the validation split are numbered from 2^40."""
    if sequence_id < FIRST_VALIDATION_ID:
        return f"{sequence_id:,}"
    return f"2⁴⁰ + {sequence_id - FIRST_VALIDATION_ID:,}"


def visible(text: str, *, one_line: bool = False) -> str:
    """Return text with signs for line ends and tabs, which still break and space it unless it is for one line."""
    signs = _SIGNS_ON_ONE_LINE if one_line else _SIGNS
    return "".join(signs.get(character) or printable(character) for character in text)
