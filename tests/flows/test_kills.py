"""Killed anywhere, a run goes on to the same bytes; two processes of one run make everything once.

Children are forked by a server that has imported torch already, and die at named failpoints.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.status import show_runs, show_stages
from flows.run.numbers import size
from flows.run.summary import summarise
from storage.artifacts import Artifacts, State
from storage.runs import find_run
from support.adopting import library_rack, run_batches
from support.children import Child
from support.runs import Recorder, digests, folder_of, grown, made_by_stages, manifests, subset, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]


EVERYTHING = ["prepare data -1", *made_by_stages(3)]

# failpoint -> the first task that runs again, and the step its training goes on from
KILLS = {
    "promote-data:-1": ("prepare data -1", 0),
    "train:2": ("train 0", 0),
    "train:4": ("train 0", 0),  # reached before the checkpoint of step 4
    "train:5": ("train 0", 4),
    "train:12": ("train 0", 8),
    "cache:1": ("cache 0", 0),
    "cache:2": ("cache 0", 0),
    "seal-build:1": ("build 1", 0),
    "seal-trunk:2": ("trunk 2", 0),
    "seal-train:1": ("train 1", 8),
    "seal-cache:1": ("cache 1", 0),
    "seal-validate:0": ("validate 0", 0),
    "sealed-build:0": ("trunk 0", 0),
    "sealed-train:1": ("cache 1", 0),
    "sealed-cache:0": ("validate 0", 0),
    "sealed-validate:2": (None, 0),
    "promote-build:2": ("trunk 2", 0),  # sealed but for the rename: that is done, and nothing is made again
    "promote-stack:1": ("cache 1", 0),
    "promote-activations:0": ("validate 0", 0),
    "promote-validation:1": ("build 2", 0),
}


LIKE_ANOTHER = ("train:2", "train:4", "train:12", "cache:2", "seal-build:1", "sealed-build:0", "sealed-cache:0")
LIKE_ANOTHER += ("promote-build:2", "promote-activations:0", "promote-validation:1")
"""Killed at the same kind of step as another of them, so that they are run with the slow."""


@pytest.mark.parametrize(
    "failpoint",
    [pytest.param(place, marks=pytest.mark.slow if place in LIKE_ANOTHER else ()) for place in KILLS],
)
def test_killed_anywhere_ends_in_the_same_bytes(failpoint: str, tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "a"
    first_again, step = KILLS[failpoint]
    child = Child(tmp_path, root, failpoint=f"{failpoint}:KILL").go()
    assert child.ended() == -signal.SIGKILL
    assert child.made == EVERYTHING[: len(child.made)]
    # Killed after its last seal, a run has all that it set out to make.
    assert _states(root) == ["done" if failpoint == "sealed-validate:2" else "killed"]
    if first_again and first_again.startswith("train"):
        assert _kept(root)[int(first_again[-1])] == (step or None)

    again = grown(tiny(tmp_path), root)
    expected = EVERYTHING[EVERYTHING.index(first_again) :] if first_again else []
    assert again.made == expected
    assert digests(root) == digests(reference())
    assert not list((root / "work").iterdir())
    assert not list((root / "trash").iterdir())
    assert _kept(root) == [None, None, None]
    for stage in range(3):
        stack = folder_of(root, "stack", stage)
        steps = [json.loads(line)["step"] for line in (stack / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(12))
        resumed = first_again == f"train {stage}"
        assert manifests(root)[stack.name]["facts"]["first_step"] == (step if resumed else 0)
    assert (f"goes on from its checkpoint at step {step}" in " ".join(again.messages)) == (step > 0)


def test_what_a_killed_cache_keeps_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a"
    assert Child(tmp_path, root, failpoint="cache:2:KILL").go().ended() == -signal.SIGKILL
    (store,) = root.glob("work/activations-0-*/store.zarr")
    written = sum(path.stat().st_size for path in store.rglob("c.*"))
    capsys.readouterr()
    show_stages(str(root), "tiny", as_json=False)
    assert f"absent, {size(written)} written" in capsys.readouterr().out
    grown(tiny(tmp_path), root)
    show_stages(str(root), "tiny", as_json=False)
    assert "written" not in capsys.readouterr().out


def test_killed_with_masks_and_epochs(tmp_path: Path, reference: Reference) -> None:
    """Resuming finds batch, mask draw and view of the step again: stage 1, inside the second epoch."""
    changes = {"training.progressive.training_objective": "mlm", "training.checkpoint_every": 3}
    root = tmp_path / "a"
    grown(tiny(tmp_path, {**changes, "training.progressive.target_stacks": 1}), root)
    assert Child(tmp_path, root, changes, "train:7:KILL").go().ended() == -signal.SIGKILL
    assert _started_tasks(again := grown(tiny(tmp_path, changes), root))[0] == "train 1"
    assert again.messages == ["stage 1 goes on from its checkpoint at step 6"]
    expected = digests(reference({"training.progressive.training_objective": "mlm"}))
    assert {name: digests(root)[name] for name in expected} == expected


def test_killed_between_the_seals_of_an_optimizers_state_and_its_stack(tmp_path: Path, reference: Reference) -> None:
    """Training goes on from the checkpoint, and seals the same state again."""
    root, changes = tmp_path / "a", {"training.optimizer_state": "keep", "training.progressive.target_stacks": 2}
    assert Child(tmp_path, root, changes, "seal-train:0:KILL").go().ended() == -signal.SIGKILL
    stage = find_run(Artifacts(root), "tiny").plan.stages[0]
    assert [Artifacts(root).state(stage.ref(kind)) for kind in ("optimizer", "stack")] == [State.SEALED, State.ABSENT]
    assert grown(tiny(tmp_path, changes), root).messages == ["stage 0 goes on from its checkpoint at step 8"]
    assert digests(root) == digests(reference(changes))
    assert not [*(root / "work").iterdir(), *(root / "trash").iterdir()]


@pytest.mark.parametrize("failpoint", ["promote-stack:0", "train:5"])
def test_killed_while_a_rack_is_adopted_or_grown_on(failpoint: str, tmp_path: Path, reference: Reference) -> None:
    config = tiny(tmp_path)
    library_rack(config, run_batches(config, reference()), 2).save(tmp_path / "rack")
    changes, root = {"model.from": str(tmp_path / "rack")}, tmp_path / "a"
    assert Child(tmp_path, root, changes, f"{failpoint}:KILL").go().ended() == -signal.SIGKILL
    grown(tiny(tmp_path, changes), root)
    grown(tiny(tmp_path, changes), tmp_path / "undisturbed")
    assert digests(root) == digests(tmp_path / "undisturbed")


def _kept(root: Path) -> list[int | None]:
    """Return what of each stage that is not trained need not be trained again, as `stackwise status` says it."""
    artifacts = Artifacts(root)
    return [stage.steps_kept for stage in summarise(artifacts, find_run(artifacts, "tiny").plan)]


def _started_tasks(recorder: Recorder) -> list[str]:
    return [task for task in recorder.made if not task.startswith("prepare")]


def test_killed_again_and_again(tmp_path: Path, reference: Reference) -> None:
    """A run that gets a little further each time still ends in the same bytes."""
    root = tmp_path / "a"
    for failpoint in ("train:5", "train:9", "cache:1", "seal-validate:0", "train:7", "promote-stack:2"):
        child = Child(tmp_path, root, failpoint=f"{failpoint}:KILL").go()
        assert child.ended() == -signal.SIGKILL, failpoint
    grown(tiny(tmp_path), root)
    assert digests(root) == digests(reference())
    assert len(list((root / "runs/tiny/attempts").iterdir())) == 7


def test_a_torn_checkpoint_costs_steps_not_weights(tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "a"
    assert Child(tmp_path, root, failpoint="train:9:KILL").go().ended() == -signal.SIGKILL
    (tensors,) = root.glob("work/stack-0-*/scratch/checkpoint/state.safetensors")
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    again = grown(tiny(tmp_path), root)
    assert again.messages == [f"stage 0 starts anew: {tensors} is damaged or missing"]
    assert digests(root) == digests(reference())


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("failpoint", "message", "again", "step"),
    [
        ("train:6", "stopped on request after step 6 of 12; run the same command to go on", "train 0", 6),
        ("cache:1", "was sealed; run the same command to go on", "validate 0", 0),  # both its shards were under way
        ("seal-train:1", "was sealed; run the same command to go on", "cache 1", 0),
    ],
)
def test_sigterm_stops_at_a_safe_point(
    failpoint: str,
    message: str,
    again: str,
    step: int,
    tmp_path: Path,
    reference: Reference,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, failpoint=f"{failpoint}:TERM").go()
    assert child.ended() == 1
    assert child.said[-2] == "message: stopping at the next safe point; once more to stop at once"
    assert child.said[-1].startswith("error: stopped on request")
    assert child.said[-1].endswith(message)
    assert _states(root) == ["stopped"]
    capsys.readouterr()
    show_stages(str(root), "tiny", as_json=False)
    assert ("absent, checkpoint after step 6 of 12" in capsys.readouterr().out) == (step == 6)
    resumed = grown(tiny(tmp_path), root)
    assert resumed.made == EVERYTHING[EVERYTHING.index(again) :]
    assert resumed.messages == ([f"stage 0 goes on from its checkpoint at step {step}"] if step else [])
    assert digests(root) == digests(reference())


def test_sigint_is_a_request_too(tmp_path: Path, reference: Reference) -> None:
    child = Child(tmp_path, tmp_path / "a", failpoint="train:3:INT").go()
    assert child.ended() == 1
    assert "after step 3 of 12" in child.said[-1]


def test_a_second_sigterm_ends_at_once(tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "a"
    child = Child(tmp_path, root, failpoint="train:6:TERM", then="twice").go()
    assert child.ended() == -signal.SIGTERM
    again = grown(tiny(tmp_path), root)
    assert again.messages == ["stage 0 goes on from its checkpoint at step 4"]  # none was written at step 6
    assert digests(root) == digests(reference())


# ---------------------------------------------------------------- two at once


@pytest.mark.parametrize("turn", range(2))
def test_two_processes_make_everything_once(turn: int, tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "a"
    children = [Child(tmp_path, root) for _ in range(2)]
    for child in children:
        child.go()
    assert [child.ended() for child in children] == [0, 0]
    assert sorted(children[0].made + children[1].made) == sorted(EVERYTHING)
    assert digests(root) == digests(reference())
    assert _states(root) == ["done"]


def test_one_waits_for_what_the_other_makes(tmp_path: Path, reference: Reference) -> None:
    """The first stands still in the middle of training; the second waits, and takes over when it is killed."""
    root = tmp_path / "a"
    first = Child(tmp_path, root, then="pause").go()
    first.hear("paused")
    second = Child(tmp_path, root).go()
    name = next(name for name in digests(reference()) if name.startswith("stack-0-"))
    while not any(f"waiting for {name}" in line for line in second.said):
        second.said.append(second.listen())
    assert any(f"process {first.process.pid} on " in line for line in second.said)
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGKILL)
    assert second.ended() == 0
    assert first.ended() == -signal.SIGKILL
    assert any("goes on from its checkpoint at step 4" in line for line in second.said)
    assert second.made == EVERYTHING[EVERYTHING.index("train 0") :]
    assert digests(root) == digests(reference())


def test_a_live_name_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "a"
    first = Child(tmp_path, root, then="pause").go()
    first.hear("paused")
    assert _states(root) == ["running"]
    second = Child(tmp_path, root, {"run.seed": 1}).go()
    assert second.ended() == 2
    assert second.said[-1].startswith("error: run.name: got 'tiny'; process ")
    assert f"process {first.process.pid} on " in second.said[-1]
    assert second.made == []
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.ended() == -signal.SIGKILL
    assert _states(root) == ["killed"]
    # Nobody holds the name now.
    third = Child(tmp_path, root, {"run.seed": 1, "training.progressive.target_stacks": 1}).go()
    assert third.ended() == 0


def test_two_configurations_share_what_they_share(tmp_path: Path, reference: Reference) -> None:
    """Two runs of other names at once: the stages that are equal are made by whichever comes first."""
    root = tmp_path / "a"
    deeper = {"run.name": "deeper", "training.progressive.target_stacks": 4}
    children = [Child(tmp_path, root).go(), Child(tmp_path, root, deeper).go()]
    assert [child.ended() for child in children] == [0, 0]
    both = children[0].made + children[1].made
    for stage in range(3):
        assert both.count(f"train {stage}") == 1
    assert both.count("train 3") == 1
    assert subset(digests(root), "stack") == subset(
        digests(reference({"training.progressive.target_stacks": 4})), "stack"
    )
    assert both.count("validate 2") == 2  # one with the cache above stage 2, one without


def _states(root: Path) -> list[str]:
    """Return what `status` says of the runs."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        show_runs(str(root), as_json=True)
    return [run["state"] for run in json.loads(out.getvalue())["runs"]]
