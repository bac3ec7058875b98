"""How documents are written: numbers and text of the corpus, and pages as Jinja templates.

The templates escape what is inserted, so that names and corpus text cannot become markup.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from flows.pages.provenance import phrase
from flows.run.numbers import clock, parameters, percent, size
from stackwise_core.errors import is_drawn
from stackwise_core.stages.identity import Ref

_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍"}


def printable(text: str) -> str:
    """Replace characters that move a cursor, change the direction of writing, or are not assigned."""
    return "".join(character if character in "\n\t" or is_drawn(character) else "\ufffd" for character in text)


def visible(text: str, *, one_line: bool = False) -> str:
    """Return text with a visible sign for each line end and tab, which is kept behind its sign except on one line."""
    signs = _SIGNS if one_line else _SIGNS | {"\n": "↵\n", "\t": "→\t"}
    return "".join(signs.get(character) or printable(character) for character in text)


def breakable(text: str) -> Markup:
    """Return escaped text that a narrow page breaks behind a dot, a slash or an underscore before within a word."""
    return Markup(re.sub(r"(?<=\S)([._/])(?=[^\W\d])", r"\1<wbr>", str(escape(printable(text)))))  # escaped before


def artifact(name: str) -> Markup:
    """Return the name of an artifact that breaks before its hash only."""
    head, dash, end = printable(name).rpartition("-")
    return Markup('<span class="whole">{}</span><wbr><span class="whole">{}</span>').format(head + dash, end)


def command(line: str) -> Markup:
    """Return a command that breaks between its words, or within a path, but not within an option."""
    words = [
        Markup('<span class="whole">{}</span>').format(printable(word)) if word.startswith("--") else breakable(word)
        for word in line.split(" ")
    ]
    return Markup(" ").join(words)


def result(entry: dict[str, Any]) -> str:
    """Return the facts of an entry in one line that does not break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:[kMB]|B|[KMGT]iB)\b)", "\u00a0", phrase(entry))


def moment(created: str) -> Markup:
    """Return a recorded time to the minute that breaks between date and time only."""
    date, _, time = minute(created).partition(" ")
    return Markup('<span class="whole">{}</span> {}').format(date, time)


def number(value: float | None) -> str:
    """Return a number with four digits and a true minus sign, or - if it is None."""
    return "-" if value is None else f"{value:.4g}".replace("-", "\u2212")


def in_column(values: Sequence[float | None]) -> list[str]:
    """Return the numbers of a column with as many decimals each: four digits of the largest, two of the smallest.

    But at most two decimals more than four digits of the largest need: one tiny number would fill a column with zeros.
    """
    known = [abs(value) for value in values if value]
    largest, smallest = (math.floor(math.log10(each(known, default=1.0))) for each in (max, min))
    decimals = max(0, 3 - largest, min(1 - smallest, 5 - largest))
    form = f",.{decimals}f" if -5 <= largest < 9 else ".3e"
    return ["-" if value is None else f"{value:{form}}".replace("-", "\u2212") for value in values]


def minute(created: str) -> str:
    """Return a recorded time (UTC) to the minute, or - if it is empty."""
    return created.replace("T", " ")[:16] or "-"


def shape(lengths: Sequence[int], by: str = "\u00d7") -> str:
    """Return the shape of an array."""
    return f" {by} ".join(f"{length:,}" for length in lengths)


def ranges(numbers: Iterable[int]) -> str:
    """Return rising numbers as ranges: 0\u20133, 7."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[each for _, each in run] for _, run in runs]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}\u2013{span[-1]}" for span in spans)


def rounded(value: float) -> float | None:
    """Return a number for a JSON document: six significant digits, None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def listed(values: NDArray[Any]) -> list[Any]:
    """Return an array for a JSON document: nested lists of rounded numbers."""
    return [listed(row) if row.ndim else rounded(float(row)) for row in values]


def _finalize(value: object) -> object:
    """Make all inserted text printable, so that a template cannot forget it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_finalize,
)
_FILTERS: dict[str, Callable[..., Any]] = {
    "artifact": artifact,
    "breakable": breakable,
    "clock": clock,
    "command": command,
    "count": "{:,}".format,
    "minute": minute,
    "moment": moment,
    "number": number,
    "parameters": parameters,
    "percent": percent,
    "ranges": ranges,
    "result": result,
    "shape": shape,
    "size": size,
    "visible": visible,
}
_ENVIRONMENT.filters.update(_FILTERS)


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of this folder; the result is safe to insert into another."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))  # escaped by the environment


def artifact_page(template: str, document: dict[str, Any], **values: Any) -> str:
    """Return the page of an artifact as one self-contained file."""
    name = Ref.model_validate(document["ref"]).name
    recipe = json.dumps({key: document[key] for key in ("recipe", "facts", "fingerprint")}, indent=2)
    return str(render(template, name=name, document=document, recipe_json=recipe, **values))
