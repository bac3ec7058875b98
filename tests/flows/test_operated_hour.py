"""Some time of operating, everything at once, and then every page is read: no wrong word on any of them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.kills import RECOVERIES, Trial, ask_for, newest
from support.operating import Site, until
from support.runs import digests

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("quick_disk")]

THEIRS = """
import sys, time
from pathlib import Path
from prefect import flow

@flow(name="theirs", flow_run_name="of another team")
def theirs():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.2)

theirs()
"""


def trial_in(site: Site, folder: Path, *places: str) -> Trial:
    folder.mkdir()
    return Trial(site, folder, places)


def states_of(site: Site, run: str) -> list[str]:
    return [state["name"] for state in site.get(f"/flow_run_states/?flow_run_id={run}")]


def test_an_hour_of_operating_says_no_wrong_word(site: Site, tmp_path: Path, reference: Callable[..., Path]) -> None:
    started_before = {run["id"] for run in site.post("/flow_runs/filter", {})}

    # A team beside us, and a run in a terminal: both live for longer than the automation waits for a heartbeat.
    script, enough = tmp_path / "theirs.py", tmp_path / "enough"
    script.write_text(THEIRS)
    theirs = site.script(script, str(enough))
    terminal = trial_in(site, tmp_path / "terminal", "train:5:HOLD")
    terminal.train()
    terminal.wait_for_failpoint()
    terminal.run_id = newest(site)

    # Suspended and resumed, cancelled, killed and retried, grown by one stack: each on the pages or by Prefect's API.
    suspended = trial_in(site, tmp_path / "suspended", "train:5:HOLD")
    suspended.start()
    suspended.wait_for_failpoint()
    ask_for("Suspended", suspended)
    until(lambda: suspended.shown() == "Suspended", "end of all that seems to run")
    cancelled = trial_in(site, tmp_path / "cancelled", "train:5:HOLD")
    cancelled.start()
    cancelled.wait_for_failpoint()
    site.command("prefect", "flow-run", "cancel", cancelled.run_id)
    site.wait_for(cancelled.run_id, "CANCELLED")
    until(lambda: cancelled.shown() == "Cancelled", "end of all that seems to run")
    killed = trial_in(site, tmp_path / "killed", "train:6:KILL")
    killed.start()
    killed.wait_for_failpoint()
    site.wait_for(killed.run_id, "CRASHED")
    RECOVERIES["flow-run retry"](killed)
    site.wait_for(killed.run_id, "COMPLETED")
    grown = site.start({"run": "tiny", "artifacts": str(killed.root)}, "add-stack/grow", quickly=True)
    site.wait_for(grown, "COMPLETED")
    assert site.post(f"/flow_runs/{suspended.run_id}/resume", {})["status"] == "ACCEPT"
    site.wait_for(suspended.run_id, "COMPLETED")

    beats = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{terminal.run_id}"]},
    }
    until(lambda: site.post("/events/filter", {"filter": beats})["total"] > 4, "heartbeats of the terminal's run")
    os.kill(terminal.pid, signal.SIGCONT)
    assert terminal.command is not None
    assert terminal.command.wait() == 0
    enough.touch()
    assert theirs.wait() == 0

    # What the pages say.
    runs = {run["id"]: run for run in site.post("/flow_runs/filter", {}) if run["id"] not in started_before}
    roots = {run["id"]: run for run in runs.values() if run["parent_task_run_id"] is None}
    said = {run["name"]: (run["state_name"], "stackwise" in run["tags"]) for run in roots.values()}
    assert said.pop("of another team") == ("Completed", False)
    assert said.pop("grow tiny by one stack") == ("Completed", True)
    assert set(said) == {"grow tiny to 3 stacks"}
    ended = Counter(run["state_name"] for run in roots.values())
    assert ended == {"Completed": 5, "Cancelled": 1}
    for run in roots:
        assert ("Crashed" in states_of(site, run)) == (run == killed.run_id), roots[run]["name"]
        assert "Failed" not in states_of(site, run)
        assert not [line for line in site.logs(run) if "Traceback" in line or "please report" in line]
    for run in runs.values():  # subflows too
        assert run["state_name"] in ("Completed", "Cancelled", "Crashed"), (run["name"], run["state_name"])
        ours = run["name"] != "of another team"
        assert ("run:tiny" in run["tags"]) == ours, (run["name"], run["tags"])
    tasks = site.task_runs(killed.run_id)
    assert {task["state_name"] for task in tasks} <= {"Completed", "Cached", "Crashed"}
    pages: list[dict[str, Any]] = site.post("/artifacts/filter", {})
    shown = Counter((page["key"], page["flow_run_id"]) for page in pages if page["flow_run_id"] in runs)
    assert shown
    assert set(shown.values()) == {1}  # one card for each key and run, renewed in its place
    for trial in (suspended, terminal):
        assert digests(trial.root) == digests(reference())
    assert site.status(killed.root, "tiny")["stages_done"] == 4
    assert digests(reference()).items() <= digests(killed.root).items()
    assert site.status(cancelled.root, "tiny")["state"] == "stopped"
