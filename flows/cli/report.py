"""`stackwise report`: what came of a run, or of several side by side, in the terminal and as one page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flows.cli.arguments import add_common
from flows.pages.run import Document, describe_run
from flows.pages.run_page import MOST_RUNS, loss_image, page_of
from flows.pages.run_tables import side_by_side, tables
from flows.run.say import say, say_json
from flows.run.terminal import print_tables, say_hanging
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, artifacts_at
from storage.files import write_text


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    add_common(parser, _run, json=True)
    help_text = f"name of a run; up to {MOST_RUNS} are set side by side"
    parser.add_argument("names", nargs="+", metavar="RUN", help=help_text)
    help_text = "write one page that needs no network, and beside it the same as JSON"
    parser.add_argument("--html", default="", metavar="FILE", help=help_text)
    parser.add_argument("--svg", default="", metavar="FILE", help="write the curves of losses as a picture")
    help_text = "of a single run: let the rack of every depth write N tokens (0; on a page 64, and 0 opens no rack)"
    parser.add_argument("--samples", type=int, metavar="N", help=help_text)
    help_text = "what they go on from (default: the beginning of a withheld sequence)"
    parser.add_argument("--prompt", default="", metavar="TEXT", help=help_text)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    artifacts = artifacts_at(options.artifacts).existing()
    documents = [describe_run(artifacts, name) for name in options.names]
    if len(documents) == 1:
        _add_samples(options, artifacts, documents[0])
    if options.html:
        _write(Path(options.html).absolute(), documents)
    if options.svg:
        _draw(options.svg, documents)
    if options.json:
        say_json(_said(documents))
        return
    for document in documents:
        say_hanging("", f"{document['run']}: {document['verdict']}")
        for line in filter(None, [document["standing"], *document["warnings"]]):
            say_hanging("", line)
    print_tables(tables(documents[0]) if len(documents) == 1 else side_by_side(documents))
    for sample in documents[0]["samples"]:
        say("", f"stage {sample['stage']}, {sample['depth']} deep: {sample['prompt']!r} -> {sample['text']!r}")
    if options.html:
        say("", f"page: {options.html}", f"data: {Path(options.html).with_suffix('.json')}")


def _check(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing here, before anything is read."""
    many = len(options.names) > 1
    page = Path(options.html)
    checks = (
        (len(options.names) > MOST_RUNS, "RUN", f"{len(options.names)} runs", f"at most {MOST_RUNS} fit side by side"),
        (len({*options.names}) < len(options.names), "RUN", " ".join(options.names), "name each run once"),
        (many and options.samples, "--samples", str(options.samples), "give one run only"),
        (many and options.prompt, "--prompt", repr(options.prompt), "give one run only"),
        ((options.samples or 0) < 0, "--samples", str(options.samples), "0 or more is expected"),
        (options.html and page.suffix == ".json", "--html", repr(options.html), "the data has this name; end in .html"),
        (
            options.html and not page.absolute().parent.is_dir(),
            "--html",
            repr(options.html),
            "its folder does not exist; make it, or choose another",
        ),
    )
    if faults := [Fault(option, value, allowed) for wrong, option, value, allowed in checks if wrong]:
        raise ConfigError(faults)


_ON_A_PAGE = 64
"""New tokens of a sample on a page, unless it is said."""


def _add_samples(options: argparse.Namespace, artifacts: Artifacts, document: Document) -> None:
    """Add what the rack of each depth writes, if that was asked for; on a page it is left out where it cannot be."""
    n_new = options.samples if options.samples is not None else _ON_A_PAGE if options.html or options.prompt else 0
    if n_new == 0 or not any(stage["digest"] for stage in document["stages"]):
        return
    from flows.run.samples import judge_depths, sample_depths

    if options.html:
        try:
            document["depths"] = judge_depths(artifacts.uri, document["run"])
        except ConfigError as error:
            document["notes"].append(f"no losses by position: {error.faults[0].allowed}")
    try:
        document["samples"] = sample_depths(artifacts.uri, document["run"], n_new, options.prompt)
    except ConfigError as error:
        if options.samples or options.prompt:
            raise
        document["notes"].append(f"no samples: {error.faults[0].allowed}")


def _said(documents: list[Document]) -> Document:
    return documents[0] if len(documents) == 1 else {"runs": documents}


def _draw(path: str, documents: list[Document]) -> None:
    if (drawn := loss_image(documents)) is None:
        raise ConfigError([Fault("--svg", repr(path), "no loss is known yet; let a stage train first")])
    _written("--svg", {Path(path).absolute(): drawn})


def _write(page: Path, documents: list[Document]) -> None:
    data = json.dumps(_said(documents), indent=1)
    _written("--html", {page: page_of(documents), page.with_suffix(".json"): data})


def _written(option: str, files: dict[Path, str]) -> None:
    try:
        for path, text in files.items():
            write_text(path, text)
    except OSError as error:
        allowed = f"cannot be written ({error.strerror or error})"
        raise ConfigError([Fault(option, repr(str(error.filename or next(iter(files)))), allowed)]) from None
