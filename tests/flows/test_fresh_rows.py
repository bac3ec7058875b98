"""`data.rows: fresh`: every stage reads on where the one before stopped, as one undisturbed run would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.cli.main import main
from flows.run.inputs import open_stage
from flows.run.stage import Stage
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.identity import AdoptedRecipe
from stackwise_core.stages.plan import RunPlan, plan_run
from stackwise_core.stages.resolve import resolve_order
from stackwise_core.stages.stages import StackSpec
from storage.artifacts import Artifacts
from storage.sequences import load_sequences
from support.configurations import CORPUS, configuration, ids
from support.modes import MODES, G, plan_of
from support.runs import grown, manifests, tiny, write_corpus

pytestmark = pytest.mark.usefixtures("quick_disk")

FRESH = MODES["fresh"]


def read_by(config: StackWiseConfig, root: Path, folder: Path) -> list[tuple[list[int], int]]:
    """The sequences and the view of every step of a run, as each stage is given them."""
    corpus, n_bytes = plan_of(config).data.corpus, 0
    sources = plan_of(config).source_facts
    found = list[tuple[list[int], int]]()
    for index in range(len(plan_of(config).stages)):
        stage = Stage(config=config, root=str(root), corpus=corpus, corpus_bytes=n_bytes, sources=sources, index=index)
        with open_stage(stage, None, folder) as inputs:
            found += [(batch["sequence_ids"].tolist(), int(batch["view"])) for batch in inputs.batches]
    return found


LIVE = {f"{G}cache_activations": False}  # the same stacks, without the stores that are retired by now
MIXTURE = {"data.source": [{"source": "one.txt", "weight": 1.0}, {"source": "two.txt", "weight": 2.0}]}


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (MIXTURE, {f"{G}building_mode": "insert"}))],
)
def test_all_stages_together_read_what_one_run_of_as_many_steps_reads(
    changes: dict[str, Any], tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one.txt", "two.txt")):
        write_corpus(tmp_path / name, seed=seed)
    root, folder = (reference(FRESH) if not changes else tmp_path / "a"), tmp_path
    if changes:
        grown(tiny(folder, {**FRESH, **changes}), root)
    else:
        folder = root.parent
    by_stages = read_by(tiny(folder, {**FRESH, **LIVE, **changes}), root, tmp_path)
    whole = {f"{G}enabled": False, "training.steps_per_stack": 36, "training.joint_steps": 0, "data.rows": "shared"}
    assert len(by_stages) == 3 * 10 + 6
    assert by_stages == read_by(tiny(folder, {**FRESH, **changes, **whole}), root, tmp_path)


def test_a_store_is_advanced_where_rows_are_shared_and_filled_from_tokens_elsewhere(reference: Any) -> None:
    """Of view 2 stage 1 reads the second half of its rows, and stage 2 the first half of another shuffle."""
    config, root = tiny(reference(FRESH).parent, FRESH), reference(FRESH)
    n_rows = len(load_sequences(Artifacts(root), plan_of(config).data_ref)[0])
    order = resolve_order(config, n_rows)
    first, second = (set(zip(*map(np.ndarray.tolist, order.visited(10, at)), strict=True)) for at in (10, 20))
    facts = [entry["facts"] for name, entry in sorted(manifests(root).items()) if name.startswith("activations")]
    assert [each["from"] for each in facts] == ["tokens", "boundary 1 and tokens"]
    assert 0 < len(first & second) < len(second)
    assert facts[1]["rows_from_tokens"] == len(second - first)
    assert [each["train_rows"] for each in facts] == [len(first), len(second)]


# ---------------------------------------------------------------- ids and costs


def fresh_plan(target: int = 3, **more: Any) -> RunPlan:
    return plan_run(configuration({"data.rows": "fresh", f"{G}target_stacks": target, **more}), CORPUS, 10**6)


def test_a_stage_begins_where_those_before_it_ended() -> None:
    steps = {f"{G}stacks": [{"steps": 30}, {}, {"steps": 50}], "training.joint_steps": 7}
    assert [stage.spec.order_step for stage in fresh_plan(**steps).stages] == [0, 30, 230, 280]
    assert [stage.spec.order_step for stage in fresh_plan(**{f"{G}enabled": False}).stages] == [0]
    config = configuration({"data.rows": "fresh", f"{G}target_stacks": 3})
    stack = StackSpec(index=0, n_blocks=2, precision="full", adapters={})
    adopted = AdoptedRecipe(shape=fresh_plan().stages[0].shape, mode="append", stack=stack, files={}, rack="")
    grown_on = plan_run(adopting(config, [adopted]), CORPUS, adopted=[adopted])
    assert [stage.spec.order_step for stage in grown_on.stages] == [0, 0, 200]


def test_raising_the_target_leaves_all_ids_and_fresh_rows_those_of_the_first_stage() -> None:
    three, four = ids(fresh_plan()), ids(fresh_plan(4))
    assert {key for key in three if three[key] != four[key]} == {"validation-2"}  # it has a store to compare now
    shared = ids(plan_run(configuration({f"{G}target_stacks": 3}), CORPUS, 10**6))
    assert {key for key in three if three[key] == shared[key]} == {
        *("data", "build-0", "trunk-0", "stack-0", "build-1", "trunk-1")  # what does not read rows
    }


def test_a_cache_of_rows_that_are_read_once_does_not_pay() -> None:
    """With shared rows the second store costs one stack and saves two; with fresh ones it costs what it saves."""
    auto = {"cache.mode": "auto", f"{G}training_objective": "clm", f"{G}target_stacks": 4}
    shared = plan_run(configuration(auto), CORPUS, 10**8)
    assert [not stage.no_cache_reason for stage in shared.stages[:-1]] == [False, True, True]
    fresh = plan_run(configuration({**auto, "data.rows": "fresh"}), CORPUS, 10**8)
    assert all("costs as much as running the trunk" in stage.no_cache_reason for stage in fresh.stages[:-1])
    small = plan_run(configuration({**auto, "data.rows": "fresh"}), CORPUS, 10**5)  # eight epochs in a stage
    assert [not stage.no_cache_reason for stage in small.stages[:-1]] == [True, True, True]


def test_the_plan_says_what_filling_a_store_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, FRESH)
    path = tmp_path / "config.yaml"
    config.to_yaml(path)
    assert main(["plan", str(path), "--artifacts", str(tmp_path / "a"), "--json"]) == 0
    first, second, *others = (stage.get("cache_fill") for stage in json.loads(capsys.readouterr().out)["stages"])
    assert others == [None, None]
    # 40 reads each: 8 rows of view 2 and all 16 of 3 and 0; then 16 of 1 and 2 and 8 of 3.
    assert (first["rows_from_tokens"], first["rows_advanced"]) == (40 + 8, 0)
    assert (second["rows_from_tokens"], second["rows_advanced"]) == (40 - 16, 16 + 8)
    # A block: matrices of 4 * 16^2 + 3 * 16 * 32, and scores and sums over 16 positions, half of them.
    stack = 16 * 2.0 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 * 16)
    assert first["flops"] == 48 * stack
    assert second["flops"] == (24 * 2 + 24) * stack
    assert main(["plan", str(path), "--artifacts", str(tmp_path / "a")]) == 0
    assert "24 rows from tokens and 24 through one stack" in " ".join(capsys.readouterr().out.split())


def test_without_growth_there_is_nothing_to_read_on_from() -> None:
    config = configuration({"data.rows": "fresh", f"{G}enabled": False})
    assert notes(config) == ["not used: data.rows (enabled: false)"]
