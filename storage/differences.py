"""Why an id differs: the fields of two recipes, followed through their parents down to the first cause."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stackwise_core.identity import (
    NUMERICS,
    ActivationRecipe,
    BuildRecipe,
    DataRecipe,
    Kind,
    Recipe,
    Ref,
    StackRecipe,
    TrunkRecipe,
    ValidationRecipe,
)
from stackwise_core.plan import RunPlan
from storage.layout import Artifacts
from storage.manifest import Manifest
from storage.runs import attempts, run_names
from storage.survey import survey

_RECIPES: dict[Kind, type[Recipe]] = {
    recipe.kind: recipe
    for recipe in (DataRecipe, BuildRecipe, TrunkRecipe, StackRecipe, ActivationRecipe, ValidationRecipe)
}
_PARENT = re.compile(r"([0-9a-f]{64})(?:#\d+)?")
NOTHING = "nothing"
"""Stands for the value of a field that only the other recipe has."""


@dataclass(frozen=True)
class Known:
    """An artifact whose recipe is known, by its manifest or by a plan."""

    ref: Ref
    fields: dict[str, Any]
    """Dotted path -> plain value, those at their defaults too."""
    created: str = ""
    """By its manifest; empty if it is only planned."""


@dataclass(frozen=True)
class Difference:
    """One first cause: a field that differs and names no parent whose recipe is known."""

    chain: tuple[str, ...]
    """Names of artifacts, from the one asked about down to the one whose field it is."""
    field: str
    here: Any
    there: Any


@dataclass
class Recipes:
    """Every recipe that an artifacts folder, and perhaps a configuration, knows of."""

    known: dict[str, Known] = field(default_factory=dict)
    """By the whole hash."""

    def add_manifest(self, manifest: Manifest) -> None:
        """Know an artifact that is there, sealed or retired."""
        fields = _fields(manifest.ref.kind, manifest.recipe, manifest.numerics)
        self.known[manifest.ref.sha256] = Known(manifest.ref, fields, manifest.created)

    def add_plan(self, plan: RunPlan) -> None:
        """Know what a run would make."""
        for ref, recipe in plan.recipes.items():
            self.known.setdefault(ref.sha256, Known(ref, _fields(ref.kind, recipe.dump(), NUMERICS[ref.kind])))

    def named(self, name: str) -> list[Known]:
        """Return what has a name, or a name that begins so."""
        found = [known for known in self.known.values() if known.ref.name.startswith(name)]
        return [known for known in found if known.ref.name == name] or found

    def nearest(self, here: Known) -> tuple[Known, list[Difference]] | None:
        """Return the artifact of the same kind and stage that differs in the fewest causes, and those.

        Of several the one with the fewest differing fields of its own, of these the newest. None if there
        is no other.
        """
        others = [known for known in self.known.values() if known.created and known.ref.sha256 != here.ref.sha256]
        others = [known for known in others if (known.ref.kind, known.ref.stage) == (here.ref.kind, here.ref.stage)]
        others.sort(key=lambda known: (known.created, known.ref.sha256), reverse=True)
        ranked = [(known, self.differences(here, known)) for known in others]
        return min(ranked, key=lambda pair: (len(pair[1]), len(_differing(here, pair[0]))), default=None)

    def differences(self, here: Known, there: Known) -> list[Difference]:
        """Return the first causes by which two artifacts differ, each by the shortest way down to it."""
        found, seen = dict[tuple[str, str, str], Difference](), set[tuple[str, str]]()
        to_compare = deque[tuple[Known, Known, tuple[str, ...]]]([(here, there, (here.ref.name,))])
        while to_compare:
            one, other, chain = to_compare.popleft()
            if (one.ref.sha256, other.ref.sha256) in seen:
                continue
            seen.add((one.ref.sha256, other.ref.sha256))
            for path, mine, its in _differing(one, other):
                below, beside = self._parent(mine), self._parent(its)
                if below and beside and below != beside and below.ref.kind == beside.ref.kind:
                    to_compare.append((below, beside, (*chain, below.ref.name)))
                    continue
                # One cause that is met in several artifacts, such as the rate of every stage, is told once.
                found.setdefault((f"{one.ref.kind} {path}", str(mine), str(its)), Difference(chain, path, mine, its))
        return list(found.values())

    def _parent(self, value: Any) -> Known | None:
        match = _PARENT.fullmatch(value) if isinstance(value, str) else None
        return self.known.get(match[1]) if match else None


def known_recipes(artifacts: Artifacts) -> Recipes:
    """Return every recipe of an artifacts folder: of what is there, and of what runs planned."""
    recipes = Recipes()
    for found in survey(artifacts):
        if found.manifest is not None:
            recipes.add_manifest(found.manifest)
    for name in run_names(artifacts):
        for attempt in attempts(artifacts, name):
            recipes.add_plan(attempt.plan)
    return recipes


def _differing(one: Known, other: Known) -> list[tuple[str, Any, Any]]:
    paths = dict.fromkeys([*one.fields, *other.fields])
    pairs = ((path, one.fields.get(path, NOTHING), other.fields.get(path, NOTHING)) for path in paths)
    return [(path, mine, its) for path, mine, its in pairs if mine != its]


def _fields(kind: Kind, recipe: Mapping[str, Any], numerics: int) -> dict[str, Any]:
    try:  # with defaults filled in, so that a field on one side only has a value on the other
        whole: Mapping[str, Any] = _RECIPES[kind].model_validate(recipe).model_dump(mode="json")
    except ValidationError:  # of another version, which knows other fields
        whole = recipe
    return {**_flatten(whole), "numerics": numerics}


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: plain value}; items of lists by their number."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    return {at: plain for key, item in items for at, plain in _flatten(item, f"{path}.{key}" if path else key).items()}
