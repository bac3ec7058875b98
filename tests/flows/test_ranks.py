"""Several processes train a stage as one would: the same losses and weights, up to the order floats are added in.

Two ranks are forked once by a server that has imported torch already, and train one stage after another; torchrun
itself, and processes that die, are in test_launch.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.run import stage as stage_module
from flows.run.events import subscribed
from flows.run.inputs import open_stage
from flows.run.stage import Stage
from flows.run.training import hooks_of
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.data.packing import corpus_facts
from stackwise_core.errors import ConfigError, NonFiniteLossError, StageInterruptedError
from stackwise_core.model.pieces import Pieces
from stackwise_core.training.training import train_stage
from storage.checkpoints import load_state
from storage.midstage import STATE_FOLDER
from support.metrics import unclocked
from support.modes import DEPTH, MODES, G
from support.ranks import COUNT, TOLERANCE, Pair, in_bfloat16
from support.runs import Recorder, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.end()


def stage_of(root: Path, changes: dict[str, Any], index: int, processes: int) -> Stage:
    """Return a stage of a run whose stages below lie in `root`."""
    config = tiny(root.parent, {**changes, "hardware.processes": processes, "hardware.threads": processes})
    corpus, n_bytes = corpus_facts(config.data.source)
    stage = Stage(config=config, root=str(root), corpus=corpus, corpus_bytes=n_bytes, index=index)
    return stage.model_copy(update={"cooling": stage.plan.cooldown is not None})


def alone(stage: Stage, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train in this process; return the records and what trains."""
    with open_stage(stage, stage.plan.ref("build") if stage.plan.build else None, folder) as inputs:
        trained = train_stage(inputs, hooks_of(stage, folder))
    weights = {name: p.detach() for name, p in inputs.model.named_parameters() if p.requires_grad}
    return trained.records, weights


OF_WEIGHTS = {"8 bits": 0.01 * 2e-3, "muon": 5e-4, "muon joint": 5e-4, "shared out, muon": 5e-4}
"""A sum in another order may round a moment to another code; Muon's iterations are in bfloat16 (1.5e-4 was seen)."""
MUON = {"training.optimizer": "muon", f"{G}trunk_strategy": "full"}
MLM = {f"{G}training_objective": "mlm", "cache.views": 2}
# Each process has a clock of its own, and all must come to the same checkpoints.
FEW = {**MLM, "training.mask_ratio": 0.02, "training.checkpoint_minutes": 1e-6}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "first": ({}, 0),
    "from a cache": ({"cache.keep": "all"}, 1),
    # Each process has two rows of four, and so two parts: what one process has cut into three.
    "live trunk, in parts": (
        {
            **MLM,
            f"{G}cache_activations": False,
            "training.accumulation_steps": 3,
            "training.residual_warmup_steps": 5,
        },
        1,
    ),
    "few positions": (FEW, 0),
    "few positions, torch 2.11": (FEW, 0),
    "nf4 dual": ({**MODES["nf4 dual"]}, 2),
    "prepend half": ({**MODES["full prepend half"]}, 1),
    "elbo": ({**MODES["elbo"]}, 0),
    "joint": ({"training.joint_steps": 8, **MODES["nf4"]}, 3),
    "whole": ({f"{G}enabled": False, "training.activation_checkpointing": True}, 0),
    "whole, few positions": ({f"{G}enabled": False, **MLM, "training.mask_ratio": 0.02}, 0),
    "whole, few positions, torch 2.11": ({f"{G}enabled": False, **MLM, "training.mask_ratio": 0.02}, 0),
    "kept": ({"training.optimizer_state": "keep", "training.new_state": "copy", "cache.keep": "all"}, 1),
    "8 bits": ({"training.optimizer": "adamw8bit", "training.optimizer_state": "keep", "cache.keep": "all"}, 1),
    "kept joint": (
        {"training.optimizer_state": "keep", f"{G}trunk_strategy": "full", "training.joint_steps": 8},
        3,
    ),
    "muon": ({**MUON, "cache.keep": "all"}, 1),
    # 33 rows: shares of a matrix that are not equal.
    "muon joint": ({**MUON, "training.optimizer_state": "keep", "training.joint_steps": 8, "model.d_ff": 33}, 3),
    "joint in time": (  # shares of two rows and of three, in two parts each
        {**DEPTH, "training.joint_steps": 8, "training.accumulation_steps": 3, "training.batch_size": 5},
        3,
    ),
}


BY_CLOCK = {
    "training.schedule": "one_clock",
    "training.joint_steps": 6,
    "data.rows": "fresh",
    "cache.keep": "all",
    f"{G}building_mode": "insert",
}
CASES |= {
    "insert by one clock": (BY_CLOCK, 2),
    "insert frozen": ({**BY_CLOCK, f"{G}tail_strategy": "frozen", f"{G}tail_stacks": 2}, 2),
    "anneal by one clock": (BY_CLOCK, 3),
    "cool-down": ({**BY_CLOCK, "validation.cooldown_steps": 4}, 2),
}


SHARED = {"hardware.shard": "always"}
CASES |= {
    "shared out": ({**SHARED, **MLM, "training.accumulation_steps": 3}, 0),
    "shared out on a trunk": (
        {**SHARED, **FEW, f"{G}cache_activations": False, "training.residual_warmup_steps": 5},
        1,
    ),
    "shared out, nf4": ({**SHARED, **MODES["nf4 dual"]}, 2),
    "shared out, prepend half": ({**SHARED, **MODES["full prepend half"]}, 1),
    "shared out, muon": (
        {**SHARED, **MUON, "training.optimizer_state": "keep", "model.d_ff": 33, "cache.keep": "all"},
        1,
    ),
    "shared out, insert frozen": (
        {**SHARED, **BY_CLOCK, f"{G}tail_strategy": "frozen", f"{G}tail_stacks": 2, f"{G}train_head": False},
        2,
    ),
    "shared out, cool-down": ({**SHARED, **BY_CLOCK, "validation.cooldown_steps": 4}, 2),
    "joint, not shared out": ({"hardware.shard": "never", "training.joint_steps": 8}, 3),
}

_SLOW = ("from a cache", "nf4 dual", "joint", "prepend half", "elbo", "whole", "whole, few positions", "kept joint")
_SLOW += ("insert frozen", "anneal by one clock", "cool-down", "8 bits", "muon joint", "joint, not shared out")
_SLOW += tuple(case for case in CASES if case.startswith("shared out, "))


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in _SLOW else c for c in CASES])
def test_two_processes_train_as_one(case: str, tmp_path: Path, reference: Any, pair: Pair) -> None:
    changes, index = CASES[case]
    root = reference({key: value for key, value in changes.items() if key != "hardware.shard"})
    expected, weights = alone(stage_of(root, changes, index, 1), tmp_path / "one")
    within = "torch 2.11" if "2.11" in case else ""
    first, second = pair.train(stage_of(root, changes, index, COUNT), tmp_path / "two", within=within)
    assert not isinstance(first, Exception), first
    records, _, steps, _ = first
    records, expected = unclocked(records), unclocked(expected)
    assert unclocked(second[0]) == records  # bit for bit: whatever is decided by them, all decide alike
    assert (steps, second[2]) == ([n + 1 for n in range(len(records))], [])
    tolerance = OF_WEIGHTS.get(case, TOLERANCE)
    for here, there in zip(records, expected, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], abs=TOLERANCE, rel=TOLERANCE), here["step"]
        assert here == pytest.approx(there, abs=tolerance, rel=tolerance), here["step"]
    state = load_state(tmp_path / "two")
    assert state is not None
    assert state.step == len(records)
    if "shared out" in case:
        assert isinstance(state.tensors, Pieces) == ("not" not in case)
    found = {name.removeprefix("model."): t for name, t in state.tensors.items() if name.startswith("model.")}
    assert found.keys() == weights.keys()
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) <= tolerance


@pytest.mark.slow
def test_sharded_products_in_bfloat16_are_those_of_one_process(tmp_path: Path, reference: Any, pair: Pair) -> None:
    """Each process rounds its share of a gradient, one process the whole: 2^-8 of the loss is allowed."""
    changes, index = CASES["whole"]
    root = reference(changes)
    with in_bfloat16():
        expected, weights = alone(stage_of(root, changes, index, 1), tmp_path / "one")
    exact, _ = alone(stage_of(root, changes, index, 1), tmp_path / "exact")
    first, second = pair.train(stage_of(root, changes, index, COUNT), tmp_path / "two", within="bfloat16")
    assert not isinstance(first, Exception), first
    losses, of_one, of_exact = ([record["loss"] for record in each] for each in (first[0], expected, exact))
    assert second[0] == first[0]
    assert losses == pytest.approx(of_one, rel=4e-3)
    assert abs(losses[0] - of_one[0]) <= 1e-6 < abs(losses[0] - of_exact[0])
    state = load_state(tmp_path / "two")
    assert state is not None
    found = {name.removeprefix("model."): t for name, t in state.tensors.items() if name.startswith("model.")}
    kinds = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (found, weights))
    assert next(kinds) == next(kinds)


@pytest.mark.parametrize("changes", [{}, SHARED])
def test_a_request_to_one_process_stops_all(
    changes: dict[str, Any], tmp_path: Path, reference: Any, pair: Pair
) -> None:
    stage = stage_of(reference({}), changes, 0, COUNT)
    errors = pair.train(stage, tmp_path / "two", stop=1)
    assert [type(error) for error in errors] == [StageInterruptedError] * COUNT
    state = load_state(tmp_path / "two")
    assert state is not None
    assert (state.step, state.fingerprint["processes"]) == (1, COUNT)
    assert sorted(path.name for path in (tmp_path / "two" / STATE_FOLDER).iterdir()) == (
        ["rank-0.safetensors", "rank-1.safetensors", "state.json"] if changes else ["state.json", "state.safetensors"]
    )
    # From there, another number of processes goes on, and says that it is another.
    recorder = Recorder()
    with subscribed(recorder):
        records, weights = alone(stage_of(reference({}), {}, 0, 1), tmp_path / "two")
    assert recorder.messages[0] == "stage 0 goes on from its checkpoint at step 1"
    differs = "threads (2, now 1), processes (2, now 1)" + (", sharded (True, now none)" if changes else "")
    assert f"made with another {differs}: bits" in recorder.messages[1]
    expected, undisturbed = alone(stage_of(reference({}), {}, 0, 1), tmp_path / "one")
    (last,), (wanted,) = unclocked(records[-1:]), unclocked(expected[-1:])
    assert last == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE)
    assert max((weights[name] - undisturbed[name]).abs().max().item() for name in weights) <= TOLERANCE


def test_two_processes_go_on_from_their_shards_with_equal_bits_or_all_start_anew(
    tmp_path: Path, reference: Any, pair: Pair
) -> None:
    stage = stage_of(reference({}), SHARED, 0, COUNT)
    undisturbed, _ = pair.train(stage, tmp_path / "one")
    expected = load_state(tmp_path / "one")
    for harmed in (False, True):
        folder = tmp_path / str(harmed)
        pair.train(stage, folder, stop=1)
        damaged = folder / STATE_FOLDER / "rank-1.safetensors"
        if harmed:
            damaged.write_bytes(b"")
        first, second = pair.train(stage, folder)
        assert unclocked(first[0]) == unclocked(second[0]) == unclocked(undisturbed[0])
        assert (first[2][0], second[2]) == (1 if harmed else 2, [])
        found = load_state(folder)
        assert found is not None
        assert expected is not None
        assert all(found.tensors[name].equal(expected.tensors[name]) for name in expected.tensors)
        said = [text for text in first[3] if "starts anew" in text]
        assert said == ([f"stage 0 starts anew: {damaged} is damaged or missing"] if harmed else [])


def test_a_loss_that_explodes_is_told_by_all_with_the_ids_of_the_whole_batch(
    tmp_path: Path, reference: Any, pair: Pair
) -> None:
    changes = {"training.learning_rate": 1e30}
    with pytest.raises(NonFiniteLossError) as alone_it_says:
        alone(stage_of(reference({}), changes, 0, 1), tmp_path / "one")
    errors = pair.train(stage_of(reference({}), changes, 0, COUNT), tmp_path / "two")
    ids = str(alone_it_says.value).split("sequence ids ")[1]
    for error in errors:
        assert isinstance(error, NonFiniteLossError)
        assert str(error).split("sequence ids ")[1] == ids


def test_ranks_with_another_version_of_torch_end_all_with_one_message(
    tmp_path: Path, reference: Any, pair: Pair
) -> None:
    errors = pair.train(stage_of(reference({}), {}, 0, COUNT), tmp_path / "two", within="another torch in rank 1")
    for error in errors:
        assert isinstance(error, ConfigError)
        assert str(error) == (
            "hardware.processes: got torch 2.11.0 in rank 0 and torch 2.11.1 in rank 1; processes that train together "
            "must run the same software on the same kind of machine"
        )
    assert load_state(tmp_path / "two") is None


# ---------------------------------------------------------------- what each process has


@pytest.mark.parametrize("card", ["NVIDIA L4", None])
def test_a_run_that_goes_on_on_another_card_says_so(
    card: str | None, tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, real, recorder = stage_of(reference({}), {}, 0, 1), stage_module.fingerprint, Recorder()

    def made_on(name: str | None) -> None:
        on_it = {"device": "cuda", "gpu": name} if name else {"device": "cpu"}
        monkeypatch.setattr(stage_module, "fingerprint", lambda *_: {**real(1, "cpu", False), **on_it})

    made_on("NVIDIA H200")
    with open_stage(stage, stage.plan.ref("build"), tmp_path) as inputs, pytest.raises(StageInterruptedError):
        train_stage(inputs, replace(hooks_of(stage, tmp_path), should_stop=lambda: True))
    made_on(card)
    with subscribed(recorder), open_stage(stage, stage.plan.ref("build"), tmp_path):
        pass
    told = "gpu (NVIDIA H200, now NVIDIA L4)" if card else "device (cuda, now cpu), gpu (NVIDIA H200, now none)"
    assert recorder.messages == [
        "stage 0 goes on from its checkpoint at step 1",
        f"the checkpoint was made with another {told}: bits may differ from an undisturbed run's",
    ]


def test_the_library_says_that_it_is_one_process(tmp_path: Path) -> None:
    config = tiny(tmp_path, {"hardware.processes": 2})
    builder, batches = ProgressiveRackBuilder(config), [torch.zeros(4, 16, dtype=torch.long)]
    builder.append_stack()
    for target in (1, None):
        with pytest.raises(ConfigError, match=r"hardware.processes: got 2; .* `stackwise train` starts several"):
            ProgressiveTrainer(config).train_rack(builder, batches, target)
