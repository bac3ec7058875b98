"""A run that was grown, and whose first file is started again: it keeps its stacks, for status, gc and growing on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.add_stack import grown as grown_by_one
from flows.cli.train import keys_of_one_more
from stackwise_core.config.schema import StackOverride
from stackwise_core.config.yaml import parse_value
from stackwise_core.stages.plan import plan_run
from storage.artifacts import Artifacts
from storage.collect import collect
from storage.locks import no_wait
from storage.runs import attempts, begin_attempt, find_run
from support.commands import Run
from support.configurations import CORPUS, configuration, ids
from support.house import plan_of, planned, pretend
from support.runs import grown, tiny, tiny_values

pytestmark = pytest.mark.usefixtures("quick_disk")


def to(n_stacks: int, **others: Any) -> dict[str, Any]:
    return {"training": {**others, "progressive": {"target_stacks": n_stacks}}}


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts").open()


def stages_of(run: Run) -> Any:
    (found,) = run("status", "--json").document["runs"]
    return found["state"], found["stages_done"], found["stages"], found["attempts"]


@pytest.mark.parametrize("joint", [{}, {"joint_steps": 5}])
def test_a_run_does_not_shrink_when_its_first_file_is_started_again(
    joint: dict[str, Any], artifacts: Artifacts, run: Run
) -> None:
    plans = [pretend(artifacts, **to(n, **joint)) for n in (2, 4, 3, 2)]
    assert find_run(artifacts, "one").plan == plans[1]
    stages = 5 if joint else 4
    assert stages_of(run) == ("done", stages, stages, 4)
    told = run("status", "one").out
    assert all(f"stack-{stack}-" in told for stack in range(4))
    assert f"its newest attempt asked for {3 if joint else 2} of these {stages} stages" in told
    collect(artifacts, newest_only=True)
    assert {folder.name for folder in artifacts.everything()} >= planned(plans[1], plans[3])


def test_what_was_never_made_or_was_made_otherwise_is_no_part_of_a_run(artifacts: Artifacts, run: Run) -> None:
    pretend(artifacts, **to(2))
    with begin_attempt(artifacts, *plan_of(**to(4)), no_wait):
        pass  # by mistake, and stopped at once
    short = pretend(artifacts, **to(2))
    assert find_run(artifacts, "one").plan == short
    assert stages_of(run) == ("done", 2, 2, 3)
    pretend(artifacts, **to(4, learning_rate=0.5))
    short = pretend(artifacts, **to(3, learning_rate=0.25))
    assert find_run(artifacts, "one").plan == short
    collect(artifacts, newest_only=True)
    assert {folder.name for folder in artifacts.everything()} == planned(short)


def test_the_attempt_is_given_up_by_removing_its_record(artifacts: Artifacts) -> None:
    _, longer, short = [pretend(artifacts, **to(n)) for n in (2, 4, 2)]
    (record,) = [each.folder for each in attempts(artifacts, "one") if each.plan == longer]
    (record / "start.json").unlink()
    collect(artifacts, newest_only=True)
    assert {folder.name for folder in artifacts.everything()} == planned(short)


def test_started_again_it_says_what_it_has_and_grows_on(tmp_path: Path, run: Run) -> None:
    less, root = {"training.steps_per_stack": 2, "training.warmup_steps": 1}, tmp_path / "artifacts"
    for n_stacks in (1, 2):
        grown(tiny(tmp_path, {**less, "training.progressive.target_stacks": n_stacks}), root)
    values = tiny_values(tmp_path / "corpus.txt")
    values["training"] |= {"steps_per_stack": 2, "warmup_steps": 1}
    values["training"]["progressive"]["target_stacks"] = 1
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(values))
    told = run("train", "first.yaml")
    assert told.code == 0
    assert "tiny was there already: 2 stacks, " in told.out
    assert " (this configuration asks for 1), validation loss" in told.out
    again = find_run(Artifacts(root), "tiny").folder / "config.yaml"
    assert f"grow: stackwise train {again} --set training.progressive.target_stacks=3" in told.out
    planned_next = run("plan", again, "--set", "training.progressive.target_stacks=3", "--json").document
    assert json.dumps(planned_next).count('"sealed"') >= 2
    values["training"]["progressive"] |= {"target_stacks": 2, "max_stacks": 2}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(values))
    told = run("train", "first.yaml")
    more = "--set training.progressive.target_stacks=3 --set training.progressive.max_stacks=3"
    assert f"grow: stackwise train first.yaml {more}\n" in told.out
    assert grown_by_one(str(root), "tiny", StackOverride(), "me").training.progressive.target_stacks == 3


@pytest.mark.parametrize("scale", ["one", "depth"])
def test_what_is_said_of_growing_beyond_the_limit_keeps_every_stack(scale: str) -> None:
    full: dict[str, Any] = {
        "model.residual_scale": scale,
        "training.progressive.max_stacks": 3,
        "training.progressive.target_stacks": 3,
    }
    config = configuration(full)
    keys = {key: parse_value(value) for key, _, value in (each.partition("=") for each in keys_of_one_more(config, 4))}
    before, after = (ids(plan_run(configuration(changes), CORPUS)) for changes in (full, full | keys))
    assert "stack-3" in after
    assert all(after[name] == digest for name, digest in before.items() if not name.startswith("validation-2"))


def test_where_time_follows_from_the_limit_none_is_said_to_be_possible() -> None:
    by_depth = {"training.progressive.time_interpretation": "depth", "training.progressive.max_stacks": 3}
    config = configuration(by_depth | {"training.progressive.training_objective": "mlm"})
    assert keys_of_one_more(config, 3) == ["training.progressive.target_stacks=3"]
    assert keys_of_one_more(config, 4) == []
