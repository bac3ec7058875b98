"""`validation.every`: the loss inside a stage is that of a stage that ends there, and measuring it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.run.events import StepTaken
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config.unused import notes
from stackwise_core.errors import NonFiniteLossError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.stages.charges import charge
from stackwise_core.stages.plan import plan_config
from stackwise_core.training.evaluate import judge_rack
from support.commands import Run
from support.configurations import configuration
from support.metrics import metrics_of, unclocked
from support.modes import G
from support.runs import digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

EVEN: dict[str, Any] = {"training.warmup_steps": 0, "training.min_learning_rate": 2e-3, f"{G}target_stacks": 2}
"""A rate that does not depend on the length of a stage."""
MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "masked int8 insert": {
        f"{G}training_objective": "mlm",
        "cache.dtype": "int8",
        f"{G}building_mode": "insert",
        f"{G}target_stacks": 3,
    },
    "adapters": {f"{G}new_stack_precision": "qlora", f"{G}trunk_strategy": "qlora"},
    "joint": {f"{G}enabled": False},
}


def measured(root: Path, stage: int) -> dict[int, float]:
    """Return the validation losses in the metrics of a stage, by the number of steps before them."""
    records = metrics_of(root, stage)
    return {record["step"] + 1: record["validation_loss"] for record in records if "validation_loss" in record}


@pytest.mark.parametrize(
    "mode", [pytest.param(name, marks=[pytest.mark.slow] * (name == "adapters")) for name in MODES]
)
def test_the_loss_is_that_of_a_stage_that_ends_there(mode: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, {**EVEN, **MODES[mode], "training.steps_per_stack": 8})
    last = 0 if mode == "joint" else config.training.progressive.target_stacks - 1
    grown(config, tmp_path / "without")
    config.validation.every = 3
    heard = grown(config, tmp_path / "with").events
    assert digests(tmp_path / "with") == digests(tmp_path / "without")  # the same artifacts, to the bit
    found = measured(tmp_path / "with", last)
    assert list(found) == [3, 6]
    steps = [event for event in heard if isinstance(event, StepTaken) and event.stage == last]
    assert {event.step: event.validation_loss for event in steps if event.validation_loss is not None} == found
    short = (
        {f"{G}stacks": [*[{"steps": 8}] * last, {"steps": 6}]} if mode != "joint" else {"training.steps_per_stack": 6}
    )
    grown(tiny(tmp_path, {**EVEN, "training.steps_per_stack": 8, **MODES[mode], **short}), tmp_path / "short")
    (ended,) = (
        manifest["facts"]["validation_loss"]
        for name, manifest in manifests(tmp_path / "short").items()
        if name.startswith(f"validation-{last}-")
    )
    assert found[6] == (ended if mode != "adapters" else pytest.approx(ended, rel=1e-3))  # stored in 4 bits at the end


def test_a_stage_that_is_resumed_has_measured_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, {**EVEN, "validation.every": 2, "training.checkpoint_every": 3})
    grown(config, tmp_path / "whole")
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return judge_rack(*arguments, **options)

    monkeypatch.setattr("flows.run.validating.judge_rack", failing)
    with pytest.raises(KeyboardInterrupt):
        grown(config, tmp_path / "killed")
    assert not list((tmp_path / "killed" / "stacks").glob("stack-0-*/manifest.json"))
    heard = grown(config, tmp_path / "killed").events
    steps = [event.step for event in heard if isinstance(event, StepTaken) and event.stage == 0]
    assert steps[0] == 4  # from the checkpoint after step 3
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    for stage in range(2):
        assert measured(tmp_path / "killed", stage) == measured(tmp_path / "whole", stage)


def scripted(*losses: float) -> Any:
    """Losses in the order in which weights are judged first, on any machine; equal weights have an equal loss again."""
    ahead, known = iter(losses), dict[str, float]()

    def of_weights(stage: Any, n_rows: int, grid: Any, model: Any) -> dict[str, float]:
        digest = tensor_digest(model.head)
        known[digest] = known[digest] if digest in known else next(ahead)
        return {"validation_loss": known[digest]}

    return of_weights


ENDING: dict[str, Any] = {
    **EVEN,
    "training.steps_per_stack": 8,
    "training.optimizer_state": "keep",
    f"{G}trunk_strategy": "full",
    "validation.every": 1,
    "validation.patience": 2,
    "validation.keep": "best",
}


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stage_ends_early_and_keeps_its_best_weights(n: int, tmp_path: Path, monkeypatch: Any, run: Run) -> None:
    losses_of = scripted(0.5, 0.4, 0.6, 0.7, *(0.5, 0.3, 0.2, 0.4, 0.1, 0.3, 0.6))
    monkeypatch.setattr("flows.run.training.losses_of", losses_of)
    config, root = tiny(tmp_path, {**ENDING, "training.checkpoint_every": 1, f"{G}target_stacks": n}), tmp_path / "a"
    heard = grown(config, root)
    facts = [manifests(root)[folder_of(root, "stack", stage).name]["facts"] for stage in range(n)]
    losses = [list(measured(root, stage).values()) for stage in range(n)]
    taken = [len(losses[stage]) for stage in range(n)]
    kept = [losses[stage].index(min(losses[stage])) + 1 for stage in range(n)]
    assert list(zip(taken, kept, strict=True)) == [(4, 2), (7, 5)][:n]
    for stage in range(n):
        assert (facts[stage]["steps"], facts[stage]["kept_step"]) == (taken[stage], kept[stage])
        assert facts[stage]["train_loss"] == metrics_of(root, stage)[kept[stage] - 1]["loss"]
    said = f"stage 0 ended early, after step {taken[0]} of 8: its validation loss has not fallen below"
    assert any(message.startswith(said) for message in heard.messages)
    # The weights, and the state of the optimizer, are those of stages of as many steps as were kept.
    short = {key: value for key, value in ENDING.items() if not key.startswith("validation.")}
    steps = {f"{G}stacks": [{"steps": each} for each in kept], f"{G}target_stacks": n}
    grown(tiny(tmp_path, {**short, **steps}), tmp_path / "short")
    for stage in range(n):
        files = ["stack.safetensors", "head.safetensors", "embedding.safetensors"]
        for file in files:
            found, wanted = (folder_of(where, "stack", stage) / file for where in (root, tmp_path / "short"))
            assert found.read_bytes() == wanted.read_bytes(), (stage, file)
    # A kill in the middle changes nothing of it.
    monkeypatch.setattr("flows.run.training.losses_of", failing_after(2, losses_of))
    with pytest.raises(KeyboardInterrupt):
        grown(config, tmp_path / "killed")
    monkeypatch.setattr("flows.run.training.losses_of", losses_of)
    grown(config, tmp_path / "killed")
    assert digests(tmp_path / "killed") == digests(root)
    for stage in range(n):
        assert unclocked(metrics_of(tmp_path / "killed", stage)) == unclocked(metrics_of(root, stage))
    # What was executed is charged, and said.
    run("report", "tiny", "--artifacts", root, "--html", tmp_path / "page.html", "--samples", 0)
    first = json.loads((tmp_path / "page.json").read_text())["stages"][0]
    config.validation.every = 0
    planned = charge(config, plan_config(config), 1000)[0]
    assert first["tflop"] == pytest.approx(planned.total * taken[0] / 8 / 1e12)
    assert (first["steps"], first["steps_planned"]) == (taken[0], 8)
    assert f"{taken[0]} of 8" in (tmp_path / "page.html").read_text()


def test_best_weights_without_their_moments_are_not_gone_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    """Or those of the last step would be kept with them."""
    losses_of, config = scripted(0.5, 0.4, 0.6, 0.7), tiny(tmp_path, {**ENDING, "training.checkpoint_every": 1})
    config.training.progressive.target_stacks = 1
    monkeypatch.setattr("flows.run.training.losses_of", losses_of)
    grown(config, tmp_path / "a")
    monkeypatch.setattr("flows.run.training.losses_of", failing_after(3, losses_of))
    config.training.optimizer_state = "reset"
    with pytest.raises(KeyboardInterrupt):
        grown(config, tmp_path / "b")
    monkeypatch.setattr("flows.run.training.losses_of", losses_of)
    config.training.optimizer_state = "keep"
    heard = grown(config, tmp_path / "b")
    assert any("stage 0 starts anew: its checkpoint has the best weights" in message for message in heard.messages)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")


def failing_after(n: int, losses_of: Any) -> Any:
    calls = iter(range(n))

    def losses(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return losses_of(*arguments)

    return losses


def test_a_validation_loss_that_is_no_number_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a checkpoint nor a manifest can hold it."""

    def nan(*arguments: Any, **options: Any) -> Any:
        return [{**found, "validation_loss": float("nan")} for found in judge_rack(*arguments, **options)]

    monkeypatch.setattr("flows.run.validating.judge_rack", nan)
    for every in (0, 1):
        config = tiny(tmp_path, {**EVEN, "validation.every": every, "training.checkpoint_every": 1})
        with pytest.raises(NonFiniteLossError, match="stage 0: validation loss nan; lower"):
            grown(config, tmp_path / str(every))


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    changes = {"validation.every": 1, "validation.patience": 2, "validation.keep": "best", f"{G}target_stacks": 1}
    config = tiny(tmp_path, {**EVEN, **changes, "training.learning_rate": 0.5, "training.min_learning_rate": 0.5})
    config.training.optimizer_state = "keep"
    grown(config, tmp_path / "one")
    config.hardware.processes = 2
    grown(config, tmp_path / "two")
    roots = (tmp_path / "one", tmp_path / "two")
    facts = [manifests(root)[folder_of(root, "stack", 0).name]["facts"] for root in roots]
    one, two = ([each[key] for key in ("steps", "steps_planned", "kept_step")] for each in facts)
    assert one == two
    (judged,) = (m["facts"] for name, m in manifests(tmp_path / "two").items() if name.startswith("validation-0-"))
    assert judged["validation_loss"] == pytest.approx(min(measured(tmp_path / "two", 0).values()), rel=1e-5)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**EVEN, "validation.every": 4, f"{G}target_stacks": 1})
    grown(config, tmp_path / "one")
    config.hardware.processes = 2
    heard = grown(config, tmp_path / "two").events
    assert measured(tmp_path / "two", 0) == pytest.approx(measured(tmp_path / "one", 0), rel=1e-5)
    told = [event.step for event in heard if isinstance(event, StepTaken) and event.validation_loss is not None]
    assert told == [4, 8]


def test_curves_of_a_report_have_it(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "a"
    grown(tiny(tmp_path, {**EVEN, "validation.every": 4, f"{G}target_stacks": 1}), root)
    page = tmp_path / "page.html"
    run("report", "tiny", "--artifacts", root, "--html", page, "--samples", 0)
    inside = json.loads(page.with_suffix(".json").read_text())["stages"][0]["curve"]["validation"]
    assert inside == {"steps": list(measured(root, 0)), "loss": list(measured(root, 0).values())}
    assert page.read_text().count("dot judged") == 2 * 3  # by steps and by FLOPs: two inside, one at the end


def test_in_the_library_too() -> None:
    config = configuration({"training.steps_per_stack": 4, "validation.every": 2, f"{G}target_stacks": 1, **TINY})
    rows = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    records: list[dict[str, float]] = []
    results = []
    for every in (2, 0):
        config.validation.every = every
        builder = ProgressiveRackBuilder(config)
        trainer = ProgressiveTrainer(config)
        trainer.hooks.on_step = records.append
        results += trainer.train_progressively(builder, rows, 1, validation=rows[:2])
    assert ["validation_loss" in record for record in records] == [False, True, False, False] + [False] * 4
    assert results[0].validation_loss == results[1].validation_loss


TINY = {"model.d_model": 16, "model.n_heads": 2, "data.seq_len": 16, "training.batch_size": 4}


def test_spread_over_processes_it_is_a_note() -> None:
    said = notes(configuration({"validation.every": 5, "hardware.processes": 2, "training.joint_steps": 3}))
    assert "taken: validation.every 0 instead of 5 in the joint stage (hardware.processes: 2)" in said
    always = {"validation.every": 5, "hardware.processes": 2, "hardware.shard": "always"}
    assert "taken: validation.every 0 instead of 5 (hardware.shard: always)" in notes(configuration(always))
    never = {**always, "training.joint_steps": 3, "hardware.shard": "never"}
    assert not any("validation.every" in line for line in notes(configuration(never)))
