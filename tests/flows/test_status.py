"""`stackwise status` of many runs: nothing is read twice, and only what the listing shows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flows.cli.status import show_runs
from storage.artifacts import Artifacts
from storage.local import LocalPlace
from storage.runs import Attempt
from support.house import MORE, planned, pretend

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_a_listing_looks_up_each_stack_and_validation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = Artifacts(tmp_path / "a").open()
    plans = [pretend(artifacts, "one"), pretend(artifacts, "same"), pretend(artifacts, "more", **MORE)]
    looked_up: Counter[str] = Counter()
    find, plan_of, read = LocalPlace.find, Attempt.plan.fget, Counter[str]()
    assert plan_of

    def counted_find(place: LocalPlace, key: str, ref: Any = None) -> Any:
        looked_up[key.rpartition("/")[2]] += 1
        return find(place, key, ref)

    def counted_plan(attempt: Attempt) -> Any:
        read[attempt.name] += 1
        return plan_of(attempt)

    monkeypatch.setattr(LocalPlace, "find", counted_find)
    monkeypatch.setattr(Attempt, "plan", property(counted_plan))
    show_runs(str(tmp_path / "a"), as_json=True)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["state"], run["stages_done"]) for run in runs] == [
        (name, "done", 3) for name in ("more", "one", "same")
    ]
    goals = {name for name in planned(*plans) if name.startswith(("stack-", "validation-"))}
    assert looked_up == Counter(goals)  # those that the runs share once, too
    assert read == Counter(["more", "one", "same"])
