"""What every command prints goes through here: a line may repeat names and texts of others, which only draw letters."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import time
from typing import Any, TextIO

from stackwise_core.errors import shown


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines; what a terminal would obey becomes visible, a line end inside a line too."""
    for line in lines:
        print(shown(line), file=file or sys.stdout, flush=file is not None)


def complain(*lines: object) -> None:
    """Print lines to stderr; see `say`. A terminal gets them wrapped between words."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = tuple(part for line in lines for part in wrapped(line, width))
    say(*lines, file=sys.stderr)


def wrapped(line: object, width: int) -> list[str]:
    """Return a line in parts of a width; a longer word, such as a path, stays whole, so that it can be copied.

    A number stays with its unit.
    """
    whole = _UNIT.sub("\x1f", shown(line))
    parts = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [part.replace("\x1f", " ") for part in parts] or [""]


_UNIT = re.compile(r"(?<=\d) (?=([KMGT]i)?B\b|[kM]\b|TFLOP|steps?\b|blocks?\b)")


def report(*lines: object) -> None:
    """Print to stderr how a command goes on; where no terminal shows it, as lines of a log, with the time of day."""
    when = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
    complain(*(f"{when}{line}" for line in lines))


def say_json(document: Any) -> None:
    """Print one JSON document, in ASCII, so that nothing in it reaches a terminal."""
    print(json.dumps(document, indent=1))
