"""Stopped and resumed on Prefect's pages, with a real server and worker; and left alone by them: minutes each."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.kills import Trial, ask_for, newest, said
from support.operating import Site, until
from support.runs import digests, folder_of, manifests

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("quick_disk")]


def test_a_run_that_is_suspended_or_paused_goes_on_by_resume(
    site: Site, tmp_path: Path, reference: Callable[..., Path]
) -> None:
    trial = Trial(site, tmp_path, ("train:5:HOLD", "train:7:HOLD"))
    trial.start()
    for state in ("Suspended", "Paused"):
        trial.wait_for_failpoint()
        ask_for(state, trial)
        until(lambda: trial.shown() == "Suspended", "end of all that seems to run")
        assert site.status(trial.root, "tiny")["state"] == "stopped"
        assert site.post(f"/flow_runs/{trial.run_id}/resume", {})["status"] == "ACCEPT"
    site.wait_for(trial.run_id, "COMPLETED")
    assert digests(trial.root) == digests(reference())
    assert manifests(trial.root)[folder_of(trial.root, "stack", 0).name]["facts"]["first_step"] == 7
    stages = [run["name"] for run in site.subflows(trial.run_id)]
    assert len(stages) == len(set(stages)) == 3  # the resumed run goes on with the subflow that was paused
    assert not [line for line in said(trial) if "Traceback" in line]


def test_a_run_of_a_terminal_is_cancelled_on_its_page(site: Site, tmp_path: Path) -> None:
    trial = Trial(site, tmp_path, ("train:5:HOLD",))
    trial.train()
    trial.wait_for_failpoint()
    trial.run_id = newest(site)
    ask_for("Cancelling", trial)
    assert trial.command is not None
    assert trial.command.wait() == 1
    until(lambda: trial.shown() == "Cancelled", "end of all that seems to run")


def test_a_live_run_of_a_terminal_is_not_shown_crashed(site: Site, tmp_path: Path) -> None:
    """It sends its heartbeats as often as the automation expects them, longer than that waits."""
    trial = Trial(site, tmp_path, ("train:5:HOLD",))
    trial.train()
    trial.wait_for_failpoint()
    run = newest(site)
    beats = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}

    def beaten() -> bool:
        assert site.run(run)["state_name"] == "Running"
        return site.post("/events/filter", {"filter": beats})["total"] > 4

    until(beaten, "heartbeats")
    os.kill(trial.pid, signal.SIGCONT)
    assert trial.command is not None
    assert trial.command.wait() == 0
