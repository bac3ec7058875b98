"""Every way to grow, through the flow's steps: cached equals live, memory equals disk, killed equals undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digests, grown, manifests, tiny

from stackwise_core.adapters import adapter_state
from stackwise_core.config import StackWiseConfig
from stackwise_core.data import corpus_facts
from stackwise_core.dataloader import PackedBatches
from stackwise_core.plan import RunPlan, plan_run
from stackwise_core.rack_builder import ProgressiveRackBuilder
from stackwise_core.resolve import resolve_order
from stackwise_core.trainer import ProgressiveTrainer
from storage.checkpoints import load_embedding, load_head, load_stack, tensor_digest
from storage.layout import Artifacts
from storage.sequences import load_sequences

pytestmark = pytest.mark.usefixtures("quick_disk")

G = "training.progressive."
LORA = {f"{G}qlora_rank": 4}
DUAL = {f"{G}progressive_qlora": True, f"{G}progressive_qlora_rank": 2}
DEPTH = {f"{G}training_objective": "mlm", f"{G}time_interpretation": "depth"}
INPUT = {f"{G}training_objective": "mlm", f"{G}time_interpretation": "input", f"{G}num_time_steps": 10}

MODES: dict[str, dict[str, Any]] = {
    "append": {},
    "prepend": {f"{G}building_mode": "prepend"},
    "full": {f"{G}trunk_strategy": "full"},
    "full prepend half": {
        f"{G}trunk_strategy": "full",
        f"{G}building_mode": "prepend",
        f"{G}new_stack_precision": "half",
    },
    "qlora trunk": {f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True, **LORA},
    "qlora top": {
        f"{G}trunk_strategy": "qlora",
        f"{G}trunk_trainable_top": 1,
        f"{G}qlora_enabled": True,
        f"{G}target_stacks": 4,
        **LORA,
    },
    "nf4": {f"{G}new_stack_precision": "qlora", **LORA},
    "nf4 dual": {f"{G}new_stack_precision": "qlora", f"{G}trunk_strategy": "qlora", **LORA, **DUAL},
    "nvfp4 top": {
        f"{G}new_stack_precision": "nvfp4",
        f"{G}trunk_strategy": "qlora",
        f"{G}trunk_trainable_top": 1,
        **DUAL,
    },
    "bfloat16": {f"{G}new_stack_precision": "bfloat16"},
    "joint": {"training.joint_steps": 6},
    "joint nf4": {"training.joint_steps": 6, f"{G}new_stack_precision": "qlora", **LORA, **DUAL},
    "whole": {f"{G}enabled": False},
    "whole nvfp4": {f"{G}enabled": False, f"{G}new_stack_precision": "nvfp4"},
    "mixed": {
        f"{G}stacks": [{}, {"mode": "prepend", "n_blocks": 2}, {"precision": "bfloat16", "steps": 8}, {}],
        f"{G}target_stacks": 4,
    },
    "depth": DEPTH,
    "depth prepend joint": {**DEPTH, f"{G}building_mode": "prepend", "training.joint_steps": 6},
    "depth joint": {**DEPTH, "training.joint_steps": 6},
    "input": INPUT,
    "input per sequence": {**INPUT, "training.time_sampling": "per_sequence", f"{G}time_encoding_type": "learned"},
    "elbo": {
        **INPUT,
        "training.time_sampling": "stratified",
        "training.loss_weighting": "elbo",
        "training.corruption": "mask",
        f"{G}time_embedding_dim": 16,
    },
}
CACHED = [
    "append",
    "qlora top",
    "nf4",
    "nvfp4 top",
    "bfloat16",
    "mixed",
    "depth",
    "input",
    "input per sequence",
    "elbo",
]

Reference = Callable[..., Path]


def plan_of(config: StackWiseConfig) -> RunPlan:
    return plan_run(config, *corpus_facts(config.data.source))


def final_parts(config: StackWiseConfig, root: Path) -> dict[str, str]:
    """Return the digest of every part of the rack as the run left it on disk."""
    artifacts, stages = Artifacts(root), plan_of(config).stages
    parts = {f"stack {c}": load_stack(artifacts, stages, c) for c in stages[-1].spec.anatomy.order}
    whole = {**parts, "head": load_head(artifacts, stages), "embedding": load_embedding(artifacts, stages)}
    return {name: tensor_digest(part) for name, part in whole.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_rack_grown_in_memory_has_the_same_bits(mode: str, tmp_path: Path, reference: Reference) -> None:
    """The trainer of the library, live trunk and all, against the artifacts of the flow."""
    root = reference(MODES[mode])
    config = tiny(root.parent, MODES[mode])
    train, _ = load_sequences(Artifacts(root), plan_of(config).data_ref)
    order = resolve_order(config, len(train))
    steps = order.steps_per_epoch * 16

    class Loader:
        """The batches of every stage, from its first step on: each pass of a stage begins with step 0."""

        def __iter__(self) -> Any:
            yield from PackedBatches(train, order, 0, steps)

    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, Loader())
    rack = builder.build_rack()
    parts = {f"stack {stack.creation_index}": stack for stack in builder.stacks}
    in_memory = {name: tensor_digest(part) for name, part in parts.items()}
    in_memory |= {"head": tensor_digest(rack.head), "embedding": tensor_digest(rack.embedding)}
    assert in_memory == final_parts(config, root)
    assert [stack.creation_index for stack in builder.stacks] == list(plan_of(config).stages[-1].spec.anatomy.order)


@pytest.mark.parametrize("mode", CACHED)
def test_a_cache_changes_time_and_not_results(mode: str, tmp_path: Path, reference: Reference) -> None:
    cached, live = reference(MODES[mode]), reference({**MODES[mode], f"{G}cache_activations": False})
    assert any(name.startswith("activations") for name in digests(cached))
    assert not any(name.startswith("activations") for name in digests(live))
    with_cache, without = tiny(cached.parent, MODES[mode]), tiny(live.parent, MODES[mode])
    assert final_parts(with_cache, cached) == final_parts(without, live)


@pytest.mark.parametrize("mode", MODES)
def test_every_cache_equals_the_live_trunk(mode: str, reference: Reference) -> None:
    """Validation of each stage has derived every row of its store again, from tokens through the whole trunk."""
    found = manifests(reference(MODES[mode]))
    stored = [name for name in found if name.startswith("activations")]
    checked = [entry["facts"] for name, entry in found.items() if name.startswith("validation")]
    assert sum(facts.get("cache") == "equals live" for facts in checked) == len(stored)
    assert bool(stored) == (mode in [*CACHED, "joint", "joint nf4", "depth joint"])


class _Killed(Exception):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_stage_goes_on_to_the_same_bytes(
    mode: str, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage dies once at step 5, after its checkpoint at step 4."""
    from stackwise_core import training

    undisturbed = digests(reference(MODES[mode]))
    fresh = False
    reach = training.reach

    def die(task: str, step: int) -> None:
        nonlocal fresh
        reach(task, step)
        if step == 1:
            fresh = True
        if step == 5 and fresh:
            fresh = False
            raise _Killed

    monkeypatch.setattr(training, "reach", die)
    config, root = tiny(tmp_path, MODES[mode]), tmp_path / "a"
    for _ in plan_of(config).stages:
        with pytest.raises(_Killed):
            grown(config, root)
    recorder = grown(config, root)
    assert any("goes on from its checkpoint at step 4" in text for text in recorder.messages)
    assert digests(root) == undisturbed


@pytest.mark.parametrize("mode", ["prepend", "full", "nf4 dual", "mixed", "joint", "depth joint"])
def test_one_stack_more_leaves_what_is_there(mode: str, tmp_path: Path, reference: Reference) -> None:
    """Raising target_stacks grows from the rack before the anneal, and anneals again."""
    changes = MODES[mode]
    target = changes.get(f"{G}target_stacks", 3)
    lower, root = {**changes, f"{G}target_stacks": target - 1}, tmp_path / "a"
    grown(tiny(tmp_path, lower), root)
    before = digests(root)
    recorder = grown(tiny(tmp_path, changes), root)
    assert "train 0" not in recorder.made
    after = digests(root)
    assert {name: after[name] for name in before} == before
    undisturbed = digests(reference(changes))
    assert {name: after[name] for name in undisturbed} == undisturbed


def test_the_same_seed_and_another_give_the_same_and_other_adapters(reference: Reference) -> None:
    root = reference(MODES["nf4"])
    config = tiny(root.parent, MODES["nf4"])
    stages = plan_of(config).stages
    first, second = load_stack(Artifacts(root), stages, 1), load_stack(Artifacts(root), stages, 2)
    a = adapter_state(first, "stack")
    b = adapter_state(second, "stack")
    assert a.keys() == b.keys()
    assert not any(torch.equal(a[key], b[key]) for key in a)


def test_one_id_is_one_result_whatever_the_mode(reference: Reference) -> None:
    """Modes share artifacts by id: what two of them name alike they made alike, to the byte."""
    made: dict[str, tuple[str, str]] = {}
    shared: set[str] = set()
    for mode, changes in MODES.items():
        for name, digest in digests(reference(changes)).items():
            first, found = made.setdefault(name, (mode, digest))
            assert digest == found, f"{name} of {mode} and of {first}"
            if first != mode:
                shared.add(name.split("-")[0])
    assert shared == {"data", "build", "trunk", "stack", "activations", "validation"}
