"""On which inputs each stack trains and is judged: masks, and depth as time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches, RepeatedLoader, stage_batches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_mask, resolve_order
from stackwise_core.stages.stages import resolve_joint_times, resolve_stages
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.training import train_step
from storage.artifacts import Artifacts
from storage.checkpoints import load_embedding, load_stack
from storage.sequences import load_sequences
from support.growth import Reference, batch_of, built, gradients, model_of
from support.modes import MODES, G, plan_of
from support.runs import manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


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
