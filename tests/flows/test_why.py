"""Why an id differs: the first cause, by its field, whatever hashes lie between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.stages.identity import Kind
from stackwise_core.stages.plan import RunPlan, plan_config, plan_run
from storage.artifacts import Artifacts
from storage.differences import Recipes, known_recipes
from support.commands import Run
from support.house import CORPUS, pretend
from support.runs import tiny, tiny_values, write_corpus

G = "training.progressive."


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def plan(changes: dict[str, Any] | None = None, corpus: str = CORPUS) -> RunPlan:
    values: dict[str, Any] = {}
    apply_overrides(values, changes or {})
    return plan_run(StackWiseConfig.from_dict(values), corpus)


def causes(one: RunPlan, other: RunPlan, kind: Kind, stage: int) -> dict[str, tuple[Any, Any]]:
    """Return {kind of the artifact and field: (here, there)}."""
    recipes = Recipes()
    recipes.add_plan(one)
    recipes.add_plan(other)
    here, there = (recipes.known[p.stages[stage].ref(kind).sha256] for p in (one, other))
    found = recipes.differences(here, there)
    return {f"{cause.chain[-1].rpartition('-')[0]} {cause.field}": (cause.here, cause.there) for cause in found}


@pytest.mark.parametrize(
    ("changes", "kind", "stage", "expected"),
    [
        ({}, "stack", 2, {}),
        ({"training.learning_rate": 0.5}, "stack", 0, {"stack-0 optim.learning_rate": (0.002, 0.5)}),
        ({"training.learning_rate": 0.5}, "stack", 2, {"stack-2 optim.learning_rate": (0.002, 0.5)}),
        ({"training.learning_rate": 0.5}, "trunk", 2, {"stack-0 optim.learning_rate": (0.002, 0.5)}),
        ({"training.learning_rate": 0.5}, "validation", 1, {"stack-1 optim.learning_rate": (0.002, 0.5)}),
        ({"data.seq_len": 64}, "stack", 2, {"data seq_len": (128, 64)}),
        ({"data.seq_len": 64}, "activations", 0, {"data seq_len": (128, 64)}),
        ({f"{G}stacks": [{"n_blocks": 7}]}, "stack", 2, {"build-0 n_blocks": (2, 7)}),
        ({f"{G}stacks": [{}, {"n_blocks": 7}]}, "stack", 0, {}),
    ],
)
def test_the_first_cause_is_found(
    changes: dict[str, Any], kind: Kind, stage: int, expected: dict[str, tuple[Any, Any]]
) -> None:
    assert causes(plan(), plan(changes), kind, stage) == expected


def test_another_text_is_named_as_the_corpus() -> None:
    assert causes(plan(), plan(corpus="11" * 32), "validation", 2) == {"data corpus": (CORPUS, "11" * 32)}


def test_every_cause_is_told_once() -> None:
    changes = {"run.seed": 3, "data.seq_len": 64, "training.learning_rate": 0.5}
    found = causes(plan(), plan(changes), "validation", 2)
    assert set(found) == {
        "data seq_len",
        "stack-2 optim.learning_rate",
        "stack-2 order_seed",
        "build-2 seed",
        "stack-2 mask.seed",
    }


def test_a_field_of_one_side_only_is_told() -> None:
    found = causes(plan({f"{G}training_objective": "mlm"}), plan({f"{G}training_objective": "clm"}), "stack", 0)
    assert set(found) == {"build-0 shape.causal", "stack-0 mask", "stack-0 views"}
    assert found["build-0 shape.causal"] == (False, True)
    mask, none = found["stack-0 mask"]
    assert (mask["ratio"], none) == (0.15, None)


def test_parents_that_nobody_knows_are_told_as_they_are() -> None:
    one, other = plan(), plan({"data.seq_len": 64})
    recipes = Recipes()
    recipes.add_plan(one)
    here = recipes.known[one.stages[0].ref("stack").sha256]
    recipes.add_plan(other)
    there = recipes.known[other.stages[0].ref("stack").sha256]
    del recipes.known[other.data_ref.sha256]
    (cause,) = [cause for cause in recipes.differences(here, there) if cause.field == "data"]
    assert (cause.here, cause.there) == (one.data_ref.sha256, other.data_ref.sha256)


def test_the_nearest_has_the_fewest_causes(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path).open()
    pretend(artifacts, "far", training={"learning_rate": 0.5}, data={"seq_len": 64})
    near = pretend(artifacts, "near", training={"learning_rate": 0.5})
    pretend(artifacts, "farther", training={"learning_rate": 0.4}, data={"seq_len": 32}, run={"name": "f", "seed": 9})
    recipes = known_recipes(artifacts)
    mine = plan({"training.learning_rate": 0.6})
    recipes.add_plan(mine)
    nearest = recipes.nearest(recipes.known[mine.stages[1].ref("stack").sha256])
    assert nearest is not None
    assert nearest[0].ref == near.stages[1].ref("stack")
    assert [cause.field for cause in nearest[1]] == ["optim.learning_rate"]


def test_what_is_only_planned_is_not_the_nearest(tmp_path: Path) -> None:
    recipes = Recipes()
    for changes in ({}, {"run.seed": 1}):
        recipes.add_plan(plan(changes))
    assert recipes.nearest(recipes.known[plan().stages[0].ref("stack").sha256]) is None


def test_an_unknown_field_of_another_version_is_compared_too() -> None:
    from storage.manifest import make_manifest

    recipe = plan().data
    manifest = make_manifest(recipe.ref(-1), recipe, (), {}, {}, {})
    recipes = Recipes()
    recipes.add_manifest(manifest)
    here = recipes.known[manifest.ref.sha256]
    newer = manifest.model_copy(update={"recipe": {**manifest.recipe, "colour": "red"}, "numerics": 2})
    recipes.add_manifest(newer)
    found = {cause.field: cause.there for cause in recipes.differences(here, recipes.known[manifest.ref.sha256])}
    assert {"colour": "red", "numerics": 2}.items() <= found.items()


# ---------------------------------------------------------------- the command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(write_corpus(tmp_path / "corpus.txt"))))
    return path


def test_why_would_this_be_trained_again(
    run: Run, tmp_path: Path, config: Path, reference: Callable[..., Path]
) -> None:
    there = ("--artifacts", reference())
    override = ("--set", "data.seq_len=8")
    ids = [stage["artifacts"]["stack"] for stage in run("plan", config, "--json", *override, *there).document["stages"]]
    document = run("why", ids[2], config, "--json", *override, *there).document
    assert (document["id"], document["state"], document["nearest_state"]) == (ids[2], "absent", "sealed")
    (cause,) = document["differences"]
    assert (cause["field"], cause["here"], cause["there"]) == ("seq_len", 8, 16)
    assert cause["chain"][0] == ids[2]
    assert cause["chain"][-1].startswith("data-")
    text = run("why", "stack-2", config, *override, *there)
    assert text.out.splitlines()[-1].endswith("seq_len is 8, there 16")
    assert run("why", ids[2], *there).code == 3  # no run has planned it
    sealed = run("status", "tiny", "--json", *there).document["stage_list"][2]["artifacts"]["stack"]
    unplanned = run("why", sealed, config, *override, *there)
    assert (unplanned.code, unplanned.faults) == (
        3,
        [f"{sealed}: is not planned by {config}. Of this kind and stage it plans {ids[2]}"],
    )
    assert run("why", "stack-", *there).code == 2
    alone = run("why", "stack-2", *there)
    assert (alone.code, "there is no other stack of stage 2" in alone.out) == (0, True)
    tiny(tmp_path)


def test_examples_are_read_as_examples(run: Run, tmp_path: Path) -> None:
    """As text they would be another corpus, or none."""
    corpus = tmp_path / "examples.jsonl"
    corpus.write_text('{"input_ids": [1, 2], "targets": [2, 3]}\n' * 40)
    values = tiny_values(corpus)
    values["training"]["progressive"]["training_objective"] = "custom"
    config = tmp_path / "custom.yaml"
    config.write_text(yaml.safe_dump(values))
    Artifacts(tmp_path / "artifacts").open()
    expected = plan_config(StackWiseConfig.from_yaml(config)).stages[0].ref("stack").name
    assert run("why", "stack-0", config, "--json").document["id"] == expected


def test_a_run_that_planned_it_is_enough(run: Run, tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts").open()
    pretend(artifacts)
    mine = pretend(artifacts, "two", training={"learning_rate": 0.5})
    ref = mine.stages[1].ref("stack")
    artifacts.discard(ref)
    document = json.loads(run("why", ref.name, "--json").out)
    assert (document["state"], [cause["field"] for cause in document["differences"]]) == (
        "absent",
        ["optim.learning_rate"],
    )
    assert run("why", "two/1/stack", "--json").document == run("why", "two/1", "--json").document == document
    assert (run("why", "two/9/stack").code, run("why", "two/1/song").code) == (2, 2)


def test_a_hash_in_a_list_is_cut_too(run: Run, tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts").open()
    below = pretend(artifacts).stages[0].ref("stack").sha256
    pretend(artifacts, "two", training={"progressive": {"building_mode": "insert"}})
    (stacks,) = [line for line in run("why", "two/1/activations").out.splitlines() if line.startswith("  stacks is ")]
    assert f'["{below[:12]}…"' in stacks
    assert below not in stacks


def test_a_stage_is_named_by_its_number() -> None:
    recipes = Recipes()
    recipes.add_plan(plan({f"{G}target_stacks": 12}))
    assert [known.ref.stage for known in recipes.named("stack-1")] == [1]
    assert [known.ref.stage for known in recipes.named("stack-11")] == [11]
    assert len(recipes.named("stack-")) == 12
    name = recipes.named("stack-1")[0].ref.name
    assert [known.ref.name for known in recipes.named(name)] == [name]
    assert [known.ref.name for known in recipes.named(name[:-2])] == [name]
