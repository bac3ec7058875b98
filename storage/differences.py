"""Why two ids differ: the fields of their recipes, followed through the parents down to the first causes."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stackwise_core.stages.identity import (
    NUMERICS,
    ActivationRecipe,
    BuildRecipe,
    DataRecipe,
    Kind,
    OptimizerRecipe,
    Recipe,
    Ref,
    StackRecipe,
    TrunkRecipe,
    ValidationRecipe,
)
from stackwise_core.stages.plan import RunPlan
from storage.artifacts import Artifacts
from storage.inventory import survey
from storage.manifest import Manifest
from storage.reachability import OnDamage, telling
from storage.runs import attempts, run_names

_RECIPES: dict[Kind, type[Recipe]] = {
    recipe.kind: recipe
    for recipe in (
        DataRecipe,
        BuildRecipe,
        TrunkRecipe,
        StackRecipe,
        OptimizerRecipe,
        ActivationRecipe,
        ValidationRecipe,
    )
}
_PARENT = re.compile(r"([0-9a-f]{64})(?:#\d+)?")
NOTHING = "nothing"
"""Value of a field that only the other recipe has."""


@dataclass(frozen=True)
class Known:
    """An artifact whose recipe is known, by its manifest or by a plan."""

    ref: Ref
    recipe: dict[str, Any]
    """All fields, with their defaults, and the version of the kind's numerics."""
    created: str = ""
    """From its manifest; empty if it is only planned."""


@dataclass(frozen=True)
class Difference:
    """A first cause: a field that differs and is not the id of a parent whose recipe is known."""

    chain: tuple[str, ...]
    """Names of artifacts, from the one asked about down to the one whose field it is."""
    field: str
    here: Any
    there: Any


@dataclass
class Recipes:
    """Recipes of artifacts that exist, and of those that runs or a configuration plan."""

    known: dict[str, Known] = field(default_factory=dict)
    """By the full hash."""

    def add_manifest(self, manifest: Manifest) -> None:
        """Add an artifact that exists, sealed or retired."""
        recipe = _complete(manifest.ref.kind, manifest.recipe, manifest.numerics)
        self.known[manifest.ref.sha256] = Known(manifest.ref, recipe, manifest.created)

    def add_plan(self, plan: RunPlan) -> None:
        """Add what a run would make."""
        for ref, recipe in plan.recipes.items():
            self.known.setdefault(ref.sha256, Known(ref, _complete(ref.kind, recipe.dump(), NUMERICS[ref.kind])))

    def named(self, name: str) -> list[Known]:
        """Return what has a name, or else a name that starts with it; 'stack-1' does not match stack 10."""
        found = [known for known in self.known.values() if known.ref.name.startswith(name)]
        return [known for known in found if f"{known.ref.name}-".startswith(f"{name}-")] or found

    def nearest(self, here: Known) -> tuple[Known, list[Difference]] | None:
        """Return the existing artifact of the same kind and stage that differs in the fewest causes, and those.

        Ties are broken by the number of fields that differ directly, then by age: the newest first.
        """

        def n_differences(pair: tuple[Known, list[Difference]]) -> tuple[int, int]:
            return len(pair[1]), len(list(_differing(here.recipe, pair[0].recipe)))

        others = [known for known in self.known.values() if known.created and known.ref.sha256 != here.ref.sha256]
        others = [known for known in others if (known.ref.kind, known.ref.stage) == (here.ref.kind, here.ref.stage)]
        others.sort(key=lambda known: (known.created, known.ref.sha256), reverse=True)
        return min(((known, self.differences(here, known)) for known in others), key=n_differences, default=None)

    def differences(self, here: Known, there: Known) -> list[Difference]:
        """Return the first causes by which two artifacts differ, each by the shortest way down to it."""
        found, seen = dict[tuple[str, str, str], Difference](), set[tuple[str, str]]()
        to_compare = deque[tuple[Known, Known, tuple[str, ...]]]([(here, there, (here.ref.name,))])
        while to_compare:
            one, other, chain = to_compare.popleft()
            if (one.ref.sha256, other.ref.sha256) in seen:
                continue
            seen.add((one.ref.sha256, other.ref.sha256))
            for path, mine, its in _differing(one.recipe, other.recipe):
                below, beside = self._parent(mine), self._parent(its)
                if below and beside and below != beside and below.ref.kind == beside.ref.kind:
                    to_compare.append((below, beside, (*chain, below.ref.name)))
                    continue
                # A cause that occurs in many artifacts, such as the rate of every stage, is listed once.
                found.setdefault((f"{one.ref.kind} {path}", str(mine), str(its)), Difference(chain, path, mine, its))
        return list(found.values())

    def _parent(self, value: Any) -> Known | None:
        match = _PARENT.fullmatch(value) if isinstance(value, str) else None
        return self.known.get(match[1]) if match else None


def known_recipes(artifacts: Artifacts, on_damage: OnDamage | None = None) -> Recipes:
    """Return the recipes of all artifacts that exist in a place, and of all that its runs planned.

    A damaged attempt raises ArtifactCorruptError, or `on_damage` is called with its message.
    """
    recipes = Recipes()
    for found in survey(artifacts):
        if found.manifest is not None:
            recipes.add_manifest(found.manifest)
    for name in run_names(artifacts):
        for attempt in attempts(artifacts, name):
            with telling(on_damage):
                recipes.add_plan(attempt.plan)
    return recipes


def _differing(mine: Any, its: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted path, value, other value) for each difference, down to where the structures part."""
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        for key in dict.fromkeys([*mine, *its]):
            yield from _differing(mine.get(key, NOTHING), its.get(key, NOTHING), f"{path}.{key}" if path else str(key))
    elif isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        for number, pair in enumerate(zip(mine, its, strict=True)):
            yield from _differing(*pair, f"{path}.{number}")
    elif mine != its:
        yield path, mine, its


def _complete(kind: Kind, recipe: dict[str, Any], numerics: int) -> dict[str, Any]:
    """Return a recipe with its defaults filled in, so that a field that one side lacks can be compared."""
    with contextlib.suppress(ValidationError):  # another version has other fields: it is compared as it is
        recipe = _RECIPES[kind].model_validate(recipe).model_dump(mode="json")
    return {**recipe, "numerics": numerics}
