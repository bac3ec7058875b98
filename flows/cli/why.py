"""`stackwise why`: which field of a recipe made an id another than the nearest there is. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.plan import plan_config
from storage.artifacts import Artifacts, artifacts_at
from storage.differences import Difference, Known, known_recipes
from storage.errors import ArtifactMissingError


def explain(root: str, name: str, config: StackWiseConfig | None, *, as_json: bool) -> None:
    """Compare an artifact with the nearest other of its kind and stage, and print the first causes.

    Args:
        root: the artifacts folder.
        name: of an artifact that is there or that a run planned; a unique start of it will do.
        config: whose plan is known too, though nothing of it was ever started.
        as_json: print one document.

    Raises:
        ArtifactMissingError: nobody knows of it. ConfigError: several begin so.
    """
    artifacts = artifacts_at(root).existing()
    recipes = known_recipes(artifacts)
    wanted = Path(name).name
    if config is not None:
        plan = plan_config(config)
        recipes.add_plan(plan)
        ours = {ref.name for ref in plan.recipes}
        here = _one([known for known in recipes.named(wanted) if known.ref.name in ours], wanted, artifacts)
    else:
        here = _one(recipes.named(wanted), wanted, artifacts)
    nearest = recipes.nearest(here)
    if as_json:
        print(json.dumps(_document(artifacts, here, nearest), indent=1))
        return
    if nearest is None:
        print(f"{_titled(artifacts, here)}: there is no other {_kind(here)} to compare it with")
        return
    there, differences = nearest
    print(f"{_titled(artifacts, here)}\ndiffers from the nearest, {_titled(artifacts, there)}, in")
    for difference in differences:
        print(f"  {_line(difference)}")


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


def _kind(known: Known) -> str:
    return known.ref.kind if known.ref.stage < 0 else f"{known.ref.kind} of stage {known.ref.stage}"


def _line(difference: Difference) -> str:
    """Return 'stack-1-… <- data-…: corpus is "a", there "b"'."""
    down = " <- ".join(difference.chain[1:])
    values = f"{difference.field} is {_spell(difference.here)}, there {_spell(difference.there)}"
    return f"{down}: {values}" if down else values


def _spell(value: Any) -> str:
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
