"""Real ranks under torchrun: what they train, what is heard of them, and that none outlives a flow that died.

The flow runs in a child (`support.children`) wherever someone is killed.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flows.run.events import StepTaken
from storage.checkpoints import STACK
from support.children import Child
from support.modes import G
from support.ranks import COUNT, TOLERANCE
from support.runs import digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

ONE_STAGE = {f"{G}target_stacks": 1}
TWO = {**ONE_STAGE, "hardware.processes": COUNT, "hardware.threads": COUNT}


def test_a_run_of_two_processes_is_the_run_of_one(tmp_path: Path, reference: Any) -> None:
    root = tmp_path / "a"
    recorder = grown(tiny(tmp_path, TWO), root)
    one = reference(ONE_STAGE)
    assert digests(root).keys() == digests(one).keys()  # how many trained is no part of any id
    assert [event.step for event in recorder.events if isinstance(event, StepTaken)] == list(range(1, 13))
    here, there = (load_file(folder_of(folder, "stack", 0) / STACK) for folder in (root, one))
    assert max((here[name] - there[name]).abs().max().item() for name in there) <= TOLERANCE
    (stack,) = [found for name, found in manifests(root).items() if name.startswith("stack-")]
    assert stack["fingerprint"]["processes"] == COUNT
    assert (stack["facts"]["steps"], stack["facts"]["first_step"]) == (12, 0)
    assert stack["facts"]["tokens_per_second"] > 0


def ranks_of(folder: Path) -> list[int]:
    """Return file descriptors of the ranks that train below a folder; they are readable when these are gone."""
    found: list[int] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "flows.run.rank" in words and any(word.startswith(str(folder)) for word in words):
            found.append(os.pidfd_open(int(pid)))
    return found


def gone(ranks: list[int], seconds: float = 240) -> bool:
    """Return whether all of them end in time."""
    for rank in ranks:
        if not select.select([rank], [], [], seconds)[0]:
            return False
        os.close(rank)
    return True


@pytest.mark.slow
def test_no_rank_outlives_a_killed_flow(tmp_path: Path, reference: Any) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, TWO, failpoint="rank-0:6:STOP", then="tell").go()
    child.hear("step 6")  # rank 0 stands still there, and rank 1 waits for it
    ranks = ranks_of(root)
    assert len(ranks) == COUNT + 1  # and torchrun
    child.process.kill()
    assert gone(ranks)
    recorder = grown(tiny(tmp_path, TWO), root)
    assert any("goes on from its checkpoint at step 4" in text for text in recorder.messages)
    assert digests(root) == digests(reference(TWO))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_rank_that_dies_is_told_and_the_stage_goes_on(processes: int, tmp_path: Path, reference: Any) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, TWO, failpoint="rank-1:6:KILL").go()
    assert child.ended() == 1
    (error,) = [line for line in child.said if line.startswith("error:")]
    assert "stage 0: rank 1 of 2 died by SIGKILL; run the same command to go on" in error
    log = error.rpartition("The log is ")[2].split("\n")[0]
    assert "SIGKILL" in Path(log).read_text()
    recorder = grown(tiny(tmp_path, {**TWO, "hardware.processes": processes}), root)
    assert any("goes on from its checkpoint at step 4" in text for text in recorder.messages)
    changed = [text for text in recorder.messages if text.startswith("the checkpoint was made with another")]
    if processes == COUNT:
        assert not changed
        assert digests(root) == digests(reference(TWO))
    else:
        assert f"processes (2, now {processes})" in changed[0]
        here, there = (load_file(folder_of(folder, "stack", 0) / STACK) for folder in (root, reference(TWO)))
        assert max((here[name] - there[name]).abs().max().item() for name in there) <= TOLERANCE


@pytest.mark.slow
def test_asked_to_stop_all_ranks_stop_with_a_checkpoint(tmp_path: Path, reference: Any) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, TWO, failpoint="train:6:TERM", then="tell").go()
    assert child.ended() == 1
    (error,) = [line for line in child.said if line.startswith("error:")]
    assert "stopped on request after step" in error
    assert gone(ranks_of(root))
    stopped_at = int(error.split("after step ")[1].split(" ")[0])
    recorder = grown(tiny(tmp_path, TWO), root)
    assert any(f"goes on from its checkpoint at step {stopped_at}" in text for text in recorder.messages)
    assert digests(root) == digests(reference(TWO))


@pytest.mark.slow
def test_what_a_rank_explains_is_explained_here(tmp_path: Path) -> None:
    child = Child(tmp_path, tmp_path / "a", {**TWO, "training.learning_rate": 1e30}).go()
    assert child.ended() == 1
    (error,) = [line for line in child.said if line.startswith("error:")]
    assert "lower training.learning_rate (now 1e+30)" in error


@pytest.mark.slow
def test_a_second_signal_ends_the_ranks_too(tmp_path: Path) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, TWO, failpoint="rank-1:6:STOP", then="tell").go()
    child.hear("step 5")
    ranks = ranks_of(root)
    child.process.terminate()
    child.hear("message: stopping at the next safe point; once more to stop at once")
    child.process.terminate()
    assert child.ended() == -signal.SIGTERM
    assert gone(ranks)
