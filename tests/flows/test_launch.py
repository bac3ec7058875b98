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

from flows.run.devices import check_machine
from flows.run.events import StepTaken
from flows.run.ranks import Job, torchrun
from flows.run.stage import Stage
from stackwise_core.errors import ConfigError
from storage.checkpoints import STACK
from support.children import Child, started
from support.configurations import configuration
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
def test_killed_between_two_shards_the_checkpoint_before_stands_for_any_number(tmp_path: Path, reference: Any) -> None:
    root, shared = tmp_path / "a", {**TWO, "hardware.shard": "always"}
    child = Child(tmp_path, root, shared, failpoint="shard-1:8:KILL").go()  # the other shard is there then
    assert child.ended() == 1
    assert "rank 1 of 2 died by SIGKILL" in "\n".join(child.said)
    recorder = grown(tiny(tmp_path, {**shared, "hardware.processes": 3}), root)
    assert any("goes on from its checkpoint at step 4" in text for text in recorder.messages)
    assert any("is shared out between its 3 processes: about" in text for text in recorder.messages)
    here, there = (load_file(folder_of(folder, "stack", 0) / STACK) for folder in (root, reference(ONE_STAGE)))
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


# ---------------------------------------------------------------- several nodes

NODES = {**ONE_STAGE, "hardware.nodes": 2, "hardware.rendezvous": "127.0.0.1:29871", "hardware.threads": 1}


def test_the_first_node_holds_the_rendezvous_at_which_the_others_come(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**NODES, "hardware.processes": 2})
    stage = Stage(config=config, root=str(tmp_path), corpus="c", corpus_bytes=1, index=0)
    job = Job(stage=stage, build=None, folder=tmp_path / "work", token="t")
    first, other = (torchrun(job, first=first)[3:] for first in (True, False))
    assert first == [
        *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29871", "--rdzv-id=t"),
        *("--rdzv-conf=is_host=1", "--local-addr=127.0.0.1", "--nproc-per-node=2"),
        *("-m", "flows.run.rank", str(tmp_path / "work/scratch/ranks/job-t.json")),
    ]
    assert [*first[:4], "--rdzv-conf=is_host=0", *first[5:]] == other
    # Or a node would take the file of the next attempt for that of one whose first node was killed, and not end.
    assert job.model_copy(update={"token": "u"}).path != job.path


def test_what_nodes_need(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware.rendezvous: got ''; hardware.nodes = 2 need HOST:PORT of the"):
        configuration({"hardware.nodes": 2})
    with pytest.raises(ConfigError, match=r"hardware.nodes: got 5; each process needs a row of every batch: at most 4"):
        configuration({**NODES, "hardware.nodes": 5, "hardware.processes": 2, "training.batch_size": 8})
    somewhere = Stage(
        config=tiny(tmp_path, {**NODES, "hardware.rendezvous": "no-such-host.invalid:1"}),
        **{"root": str(tmp_path), "corpus": "c", "corpus_bytes": 1, "index": 0},
    )
    with pytest.raises(ConfigError, match=r"hardware.rendezvous: got 'no-such-host.invalid:1'; no address was found"):
        torchrun(Job(stage=somewhere, build=None, folder=tmp_path), first=True)
    with pytest.raises(ConfigError, match=r"hardware.rendezvous: got 'no-such-host.invalid:1'; no address was found"):
        check_machine(somewhere.config, remote=False)  # before anything starts
    with pytest.raises(ConfigError, match=r"hardware.nodes: got 2; nodes share the work folders"):
        check_machine(tiny(tmp_path, NODES), remote=True)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_nodes_train_as_two_processes_and_another_number_goes_on(
    nodes: int, tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    root = tmp_path / "a"
    node = started("join", "--artifacts", root)
    request.addfinalizer(node.kill)
    child = Child(tmp_path, root, NODES, failpoint="train:6:TERM").go()
    assert child.ended() == 1
    (error,) = [line for line in child.said if line.startswith("error:")]
    assert "stopped on request after step" in error
    assert "message: stage 0 trains on 2 nodes, once `stackwise join` runs on the others" in child.said
    recorder = grown(tiny(tmp_path, {**NODES, "hardware.nodes": nodes}), root)
    stopped_at = error.split("after step ")[1].split(" ")[0]
    assert any(f"goes on from its checkpoint at step {stopped_at}" in text for text in recorder.messages)
    node.terminate()
    node.join(120)
    assert node.exitcode == 0
    here, there = (load_file(folder_of(folder, "stack", 0) / STACK) for folder in (root, reference(TWO)))
    furthest = max((here[name] - there[name]).abs().max().item() for name in there)
    assert furthest <= (0.0 if nodes == COUNT else TOLERANCE)
