"""`stackwise compare`: what a configuration gives against other ways to spend its FLOPs, every arm at its best rate."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flows.cli.arguments import add_common, add_config, add_loudness, load_config
from flows.cli.train import on_server
from flows.pages.comparison import comparison_page, explained, markdown, tables, write_comparison
from flows.pages.page import in_column
from flows.run.comparing import RunsFailedError, known_results, open_field
from flows.run.comparison import Comparison, comparison_of, unknown_arm
from flows.run.devices import check_machine
from flows.run.events import Subscriber, subscribed
from flows.run.field import Field
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, plain_table, print_tables, reading_shown, showing
from flows.run.verdict import failures_of, judge
from stackwise_core.config.yaml import load_yaml, parse_value
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.arms import ARMS
from storage.files import write_text

_YAML = (".yaml", ".yml")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    add_common(parser, _run, json=True)
    add_config(parser)
    named = f"more arms, by commas: {', '.join(ARMS)}; a YAML file with keys to change; either with :KEY=VALUE"
    parser.add_argument("--arms", default="", metavar="A,B", help=named)
    help_text = "factors of the learning rates that are tried for every arm (default: 0.5,1,2)"
    parser.add_argument("--rates", default="0.5,1,2", metavar="X,Y", help=help_text)
    parser.add_argument("--extend", action="store_true", help="try one more rate while the best is at their edge")
    parser.add_argument("--seeds", default="3", metavar="N", help="how many (default: 3)")
    help_text = "multiples of the FLOPs of CONFIG (default: 1); rates are tuned at the first that is named"
    parser.add_argument("--budgets", default="1", metavar="X,Y", help=help_text)
    help_text = "further budgets of end-to-end training, between which its loss is interpolated"
    parser.add_argument("--curve", default="", metavar="X,Y", help=help_text)
    parser.add_argument("--tflop", default="0", metavar="N", help="what a budget of 1 is (default: what CONFIG costs)")
    parser.add_argument("--jobs", default="1", metavar="N", help="runs at a time, each with hardware.threads")
    parser.add_argument(
        "--name", default="", help="of the comparison; the names of its runs begin with it (default: run.name)"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and what they cost, and train nothing")
    parser.add_argument(
        "--so-far",
        action="store_true",
        help="judge the runs that are done, each arm at the best rate so far; train nothing",
    )
    parser.add_argument("--html", default="", metavar="FILE", help="write the page there, too")
    parser.add_argument("--markdown", default="", metavar="FILE", help="write the tables as Markdown, too")
    add_loudness(parser)


def _run(options: argparse.Namespace) -> None:
    config = load_config(options)
    arms, own = arms_of(options.arms)
    given: dict[str, Any] = {
        "rates": _numbers("--rates", options.rates),
        "seeds": _whole("--seeds", options.seeds),
        "budgets": _numbers("--budgets", options.budgets),
        "curve": _numbers("--curve", options.curve),
        "tflop": _number("--tflop", options.tflop),
        "extend": options.extend,
        "name": options.name,
    }
    jobs = _whole("--jobs", options.jobs)
    if jobs < 1:
        raise ConfigError([Fault("--jobs", str(jobs), "at least 1 is expected")])
    comparison = comparison_of(config, arms, own, **given, so_far=options.so_far)
    with reading_shown():
        field = open_field(comparison, options.artifacts)
    if options.plan:
        return _show_plan(field, as_json=options.json)
    if options.so_far:
        _show(options, field)
        return None
    listener = showing(quiet=options.quiet, verbose=options.verbose, lines=True)
    failed = _complete(comparison, field, listener, {"config": config, "arms": arms, "own": own, "jobs": jobs, **given})
    failures = _show(options, field)
    if failed or failures:
        raise failed or RunsFailedError("\n".join(failures))
    return None


def _complete(
    comparison: Comparison, field: Field, shown: AbstractContextManager[Subscriber], given: dict[str, Any]
) -> RunsFailedError | None:
    """Run what is missing, and return the error of runs that failed."""
    results = known_results(field)
    if all(run in results for run in field.wanted(results)):
        return None
    check_machine(given["config"], remote=field.artifacts.is_remote)
    with on_server(field.artifacts):
        from flows.compare import compare_to_the_end

        try:
            with shown as listener, subscribed(listener):
                compare_to_the_end(comparison, {"artifacts": field.artifacts.uri, **given})
        except RunsFailedError as error:
            return error
    return None


def _show(options: argparse.Namespace, field: Field) -> list[str]:
    """Print and write what there is, and return a line for each run without a loss."""
    results = known_results(field, failed=True)
    if not options.so_far:
        field.register(results)
    document = judge(field, results)
    folder = write_comparison(document, field.artifacts)
    for file, drawn in ((options.markdown, markdown), (options.html, comparison_page)):
        if file:
            write_text(Path(file), drawn(document))
    if options.json:
        say_json(document)
    else:
        found = tables(document)
        print_tables(found)
        say("", *explained(found), *document["notes"], "", document["verdict"], *filter(None, [document["loses"]]), "")
        say(f"everything together: {document['total_tflop']:.4g} TFLOP; in {folder}")
    return failures_of(document)


def _show_plan(field: Field, *, as_json: bool) -> None:
    """Print every run with its steps, its FLOPs and whether it is there; a rate that is still to be tuned is `best`."""
    rows = field.planned(known_results(field))
    if as_json:
        say_json({"name": field.comparison.name, "budget_tflop": field.unit / 1e12, "runs": rows})
        return
    table = plain_table("arm", "|budget", "|rate", "|seed", "steps", "|TFLOP", "state")
    for row, tflop in zip(rows, in_column([row["tflop"] for row in rows]), strict=True):
        steps = ", ".join(map(str, row["steps"]))
        rate = "best" if row["rate"] is None else f"{row['rate']:g}"
        table.add_row(row["arm"], f"{row['budget']:g}", rate, str(row["seed"]), steps, tflop, row["state"])
    plain_console().print(table)
    left = [row["tflop"] for row in rows if row["state"] == "to run"]
    say(
        "",
        f"{len(rows)} runs, {sum(row['tflop'] for row in rows):.4g} TFLOP; to run: {len(left)}, {sum(left):.4g} TFLOP",
    )


def arms_of(text: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the arms that --arms names, and what those change that it defines.

    Raises:
        ConfigError: a file cannot be read, or an entry is neither an arm, nor a file, nor ARM:KEY=VALUE.
    """
    names, own = list[str](), dict[str, dict[str, Any]]()
    for entry in dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))):
        start, *changes = entry.split(":")
        if Path(entry).suffix in _YAML and Path(start).suffix not in _YAML and start not in ARMS:
            start, changes = entry, []  # a path with a colon
        is_file = Path(start).suffix in _YAML
        if not is_file and not changes:
            names.append(entry)
            continue
        if not is_file and start not in ARMS:
            raise ConfigError([Fault("--arms", repr(entry), unknown_arm(start))])
        pairs = [change.partition("=") for change in changes]
        if not all(key and equals for key, equals, _ in pairs):
            allowed = "ARM:KEY=VALUE is expected, such as frozen:training.optimizer_state=keep"
            raise ConfigError([Fault("--arms", repr(entry), allowed)])
        name = " ".join([Path(start).stem if is_file else start, *(f"{k.split('.')[-1]}={v}" for k, _, v in pairs)])
        keys = load_yaml(Path(start)) if is_file else {"arm": start}
        keys |= {key: parse_value(value) for key, _, value in pairs}
        if name in own:
            raise ConfigError([Fault("--arms", repr(entry), f"another arm is called {name}, too; rename a file")])
        own[name] = keys
    return names, own


def _numbers(option: str, text: str) -> list[float]:
    return [_number(option, part) for part in text.split(",") if part.strip()]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError([Fault(option, repr(text), "a number is expected, such as 0.5")]) from None


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError([Fault(option, repr(text), "a whole number is expected, such as 3")]) from None
