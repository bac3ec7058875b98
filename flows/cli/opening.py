"""The rack that `generate` and `evaluate` read: of a run, or of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise_core.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stackwise_core.interop.folders import OpenedFolder
    from storage.racks import OpenedRun

    Opened = OpenedRun | OpenedFolder


def add_rack(parser: argparse.ArgumentParser) -> None:
    """Add RUN|DIR and --tokenizer."""
    help_text = "name of a run, or a folder: a rack that was saved, an export, or a Hugging Face checkpoint (Llama, "
    help_text += "Mistral, Qwen, SmolLM3, OLMo2); what has no slash is a run, if there is one of this name"
    parser.add_argument("name", metavar="RUN|DIR", help=help_text)
    help_text = "of a folder: byte, or a tokenizer.json (default: the one in it)"
    parser.add_argument("--tokenizer", default="", metavar="FILE", help=help_text)


def open_racks(options: argparse.Namespace, depth: int | str | None) -> list[Opened]:
    """Find a rack without loading it, or those of every depth.

    Args:
        options: with `name`, `tokenizer` and `artifacts`.
        depth: the number of stacks of a run; `all` for every depth; None as far as it is trained.

    Raises:
        ConfigError: there is no such run, folder or depth, or no text can be made with it or judged by it.
        SavedRackError: the folder holds no rack, or a damaged one.
    """
    if _is_folder(options):
        from stackwise_core.interop.folders import open_folder

        if depth not in (None, "all"):
            raise ConfigError([Fault("--depth", str(depth), "a folder holds a rack of one depth; leave it out")])
        found: list[Opened] = [open_folder(options.name, options.tokenizer)]
    else:
        check_run(options.artifacts, options.name)
        from storage.racks import open_run, open_runs

        if options.tokenizer:
            allowed = "a run has the tokenizer that it was trained with; leave it out"
            raise ConfigError([Fault("--tokenizer", repr(options.tokenizer), allowed)])
        if depth == "all":
            found = [*open_runs(options.artifacts, options.name)]
        else:
            found = [open_run(options.artifacts, options.name, None if depth is None else int(depth))]
    if objective_of(found[0]) == "custom":
        allowed = f"run {options.name} was trained on targets of its own (custom), and text says nothing about them"
        raise ConfigError([Fault("RUN", repr(options.name), f"{allowed}; `status` shows its loss")])
    return found


def check_run(artifacts: str, name: str) -> None:
    """Raise ConfigError unless there is such a run: before torch is imported, which takes seconds."""
    from storage.artifacts import artifacts_at
    from storage.runs import known_attempts

    known_attempts(artifacts_at(artifacts).existing(), name)


def objective_of(opened: Opened) -> str:
    """Return what a rack was trained for: clm, mlm or custom."""
    return opened.config.training.progressive.training_objective


def _is_folder(options: argparse.Namespace) -> bool:
    name = options.name
    if "/" in name or name in ("", ".", "..", "~"):
        return True
    return Path(name).is_dir() and not _is_run(options)


def _is_run(options: argparse.Namespace) -> bool:
    from storage.artifacts import artifacts_at
    from storage.errors import ArtifactsFolderError
    from storage.runs import attempts

    try:
        return bool(attempts(artifacts_at(options.artifacts).existing(), options.name))
    except ArtifactsFolderError:
        return False
