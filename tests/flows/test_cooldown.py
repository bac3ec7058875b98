"""`validation.cooldown_steps`: a stage that ends at the peak rate is judged as if its clock ended there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.run.run import grow
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import cooldown_flops, plan_run
from support.configurations import CORPUS, configuration, ids
from support.modes import G, plan_of
from support.runs import digests, folder_of, grown, manifests, subset, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

CLOCK: dict[str, Any] = {
    "training.schedule": "one_clock",
    "training.decay": "linear",
    "training.steps_per_stack": 8,
    "training.joint_steps": 4,
    f"{G}target_stacks": 2,
}
COOLED = {**CLOCK, "validation.cooldown_steps": 5}
MODES: dict[str, dict[str, Any]] = {
    "shared": {},
    "fresh int8 insert": {"data.rows": "fresh", "cache.dtype": "int8", f"{G}building_mode": "insert"},
    "nvfp4 depth": {
        f"{G}new_stack_precision": "nvfp4",
        f"{G}trunk_strategy": "qlora",
        f"{G}training_objective": "mlm",
        f"{G}time_interpretation": "depth",
        "training.joint_steps": 0,
        f"{G}target_stacks": 3,
    },
}
SLOW = [pytest.param(mode, marks=[pytest.mark.slow] if mode == "nvfp4 depth" else []) for mode in MODES]
MODES["kept"] = {"training.optimizer_state": "keep", f"{G}building_mode": "insert"}
Reference = Callable[..., Path]


def judged(root: Path, kind: str, stage: int) -> dict[str, Any]:
    return json.loads((folder_of(root, kind, stage) / "report.json").read_text())


@pytest.mark.parametrize("mode", [*SLOW, pytest.param("kept", marks=pytest.mark.slow)])
def test_it_is_the_loss_of_a_run_whose_clock_ends_there(mode: str, tmp_path: Path, reference: Reference) -> None:
    """Against runs that end with the stage, which takes five steps more and decays in them."""
    root = reference({**COOLED, **MODES[mode]})
    for stage in (0, 1):
        ends_there = {
            f"{G}target_stacks": stage + 1,
            f"{G}stacks": [{"steps": 8}] * stage + [{"steps": 8 + 5}],
            "training.decay_steps": 5,
            "training.joint_steps": 0,
        }
        grown(tiny(tmp_path, {**CLOCK, **MODES[mode], **ends_there}), tmp_path / f"{stage}")
        cooled, reached = judged(root, "cooldown", stage), judged(tmp_path / f"{stage}", "validation", stage)
        names = {"validation_loss", "validation_loss_exact", "validation_sequences", "loss_positions", "by_mask_ratio"}
        assert {name: cooled.get(name) for name in names} == {name: reached.get(name) for name in names}
        assert cooled["validation_loss"] != judged(root, "validation", stage)["validation_loss"]
    assert [path.name[:10] for path in sorted((root / "cooldowns").iterdir())] == ["cooldown-0", "cooldown-1"]


def test_a_cache_below_it_changes_no_loss(reference: Reference) -> None:
    cached, live = reference(COOLED), reference({**COOLED, f"{G}cache_activations": False})
    assert any(name.startswith("activations") for name in digests(cached))
    assert not any(name.startswith("activations") for name in digests(live))
    for stage in (0, 1):
        with_cache, without = (judged(root, "cooldown", stage) for root in (cached, live))
        assert {**with_cache, "flops": 0} == {**without, "flops": 0}


@pytest.mark.parametrize("mode", SLOW)
def test_nothing_else_changes_and_it_is_made_once(mode: str, tmp_path: Path, reference: Reference) -> None:
    """Of a finished run too, where the stage is trained again for it."""
    with_it = reference({**COOLED, **MODES[mode]})
    config, root = tiny(tmp_path, {**CLOCK, **MODES[mode]}), tmp_path / "a"
    grown(config, root)
    others = digests(root)
    assert others == {name: digest for name, digest in digests(with_it).items() if not name.startswith("cooldown")}
    later = tiny(tmp_path, {**COOLED, **MODES[mode]})
    recorder = grown(later, root)
    assert recorder.made == ["cool 0", "cool 1"]
    assert [text for text in recorder.messages if "trains again" in text] == [
        f"stage {n} trains again before its cool-down: its last checkpoint is not there" for n in (0, 1)
    ]
    assert digests(root) == digests(with_it)
    assert grown(later, root).made == []


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [8, 11])
def test_a_killed_cool_down_goes_on(
    at: int, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the stage's last step, and in the midst, after the checkpoint at step 10."""
    from stackwise_core.training import training

    steps, failpoint = list[int](), training.failpoint

    def die(task: str, step: int) -> None:
        steps.append(step)
        if step == at and steps.count(step) == 1:
            raise _Killed
        failpoint(task, step)

    monkeypatch.setattr(training, "failpoint", die)
    root, changes = tmp_path / "a", {**COOLED, "training.checkpoint_every": 5}
    with pytest.raises(_Killed):
        grown(tiny(tmp_path, changes), root)
    first = steps[:]
    recorder = grown(tiny(tmp_path, changes), root)
    assert first == list(range(1, at + 1))
    resumed = [text for text in recorder.messages if "goes on" in text]
    assert resumed == [f"stage 0 goes on from its checkpoint at step {5 if at == 8 else 10}"]
    assert not any("trains again" in text for text in recorder.messages)
    assert digests(root) == digests(reference(COOLED))


def test_forced_training_hands_its_state_on(tmp_path: Path, reference: Reference) -> None:
    import shutil

    root = tmp_path / "a"
    shutil.copytree(reference(COOLED), root)
    recorder = grown(tiny(tmp_path, COOLED), root, from_stack=1)
    assert recorder.made == [
        "build 1",
        "trunk 1",
        "train 1",
        "cool 1",
        "validate 1",
        "trunk 2",
        "train 2",
        "validate 2",
    ]
    assert not any("trains again" in text for text in recorder.messages)
    assert digests(root) == digests(reference(COOLED))


def test_it_is_charged_and_shown(tmp_path: Path, reference: Reference) -> None:
    root = reference(COOLED)
    config = tiny(root.parent, COOLED)
    facts = manifests(root)[folder_of(root, "cooldown", 1).name]["facts"]
    # Stack 1 and head forward and backward, stack 0 forward, on 5 batches of 4.
    stack = 16 * 2.0 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 * 16 * 0.5)
    head = 2.0 * 16 * 16 * 264
    assert facts["flops"] == cooldown_flops(plan_of(config).stages[1], 16) == 5 * 4 * (3 * stack + 3 * head + stack)
    assert facts["seconds"] > 0
    first, second, last = grow(config, str(root))
    assert second.cooled_loss == facts["validation_loss"]
    assert f", cooled {facts['validation_loss']:.4f}" in second.cells[4]
    assert second.line.startswith(f"validation loss {second.validation_loss:.4f}, cooled {second.cooled_loss:.4f}")
    assert (first.cooled_loss is None, last.cooled_loss is None) == (False, True)
    assert "cooled_loss" not in last.model_dump(mode="json")


# ---------------------------------------------------------------- ids and rules


def planned(**changes: Any) -> dict[str, str]:
    return ids(plan_run(configuration({**CLOCK, **changes}), CORPUS, 10**6))


def test_only_the_cool_down_depends_on_its_steps() -> None:
    without, five = planned(), planned(**{"validation.cooldown_steps": 5})
    assert {key for key in five if five[key] != without.get(key)} == {"cooldown-0", "cooldown-1"}
    six = planned(**{"validation.cooldown_steps": 6})
    assert {key for key in five if five[key] != six[key]} == {"cooldown-0", "cooldown-1"}
    decayed = planned(**{"validation.cooldown_steps": 5, "training.joint_steps": 0})
    assert set(subset(decayed, "cooldown")) == {"cooldown-0"}  # the last stage decays by itself


def test_where_it_has_no_meaning_that_is_said() -> None:
    by_stage = configuration({"validation.cooldown_steps": 5})
    assert notes(by_stage) == ["not used: validation.cooldown_steps (schedule: per_stage)"]
    assert not any(stage.cooldown for stage in plan_run(by_stage, CORPUS).stages)
    ends = {f"{G}enabled": False, "training.joint_steps": 0, "training.warmup_steps": 1}
    whole = configuration({**COOLED, **ends})
    assert notes(whole) == ["not used: validation.cooldown_steps (enabled: false)"]
    library = configuration(COOLED)
    with pytest.raises(ConfigError, match=r"cooldown_steps: got 5; give `validation`, the batches on which"):
        ProgressiveTrainer(library).train_progressively(ProgressiveRackBuilder(library), [])
