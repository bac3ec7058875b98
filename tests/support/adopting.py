"""Racks grown in the library on the batches that a run would train on, to be adopted by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.losses import Batch
from stackwise_core.stages.plan import plan_config
from stackwise_core.stages.resolve import resolve_order
from storage.artifacts import Artifacts
from storage.sequences import load_sequences
from support.runs import grown, tiny


def run_batches(config: Any, root: Path) -> list[Batch]:
    """Return the batches of every step of a run's longest stage, in its order; its data lies in `root`."""
    train, _ = load_sequences(Artifacts(root), plan_config(config).data_ref)
    return list(PackedBatches(train, resolve_order(config, len(train)), 0, config.training.steps_per_stack))


def library_rack(config: Any, batches: list[Batch], n_stacks: int) -> ProgressiveRackBuilder:
    """Grow a rack in memory; without the joint anneal that the configuration may end with."""
    config = config.model_copy(deep=True)
    config.training.joint_steps = 0
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, batches, n_stacks)
    return builder


def adopted(folder: Path, changes: dict[str, Any], rack: Path, root: Path) -> Any:
    """Return the configuration of a run that adopts a rack, and run it."""
    config = tiny(folder, {**changes, "model.from": str(rack)})
    grown(config, root)
    return config
