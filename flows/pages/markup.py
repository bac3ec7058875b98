"""HTML and SVG as trees: text and attributes are escaped because they are never pasted into markup."""

from __future__ import annotations

import unicodedata
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element; `class_` is class, and _ in a name is -, as in stroke_width. A None child is left out."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: printable(str(value)) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child:
            _append_text(made, printable(child))
    return made


def page(title: str, style: str, *children: Child) -> str:
    """Return a whole HTML document that needs nothing from elsewhere."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    document = element("html", head, element("body", *children), lang="en")
    return "<!doctype html>\n" + tostring(document, encoding="unicode", method="html") + "\n"


def printable(text: str) -> str:
    """Return text without what moves a cursor, turns the direction of writing, or is no character at all."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return character
    return "\ufffd"


def _append_text(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text
