"""Any configuration either trains two steps or is refused by `validate()`: none fails later."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from support.runs import grown, manifests, tiny_values, write_corpus

G = "training.progressive."
PRECISIONS = ["full", "half", "bfloat16", "nvfp4", "qlora"]
OVERRIDE = st.fixed_dictionaries(
    {},
    optional={
        "n_blocks": st.sampled_from([0, 1, 2]),
        "precision": st.sampled_from(["default", *PRECISIONS]),
        "mode": st.sampled_from(["default", "append", "prepend", "insert"]),
        "tail_stacks": st.sampled_from([0, 1, 2]),
        "steps": st.sampled_from([0, 2, 3]),
    },
)
ADAPTER = {"rank": 2, "alpha": 4.0}
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    f"{G}enabled": st.sampled_from([True, True, True, False]),
    f"{G}target_stacks": st.sampled_from([1, 2, 3]),
    f"{G}max_stacks": st.sampled_from([2, 3, 5]),
    f"{G}building_mode": st.sampled_from(["append", "prepend", "insert"]),
    f"{G}tail_stacks": st.sampled_from([1, 2]),
    f"{G}tail_strategy": st.sampled_from(["frozen", "qlora", "full"]),
    f"{G}trunk_strategy": st.sampled_from(["frozen", "qlora", "full"]),
    f"{G}trunk_trainable_top": st.sampled_from([0, 0, 1, 2]),
    f"{G}new_stack_precision": st.sampled_from(PRECISIONS),
    f"{G}cache_activations": st.booleans(),
    f"{G}training_objective": st.sampled_from(["mlm", "clm"]),
    f"{G}qlora_enabled": st.booleans(),
    f"{G}qlora_rank": st.sampled_from([2, 4, 16, 40]),
    f"{G}qlora_strategy": st.sampled_from(["simplified", "progressive", "variable"]),
    f"{G}qlora_rank_pattern": st.sampled_from(["constant", "increasing", "decreasing", "linear"]),
    f"{G}qlora_alpha_pattern": st.sampled_from(["constant", "increasing", "decreasing", "linear"]),
    f"{G}qlora_configs": st.sampled_from(
        [{}, {0: {"rank": 2, "alpha": 4.0}}, {n: {"rank": 2, "alpha": 3.0} for n in range(3)}]
    ),
    f"{G}progressive_qlora": st.booleans(),
    f"{G}progressive_qlora_rank": st.sampled_from([2, 8, 64]),
    f"{G}time_interpretation": st.sampled_from(["none", "none", "input", "depth"]),
    f"{G}time_embedding_dim": st.sampled_from([16, 7, 64]),
    f"{G}time_encoding_type": st.sampled_from(["sinusoidal", "learned"]),
    f"{G}stack_time_mapping": st.sampled_from(["linear", "exponential", "custom"]),
    f"{G}time_mapping": st.sampled_from([[], [0, 1, 2], [2, 1, 0], [0, 9, 99]]),
    f"{G}time_per_stack": st.sampled_from([1, 3]),
    f"{G}num_time_steps": st.sampled_from([0, 4, 50]),
    f"{G}stacks": st.lists(OVERRIDE, max_size=3),
    "training.new_stack_init": st.sampled_from(["auto", "copy", "copy_zero", "random", "zero"]),
    "training.joint_steps": st.sampled_from([0, 0, 2]),
    "training.accumulation_steps": st.sampled_from([1, 2, 3]),
    "training.activation_checkpointing": st.booleans(),
    "training.loss_weighting": st.sampled_from(["mean", "mean", "elbo"]),
    "training.corruption": st.sampled_from(["bert", "mask"]),
    "training.time_sampling": st.sampled_from(["per_batch", "per_sequence", "stratified"]),
    "training.mask_ratio": st.sampled_from([0.15, 0.5]),
    "training.mask_ratio_max": st.sampled_from([0.5, 1.0]),
    "training.mask_ratio_table": st.sampled_from([[], [0.2, 0.4, 0.6, 0.8]]),
    "model.tie_embeddings": st.booleans(),
    "model.n_kv_heads": st.sampled_from([0, 1]),
    "model.attention": st.sampled_from(["auto", "causal", "bidirectional"]),
    "model.d_ff": st.sampled_from([0, 32, 40]),
    "cache.dtype": st.sampled_from(["bfloat16", "float16", "float32", "int8", "fp8"]),
    "cache.views": st.sampled_from([0, 1, 2]),
    "cache.max_gb": st.sampled_from([1.0, 1e-3]),
    "data.rows": st.sampled_from(["shared", "fresh"]),
    "validation.cooldown_steps": st.sampled_from([0, 1, 3]),
    "validation.every": st.sampled_from([0, 1]),
    "cache.keep": st.sampled_from(["last", "all"]),
    "cache.mode": st.sampled_from(["always", "auto"]),
    "cache.fill_workers": st.sampled_from([1, 3]),
}
# A few keys of many: most of what has all of them is refused.
CHANGES = st.sets(st.sampled_from(sorted(CHOICES)), max_size=9).flatmap(
    lambda keys: st.fixed_dictionaries({key: CHOICES[key] for key in sorted(keys)})
)
_EXAMPLES = int(os.environ.get("STACKWISE_EXAMPLES", "400"))
"""Of the slow test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    where = tmp_path_factory.mktemp("any")
    write_corpus(where / "corpus.txt")
    return where


_number = itertools.count()


def accepted(values: dict[str, Any], changes: dict[str, Any]) -> StackWiseConfig | None:
    """The configuration with the changes; None if it is refused."""
    changed = copy.deepcopy(values)
    apply_overrides(changed, changes)
    try:
        return StackWiseConfig.from_dict(changed)
    except ConfigError:
        return None


@settings(max_examples=16, derandomize=True, database=None)
@given(changes=CHANGES)
def test_it_trains_or_is_refused(changes: dict[str, Any], folder: Path) -> None:
    train_or_refuse(changes, folder)


@pytest.mark.slow
@settings(max_examples=_EXAMPLES, derandomize=True, database=None)
@given(changes=CHANGES)
def test_many_train_or_are_refused(changes: dict[str, Any], folder: Path) -> None:
    train_or_refuse(changes, folder)


def train_or_refuse(changes: dict[str, Any], folder: Path) -> None:
    """Train a changed configuration unless it is refused; every stage must end with a loss."""
    values = tiny_values(folder / "corpus.txt")
    values["training"] |= {"steps_per_stack": 2, "checkpoint_every": 1}
    config = accepted(values, changes)
    if config is None:
        return
    root = folder / str(next(_number))
    grown(config, root)
    judged = [found["facts"] for name, found in manifests(root).items() if name.startswith("validation")]
    growth = config.training.progressive
    n_grown = growth.target_stacks + bool(config.training.joint_steps)
    assert len(judged) == (n_grown if growth.enabled else 1)
    assert all(0.0 < facts["validation_loss"] < 20.0 for facts in judged)
    shutil.rmtree(root)
