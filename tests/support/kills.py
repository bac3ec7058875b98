"""Killed as an operator sees it: server, worker and flow are real processes; each recovery ends in the same bytes.

One run is killed at ten turns of its way, and recovered from each in one manner or another: the process that
recovers from one kill is the one that the next kill hits. Four such runs, the manners shifted by one, are the matrix.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from support.operating import TERMINAL, Site, until
from support.processes import wait_until_gone
from support.runs import digests, folder_of, manifests, tiny_values, write_corpus

Reference = Callable[..., Path]
Note = Callable[[str, object], None]


class Trial:
    """One run of three stages, and the processes that bring it forward."""

    def __init__(self, site: Site, folder: Path, places: tuple[str, ...] = (), **environment: str) -> None:
        self.site, self.root, self.met = site, folder / "artifacts", folder / "met"
        self.met.mkdir()
        self.values = tiny_values(write_corpus(folder / "corpus.txt"))
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(self.values))
        self.places, self.turn, self.run_id = places, 0, ""
        self.n_reports = site.n_reports()
        self.command: subprocess.Popen[bytes] | None = None
        met = {"STACKWISE_FAILPOINT": ",".join(places), "STACKWISE_FAILPOINTS_MET": str(self.met)}
        self.environment = environment | (met if places else {})

    def start(self, **parameters: Any) -> None:
        """Start a new run of the deployment."""
        self.command = None
        parameters |= {"config": self.values, "artifacts": str(self.root)}
        self.run_id = self.site.start(parameters, environment=self.environment, quickly=True)

    def train(self) -> None:
        """Start `stackwise train` against the same server."""
        arguments = ("train", str(self.config), "--artifacts", str(self.root))
        self.command = self.site.begin("stackwise", *arguments, **self.environment)

    @property
    def pid(self) -> int:
        """The flow process: as the run itself says and, if a worker started it, as the worker recorded it."""
        pid = self.site.status(self.root, "tiny")["holder"]["pid"]
        assert pid == (self.command.pid if self.command else self.site.pid_of(self.run_id))
        return pid

    def wait_for_failpoint(self) -> None:
        """Wait until the next failpoint has been met."""
        until((self.met / str(self.turn)).exists, f"process at {self.places[self.turn]}; see {self.site.folder}")
        self.turn += 1

    @property
    def at_the_end(self) -> bool:
        """No more failpoints are to come."""
        return self.turn == len(self.places)

    def wait_for_report(self) -> None:
        """Wait until the worker has said its last word on the process that has ended."""
        worker = self.site.worker
        assert worker is not None
        until(lambda: self.site.n_reports() > self.n_reports or worker.poll() is not None, "report of the worker")
        self.n_reports = self.site.n_reports()

    def sealed(self) -> dict[str, tuple[int, int]]:
        """Return what would change if a sealed artifact were made again."""
        found = [path.stat() for path in sorted(self.root.glob("*/*/manifest.json"))]
        names = [path.parent.name for path in sorted(self.root.glob("*/*/manifest.json"))]
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in zip(names, found, strict=True)}

    def shown(self) -> str:
        """Return the run's state on Prefect's pages, and what of it still seems to run."""
        subflows, tasks = self.site.subflows(self.run_id), self.site.task_runs(self.run_id)
        alive = [child["name"] for child in (*subflows, *tasks) if child["state_type"] == "RUNNING"]
        state = self.site.run(self.run_id)["state_name"]
        return f"{state} ({', '.join(sorted(set(alive)))} Running)" if alive else state


# ---------------------------------------------------------------- kills


def _at_failpoint(trial: Trial) -> None:
    """The failpoint has killed the flow process; the worker sees it end."""
    trial.site.wait_for(trial.run_id, "CRASHED")
    trial.wait_for_report()


def _by_sigterm(trial: Trial) -> None:
    pid = trial.pid
    os.kill(pid, signal.SIGTERM)
    if trial.command:
        assert trial.command.wait() == 1
        trial.run_id = newest(trial.site)
    else:
        wait_until_gone(pid)  # it told its end itself: the worker has no word to add
    trial.site.wait_for(trial.run_id)
    until(lambda: trial.shown() == "Cancelled", "end of all that seems to run")


def _by_cancel(trial: Trial) -> None:
    trial.site.command("prefect", "flow-run", "cancel", trial.run_id)
    trial.site.wait_for(trial.run_id, "CANCELLED")
    until(lambda: trial.shown() == "Cancelled", "end of all that seems to run")


def _the_server_for_a_moment(trial: Trial) -> None:
    """The flow finishes its stage without a server, and waits for it between two stages."""
    pid = trial.pid
    trial.site.kill_server()
    os.kill(pid, signal.SIGCONT)
    until(lambda: any(trial.root.glob("validations/validation-1-*/manifest.json")), "stage that needs no server")
    trial.site.start_server()
    trial.site.wait_for_server()


def _the_server(trial: Trial) -> None:
    """The flow gives up: no server for as long as it has patience."""
    pid = trial.pid
    trial.site.kill_server()
    os.kill(pid, signal.SIGCONT)
    wait_until_gone(pid)
    trial.site.start_server()
    trial.site.wait_for_server()
    trial.wait_for_report()
    trial.site.revive_worker()


def _the_machine(trial: Trial) -> None:
    pid = trial.pid
    trial.site.kill_worker()
    os.kill(pid, signal.SIGKILL)
    trial.site.kill_server()
    trial.site.start_server()
    trial.site.wait_for_server()
    trial.site.start_worker()
    trial.site.wait_for_worker()


def _the_machine_told_by_hand(trial: Trial) -> None:
    """Change state on the run's page, Crashed: whoever knows that a machine is dead need not wait for its heartbeat."""
    _the_machine(trial)
    state = {"type": "CRASHED", "name": "Crashed", "message": "the machine was restarted"}
    trial.site.post(f"/flow_runs/{trial.run_id}/set_state", {"state": state, "force": True})


def _the_worker(trial: Trial) -> None:
    """The flow lives on in a session of its own, and comes to its end."""
    pid = trial.pid
    trial.site.kill_worker()
    os.kill(pid, signal.SIGCONT)
    trial.site.start_worker()
    trial.site.wait_for(trial.run_id, "COMPLETED")
    trial.site.wait_for_worker()


@dataclass(frozen=True)
class Kill:
    """What is done to a run, and where."""

    what: str
    place: str
    strike: Callable[[Trial], None] = _at_failpoint


# In the order in which a run of three stages comes to these places.
KILLS = (
    Kill("kill -9 in build", "seal-build:0:KILL"),
    Kill("kill -9 in trunk", "seal-trunk:0:KILL"),
    Kill("kill -9 in train", "train:6:KILL"),
    Kill("kill -9 in cache", "cache:1:KILL"),
    Kill("kill -9 in validate", "seal-validate:0:KILL"),
    Kill("SIGTERM in train", "train:5:HOLD", _by_sigterm),
    Kill("flow-run cancel in train", "train:7:HOLD", _by_cancel),
    Kill("kill -9 of the server", "train:9:HOLD", _the_server),
    Kill("machine restart", "train:9:HOLD", _the_machine),
    Kill("kill -9 of the worker", "seal-validate:2:HOLD", _the_worker),
)


# ---------------------------------------------------------------- what is asked on a page


def ask_for(state: str, trial: Trial) -> None:
    """Set a state as the run's page does, and let the flow process go on once it has heard of it."""
    pid = trial.pid
    asked: dict[str, Any] = {"type": "CANCELLING" if state == "Cancelling" else "PAUSED", "name": state}
    if state != "Cancelling":
        expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        asked["state_details"] = {"pause_reschedule": state == "Suspended", "pause_timeout": expires}
    answer = trial.site.post(f"/flow_runs/{trial.run_id}/set_state", {"state": asked})
    assert answer["status"] == "ACCEPT", answer
    until(
        lambda: f"{state} on Prefect's pages: stopping at the next safe point" in said(trial), "word of it in its log"
    )
    os.kill(pid, signal.SIGCONT)
    wait_until_gone(pid)


def newest(site: Site) -> str:
    """Return the id of the newest run of the trials."""
    named = {"flow_runs": {"name": {"any_": ["grow tiny to 3 stacks"]}}, "sort": "START_TIME_DESC", "limit": 1}
    return site.post("/flow_runs/filter", named)[0]["id"]


def said(trial: Trial) -> list[str]:
    return trial.site.logs(trial.run_id)


# ---------------------------------------------------------------- recoveries


def _by_retry(trial: Trial) -> None:
    _retry(trial, lambda: trial.site.command("prefect", "flow-run", "retry", trial.run_id))


def _by_button(trial: Trial) -> None:
    """Ask what the button Retry of a run's page asks."""
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    _retry(trial, lambda: trial.site.post(f"/flow_runs/{trial.run_id}/set_state", {"state": state, "force": True}))


def _retry(trial: Trial, retry: Callable[[], object]) -> None:
    """Retry what has ended, by Prefect's own account, and again should a late report of the end undo it."""
    n_starts = trial.site.wait_for(trial.run_id)["run_count"]

    def started() -> bool:
        run = trial.site.run(trial.run_id)
        if run["run_count"] == n_starts and run["state_type"] in TERMINAL:
            retry()
        return run["run_count"] > n_starts

    until(started, f"start of run {trial.run_id} once it was retried")


def _by_new_run(trial: Trial) -> None:
    trial.start()


def _by_command(trial: Trial) -> None:
    """It goes on to the next place; what only a worker's run can come to is left to one: it is killed there."""
    trial.train()
    assert trial.command is not None
    if trial.at_the_end:
        assert trial.command.wait() == 0
    elif trial.places[trial.turn].endswith("KILL"):
        trial.wait_for_failpoint()
        assert trial.command.wait() == -signal.SIGKILL
        trial.start()


def _by_itself(trial: Trial) -> None:
    """Nobody does anything."""


RECOVERIES = {
    "flow-run retry": _by_retry,
    "Retry in the UI": _by_button,
    "new deployment run": _by_new_run,
    "stackwise train": _by_command,
    "nothing": _by_itself,
}

Links = list[tuple[Kill, str]]


def each_once() -> Links:
    """Every kill once, every recovery, in as few processes as can be."""
    retry, button, new_run, command, nothing = RECOVERIES
    recoveries = (retry, button, new_run, retry, command, new_run, button, nothing, new_run, command)
    links = list(zip(KILLS, recoveries, strict=True))
    links[7] = (
        replace(KILLS[7], what="kill -9 of the server, started again", strike=_the_server_for_a_moment),
        nothing,
    )
    told_by_hand = replace(KILLS[8], what="machine restart, told by hand", strike=_the_machine_told_by_hand)
    links[8] = (told_by_hand, recoveries[8])
    return links


def shifted(shift: int) -> Links:
    """Every kill, the four recoveries in turn from another one on: four shifts are the whole matrix."""
    names = list(RECOVERIES)[:4]
    return [(kill, names[(number + shift) % 4]) for number, kill in enumerate(KILLS)]


def places_of(links: Links) -> tuple[str, ...]:
    """Return all failpoints of a trial, in order."""
    places: list[str] = []
    recovery = ""
    for kill, next_recovery in links:
        # A SIGTERM may hit the command itself, unless a retry is to follow: that is of a deployment's run.
        hits_the_command = kill.strike is _by_sigterm and next_recovery in ("new deployment run", "stackwise train")
        place = kill.place
        if recovery == "stackwise train" and not hits_the_command:
            places.append(f"{place.rpartition(':')[0]}:KILL")
            # Killed at its first shard, a cache may have both: whatever goes on comes to its seal for certain.
            place = "seal-cache:0:KILL" if place == "cache:1:KILL" else place
        places.append(place)
        recovery = next_recovery
    return tuple(places)


# ---------------------------------------------------------------- one run, all its kills


def kill_and_recover(trial: Trial, links: Links, expected: dict[str, str], note: Note) -> None:
    """Kill a run at every place; whatever recovers it makes nothing again that was sealed, and to the same bytes."""
    trial.start()
    trial.wait_for_failpoint()
    for kill, recovery in links:
        kill.strike(trial)
        shown, sealed, began = trial.shown(), trial.sealed(), time.monotonic()
        RECOVERIES[recovery](trial)
        if trial.at_the_end:
            trial.site.wait_for(trial.run_id, "COMPLETED")
        else:
            trial.wait_for_failpoint()
        seconds = time.monotonic() - began
        now = trial.sealed()
        assert {name: now[name] for name in sealed} == sealed, kill.what
        assert digests(trial.root).items() <= expected.items(), kill.what
        note("kill", [kill.what, recovery, shown, f"{len(sealed)} artifacts", f"{seconds:.0f} s", "yes"])
    assert digests(trial.root) == expected
    cancelled = next(recovery for kill, recovery in links if kill.strike is _by_cancel)
    again = 8 if cancelled == "stackwise train" else 7  # which was killed in its turn
    for stage, step in enumerate([4, again, 8]):
        stack = folder_of(trial.root, "stack", stage)
        assert manifests(trial.root)[stack.name]["facts"]["first_step"] == step
        assert [json.loads(line)["step"] for line in (stack / "metrics.jsonl").read_text().splitlines()] == [*range(12)]
    assert not list((trial.root / "work").iterdir())
