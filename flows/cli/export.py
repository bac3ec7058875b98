"""`stackwise export`: write the rack of a run into a folder for transformers or llama.cpp."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.cli.arguments import add_common
from flows.cli.opening import check_run
from flows.run.numbers import percent, size
from flows.run.say import say, say_json
from stackwise_core.interop.target import checked_target, exported_files
from stackwise_core.strict import parse_object

if TYPE_CHECKING:
    from stackwise_core.interop.read_back import Comparison


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    add_common(parser, _export, json=True)
    parser.add_argument("run_name", metavar="RUN", help="name of a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder to write; it must be absent or empty")
    help_text = "the number of stacks, as the stage that added the last of them left the rack (default: all)"
    parser.add_argument("--depth", type=int, metavar="K", help=help_text)
    help_text = "a folder for transformers (hf), or a file for llama.cpp in it (gguf); default: hf"
    parser.add_argument("--format", default="hf", choices=("hf", "gguf"), help=help_text)
    help_text = "type of the written weights (default: float32)"
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help=help_text)
    help_text = "where diffusion time is an input: the step to export; every step needs its own folder"
    parser.add_argument("--time-step", type=int, metavar="T", help=help_text)
    help_text = "send the folder to this repository of Hugging Face; a new one is private"
    parser.add_argument("--push", metavar="OWNER/NAME", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")


def _export(options: argparse.Namespace) -> None:
    check_run(options.artifacts, options.run_name)
    checked_target(options.to, force=options.force)  # before torch, which takes seconds to load
    from flows.run.exporting import export_run  # imports torch
    from flows.run.pushing import Repository

    repository = Repository(options.push) if options.push is not None else None
    exported, notes = export_run(
        options.artifacts,
        options.run_name,
        options.to,
        depth=options.depth,
        format=options.format,
        dtype=options.dtype,
        time_step=options.time_step,
        force=options.force,
    )
    if options.json:
        about = parse_object((exported.folder / "stackwise.json").read_bytes())
        pushed = {"pushed": repository.push(exported.folder)} if repository else {}
        say_json({"folder": str(exported.folder), "bytes": exported.n_bytes, "notes": notes, **pushed, **about})
        return
    say(f"{options.run_name} -> {exported.folder}: {exported.architecture}, {options.dtype}, {size(exported.n_bytes)}")
    say(f"read back: {_told(exported.comparison)}")
    say(*(f"note: {note}" for note in notes))
    if repository:
        files = sorted(exported_files(exported.folder))
        say(f"sending {size(exported.n_bytes)} to {repository.where}: {', '.join(files)}")
        say(f"sent: {repository.push(exported.folder)}")


def _told(found: Comparison) -> str:
    if found.equal:
        return f"the logits of {found.tokens} tokens equal those of the run, bit for bit"
    return (
        f"the logits of {found.tokens} tokens differ from the run's by at most {found.difference:.1e} of the largest; "
        f"the likeliest token is the same for {percent(found.same_choices, '.1f')}"
    )
