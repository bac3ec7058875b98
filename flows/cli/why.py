"""`stackwise why`: which field of a recipe makes an id differ from the most similar one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.cli.arguments import add_common, add_config, load_config
from flows.run.maintenance import planned_by_run
from flows.run.reading import Reading
from flows.run.say import complain, say, say_json
from flows.run.terminal import reading_shown
from stackwise_core.errors import ConfigError, Fault
from storage.adopt import plan_in
from storage.artifacts import Artifacts, artifacts_at
from storage.differences import Difference, Known, known_recipes
from storage.errors import ArtifactMissingError


def add_why(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `why`."""
    add_common(parser, explain, json=True)
    help_text = "an artifact that exists or is planned: its name, of which a unique prefix is enough, or RUN/STAGE/KIND"
    parser.add_argument("id", metavar="ID", help=help_text)
    add_config(parser, optional=True)


def explain(options: argparse.Namespace) -> None:
    """Print the recipe fields in which an artifact differs from the most similar one of its kind and stage.

    Raises:
        ArtifactMissingError: no run made or planned it, or not the configuration that is given.
        ConfigError: the prefix is ambiguous, the run has no such stage, or the configuration is wrong.
    """
    config = load_config(options) if options.config is not None else None
    artifacts = artifacts_at(options.artifacts).existing()
    recipes = known_recipes(artifacts, on_damage=complain)
    of_run = planned_by_run(artifacts, options.id)
    wanted = of_run.name if of_run else Path(options.id).name
    found = recipes.named(wanted)
    if config is not None:
        with reading_shown():
            _, plan = plan_in(artifacts, config, Reading("read"))
        recipes.add_plan(plan)
        planned = {ref.name for ref in plan.recipes}
        found = [known for known in recipes.named(wanted) if known.ref.name in planned]
        if not found:
            kind = "-".join(wanted.split("-")[:2])
            alike = [name for name in sorted(planned) if name.startswith(f"{kind}-")]
            remedy = (
                f"Of this kind and stage it plans {alike[0]}"
                if alike
                else f"`stackwise plan {options.config} --json` lists what it plans"
            )
            raise ArtifactMissingError(wanted, f"is not planned by {options.config}", remedy)
    here = _one(found, wanted, artifacts)
    nearest = recipes.nearest(here)
    if options.json:
        say_json(_document(artifacts, here, nearest))
        return
    if nearest is None:
        kind = here.ref.kind if here.ref.stage < 0 else f"{here.ref.kind} of stage {here.ref.stage}"
        say(f"{_titled(artifacts, here)}: there is no other {kind} to compare it with")
        return
    there, differences = nearest
    say(_titled(artifacts, here), f"differs from the nearest, {_titled(artifacts, there)}, in")
    say(*(f"  {_line(difference)}" for difference in differences))


def _one(found: list[Known], name: str, artifacts: Artifacts) -> Known:
    if not found:
        remedy = "See `stackwise status RUN`; for one that no run has planned yet, give its configuration after it"
        raise ArtifactMissingError(name, f"is no artifact of {artifacts.uri}, nor planned by a run", remedy)
    if len(found) > 1:
        names = ", ".join(sorted(known.ref.name for known in found)[:5])
        raise ConfigError([Fault("ID", repr(name), f"{len(found)} artifacts begin so: {names}")])
    return found[0]


def _titled(artifacts: Artifacts, known: Known) -> str:
    return f"{known.ref.name} ({artifacts.state(known.ref).value})"


def _line(difference: Difference) -> str:
    """Return 'stack-1-… <- data-…: corpus is "a", there "b"'."""
    down = " <- ".join(difference.chain[1:])
    values = f"{difference.field} is {_spell(difference.here)}, there {_spell(difference.there)}"
    return f"{down}: {values}" if down else values


def _spell(value: Any) -> str:
    """Return a value as JSON, of a hash the beginning, also in a list."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    text = json.dumps(value)
    return f"{text[:13]}…{text[-1]}" if isinstance(value, str) and len(value) >= 64 else text


def _document(artifacts: Artifacts, here: Known, nearest: tuple[Known, list[Difference]] | None) -> dict[str, Any]:
    there, differences = nearest or (None, [])
    return {
        "id": here.ref.name,
        "state": artifacts.state(here.ref).value,
        "nearest": there.ref.name if there else None,
        "nearest_state": artifacts.state(there.ref).value if there else None,
        "differences": [asdict(difference) for difference in differences],
    }
