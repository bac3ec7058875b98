"""`stackwise plan` says how long a run takes here, from two steps of one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli import plan
from flows.run import probe
from flows.run.numbers import clock
from flows.run.reading import Reading
from stackwise_core.stages.charges import charge, judging_flops
from storage.adopt import plan_in
from storage.artifacts import artifacts_at
from support.commands import Run
from support.runs import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return the command for the tiny run, whose stages take 12 steps each."""
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path).to_yaml())
    return ["plan", str(tmp_path / "tiny.yaml"), "--artifacts", str(tmp_path / "a")]


def test_minutes_are_by_flops_from_a_step_of_the_dearest_stage(
    command: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda config, stage: 5.0)
    every = {"validation.every": 5}  # of 12 steps: after 5, 10 and at the end
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path, every).to_yaml())
    document = run(*command, "--json", "--probe").document
    config, planned = plan_in(artifacts_at(str(tmp_path / "a")).reachable(), tiny(tmp_path, every), Reading("read"))
    costs = charge(config, planned, 16)
    dearest = document["probe"]["stage"]
    assert costs[dearest].trained == max(cost.trained for cost in costs)
    for stage, of_plan, cost in zip(document["stages"], planned.stages, costs, strict=True):
        judged = 3 * judging_flops(config, of_plan, document["validation_sequences"])
        assert stage["seconds"] == pytest.approx(60 * (cost.total + judged) / costs[dearest].trained, abs=0.06)
    said = run(*command).out
    assert f"\nabout {clock(max(1, document['seconds']))} in all, by a probe: two steps of stage {dearest} with" in said
    assert said.count(" on this machine\n") == 3
    assert not (tmp_path / "a").exists()


def test_no_probe_where_it_is_not_wanted_or_takes_long(
    command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> float:
        raise AssertionError

    monkeypatch.setattr(probe, "probe", never)
    assert not {"probe", "no_probe"} & run(*command, "--json").document.keys()
    assert "this machine" not in run(*command, "--no-probe").out
    monkeypatch.setattr(plan, "_QUICK_FLOPS", {False: 1.0})
    assert "not known: a step takes long here; --probe takes two" in run(*command).out


def test_a_plan_stands_without_a_probe(command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> float:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(probe, "probe", fails)
    said = run(*command)
    assert said.code == 0
    assert said.out.splitlines()[-1] == "how long it takes is not known: the probe failed: no room"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.progressive.training_objective": "mlm", "training.progressive.building_mode": "insert"},
        {"training.progressive.new_stack_precision": "qlora", "training.progressive.trunk_strategy": "qlora"},
    ],
)
def test_a_step_of_the_last_stage_takes_a_while(tmp_path: Path, changes: dict[str, Any]) -> None:
    config, planned = plan_in(artifacts_at(str(tmp_path / "a")).reachable(), tiny(tmp_path, changes), Reading("read"))
    assert probe.probe(config, planned.stages[-1]) > 0
