"""The state of an optimizer as an artifact of a run: left, gone on from, dropped, and made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.run.events import Event, StepTaken, request_stop, stopping_on_signals, subscribed
from flows.run.inputs import open_stage
from flows.run.stage import Stage
from stackwise_core.data.packing import corpus_facts
from stackwise_core.errors import StageInterruptedError
from stackwise_core.training import training
from storage.artifacts import Artifacts, State
from storage.checkpoints import load_tensors
from storage.errors import ArtifactCorruptError
from support.modes import G, plan_of
from support.runs import digests, folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

KEEP = {"training.optimizer_state": "keep", "training.steps_per_stack": 4, f"{G}target_stacks": 2}


def states(root: Path, config: Any) -> list[State]:
    return [Artifacts(root).state(stage.ref("optimizer")) for stage in plan_of(config).stages if stage.optimizer]


def test_a_stage_begins_with_the_moments_of_the_artifact(tmp_path: Path) -> None:
    config, root = tiny(tmp_path, {**KEEP, "cache.keep": "all"}), tmp_path / "a"
    grown(config, root)
    corpus, n_bytes = corpus_facts(config.data.source)
    stage = Stage(config=config, root=str(root), corpus=corpus, corpus_bytes=n_bytes, index=1)
    left = load_tensors(folder_of(root, "optimizer", 0) / "moments.safetensors")
    with open_stage(stage, stage.plan.ref("build"), tmp_path / "work") as opened:
        found = dict(opened.moments)
    assert {name.rpartition(".")[0] for name in found} == {"head.norm.weight", "head.projection.weight"}
    for name, value in found.items():
        assert value.equal(left[name.replace("head.projection", "embedding")]), name  # the head was tied
    assert found["head.norm.weight.step"] == 4
    after = load_tensors(folder_of(root, "optimizer", 1) / "moments.safetensors")
    assert after["head.norm.weight.step"] == 8


def test_the_newest_state_stays_and_serves_a_higher_target(tmp_path: Path, reference: Any) -> None:
    config, root = tiny(tmp_path, KEEP), tmp_path / "a"
    grown(config, root)
    assert states(root, config) == [State.RETIRED, State.SEALED]
    higher = {**KEEP, f"{G}target_stacks": 3}
    recorder = grown(tiny(tmp_path, higher), root)
    assert [task for task in recorder.made if task.startswith("train")] == ["train 2"]
    straight = reference(higher)
    assert {name: digests(root)[name] for name in digests(straight)} == digests(straight)


_LOST = [pytest.param(how, marks=pytest.mark.slow) for how in ("never kept", "removed")]


@pytest.mark.parametrize("lost", ["stopped", *_LOST])
def test_a_state_that_is_gone_is_made_again_by_training_its_stage_again(
    lost: str, tmp_path: Path, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, root = tiny(tmp_path, KEEP), tmp_path / "a"
    one = {f"{G}target_stacks": 1, "training.optimizer_state": "reset" if lost == "never kept" else "keep"}
    grown(tiny(tmp_path, {**KEEP, **one}), root)
    if lost != "never kept":
        shutil.rmtree(folder_of(root, "optimizer", 0))
    (tmp_path / "tiny.yaml").write_text(config.to_yaml())
    assert main(["plan", str(tmp_path / "tiny.yaml"), "--artifacts", str(root), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert "train" in planned[0]["to_run"]
    assert planned[0]["states"]["stack"] == "sealed"
    assert planned[0]["states"]["optimizer"] == "absent"

    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            request_stop()

    if lost == "stopped":
        with subscribed(stop), stopping_on_signals(), pytest.raises(StageInterruptedError):
            grown(config, root)
    recorder = grown(config, root)
    assert [task for task in recorder.made if task.startswith("train")] == ["train 0", "train 1"]
    said = [text for text in recorder.messages if "trained again" in text]
    assert said == ["stage 0 is trained again: stage 1 goes on from the state of its optimizer, which was not kept"]
    straight = digests(reference(KEEP))
    assert {name: digests(root)[name] for name in straight} == straight
    assert main(["verify", "--artifacts", str(root)]) == 0


def test_a_stage_that_trains_to_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "a"
    grown(tiny(tmp_path, {**KEEP, "training.optimizer_state": "reset", f"{G}target_stacks": 1}), root)
    monkeypatch.setattr(training, "learning_rate", lambda spec, step: 1e-4)
    before = digests(root)
    with pytest.raises(ArtifactCorruptError, match=r"has other weights in .* with --from-stack 0"):
        grown(tiny(tmp_path, KEEP), root)
    assert before.items() <= digests(root).items()


@pytest.mark.slow
def test_on_one_clock_the_last_stage_is_trained_again_from_the_state_below_it(tmp_path: Path, reference: Any) -> None:
    clock = {**KEEP, "training.schedule": "one_clock"}
    config, root = tiny(tmp_path, clock), tmp_path / "a"
    grown(config, root)
    assert states(root, config) == [State.SEALED]
    higher = {**clock, f"{G}target_stacks": 3}
    recorder = grown(tiny(tmp_path, higher), root)
    assert [task for task in recorder.made if task.startswith("train")] == ["train 1", "train 2"]
    straight = digests(reference(higher))
    assert {name: digests(root)[name] for name in straight} == straight


def test_all_commands_know_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, root, copy = tiny(tmp_path, KEEP), tmp_path / "a", tmp_path / "copy"
    grown(config, root)
    first, last = (stage.ref("optimizer").name for stage in plan_of(config).stages)

    def said(*command: str) -> str:
        where = [] if "--artifacts" in command else ["--artifacts", str(root)]
        assert main([*command, *where]) == 0
        return capsys.readouterr().out

    assert f"{first} retired" in " ".join(said("status", "tiny").split())
    assert f"ok  {last}" in said("verify", "tiny")
    assert "optimizer" in said("inspect", last)
    (tmp_path / "other.yaml").write_text(tiny(tmp_path, {**KEEP, "training.learning_rate": 1e-3}).to_yaml())
    planned = said("why", "optimizer-1", str(tmp_path / "other.yaml"))
    assert "optim.learning_rate is 0.001, there 0.002" in planned
    assert "0 B" in said("gc", "--dry-run")
    said("push", str(copy), "tiny")
    assert digests(copy) == digests(root)
    assert f"ok  {last}" in said("verify", "tiny", "--artifacts", str(copy))
