"""A quick try is one key: alone, on the defaults and on the quickstart, each is accepted or refused for a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import plan_run
from support.configurations import CORPUS, GROWTH, LEAVES, NOT_BUILT, configuration, values_of

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

ORDINARY: dict[str, list[Any]] = {
    "run.seed": [7],
    "data.seq_len": [32, 1024],
    "data.max_sequences": [8, 1000],
    "model.vocab_size": [259, 512],
    "model.d_model": [64, 256],
    "model.n_heads": [1, 2, 8],
    "model.n_kv_heads": [1, 2, 4],
    "model.d_ff": [32, 1024],
    "training.batch_size": [1, 7, 256],
    "training.accumulation_steps": [2, 3, 64],
    "training.steps_per_stack": [1, 5, 10_000],
    "training.learning_rate": [1e-5, 1e-1],
    "training.min_learning_rate": [0.0, 1e-2],
    "training.warmup_steps": [0, 1000],
    "training.joint_steps": [1, 100],
    "training.mask_ratio_min": [0.5, 0.95],
    "training.mask_ratio_max": [0.1, 1.0],
    "cache.views": [1, 4],
    "cache.fill_workers": [2],
    "hardware.processes": [2, 9, 33],
    "hardware.nodes": [2],
    f"{GROWTH}.max_stacks": [1, 3, 64],
    f"{GROWTH}.target_stacks": [1, 2, 12, 13],
    f"{GROWTH}.qlora_rank": [1, 1024],
    f"{GROWTH}.progressive_qlora_rank": [1, 1024],
    f"{GROWTH}.trunk_trainable_top": [1, 5],
    f"{GROWTH}.time_per_stack": [100],
    f"{GROWTH}.num_time_steps": [1, 1000],
    f"{GROWTH}.stacks": [[{"steps": 5}], [{}, {"precision": "qlora"}], [{}, {"mode": "prepend"}]],
    f"{GROWTH}.time_embedding_dim": [7, 512],
}
LIMIT = "a limit is the user's own: growing past it, or lowering it below what is there, is not what it is for"
REFUSED: dict[tuple[str, Any], str] = {
    (f"{GROWTH}.max_stacks", 1): LIMIT,
    (f"{GROWTH}.target_stacks", 13): LIMIT,
    ("training.loss_weighting", "elbo"): "another loss than asked for: the bound needs time as an input and all [MASK]",
    ("hardware.nodes", 2): "nobody but the user knows where the nodes meet",
    ("hardware.processes", 33): "more processes than rows of a batch: each idle one would only wait",
}
REFUSED_OF_CLM: dict[tuple[str, Any], str] = {
    ("model.attention", "bidirectional"): "every position would see its own target",
    (f"{GROWTH}.time_interpretation", "input"): "nothing is corrupted, so that a time step would mean nothing",
}
REFUSED_OF_INSERT: dict[tuple[str, Any], str] = {
    (f"{GROWTH}.new_stack_precision", "nvfp4"): "in the tail it would have to train, and has no adapter; qlora has one",
}
BASES = {"defaults": REFUSED, "quickstart": REFUSED | REFUSED_OF_CLM | REFUSED_OF_INSERT}


def with_one(base: str, path: str, value: Any) -> StackWiseConfig:
    if base == "defaults":
        return configuration({path: value})
    return StackWiseConfig.from_yaml(QUICKSTART, {path: value})


@pytest.mark.parametrize("base", BASES)
def test_one_key_alone_is_accepted_or_refused_for_a_reason(base: str) -> None:
    refused: dict[tuple[str, Any], str] = {}
    tried = {path: [*values_of(path), *ORDINARY.get(path, [])] for path in LEAVES.keys() - NOT_BUILT}
    assert all(tried.values())
    for path, value in ((path, value) for path, values in tried.items() for value in values):
        try:
            config = with_one(base, path, value)
        except ConfigError as error:
            refused[path, value] = str(error)
            continue
        notes(config)
        if path not in ("data.source", "training.custom_loss") and value != "custom":
            assert plan_run(config, CORPUS, 10**6).stages
    assert refused.keys() == BASES[base].keys(), refused
    for (path, _), message in refused.items():
        assert message.count("\n") == 0
        assert path.rpartition(".")[2] in message or "max_stacks" in message


@pytest.mark.parametrize(
    ("base", "path", "value", "line"),
    [
        ("quickstart", "training.steps_per_stack", 5, "warmup_steps 5 instead of 20 (steps of the first stage: 5)"),
        ("defaults", "training.steps_per_stack", 5, "warmup_steps 5 instead of 20 (steps_per_stack: 5)"),
        ("defaults", "training.warmup_steps", 1000, "warmup_steps 200 instead of 1000 (steps_per_stack: 200)"),
        ("defaults", "training.joint_steps", 10, "warmup_steps 10 instead of 20 (joint_steps: 10)"),
        (
            "defaults",
            "training.learning_rate",
            1e-5,
            "min_learning_rate 1e-05 instead of 0.0002 (learning_rate: 1e-05)",
        ),
        (
            "defaults",
            "training.min_learning_rate",
            0.01,
            "min_learning_rate 0.002 instead of 0.01 (learning_rate: 0.002)",
        ),
        ("defaults", "training.accumulation_steps", 64, "accumulation_steps 32 instead of 64 (batch_size: 32)"),
        ("quickstart", "data.max_sequences", 8, "batch_size 8 instead of 32 (data.max_sequences: 8)"),
        (
            "defaults",
            f"{GROWTH}.stacks",
            [{"steps": 5}, {"steps": 9}, {"steps": 30}],
            "warmup_steps 5 to 9 instead of 20 for stacks 0, 1 (steps: 5 to 9)",
        ),
    ],
)
def test_what_one_key_settles_is_taken_with_a_note(base: str, path: str, value: Any, line: str) -> None:
    config = with_one(base, path, value)
    assert notes(config) == [f"taken: {line}"]
    # What is taken is what enters ids: the same file with the values of the note is the same run.
    name, taken = line.split()[:2]
    if not path.endswith(("stacks", "joint_steps")):  # where not every stage takes it
        section, kind = config.training, type(getattr(config.training, name))
        setattr(section, name, kind(taken))
        before, after = plan_run(with_one(base, path, value), CORPUS), plan_run(config, CORPUS)
        assert before.stages[0] == after.stages[0]


def test_what_is_settled_by_several_keys() -> None:
    anneal = {"training.joint_steps": 50, "training.joint_learning_rate": 1e-4}
    assert notes(configuration(anneal)) == [
        "taken: min_learning_rate 0.0001 instead of 0.0002 (joint_learning_rate: 0.0001)"
    ]
    shared = {"hardware.processes": 9, "training.accumulation_steps": 4}
    assert notes(configuration(shared)) == ["taken: accumulation_steps 3 instead of 4 (hardware.processes: 9)"]
    assert notes(configuration({"hardware.processes": 8, "training.accumulation_steps": 4})) == []
    exponential = {f"{GROWTH}.time_interpretation": "depth", f"{GROWTH}.stack_time_mapping": "exponential"}
    assert notes(configuration(exponential)) == [
        "taken: num_time_steps 20 instead of 12 (stack_time_mapping: exponential, max_stacks: 12)"
    ]
    whole = {f"{GROWTH}.enabled": False, "training.steps_per_stack": 5, f"{GROWTH}.stacks": [{"n_blocks": 1}]}
    assert notes(configuration(whole)) == ["taken: warmup_steps 5 instead of 20 (steps_per_stack: 5)"]
    all_their_own = {"training.steps_per_stack": 5, f"{GROWTH}.stacks": [{"steps": 50}] * 3}
    assert notes(configuration(all_their_own)) == []
