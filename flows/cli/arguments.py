"""What commands share: arguments, the configuration that they name, and the message of a wait for a lock."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from flows.run.say import report
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import parse_value
from stackwise_core.errors import ConfigError, Fault

Run = Callable[[argparse.Namespace], int | None]
"""Runs a command and returns its exit code; None is 0."""


def add_common(parser: argparse.ArgumentParser, run: Run, *, json: bool = False) -> None:
    """Set the function that runs a command, and add --artifacts and perhaps --json."""
    parser.set_defaults(run=run)
    help_text = "where artifacts are stored: a folder (default: artifacts/) or s3://BUCKET/PREFIX"
    parser.add_argument("--artifacts", default="artifacts", metavar="ROOT", help=help_text)
    if json:
        add_json(parser)


def add_loudness(parser: argparse.ArgumentParser) -> None:
    """Add -q and -v."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-q", "--quiet", action="store_true", help="no progress; only notes, warnings and the result")
    how.add_argument("-v", "--verbose", action="store_true", help="a line for every step and every task, and no bars")


def add_json(parser: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add CONFIG and --set."""
    help_text = "look the id up in the plan of this configuration" if optional else "a YAML configuration"
    parser.add_argument("config", nargs="?" if optional else None, metavar="CONFIG", help=help_text)
    help_text = "change a key of CONFIG, such as training.batch_size=8"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def load_config(options: argparse.Namespace) -> StackWiseConfig:
    """Return the configuration that CONFIG and --set name.

    Raises:
        ConfigError: names every fault.
    """
    overrides: dict[str, Any] = {}
    for entry in options.set:
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise ConfigError([Fault("--set", repr(entry), "KEY=VALUE is expected, such as training.batch_size=8")])
        overrides[key] = parse_value(value)
    return StackWiseConfig.from_yaml(options.config, overrides)


def print_waiting(holder: str) -> None:
    """Print that this command waits for a lock; an `on_wait` callback."""
    report(f"waiting for {holder}")
