"""`stackwise config`: every key of a configuration with its default and description, or what a file changes."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from flows.cli.arguments import add_json, load_config
from flows.run.say import say, say_json
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.keys import Key, keys_of
from stackwise_core.errors import ConfigError, Fault

_WIDTH = 100


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `config`."""
    parser.set_defaults(run=_run)
    parser.add_argument("section", nargs="?", default="", metavar="SECTION", help="only keys that begin with this")
    parser.add_argument("--diff", dest="config", default="", metavar="FILE", help="what a configuration changes")
    parser.add_argument("--markdown", action="store_true", help="print a page of the documentation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of FILE")
    add_json(parser)


def _run(options: argparse.Namespace) -> None:
    if options.set and not options.config:
        raise ConfigError([Fault("--set", options.set[0], "it changes a key of a file; name one by --diff")])
    config = load_config(options) if options.config else StackWiseConfig()
    keys = [key for key in keys_of(config) if _is_in(key.name, options.section)]
    if not keys:
        sections = ", ".join(dict.fromkeys(key.name.split(".")[0] for key in keys_of(config)))
        raise ConfigError([Fault("SECTION", repr(options.section), f"no key begins with it; the sections: {sections}")])
    if options.config:
        keys = [key for key in keys if key.changed]
    if options.markdown:
        say(*_page(keys))
    elif options.json:
        say_json({"keys": [key._asdict() for key in keys]})
    elif options.config:
        say(*(_changed(keys) or [f"{options.config} changes no key"]))
    else:
        say(*(line for key in keys for line in _described(key)))


def _page(keys: Sequence[Key]) -> list[str]:
    """Return the reference of the documentation: a table for each section, which this command writes."""
    lines = ["# Configuration", "", *_INTRODUCTION]
    sections = dict[str, list[Key]]()
    for key in keys:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, members in sections.items():
        lines += ["", f"## {section}", "", "| key | default | what it is |", "|---|---|---|"]
        for key in members:
            name, about = key.name.rpartition(".")[2], key.description.replace("|", "\\|").replace("<", "&lt;")
            choices = ", ".join(f"`{choice}`" for choice in key.choices)
            about = f"{choices}<br>{about}" if choices else about
            lines.append(f"| `{name}` | `{_text(key.default)}` | {about} |")
    return lines


_INTRODUCTION = (
    "Every key has a default; a file names those that it changes. `stackwise config` prints this list, `stackwise",
    "config --diff FILE` what a file changes, and `stackwise plan FILE` the stages that come of it. A key that a",
    "configuration does not use is a note in the plan, one that contradicts another is refused with a sentence.",
    "Where a key takes one of a few words, they come first. `stackwise config --markdown` wrote this page.",
)


def _is_in(name: str, section: str) -> bool:
    return not section or name == section or name.startswith(f"{section}.")


def _changed(keys: Sequence[Key]) -> list[str]:
    """Return a line for each key: its value, and its default behind a sign that begins a comment."""
    if not keys:
        return []
    lines = [("# what it sets", "default"), *((f"{key.name}: {_text(key.value)}", _text(key.default)) for key in keys)]
    width = max(len(line) for line, _ in lines)
    return [f"{line:<{width}}  # {default}" for line, default in lines]


def _described(key: Key) -> list[str]:
    width = min(_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else _WIDTH
    choices = [f"values: {', '.join(key.choices)}"] if key.choices else []
    about = [*choices, *textwrap.wrap(key.description, width - 4, break_on_hyphens=False)]
    return [f"{key.name}: {_text(key.default)}", *(f"    {line}" for line in about)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
