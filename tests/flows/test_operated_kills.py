"""The whole matrix of kills and recoveries, and what is made again on purpose: minutes each, with `make test-slow`."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.disk import mounted
from support.kills import Trial, kill_and_recover, places_of, shifted
from support.operating import Site, until
from support.runs import digests

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("quick_disk")]

Reference = Callable[..., Path]


@pytest.mark.parametrize("shift", range(4))
def test_every_kill_and_every_recovery(
    shift: int, site: Site, tmp_path: Path, reference: Reference, record_property: Any
) -> None:
    links = shifted(shift)
    # The flow whose server is killed asks for it four times, not six: it gives up in one minute, not five.
    trial = Trial(site, tmp_path, places_of(links), PREFECT_CLIENT_MAX_RETRIES="3")
    kill_and_recover(trial, links, digests(reference()), record_property)


@pytest.mark.parametrize(
    ("parameters", "redone"),
    [
        ({"from_stack": 1}, ["cache", "build trunk train cache validate", "build trunk train validate"]),
        ({"force": "train"}, ["train cache", "train", "train"]),  # a cache that was retired is filled again
    ],
)
def test_redone_on_purpose(
    parameters: dict[str, Any], redone: list[str], site: Site, tmp_path: Path, reference: Reference
) -> None:
    trial = Trial(site, tmp_path)
    shutil.copytree(reference(), trial.root)
    trial.start(**parameters)
    trial.site.wait_for(trial.run_id, "COMPLETED")
    expected = [(stage, task) for stage, names in enumerate(redone) for task in names.split()]

    def tasks() -> list[tuple[int, str]]:
        told = [re.fullmatch(r"stage (\d): (\w+)", line) for line in trial.site.logs(trial.run_id)]
        return [(int(line[1]), line[2]) for line in told if line]

    until(lambda: len(tasks()) >= len(expected), "log of every task: lines come after the run has ended")
    assert tasks() == expected
    assert digests(trial.root) == digests(reference())


def test_a_live_run_that_was_taken_for_dead_comes_to_its_end(site: Site, tmp_path: Path, reference: Reference) -> None:
    """A heartbeat that is judged late, or a person who is wrong, marks a run Crashed; its process goes on."""
    trial = Trial(site, tmp_path, ("train:9:HOLD",))
    trial.start()
    trial.wait_for_failpoint()
    state = {"type": "CRASHED", "name": "Crashed", "message": "no heartbeat: its machine died"}
    trial.site.post(f"/flow_runs/{trial.run_id}/set_state", {"state": state, "force": True})
    os.kill(trial.pid, signal.SIGCONT)
    until(lambda: trial.site.run(trial.run_id)["state_type"] == "COMPLETED", "end of the run")
    assert trial.site.run(trial.run_id)["run_count"] == 1
    assert digests(trial.root) == digests(reference())


def test_a_server_whose_disk_is_full(tmp_path: Path, reference: Reference) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=100m"):
        site = Site(tmp_path / "site", PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{disk}/prefect.db")
        try:
            site.start_server()
            site.wait_for_server()
            trial = Trial(site, tmp_path, ("train:9:HOLD",))
            trial.train()
            assert trial.command is not None
            trial.wait_for_failpoint()
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(100 << 20))
            os.kill(trial.command.pid, signal.SIGCONT)
            assert trial.command.wait(900) == 1
            said = (site.folder / "stackwise.log").read_text()
            assert said.count("stackwise: Prefect's server") == 1
            assert "Traceback" not in said
            sealed = trial.sealed()
            assert {name.rpartition("-")[0] for name in sealed} >= {"build-0", "trunk-0", "stack-0"}
            (disk / "filler").unlink()
            site.kill_server()
            site.start_server()
            site.wait_for_server()
            trial.train()
            assert trial.command.wait(900) == 0
            now = trial.sealed()
            assert {name: now[name] for name in sealed} == sealed
            assert digests(trial.root) == digests(reference())
        finally:
            site.end()
