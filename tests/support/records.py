"""Files of a run changed as their maker could: the checksums go along, so that what they say is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.records import hash_of, sealed, unsealed
from storage.runs import START


def rewrite(path: Path, text: str) -> None:
    """Give a file of an attempt another text."""
    path.write_text(text)
    vouch(path)


def vouch(path: Path) -> None:
    """Let the start of an attempt, if it knows a file, know it as it is now."""
    start = path.parent / START
    if path.name != START and start.exists() and path.name in (files := unsealed(start.read_bytes())["files"]):
        change(start, files={**files, path.name: hash_of(path.read_bytes())})


def change(path: Path, **values: Any) -> None:
    """Change values of a sealed record."""
    path.write_text(sealed({**unsealed(path.read_bytes()), **values}))
