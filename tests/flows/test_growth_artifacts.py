"""What growing leaves on disk: what a stage changes, what it keeps bit for bit, and in which type it is stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.adapters import adapter_parameters, adapter_state, base_state
from stackwise_core.model.blocks import Stack
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.precision import base_linears, storage_of
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.stages import resolve_stages
from stackwise_core.training import hardware
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import train_stack
from storage.artifacts import Artifacts
from storage.checkpoints import load_embedding, load_head, load_stack
from storage.errors import ArtifactCorruptError
from storage.sequences import load_sequences
from support.growth import Reference, batch_of, built, dense_loss, finish, model_of, residual_stream
from support.modes import LORA, MODES, G, plan_of
from support.runs import digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


def part(root: Path, config: StackWiseConfig, stage: int, stack: int) -> Stack:
    return load_stack(Artifacts(root), plan_of(config).stages[: stage + 1], stack)


def test_a_prepended_stack_trains_below_a_trunk_and_head_that_stay(reference: Reference) -> None:
    root = reference(MODES["prepend"])
    config = tiny(root.parent, MODES["prepend"])
    stages, artifacts = plan_of(config).stages, Artifacts(root)
    assert [stage.spec.anatomy.order for stage in stages] == [(0,), (1, 0), (2, 1, 0)]
    for later in (1, 2):
        assert {path.name for path in folder_of(root, "stack", later).iterdir()} == {
            "stack.safetensors",
            "metrics.jsonl",
            "manifest.json",
        }
        facts = manifests(root)[stages[later].ref("stack").name]["facts"]
        older = {f"stack {c}" for c in range(later)}
        assert set(facts["frozen_unchanged"]) == {*older, "head", "embedding"}
    first, last = load_head(artifacts, stages[:1]), load_head(artifacts, stages)
    assert tensor_digest(first) == tensor_digest(last)
    assert tensor_digest(load_embedding(artifacts, stages[:1])) == tensor_digest(load_embedding(artifacts, stages))
    losses = [manifests(root)[stage.ref("validation").name]["facts"]["validation_loss"] for stage in stages]
    assert losses[2] < losses[1] < losses[0]


def test_an_appended_stack_may_leave_the_head_as_it_is(reference: Reference) -> None:
    frozen = {f"{G}train_head": False}
    root = reference(frozen)
    stages, artifacts = plan_of(tiny(root.parent, frozen)).stages, Artifacts(root)
    trained = plan_of(tiny(root.parent, {})).stages
    assert stages[0].stack.sha256 == trained[0].stack.sha256  # shared: the first stage trains it in any case
    assert stages[1].stack.sha256 != trained[1].stack.sha256
    assert not (folder_of(root, "stack", 2) / "head.safetensors").exists()
    assert tensor_digest(load_head(artifacts, stages[:1])) == tensor_digest(load_head(artifacts, stages))
    facts = manifests(root)[stages[2].ref("stack").name]["facts"]
    assert set(facts["frozen_unchanged"]) == {"head"}  # the trunk is read from its cache
    losses = [manifests(root)[stage.ref("validation").name]["facts"]["validation_loss"] for stage in stages]
    assert losses[2] < losses[1] < losses[0]


def test_a_prepended_copy_zero_starts_at_the_loss_before_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["prepend"])
    builder = built(config, 1)
    batch = batch_of(config, 1)
    with torch.no_grad():
        before = dense_loss(builder.build_rack(), batch)
        builder.add_stack()
        assert dense_loss(builder.build_rack(), batch) == before
    assert [stack.creation_index for stack in builder.stacks] == [1, 0]


def test_a_tail_trains_on_with_each_inserted_stack_and_every_depth_keeps_its_own(reference: Reference) -> None:
    root = reference(MODES["insert"])
    config = tiny(root.parent, MODES["insert"])
    stages, artifacts = plan_of(config).stages, Artifacts(root)
    assert [stage.spec.anatomy.order for stage in stages] == [(0,), (1, 0), (1, 2, 0)]
    tails = [part(root, config, stage, 0) for stage in range(3)]
    heads = [load_head(artifacts, stages[:depth]) for depth in (1, 2, 3)]
    assert len({tensor_digest(tail) for tail in tails}) == len({tensor_digest(head) for head in heads}) == 3
    assert tensor_digest(part(root, config, 1, 1)) == tensor_digest(part(root, config, 2, 1))
    assert tensor_digest(load_embedding(artifacts, stages[:1])) == tensor_digest(load_embedding(artifacts, stages))
    assert {path.name for path in folder_of(root, "stack", 2).iterdir()} >= {"stack.safetensors", "stack-0"}
    store = stages[1].activations
    assert store is not None
    assert store.stacks == (stages[1].stack.sha256,)  # below the tail, whose new version it does not depend on


def test_a_tail_starts_as_it_was(tmp_path: Path) -> None:
    """A step of no size leaves the rack the one that it was, with an identity below its old tail."""
    changes = {**MODES["insert"], "training.new_stack_init": "copy_zero", f"{G}target_stacks": 2}
    config = tiny(tmp_path, changes)
    builder = built(config, 1)
    batch = batch_of(config, 1)
    with torch.no_grad():
        before = dense_loss(builder.build_rack(), batch)
        builder.add_stack()
        assert dense_loss(builder.build_rack(), batch) == before
    model = model_of(builder, config, 1)
    total, count = model.summed_loss(batch)
    assert float(total.detach() / count) == pytest.approx(float(before), rel=1e-6)


def test_a_stack_is_a_copy_of_its_neighbour_dequantised_and_merged(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**MODES["nf4 dual"], "training.new_stack_init": "copy"})
    builder = built(config, 2)
    finish(builder, config, 1)  # quantised, adapters trained
    source = builder.stack(1)
    new = builder.add_stack()
    x = residual_stream()
    with torch.no_grad():
        difference = (new(x) - source(x)).abs().max() / source(x).abs().max()
    assert 0.0 < difference < 0.1  # the copy is NF4 itself: near, and not equal


def test_a_copy_has_merged_what_the_adapters_of_its_source_learned(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, "training.new_stack_init": "copy"})
    builder = built(config, 1)
    source, x = builder.stack(0), residual_stream()
    with torch.no_grad():
        for parameter in adapter_parameters(source):
            parameter.mul_(10.0)
        expected = source(x)
        assert (builder.add_stack()(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ranks_wider_than_layers_are_stored_and_come_back(tmp_path: Path) -> None:
    """Keys and values have 8 channels, the others 16 or more; the rank asked for is 40."""
    ranks = {f"{G}qlora_rank": 40, f"{G}progressive_qlora_rank": 12, f"{G}new_stack_precision": "qlora"}
    more = {f"{G}trunk_strategy": "qlora", f"{G}progressive_qlora": True, f"{G}target_stacks": 2}
    config = tiny(tmp_path, {**ranks, **more, "model.n_kv_heads": 1, "training.steps_per_stack": 2})
    grown(config, root := tmp_path / "root")
    stack = part(root, config, 1, 0)
    for name, rank in (("stack", 40), ("progressive", 12)):
        state = adapter_state(stack, name)
        saved = load_file(folder_of(root, "stack", 1) / "stack-0" / f"adapter-{name}.safetensors")
        assert all(saved[key].equal(tensor) for key, tensor in state.items())
        found = {key.split(".")[3]: len(tensor) for key, tensor in state.items() if "lora_A" in key}
        assert found == {"q_proj": min(rank, 16), "o_proj": min(rank, 16), "k_proj": 8, "v_proj": 8} | {
            f"{layer}_proj": min(rank, 16) for layer in ("gate", "up", "down")
        }
        assert all(tensor.any() for tensor in state.values())


def test_a_new_stack_is_a_copy_of_the_one_it_is_put_next_to(tmp_path: Path) -> None:
    modes = ["append", "prepend", "prepend", "append", "append", "insert"]
    changes = {f"{G}stacks": [{"mode": mode} for mode in modes], f"{G}target_stacks": 6}
    assert [stage.source for stage in resolve_stages(tiny(tmp_path, changes))] == [None, 0, 1, 0, 3, 3]
    inserted = tiny(tmp_path, {f"{G}building_mode": "insert"})
    assert [stage.source for stage in resolve_stages(inserted)] == [None, 0, 1]  # the second has none below it


def test_a_quantised_stack_stays_so_while_its_adapters_train(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["joint nf4"])
    builder = built(config, 3)
    for stage in range(3):
        finish(builder, config, stage)
    model_of(builder, config, 3)
    assert {storage_of(linear) for stack in builder.stacks for linear in base_linears(stack).values()} == {"nf4"}


def test_only_the_top_of_a_qlora_trunk_changes(reference: Reference) -> None:
    root = reference(MODES["qlora top"])
    config = tiny(root.parent, MODES["qlora top"])
    for stage in (1, 2, 3):
        for stack in range(stage):
            before, after = (part(root, config, at, stack) for at in (stage - 1, stage))
            assert all(base_state(before)[key].equal(value) for key, value in base_state(after).items())
            a, b = adapter_state(before, "stack"), adapter_state(after, "stack")
            changed = [key for key in a if not a[key].equal(b[key])]
            assert (len(changed) == len(a)) == (stack == stage - 1), (stage, stack)


def test_any_depth_is_the_rack_as_its_stage_left_it(reference: Reference) -> None:
    """Stage 1 judged the adapters it had then: they train on, and its rack still gives the loss it recorded."""
    root = reference(MODES["qlora trunk"])
    config = tiny(root.parent, MODES["qlora trunk"])
    stages, artifacts = plan_of(config).stages, Artifacts(root)
    _, validation = load_sequences(artifacts, plan_of(config).data_ref)
    batch = validation_batch(validation.fields(np.arange(min(8, len(validation)))), None)
    for depth in (1, 2, 3):
        below = stages[:depth]
        stacks = [load_stack(artifacts, below, stack) for stack in range(depth)]
        parts = load_embedding(artifacts, below), stacks, load_head(artifacts, below)
        (judged,) = judge_rack(*parts, [batch], stream=Stream("bfloat16"), boundary=0)
        recorded = manifests(root)[stages[depth - 1].ref("validation").name]["facts"]["validation_loss_exact"]
        assert judged["validation_loss_exact"] == pytest.approx(recorded, rel=1e-5)


def test_a_stage_is_judged_on_the_stream_that_it_trained_on(reference: Reference) -> None:
    """Rounded below the boundary and nowhere else: where there is none, the two losses are one."""
    for mode, rounded in (("append", [False, True, True]), ("prepend", [False] * 3), ("full", [False] * 3)):
        root = reference(MODES[mode])
        stages = plan_of(tiny(root.parent, MODES[mode])).stages
        facts = [manifests(root)[stage.ref("validation").name]["facts"] for stage in stages]
        differ = [found["validation_loss"] != found["validation_loss_exact"] for found in facts]
        assert differ == rounded, mode
        for found in facts:
            assert found["validation_loss"] == pytest.approx(found["validation_loss_exact"], rel=0.01)


STORED = {
    "half": {"weight": torch.float16},
    "bfloat16": {"weight": torch.bfloat16},
    "nvfp4": {"weight": torch.uint8, "per_tensor_scale": torch.float32},
    "qlora": {"weight": torch.uint8, "absmax": torch.uint8},
}


@pytest.mark.parametrize("precision", STORED)
def test_a_frozen_stack_is_stored_and_loaded_in_its_type(precision: str, reference: Reference) -> None:
    changes = {f"{G}new_stack_precision": precision, **(LORA if precision == "qlora" else {})}
    root = reference(changes)
    config = tiny(root.parent, changes)
    for stage in range(3):
        stored = load_file(folder_of(root, "stack", stage) / "stack.safetensors")
        for key, dtype in STORED[precision].items():
            assert stored[f"blocks.0.attention.q_proj.{key}"].dtype == dtype
        assert stored["blocks.0.attention_norm.weight"].dtype == torch.float32
        loaded = base_state(part(root, config, 2, stage))
        assert loaded.keys() == stored.keys()
        assert all(loaded[key].equal(stored[key]) for key in stored)
    assert not any(p.requires_grad for p in part(root, config, 2, 0).parameters())


def test_the_joint_anneal_trains_everything_it_may(reference: Reference) -> None:
    """Embedding, head and adapters change; NF4 bases cannot; a bfloat16 base does, and is bfloat16 again."""
    changes = {
        "training.joint_steps": 6,
        f"{G}stacks": [{"precision": "bfloat16"}, {"precision": "qlora"}, {}],
        **LORA,
    }
    root = reference(changes)
    config = tiny(root.parent, changes)
    stages, artifacts = plan_of(config).stages, Artifacts(root)
    assert [stage.spec.mode for stage in stages] == ["append", "append", "append", "joint"]

    def changed(stack: int) -> set[str]:
        before, after = (base_state(part(root, config, at, stack)) for at in (2, 3))
        assert {key: tensor.dtype for key, tensor in before.items()} == {key: t.dtype for key, t in after.items()}
        return {key for key in before if not before[key].equal(after[key])}

    assert "blocks.0.attention.q_proj.weight" in changed(0)
    assert not changed(1)
    assert "blocks.0.attention.q_proj.weight" in changed(2)
    old, new = (adapter_state(part(root, config, at, 1), "stack") for at in (2, 3))
    assert not any(old[key].equal(new[key]) for key in old if "lora_B" in key)
    for load in (load_head, load_embedding):
        assert tensor_digest(load(artifacts, stages[:3])) != tensor_digest(load(artifacts, stages))
    head, embedding = load_head(artifacts, stages), load_embedding(artifacts, stages)
    assert not head.projection.weight.equal(embedding.weight)


def test_checkpointing_activations_changes_no_bit(tmp_path: Path, reference: Reference) -> None:
    changes = {**MODES["prepend"], "training.activation_checkpointing": True}
    root = tmp_path / "a"
    grown(tiny(tmp_path, changes), root)
    assert digests(root) == digests(reference(MODES["prepend"]))


def test_without_a_compiler_a_run_says_so_once_and_records_it(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(hardware, "BACKEND", broken)
    root = tmp_path / "a"
    changes = {**MODES["prepend"], "hardware.compile": True}
    messages = grown(tiny(tmp_path, changes), root).messages
    assert sum("no C++ compiler" in message for message in messages) == 1
    assert digests(root) == digests(reference(MODES["prepend"]))
    recorded = [manifest["fingerprint"] for manifest in manifests(root).values()]
    assert {found["compile"] for found in recorded if "compile" in found} == {False}


def test_a_cached_stage_loads_no_stack_of_its_trunk(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays flat because the trunk is not there: only the neighbour is read, once, to be copied."""
    from flows.run import inputs

    loaded: list[int] = []
    load = inputs.load_stack

    def spy(artifacts: Artifacts, stages: Any, stack: int, *device: torch.device) -> Stack:
        loaded.append(stack)
        return load(artifacts, stages, stack, *device)

    monkeypatch.setattr(inputs, "load_stack", spy)
    config = tiny(tmp_path, {f"{G}target_stacks": 4})
    root = tmp_path / "a"
    grown(config, root)
    loaded.clear()
    grown(tiny(tmp_path, {f"{G}target_stacks": 4, "training.learning_rate": 1e-3}), root, from_stack=3, force="train")
    loaded.clear()
    plan = plan_of(config)
    from flows.run.stage import Stage

    stage = Stage(config=config, root=str(root), corpus=plan.data.corpus, corpus_bytes=plan.corpus_bytes, index=3)
    with inputs.open_stage(stage, None, tmp_path / "work") as opened:
        assert loaded == [2]
        assert list(opened.model.stacks) == ["3"]


@pytest.mark.parametrize("part_of_it", ["stacks", "head", "embedding"])
def test_a_stage_that_changed_a_frozen_weight_is_not_sealed(
    part_of_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackwise_core.training import training

    def careless(model: StageModel, *args: Any, **how: Any) -> list[dict[str, float]]:
        records = train_stack(model, *args, **how)
        frozen = [p for p in getattr(model, part_of_it).parameters() if not p.requires_grad]
        with torch.no_grad():
            for parameter in frozen[:1]:
                parameter.view(-1)[0] += 1.0
        return records

    monkeypatch.setattr(training, "train_stack", careless)
    config, root = tiny(tmp_path, MODES["prepend"]), tmp_path / "a"
    with pytest.raises(training.FrozenChangedError, match="stage 1: training changed frozen weights"):
        grown(config, root)
    sealed = [name for name in manifests(root) if name.startswith("stack-")]
    assert sealed == [plan_of(config).stages[0].ref("stack").name]


def test_a_stack_that_begins_otherwise_than_its_build_says_is_not_trained(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another version of torch draws or quantises differently."""
    from flows.run import inputs
    from flows.run.stage import Stage

    root = reference()
    config = tiny(root.parent)
    plan = plan_of(config)
    stage = Stage(config=config, root=str(root), corpus=plan.data.corpus, corpus_bytes=plan.corpus_bytes, index=1)
    inputs.open_model(stage, stage.plan.ref("build"))
    new_stack = inputs.new_stack

    def other(*args: Any) -> Stack:
        stack = new_stack(*args)
        with torch.no_grad():
            next(stack.parameters()).mul_(1.0 + 2**-20)
        return stack

    monkeypatch.setattr(inputs, "new_stack", other)
    with pytest.raises(ArtifactCorruptError, match="describes other initial tensors"):
        inputs.open_model(stage, stage.plan.ref("build"))


def test_a_checkpoint_of_another_version_costs_its_steps_and_nothing_else(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackwise_core.training import training

    undisturbed = digests(reference())

    def renamed(model: Any, optimizer: Any, records: Any, *ranks: Any) -> Any:
        state = capture(model, optimizer, records, *ranks)
        tensors = {key.replace("stacks.0", "stack"): tensor for key, tensor in state.tensors.items()}
        return dataclasses.replace(state, tensors=tensors)

    capture = training.capture
    config, root = tiny(tmp_path), tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(training, "capture", renamed)
        patch.setattr(training, "failpoint", lambda task, step: 1 / 0 if step == 5 else None)
        with pytest.raises(ZeroDivisionError):
            grown(config, root)
    recorder = grown(config, root)
    assert any("starts anew: its checkpoint is of another version" in text for text in recorder.messages)
    assert digests(root) == undisturbed
