"""What pages of every kind have: a head, tiles of numbers, figures, tables, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from flows.pages.markup import Child, element
from flows.run.numbers import parameters, size
from stackwise_core.stages.identity import Ref


def heading(document: dict[str, Any], what: str, summary: str) -> Element:
    """Return the head of a page: what it is about, in a sentence, and by which name it is found."""
    facts = {
        "state": document["state"],
        "created": f"{minute(document['created'])} UTC",
        "folder": element("code", document["folder"]),
        "digest": element("code", document["digest"]),
        "bytes": f"{size(sum(file['size'] for file in document['files'].values()))} in {len(document['files'])} files",
    }
    return element(
        "header",
        element("p", what, class_="kicker"),
        element("h1", name_of(document)),
        element("p", summary),
        definitions(facts),
    )


def name_of(document: dict[str, Any]) -> str:
    """Return the name of the artifact."""
    return Ref.model_validate(document["ref"]).name


def minute(created: str) -> str:
    """Return a recorded time to the minute; all are in UTC."""
    return created.replace("T", " ")[:16]


def shape(lengths: Sequence[int]) -> str:
    """Return the lengths of an array's axes."""
    return " \u00d7 ".join(f"{length:,}" for length in lengths)


def definitions(facts: dict[str, Child]) -> Element:
    """Return names beside their values."""
    pairs = [element(tag, content) for name, value in facts.items() for tag, content in (("dt", name), ("dd", value))]
    return element("dl", *pairs)


def tiles(*numbers: tuple[str, str, bool]) -> Element:
    """Return the numbers to see first: (value, what it is, whether it asks for attention)."""
    shown = [
        element("div", element("b", value), element("span", what), class_="tile alert" if alert else "tile")
        for value, what, alert in numbers
    ]
    return element("div", *shown, class_="tiles")


def section(title: str, *children: Child) -> Element:
    """Return a section under a title."""
    return element("section", element("h2", title), *children)


def figures(*pairs: tuple[Element, str]) -> Element:
    """Return plots with their captions, side by side where there is room."""
    shown = [element("figure", plot, element("figcaption", caption)) for plot, caption in pairs]
    return element("div", *shown, class_="figures")


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]]) -> Element:
    """Return a table; a column whose name begins with | is set to the right, one with * may wrap."""
    classes = ["right" if name.startswith("|") else "wide" if name.startswith("*") else "" for name in columns]
    head = [element("th", name.lstrip("|*"), class_=kind) for name, kind in zip(columns, classes, strict=True)]
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, classes, strict=True)))
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", whole, class_="scroll")


def provenance(document: dict[str, Any]) -> Element:
    """Return the artifacts that this one comes from."""
    rows = [
        [
            element("code", entry["name"]),
            entry["state"],
            minute(entry["created"]) or "-",
            told(entry["facts"]),
            element("code", entry["digest"][:12]),
        ]
        for entry in document["provenance"]
    ]
    note = "What was made first comes first. A replaced artifact was made again since, with other bytes."
    columns = ("artifact", "state", "made (UTC)", "*what it came to", "digest")
    return section("Where it comes from", element("p", note, class_="soft"), table(columns, rows))


def told(facts: dict[str, Any]) -> str:
    """Return a few facts in a line."""
    return ", ".join(_PHRASES[name](value) for name, value in facts.items())


def recipe(document: dict[str, Any]) -> Element:
    """Return what decided the numbers, and on what they were computed."""
    shown = {name: document[name] for name in ("recipe", "facts", "fingerprint")}
    raw = element("pre", json.dumps(shown, indent=2))
    return section("By what recipe", element("details", element("summary", "recipe, facts and machine as JSON"), raw))


_PHRASES: dict[str, Callable[[Any], str]] = {
    "documents": lambda count: f"{count:,} documents",
    "train_sequences": lambda count: f"{count:,} sequences",
    "validation_sequences": lambda count: f"{count:,} for validation",
    "operator": str,
    "blocks": lambda count: f"{count} blocks",
    "strategy": str,
    "stacks": lambda count: f"{count} below",
    "train_loss": lambda loss: f"loss {loss:.4f}",
    "steps": lambda count: f"{count:,} steps",
    "rack_parameters": lambda count: f"rack of {parameters(count)}",
    "boundary": lambda depth: f"boundary {depth}",
    "train_rows": lambda count: f"{count:,} rows",
    "store_bytes": size,
    "validation_loss": lambda loss: f"loss {loss:.4f}",
    "cache": lambda verdict: f"cache {verdict}",
}
"""How a fact is told, of those that `provenance` picks."""
