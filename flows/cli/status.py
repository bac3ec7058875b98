"""`stackwise status`: the runs of an artifacts folder, or the stages of one run."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.cli.arguments import add_common
from flows.run.live import progress_line, read_live
from flows.run.numbers import clock, loss, size
from flows.run.say import say, say_json
from flows.run.summary import StageSummary, state_of_run, summarise
from flows.run.terminal import plain_console, plain_table, say_hanging, stage_tables
from stackwise_core.errors import ConfigError, Fault, shown
from stackwise_core.stages.identity import Kind, Ref
from stackwise_core.stages.plan import StagePlan
from storage.artifacts import Artifacts, Lookup, State, artifacts_at
from storage.errors import ArtifactError
from storage.locks import Holder
from storage.runs import Attempt, all_attempts, counting, holder_of_run, is_live, known_attempts

Lookups = Callable[[Ref], Lookup]
_GOALS: tuple[Kind, ...] = ("stack", "cooldown", "validation")


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `status`."""
    add_common(parser, _run, json=True)
    parser.add_argument("name", nargs="?", metavar="RUN", help="name of a run; default: all runs")
    parser.add_argument("--follow", action="store_true", help="print how far a live run is until it ends")


def _run(options: argparse.Namespace) -> None:
    if options.follow:
        _follow(options)
    if options.name is None:
        show_runs(options.artifacts, as_json=options.json)
    else:
        show_stages(options.artifacts, options.name, as_json=options.json)


def _follow(options: argparse.Namespace) -> None:
    """Print how far a run is whenever that has changed, until no process holds it.

    Raises:
        ConfigError: no run is named, there is no such run, or JSON was asked for.
    """
    if options.name is None or options.json:
        wrong = ("RUN", "nothing", "name the run to follow") if options.name is None else _NO_JSON
        raise ConfigError([Fault(*wrong)])
    artifacts, last = artifacts_at(options.artifacts).existing(), ""
    known_attempts(artifacts, options.name)
    while is_live(artifacts, options.name):
        live = read_live(known_attempts(artifacts, options.name)[-1].folder)
        line = progress_line(live) if live else ""
        if line and line != last:
            say(line)
        last = line
        time.sleep(_SECONDS_BETWEEN_LOOKS)


_NO_JSON = ("--follow", "--json", "a document is printed once; leave one of them out")
_SECONDS_BETWEEN_LOOKS = 1.0
_LONG_AGO = 15.0


def show_runs(root: str, *, as_json: bool) -> None:
    """Print the state, progress and newest validation loss of every run."""
    artifacts = artifacts_at(root).existing()
    lookup = functools.cache(artifacts.lookup)  # runs share artifacts
    runs = [_document(artifacts, found, lookup) for found in all_attempts(artifacts).values()]
    if as_json:
        say_json({"artifacts": artifacts.uri, "runs": runs})
        return
    say(*(_lines(runs) if runs else [f"no runs yet in {artifacts.uri}"]))
    say(*(f"{run['name']}: {line}" for run in runs for line in _told(run)))


def _lines(runs: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run, in columns; drawn here, since a table of rich's takes a second for a thousand."""
    cells = {
        "run": [run["name"] for run in runs],
        "state": [run["state"] for run in runs],
        "stages": [f"{run['stages_done']}/{run['stages']}" for run in runs],
        "val. loss": [loss(run["validation_loss"]) for run in runs],
        "attempts": [str(run["attempts"]) for run in runs],
        "started (UTC)": [run["started"][:16].replace("T", " ") for run in runs],
    }
    columns = [
        [f"{cell:{'>' if name in _NUMBERS else '<'}{max(map(len, [name, *column]))}}" for cell in [name, *column]]
        for name, column in cells.items()
    ]
    width = plain_console().width if sys.stdout.isatty() else math.inf
    for least in (4, 3):  # a date or a name that is cut is worth less than a number
        if sum(len(column[0]) + 2 for column in columns) - 2 > width:
            del columns[least]
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


_NUMBERS = ("stages", "val. loss", "attempts")


def show_stages(root: str, name: str, *, as_json: bool) -> None:
    """Print the stages of a run and their artifacts.

    Raises:
        ConfigError: there is no such run.
    """
    artifacts = artifacts_at(root).existing()
    found = known_attempts(artifacts, name)
    attempt, plan = found[-1], counting(artifacts, found)[-1].plan
    stages = summarise(artifacts, plan)
    run = _describe(artifacts, found, artifacts.lookup)
    if as_json:
        say_json({**run, "stage_list": [stage.model_dump() for stage in stages]})
        return
    console = plain_console()
    rest = f": {run['state']}, attempt {attempt.number}, {attempt.folder}"
    console.print(Text.assemble((shown(name), "bold"), shown(rest)), soft_wrap=True)
    message = "; ".join(run["message"].splitlines())
    shorter = len(attempt.plan.stages)
    fewer = [f"its newest attempt asked for {shorter} of these {len(stages)} stages"] if shorter < len(stages) else []
    going = [_going(run["progress"])] if "progress" in run else []
    for line in (*([message] if message else []), *fewer, *_holders(run), *going):
        say_hanging("", line)
    console.print(stage_tables(stages))
    console.print()
    console.print(_artifact_table(stages, run["locks"]))


def _going(said: dict[str, Any]) -> str:
    """Return where a live run is, and when that was if it is long ago: what is said of the time left is as old."""
    age = time.time() - said["at"]
    return progress_line(said) + (f"; that was {clock(age)} ago" if age >= _LONG_AGO else "")


def _told(run: dict[str, Any]) -> list[str]:
    return [*([run["message"]] if run["state"] == "damaged" else []), *_holders(run)]


def _holders(run: dict[str, Any]) -> list[str]:
    """Return a line for the process that executes the run, and one for each process that makes an artifact of it."""
    held = {"started": run["holder"], **run["locks"]}
    return [f"{what}: {Holder(**holder)}" for what, holder in held.items() if holder is not None]


def _artifact_table(stages: list[StageSummary], held: Collection[str]) -> Table:
    table = plain_table("stage", "artifact", "state")
    for stage in stages:
        for kind, artifact in stage.artifacts.items():
            state = _state_of(stage, kind)
            table.add_row(
                str(stage.stage), artifact, state.replace("absent", "being made") if artifact in held else state
            )
        if "activations" not in stage.artifacts:
            table.add_row(str(stage.stage), "no activations", stage.cache_note)
    return table


def _state_of(stage: StageSummary, kind: str) -> str:
    """Return the state of an artifact, and how much of it an unfinished attempt left."""
    if kind == "stack" and stage.steps_kept is not None:
        return f"{stage.states[kind]}, checkpoint after step {stage.steps_kept} of {stage.steps}"
    if kind == "activations" and stage.bytes_kept:
        return f"{stage.states[kind]}, {size(stage.bytes_kept)} written"
    return stage.states[kind]


def _document(artifacts: Artifacts, found: list[Attempt], lookup: Lookups) -> dict[str, Any]:
    """Return the document of a run, of its attempts; a damaged run must not hide the others."""
    try:
        found[-1].read("config.yaml")  # raises if it is damaged
        return _describe(artifacts, found, lookup)
    except ArtifactError as error:
        unknown = {"stages": 0, "stages_done": 0, "validation_loss": None, "attempts": len(found), "started": "-"}
        damage = {"name": found[-1].name, "state": "damaged", "message": str(error)}
        return {**damage, **unknown, "holder": None, "locks": {}}


def _describe(artifacts: Artifacts, found: list[Attempt], lookup: Lookups) -> dict[str, Any]:
    attempt, plan = found[-1], counting(artifacts, found)[-1].plan
    outcome, live = attempt.outcome, is_live(artifacts, attempt.name)
    done = [stage for stage in plan.stages if _is_finished(stage, lookup)]
    all_done = len(done) == len(plan.stages)
    making = {} if all_done and not live else plan.recipes
    holders = {ref.name: artifacts.place.lock_holder(ref.name) for ref in making}
    state = state_of_run(outcome, live=live, all_done=all_done)
    return {
        "name": attempt.name,
        "state": state,
        "message": outcome["message"] if outcome and state in ("failed", "stopped") else "",
        "stages": len(plan.stages),
        "stages_done": len(done),
        "validation_loss": _validation_loss(done[-1], lookup) if done else None,
        "attempts": len(found),
        "started": attempt.start["started"],
        "holder": holder_of_run(attempt)._asdict() if live else None,
        "locks": {name: holder._asdict() for name, holder in holders.items() if holder is not None},
        **({"progress": progress} if live and (progress := read_live(attempt.folder)) else {}),
    }


def _is_finished(stage: StagePlan, lookup: Lookups) -> bool:
    """Return whether stack, cool-down and validation are there; adopted stacks have no validation but the last."""
    goals = [stage.ref(kind) for kind in _GOALS if stage.recipe(kind) is not None]
    return all(lookup(ref).state is State.SEALED for ref in goals)


def _validation_loss(stage: StagePlan, lookup: Lookups) -> float | None:
    manifest = lookup(stage.ref("validation")).sealed if stage.validation else None
    return manifest.facts.get("validation_loss") if manifest else None
