"""What growing means: what trains and what does not, through which gradients, on which inputs, stored as what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.adapters import adapter_parameters, adapter_state, base_state
from stackwise_core.model.blocks import Rack, Stack
from stackwise_core.model.precision import StoredLinear, base_linears, storage_of
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches, RepeatedLoader, stage_batches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_mask, resolve_order
from stackwise_core.stages.stages import resolve_joint_times, resolve_stages
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.optimizer import LossScale, learning_rate, make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import capture, end_stage, tensor_digest, train_stack, train_step
from storage.artifacts import Artifacts
from storage.checkpoints import load_embedding, load_head, load_stack
from storage.errors import ArtifactCorruptError
from storage.sequences import load_sequences
from support.modes import DUAL, LORA, MODES, G, plan_of
from support.runs import digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]


def built(config: StackWiseConfig, n_stacks: int) -> ProgressiveRackBuilder:
    """Return an untrained rack, every parameter moved a little so that nothing is zero by construction."""
    builder = ProgressiveRackBuilder(config)
    for _ in range(n_stacks):
        builder.add_stack()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in builder.build_rack().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return builder


def model_of(builder: ProgressiveRackBuilder, config: StackWiseConfig, stage: int) -> StageModel:
    spec = resolve_stages(config)[stage]
    builder.prepare_stage(spec)
    rack, stacks = builder.build_rack(), {stack.creation_index: stack for stack in builder.stacks}
    return StageModel.assemble(config, spec.anatomy, stacks, rack.head, rack.embedding, torch.device("cpu"))


def finish(builder: ProgressiveRackBuilder, config: StackWiseConfig, stage: int) -> None:
    """End a stage as if it had trained."""
    end_stage(model_of(builder, config, stage))
    builder.finish_stage(resolve_stages(config)[stage].anatomy)


def batch_of(config: StackWiseConfig, stage: int, trunk: Any = None) -> dict[str, Any]:
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    objective = config.training.progressive.training_objective
    loader = ProgressiveDataLoader([tokens], resolve_mask(config, stage), stage, trunk, objective=objective)
    return next(iter(loader))


def dense_loss(rack: Rack, batch: dict[str, Any]) -> Tensor:
    """The mean cross-entropy of a whole rack, written out: no stage model, no head at loss positions only."""
    x = rack.embedding(batch["input_ids"])
    for stack in rack.stacks:
        x = stack(x)
    logits = rack.head.projection(rack.head.norm(x))
    positions = batch.get("combined_masks", batch["masks"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return losses[positions.flatten()].mean()


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- who gets a gradient


@pytest.mark.parametrize("mode", ["append", "prepend", "full", "qlora trunk", "nf4 dual", "nvfp4 top", "mixed"])
def test_exactly_what_trains_gets_a_gradient_and_it_is_the_dense_one(mode: str, tmp_path: Path) -> None:
    """Against autograd through the whole rack, with everything trainable."""
    config = tiny(tmp_path, MODES[mode])
    stage = len(resolve_stages(config)) - 1
    builder = built(config, stage + 1)
    model = model_of(builder, config, stage)
    rack = builder.build_rack()
    trunk = None
    if model.embedding is None:
        below = rack.stacks[: model.anatomy.boundary]

        def trunk(input_ids: Tensor) -> Tensor:
            x = rack.embedding(input_ids)
            for stack in below:
                x = stack(x)
            return x.detach()

    batch = batch_of(config, stage, trunk)
    total, count = model.summed_loss(batch)
    (total / count).backward()
    found = gradients(rack)
    expected_names = {name for name, p in rack.named_parameters() if p.requires_grad}
    assert found.keys() == expected_names
    rack.zero_grad(set_to_none=True)
    trains = {c: model.anatomy.trains_of(c) for c in model.anatomy.order}
    rack.requires_grad_(True)
    dense_loss(rack, batch).backward()
    dense = gradients(rack)
    for name, gradient in found.items():
        assert torch.allclose(gradient, dense[name], atol=1e-6, rtol=1e-4), name
    # What should train, by the design: the new stack, the head if it is on top, adapters of a qlora trunk.
    newest, order = model.anatomy.newest, list(model.anatomy.order)
    strategy = config.training.progressive.trunk_strategy
    for position, c in enumerate(order):
        names = {name for name in expected_names if name.startswith(f"stacks.{position}.")}
        adapters = {name for name in names if ".lora_" in name}
        if (c == newest and trains[c] == "everything") or strategy == "full":
            assert names - adapters, c
        elif strategy == "qlora" and (c == newest or config.training.progressive.trunk_trainable_top in (0, 1)):
            top = c == newest or config.training.progressive.trunk_trainable_top == 0 or position == len(order) - 2
            assert names == adapters, c
            assert bool(adapters) == top, c
        else:
            assert not names, c
    head = {name for name in expected_names if name.startswith("head")}
    assert bool(head) == (strategy == "full" or order[-1] == newest)
    assert ("embedding.weight" in expected_names) == (strategy == "full")


def test_both_adapters_of_a_trunk_train_and_both_contribute(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["nf4 dual"])
    builder = built(config, 3)
    model_of(builder, config, 2)
    trunk = builder.stack(0)
    trainable = {id(p) for p in trunk.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(trunk)}
    x = torch.randn(2, 5, 16)
    outputs = [trunk(x)]
    for name in ("stack", "progressive"):
        with torch.no_grad():
            for parameter in adapter_parameters(trunk, name):
                parameter.zero_()
        outputs.append(trunk(x))
    assert not outputs[0].equal(outputs[1])
    assert not outputs[1].equal(outputs[2])


def test_under_frozen_no_adapter_of_the_trunk_trains_and_all_contribute(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, **DUAL})
    builder = built(config, 3)
    model = model_of(builder, config, 2)
    assert [c for c in model.anatomy.order if model.anatomy.trains_of(c) != "nothing"] == [2]
    assert not any(p.requires_grad for c in (0, 1) for p in builder.stack(c).parameters())
    stack, x = builder.stack(0), torch.randn(2, 5, 16)
    before = stack(x)
    with torch.no_grad():
        adapter_parameters(stack, "progressive")[1].zero_()
    assert not stack(x).equal(before)


def test_adapters_begin_apart(tmp_path: Path) -> None:
    """Of one rank, they are drawn by stack and name: equal factors would learn the same thing twice."""
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, **DUAL, f"{G}progressive_qlora_rank": 4})
    builder = ProgressiveRackBuilder(config)
    builder.add_stack()
    builder.add_stack()
    own, progressive = (adapter_state(builder.stack(0), name) for name in ("stack", "progressive"))
    assert own.keys() == progressive.keys()
    assert not any(own[key].equal(progressive[key]) for key in own if "lora_A" in key)
    neighbour = adapter_state(builder.stack(1), "stack")
    assert not any(own[key].equal(neighbour[key]) for key in own if "lora_A" in key)


def test_adapters_train_at_a_rate_of_their_own_and_do_not_decay(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**MODES["qlora trunk"], "training.adapter_learning_rate": 7e-4})
    builder = built(config, 3)
    model, spec = model_of(builder, config, 2), resolve_stages(config)[2].optim
    optimizer = make_optimizer(model, spec)
    train_step(model, batch_of(config, 2), optimizer, spec, 1)
    adapters = {id(p) for c in range(3) for p in adapter_parameters(builder.stack(c))}
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert adapters < found.keys()
    share = learning_rate(spec, 1) / spec.learning_rate
    assert [found[key] for key in adapters] == [(pytest.approx(7e-4 * share), 0.0)] * len(adapters)
    assert {found[key][0] for key in found.keys() - adapters} == {spec.learning_rate * share}


RANKS_AND_ALPHAS: dict[str, tuple[dict[str, Any], list[tuple[int, float]]]] = {
    "simplified": ({}, [(4, 3.0)] * 3),
    "increasing": ({"qlora_rank_pattern": "increasing"}, [(4, 3.0), (8, 3.0), (16, 3.0)]),
    "decreasing": (
        {"qlora_rank_pattern": "decreasing", "qlora_alpha_pattern": "decreasing"},
        [(4, 3.0), (2, 1.5), (1, 1.0)],
    ),
    "linear": ({"qlora_rank_pattern": "linear", "qlora_alpha_pattern": "linear"}, [(4, 3.0), (8, 6.0), (12, 9.0)]),
    "variable": (
        {"qlora_configs": {n: {"rank": n + 1, "alpha": n + 5.0} for n in range(3)}},
        [(1, 5.0), (2, 6.0), (3, 7.0)],
    ),
}


@pytest.mark.parametrize("name", RANKS_AND_ALPHAS)
def test_each_stack_has_the_rank_and_alpha_of_its_strategy(name: str, tmp_path: Path) -> None:
    more, expected = RANKS_AND_ALPHAS[name]
    strategy = name if name in ("simplified", "variable") else "progressive"
    given = {"qlora_enabled": True, "qlora_strategy": strategy, **more}
    if name != "variable":
        given |= {"qlora_rank": 4, "qlora_alpha": 3.0}
    config = tiny(tmp_path, {f"{G}{key}": value for key, value in given.items()})
    adapters = [stack.adapters["stack"] for stack in resolve_stages(config)[-1].stacks]
    assert [(adapter.rank, adapter.alpha) for adapter in adapters] == expected


def test_the_top_of_a_trunk_is_what_lies_next_to_the_head(tmp_path: Path) -> None:
    """Also where the stack that was created last lies at the bottom."""
    stacks = [{}, {"mode": "prepend"}, {}]
    config = tiny(tmp_path, {**MODES["qlora top"], f"{G}target_stacks": 3, f"{G}stacks": stacks})
    anatomy = resolve_stages(config)[2].anatomy
    assert anatomy.order == (1, 0, 2)
    assert anatomy.trained == (0, 2)
    assert anatomy.below == (1,)


def test_a_gradient_left_on_what_is_frozen_is_not_clipped_by(tmp_path: Path) -> None:
    """As after a user's own backward pass: only what trains counts in the norm."""
    config = tiny(tmp_path, MODES["prepend"])
    norms: list[float] = []
    for left in (False, True):
        builder = built(config, 2)
        model, spec = model_of(builder, config, 1), resolve_stages(config)[1].optim
        if left:
            model.head.projection.weight.grad = torch.ones_like(model.head.projection.weight)
        norms.append(train_step(model, batch_of(config, 1), make_optimizer(model, spec), spec, 0)["gradient_norm"])
    assert norms[0] == norms[1]


def test_a_gentler_anneal_is_gentler_everywhere(tmp_path: Path) -> None:
    """At a tenth of the rate, adapters have a tenth of theirs, and the minimum is no higher than the peak."""
    rates = {"learning_rate": 1e-2, "min_learning_rate": 2e-3, "adapter_learning_rate": 4e-3}
    changes = {f"training.{key}": value for key, value in rates.items()} | {"training.joint_learning_rate": 1e-3}
    config = tiny(tmp_path, {**changes, "training.joint_steps": 6, f"{G}qlora_enabled": True, **LORA})
    *_, last, joint = (stage.optim for stage in resolve_stages(config))
    assert (last.learning_rate, last.min_learning_rate, last.adapter_learning_rate) == (1e-2, 2e-3, 4e-3)
    assert (joint.learning_rate, joint.min_learning_rate) == (1e-3, 1e-3)
    assert joint.adapter_learning_rate == pytest.approx(4e-4)


def test_a_trained_stage_keeps_no_gradient(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    model, spec = model_of(built(config, 1), config, 0), resolve_stages(config)[0].optim
    train_stack(model, [batch_of(config, 0)] * spec.steps, spec)
    assert not gradients(model)


def test_a_quantised_trunk_is_dense_only_while_it_runs(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["nf4"])
    builder = built(config, 2)
    finish(builder, config, 0)
    stored = [module for module in builder.stack(0).modules() if isinstance(module, StoredLinear)]
    held: list[bool] = []
    builder.stack(0).register_forward_hook(lambda *_: held.append(all(linear.held is not None for linear in stored)))
    LiveTrunk(builder.build_rack().embedding, [builder.stack(0)], Stream("bfloat16"))(
        torch.zeros(2, 5, dtype=torch.long)
    )
    assert stored
    assert held == [True, True]
    assert all(linear.held is None for linear in stored)


# ---------------------------------------------------------------- what changes on disk


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


def test_a_prepended_copy_zero_starts_at_the_loss_before_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["prepend"])
    builder = built(config, 1)
    batch = batch_of(config, 1)
    with torch.no_grad():
        before = dense_loss(builder.build_rack(), batch)
        builder.add_stack()
        assert dense_loss(builder.build_rack(), batch) == before
    assert [stack.creation_index for stack in builder.stacks] == [1, 0]


def test_a_stack_is_a_copy_of_its_neighbour_dequantised_and_merged(tmp_path: Path) -> None:
    config = tiny(tmp_path, {**MODES["nf4 dual"], "training.new_stack_init": "copy"})
    builder = built(config, 2)
    finish(builder, config, 1)  # quantised, adapters trained
    source = builder.stack(1)
    new = builder.add_stack()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        difference = (new(x) - source(x)).abs().max() / source(x).abs().max()
    assert 0.0 < difference < 0.1  # the copy is NF4 itself: near, and not equal


def test_a_copy_has_merged_what_the_adapters_of_its_source_learned(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA, "training.new_stack_init": "copy"})
    builder = built(config, 1)
    source, x = builder.stack(0), torch.randn(2, 5, 16)
    with torch.no_grad():
        for parameter in adapter_parameters(source):
            parameter.mul_(10.0)
        expected = source(x)
        assert (builder.add_stack()(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_new_stack_is_a_copy_of_the_one_it_is_put_next_to(tmp_path: Path) -> None:
    modes = ["append", "prepend", "prepend", "append", "append"]
    changes = {f"{G}stacks": [{"mode": mode} for mode in modes], f"{G}target_stacks": 5}
    assert [stage.source for stage in resolve_stages(tiny(tmp_path, changes))] == [None, 0, 1, 0, 3]


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


def test_a_cached_stage_loads_no_stack_of_its_trunk(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays flat because the trunk is not there: only the neighbour is read, once, to be copied."""
    from flows.run import inputs

    loaded: list[int] = []
    load = inputs.load_stack

    def spy(artifacts: Artifacts, stages: Any, stack: int) -> Stack:
        loaded.append(stack)
        return load(artifacts, stages, stack)

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


# ---------------------------------------------------------------- masks and time


def test_an_answer_cannot_leak_through_a_boundary(tmp_path: Path, reference: Reference) -> None:
    """Two texts that differ only where both are masked have the same boundary, bit for bit."""
    from stackwise_core.objectives.make_batch import make_batch

    changes = {f"{G}training_objective": "mlm", "training.corruption": "mask", "training.mask_ratio": 0.4}
    root = reference(changes)
    config = tiny(root.parent, changes)
    stages, artifacts = plan_of(config).stages, Artifacts(root)
    spec = resolve_mask(config, 1)
    assert spec is not None
    tokens, ids = np.arange(32, dtype=np.int64).reshape(2, 16), np.array([7, 8], dtype=np.int64)
    masks = spec.masks(ids, 0, 16)
    other = np.where(masks, (tokens + 101) % 256, tokens)
    assert masks.any()
    assert (other != tokens).any()
    trunk = LiveTrunk(load_embedding(artifacts, stages), [load_stack(artifacts, stages, 0)], Stream("bfloat16"))
    rows = [
        trunk(make_batch({"input_ids": text, "sequence_ids": ids, "view": 0}, spec)["input_ids"])
        for text in (tokens, other)
    ]
    assert rows[0].equal(rows[1])
    unmasked = trunk(torch.from_numpy(other))
    assert not unmasked.equal(rows[0])


def test_depth_as_time_trains_each_stack_at_its_own_ratio(reference: Reference) -> None:
    changes = {**MODES["depth"], f"{G}max_stacks": 4}
    root = reference(changes)
    config = tiny(root.parent, changes)
    stages = plan_of(config).stages
    assert [stage.spec.time_step for stage in stages] == [0, 1, 2]
    ratios = [stage.stack.mask.ratio for stage in stages if stage.stack.mask]
    assert ratios == pytest.approx([0.15, 0.40, 0.65])
    train, _ = load_sequences(Artifacts(root), plan_of(config).data_ref)
    order = resolve_order(config, len(train))
    for stage, ratio in zip(stages, ratios, strict=True):
        base = PackedBatches(train, order, 0, 12)
        loader = ProgressiveDataLoader(base, stage.stack.mask, stage.index, time_step=stage.spec.time_step)
        batches = list(loader)
        assert {batch["time_step"] for batch in batches} == {stage.index}
        shares = np.mean([batch["masks"].float().mean().item() for batch in batches])
        assert shares == pytest.approx(ratio, abs=0.06)
        store = stage.activations
        if store is not None:
            assert store.mask is not None
            assert store.mask.ratio == pytest.approx(ratios[stage.index + 1])
    facts = [manifests(root)[stage.ref("validation").name]["facts"] for stage in stages]
    assert all(set(found["by_mask_ratio"]) == {"0.15", "0.3", "0.5", "0.7", "0.9"} for found in facts)
    assert all(len(set(found["by_mask_ratio"].values())) == 5 for found in facts)
    assert facts[0]["by_mask_ratio"]["0.15"] == pytest.approx(facts[0]["validation_loss_exact"], rel=1e-6)


def test_the_mapping_is_no_part_of_an_id_the_step_is(tmp_path: Path) -> None:
    linear = tiny(tmp_path, {**MODES["depth"], f"{G}num_time_steps": 12})
    listed = {f"{G}stack_time_mapping": "custom", f"{G}time_mapping": [0, 1, 2]}
    custom = tiny(tmp_path, {**MODES["depth"], f"{G}num_time_steps": 12, **listed})
    other = tiny(tmp_path, {**MODES["depth"], f"{G}num_time_steps": 12, **listed, f"{G}time_mapping": [0, 1, 5]})
    plans = [plan_run(config, "0" * 64) for config in (linear, custom, other)]
    ids = [[stage.ref("stack").sha256 for stage in plan.stages] for plan in plans]
    assert ids[0] == ids[1]
    assert ids[0][:2] == ids[2][:2]
    assert ids[0][2] != ids[2][2]


def test_joint_training_over_depth_leaves_younger_stacks_out(tmp_path: Path) -> None:
    """Each step trains the rack of one stack: those created later get no gradient."""
    config = tiny(tmp_path, MODES["depth joint"])
    builder = built(config, 3)
    model = model_of(builder, config, 3)
    spec = resolve_stages(config)[3]
    optimizer = make_optimizer(model, spec.optim)
    batch = {**batch_of(config, 1), "stack_idx": 1}
    train_step(model, batch, optimizer, spec.optim, 0)
    assert gradients(builder.stack(0))
    assert gradients(builder.stack(1))
    assert not gradients(builder.stack(2))
    with torch.no_grad():
        rack = builder.build_rack()
        prefix = rack.hidden(batch["input_ids"], depth=2)
        assert model(batch).equal(prefix)


def test_joint_training_over_depth_masks_anew_in_each_pass(tmp_path: Path) -> None:
    config = tiny(tmp_path, MODES["depth joint"])
    masks = [mask for mask in (resolve_mask(config, stack) for stack in range(3)) if mask is not None]
    spec, times = resolve_stages(config)[-1], resolve_joint_times(config)
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    batches = list(itertools.islice(stage_batches(config, spec, RepeatedLoader([tokens], views=2)), 24))
    assert {batch["stack_idx"] for batch in batches} == {0, 1, 2}
    assert all(batch["time_step"] == times[batch["stack_idx"]][0] for batch in batches)
    for stack, mask in enumerate(masks):
        drawn = [batch for batch in enumerate(batches) if batch[1]["stack_idx"] == stack]
        for n, batch in drawn:
            expected = mask.masks(batch["sequence_ids"].numpy(), n % 2, 16)
            assert (batch["masks"].numpy() == expected).all()


def test_only_the_first_batch_is_judged_on_the_rounded_stream(tmp_path: Path) -> None:
    """The others, at ratios that the trunk was not cached under, are compared between stages: unrounded."""
    config = tiny(tmp_path)
    builder = built(config, 2)
    rack = builder.build_rack()
    tokens = torch.randint(0, 256, (2, 4, 16), generator=torch.Generator().manual_seed(2))
    own, other = (next(iter(ProgressiveDataLoader([part], objective="clm"))) for part in tokens)

    def judged(*batches: dict[str, Any], boundary: int = 1) -> list[dict[str, float]]:
        parts = rack.embedding, builder.stacks, rack.head
        return judge_rack(*parts, batches, stream=Stream("bfloat16"), boundary=boundary)

    first, second = judged(own, other)
    assert first == judged(own)[0]
    assert first["validation_loss"] != first["validation_loss_exact"]
    assert second == judged(other, boundary=0)[0]


# ---------------------------------------------------------------- fp16


def test_a_loss_scale_halves_on_overflow_and_doubles_after_a_while() -> None:
    scale = LossScale(2.0**16, [])
    history: list[dict[str, float]] = []
    for step in range(4100):
        overflowed = step in (3, 50)
        scale.update(overflowed=overflowed)
        history.append({"step": step, "skipped": float(overflowed)})
    assert scale.value == 2.0**16 / 4 * 4  # two halvings, then doubled 2,000 and 4,000 steps after step 50
    assert LossScale(2.0**16, history).value == scale.value


def test_a_scaled_step_is_the_step_and_an_overflow_changes_no_weight(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}new_stack_precision": "half"})
    weights: list[dict[str, Tensor]] = []
    for scale in (None, LossScale(2.0**16, []), LossScale(2.0**127, [])):
        builder = built(config, 1)
        model = model_of(builder, config, 0)
        spec = resolve_stages(config)[0]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = batch_of(config, 0)
        optimizer = make_optimizer(model, spec.optim)
        record = train_step(model, batch, optimizer, spec.optim, 0, scale)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if scale is not None and scale.value == 2.0**126:
            assert record["skipped"] == 1.0
            assert all(before[name].equal(p) for name, p in model.named_parameters())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])  # powers of two lose nothing


def test_a_resumed_stage_scales_its_loss_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU products are fp32: here the stage takes them for fp16."""
    from stackwise_core.training import optimizer as core_optimizer
    from stackwise_core.training import training

    scales: list[float] = []

    def noting(
        model: Any, batch: Any, optimizer: Any, spec: Any, step: int, scale: Any, ranks: Any
    ) -> dict[str, float]:
        scales.append(scale.value)
        return train_step(model, batch, optimizer, spec, step, scale, ranks)

    monkeypatch.setattr(core_optimizer, "compute_dtype", lambda precision, device: torch.float16)
    monkeypatch.setattr(training, "train_step", noting)
    config = tiny(tmp_path, {f"{G}new_stack_precision": "half"})
    model, spec = model_of(built(config, 1), config, 0), resolve_stages(config)[0].optim
    records = [{"step": float(n), "loss": 1.0, "skipped": float(n in (0, 3))} for n in range(spec.steps - 2)]
    state = capture(model, make_optimizer(model, spec), records)
    train_stack(model, [batch_of(config, 0)] * 2, spec, state=state)
    assert scales == [2.0**14, 2.0**14]


# ---------------------------------------------------------------- in memory


def test_stacks_added_by_hand_train_in_creation_order(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}target_stacks": 3})
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.prepend_stack(n_blocks=2)
    builder.append_stack(precision="bfloat16")
    tokens = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    results = ProgressiveTrainer(config).train_progressively(builder, tokens, target_stacks=4)
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert [stack.creation_index for stack in builder.stacks] == [1, 0, 2, 3]
    info = builder.get_rack_info()["stacks"]
    assert [entry["n_blocks"] for entry in info] == [2, 1, 1, 1]
    assert [entry["precision"] for entry in info] == ["full", "full", "bfloat16", "full"]
    assert all(result.loss < 6.0 for result in results)


def test_an_edit_of_the_configuration_holds_from_the_next_stage_on(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA})
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    tokens = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    trainer.train_progressively(builder, tokens, target_stacks=2)
    trunk = {c: adapter_state(builder.stack(c), "stack") for c in (0, 1)}
    frozen = {c: {key: value.clone() for key, value in state.items()} for c, state in trunk.items()}
    trainer.train_progressively(builder, tokens, target_stacks=3)
    assert all(frozen[c][key].equal(value) for c in (0, 1) for key, value in trunk[c].items())
    config.training.progressive.trunk_strategy = "qlora"
    trainer.train_progressively(builder, tokens, target_stacks=4)
    assert not any(frozen[c][key].equal(value) for c in (0, 1) for key, value in trunk[c].items() if "lora_B" in key)


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


def test_a_key_that_only_a_stack_added_by_hand_needs_is_no_fault(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}new_stack_precision": "qlora", f"{G}qlora_rank": 4})
    builder = ProgressiveRackBuilder(config)
    builder.append_stack(precision="full")
    builder.append_stack()
    assert [entry["adapters"] for entry in builder.get_rack_info()["stacks"]] == [[], ["stack"]]
