"""The configuration: every promised key exists, and every fault is reported at once."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import LoraOverride, StackOverride
from stackwise_core.errors import ConfigError, Fault
from support.configurations import GROWTH, LEAVES, faults_of, nested

ROOT = Path(__file__).parents[2]

# Scripts are written against these names.
PROMISED_KEYS = {
    "run": "name seed",
    "data": "source tokenizer seq_len max_sequences validation_fraction",
    "model": "vocab_size d_model n_heads n_kv_heads d_ff blocks_per_stack tie_embeddings rope_theta attention",
    "training": "batch_size steps_per_stack learning_rate warmup_steps weight_decay new_stack_init joint_steps "
    "checkpoint_every mask_ratio mask_ratio_min mask_ratio_max mask_ratio_table corruption loss_weighting "
    "time_sampling",
    "training.progressive": "enabled max_stacks target_stacks building_mode trunk_strategy trunk_trainable_top "
    "new_stack_precision cache_activations training_objective qlora_enabled qlora_rank qlora_alpha qlora_strategy "
    "qlora_rank_pattern qlora_alpha_pattern qlora_configs progressive_qlora progressive_qlora_rank "
    "progressive_qlora_alpha time_interpretation time_embedding_dim time_encoding_type stack_time_mapping "
    "time_mapping time_per_stack num_time_steps stacks",
    "cache": "dtype views max_gb keep mode fill_workers task_runner",
    "hardware": "device compile deterministic processes threads tf32",
}


# ---------------------------------------------------------------- the schema


def test_every_promised_key_exists_with_a_default() -> None:
    promised = {f"{section}.{name}" for section, names in PROMISED_KEYS.items() for name in names.split()}
    assert promised - set(LEAVES) == set()
    assert set(StackOverride.model_fields) == {"n_blocks", "precision", "mode", "tail_stacks", "steps"}
    assert set(LoraOverride.model_fields) == {"rank", "alpha"}
    assert [path for path, field in LEAVES.items() if field.is_required()] == []


def test_defaults_are_valid_and_small() -> None:
    config = StackWiseConfig()
    config.validate()
    growth = config.training.progressive
    assert (growth.training_objective, growth.time_interpretation) == ("mlm", "none")
    assert (growth.building_mode, growth.trunk_strategy) == ("append", "frozen")
    assert growth.stacks == []
    assert (config.data.source, config.data.tokenizer, config.training.mask_ratio) == ("stdlib", "byte", 0.15)
    assert StackWiseConfig.from_dict({}) == config


def test_schema_has_no_unions_and_describes_every_field() -> None:
    schema = StackWiseConfig.model_json_schema()
    assert not {"anyOf", "oneOf"} & set(json.dumps(schema).replace('"', " ").split())
    sections = {"StackWiseConfig": schema, **schema["$defs"]}
    undescribed = [
        f"{section}.{name}"
        for section, parts in sections.items()
        for name, field in parts["properties"].items()
        if not {**sections.get(field.get("$ref", "").removeprefix("#/$defs/"), {}), **field}.get("description")
    ]
    assert undescribed == []


def test_importing_schema_and_identity_loads_neither_torch_nor_prefect() -> None:
    modules = "stackwise_core.config, stackwise_core.stages.identity, stackwise_core.stages.costs"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "prefect", "zarr"} & set(done.stdout.split())


# ---------------------------------------------------------------- faults


def test_every_fault_at_once() -> None:
    faults = faults_of(
        {
            "run": {"seed": -1},
            "model": {"d_model": 100, "n_heads": 3, "vocab_size": 100},
            "training": {
                "batch_size": 30,
                "learning_rate": "fast",
                "corruption": "rot13",
                "stepz_per_stack": 3,
                "progressive": {"target_stacks": 5, "max_stacks": 4},
            },
            "cache": {"dtype": "int4"},
            "hardware": {"processes": 31},
        }
    )
    found = {fault.path: (fault.received, fault.allowed) for fault in faults}
    assert len(found) == len(faults)
    assert found == {
        "run.seed": ("-1", "input should be greater than or equal to 0"),
        "training.learning_rate": ("'fast'", "input should be a valid number"),
        "training.corruption": ("'rot13'", "input should be 'bert' or 'mask'"),
        "training.stepz_per_stack": ("3", "there is no such key; did you mean steps_per_stack?"),
        "model.n_heads": ("3", "must divide model.d_model = 100"),
        "model.vocab_size": ("100", "the byte tokenizer needs at least 259; 0 takes what it needs"),
        "hardware.processes": ("31", "each process needs a row of every batch: at most 30"),
        "training.progressive.target_stacks": ("5", "must not exceed training.progressive.max_stacks = 4"),
        "cache.dtype": ("'int4'", "input should be 'bfloat16', 'float16', 'float32', 'int8' or 'fp8'"),
    }


@pytest.mark.parametrize(
    ("values", "path", "received"),
    [
        ({"model": {"d_model": 36, "n_heads": 4}}, "model.n_heads", "4"),  # heads of 9 channels
        ({"model": {"n_heads": 4, "n_kv_heads": 3}}, "model.n_kv_heads", "3"),
        (
            {"model": {"attention": "bidirectional"}, "training": {"progressive": {"training_objective": "clm"}}},
            "model.attention",
            "'bidirectional'",
        ),
        ({"model": {"vocab_size": 1}}, "model.vocab_size", "1"),
        ({"data": {"tokenizer": "words.json"}}, "data.tokenizer", "'words.json'"),
        ({"hardware": {"processes": 9}, "data": {"max_sequences": 8}}, "hardware.processes", "9"),
        ({"hardware": {"processes": 2, "device": "cuda:1"}}, "hardware.device", "'cuda:1'"),
        (
            {"training": {"progressive": {"trunk_strategy": "full", "stacks": [{}, {"precision": "nvfp4"}]}}},
            f"{GROWTH}.stacks.1.precision",
            "'nvfp4'",
        ),
        (
            {"training": {"new_stack_init": "random", "progressive": {"stacks": [{}, {"precision": "qlora"}]}}},
            "training.new_stack_init",
            "'random'",
        ),
        (
            {"model": {"d_ff": 24}, "training": {"progressive": {"stacks": [{}, {"precision": "nvfp4"}]}}},
            "model.d_ff",
            "24",
        ),
        (
            {"training": {"joint_steps": 5, "progressive": {"stacks": [{}, {"precision": "nvfp4"}]}}},
            "training.joint_steps",
            "5",
        ),
        (
            {"training": {"progressive": {"qlora_enabled": True, "qlora_strategy": "variable"}}},
            f"{GROWTH}.qlora_configs",
            "0 entries",
        ),
    ],
)
def test_each_rule_across_fields(values: dict[str, Any], path: str, received: str) -> None:
    (fault,) = faults_of(values)
    assert (fault.path, fault.received) == (path, received)
    assert fault.allowed


ADAPTERS = {f"{GROWTH}.qlora_enabled": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {f"{GROWTH}.new_stack_precision": "qlora", "training.new_stack_init": "random"},
            "training.new_stack_init: got 'random'; stacks 1, 2 are NF4 and train adapters only, so their "
            "weights must be "
            "copies; use auto or copy",
        ),
        (
            {f"{GROWTH}.target_stacks": 7, f"{GROWTH}.new_stack_precision": "qlora", "training.new_stack_init": "zero"},
            "training.new_stack_init: got 'zero'; stacks 1, 2, 3, 4 and 2 more are NF4 and train adapters only, "
            "so their weights must be copies; use auto or copy",
        ),
        (
            {f"{GROWTH}.time_interpretation": "depth", f"{GROWTH}.num_time_steps": 2},
            "training.progressive.num_time_steps: got 2; stack 2 gets the step 2, outside 0 to 1; raise it, or lower "
            "training.progressive.time_per_stack (now 1)",
        ),
        (
            {
                **ADAPTERS,
                f"{GROWTH}.qlora_strategy": "variable",
                f"{GROWTH}.qlora_configs": {1: {"rank": 2, "alpha": 2.0}},
            },
            "training.progressive.qlora_configs: got 1 entries; stacks 0, 2 are without an entry, and each "
            "adapter needs one (given: 1)",
        ),
        (
            {f"{GROWTH}.new_stack_precision": "nvfp4", "model.d_model": 72},
            "model.d_model: got 72; stacks 0, 1, 2 are NVFP4: 16 must divide it; change it, or use bfloat16",
        ),
        (
            {f"{GROWTH}.stacks": [{}, {"precision": "nvfp4"}], "model.d_model": 96, "model.n_kv_heads": 1},
            "model.n_kv_heads: got 1; stack 1 is NVFP4: 16 must divide the layers of width 24 that it gives; "
            "change it, or use bfloat16",
        ),
        (
            {f"{GROWTH}.new_stack_precision": "nvfp4", "training.joint_steps": 10},
            "training.joint_steps: got 10; the joint anneal trains only adapters of quantised stacks; stacks 0, "
            "1, 2 are NVFP4 without any; set training.progressive.qlora_enabled",
        ),
        (
            {f"{GROWTH}.new_stack_precision": "nvfp4", f"{GROWTH}.trunk_strategy": "full"},
            "training.progressive.new_stack_precision: got 'nvfp4'; trunk_strategy full trains these weights, "
            "which would be quantised; use full, half or bfloat16",
        ),
        (
            {"training.loss_weighting": "elbo"},
            "training.loss_weighting: got 'elbo'; needs training.progressive.time_interpretation: input (now none), "
            "training.corruption: mask (now bert); set what is missing, or use mean",
        ),
        (
            {
                **ADAPTERS,
                f"{GROWTH}.target_stacks": 1024,
                f"{GROWTH}.max_stacks": 1024,
                f"{GROWTH}.qlora_strategy": "progressive",
                f"{GROWTH}.qlora_alpha_pattern": "increasing",
            },
            "training.progressive.qlora_alpha_pattern: got 'increasing'; gives stack 1019 an infinite alpha; "
            "use another",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_has_one_sentence(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """As a person meets it: from a file, with what to change, whatever the number of stacks that it concerns."""
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: wrong}\n")
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_yaml(path, changes)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("modl", "did you mean model?"),
        ("training.progressive.target_stack", "did you mean target_stacks?"),
        ("cache.zzz", "known here: dtype, views, max_gb, keep, mode, fill_workers, task_runner"),
    ],
)
def test_unknown_keys_are_faults_with_a_hint(path: str, hint: str) -> None:
    (fault,) = faults_of(nested(path, 1))
    assert (fault.path, fault.received, fault.allowed) == (path, "1", f"there is no such key; {hint}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.batch_size", "8"),
        ("training.batch_size", 8.0),
        ("training.batch_size", True),
        ("training.progressive.cache_activations", "yes"),
        ("training.learning_rate", math.nan),
        ("run.name", "a/b"),
        ("run.name", "a\n"),
        ("hardware.device", "gpu"),
        ("training", None),
        ("data.validation_fraction", 0.5),
    ],
)
def test_wrong_types_and_ranges_are_faults(path: str, value: Any) -> None:
    (fault,) = faults_of(nested(path, value))
    assert (fault.path, fault.received) == (path, repr(value))


@pytest.mark.parametrize("path", ["training.weight_decay", "training.learning_rate", "cache.max_gb"])
def test_infinity_is_a_fault(path: str) -> None:
    assert path in {fault.path for fault in faults_of(nested(path, math.inf))}


@pytest.mark.parametrize(
    "broken",
    [
        {"mask_ratio_table": [2.0, 0.5, 3.0]},
        {"progressive": {"stacks": [1, 2]}},
        {"progressive": {"qlora_configs": {0: {"rank": 1}}}},
    ],
)
def test_rules_are_told_beside_faults_inside_lists(broken: dict[str, Any]) -> None:
    paths = [fault.path for fault in faults_of({"training": {**broken, "loss_weighting": "elbo"}})]
    assert "training.loss_weighting" in paths


def test_no_fault_is_told_about_a_value_nobody_gave() -> None:
    faults = faults_of({"training": {"progressive": {"target_stacks": "many", "max_stacks": 2}}})
    assert [fault.received for fault in faults] == ["'many'"]


def test_config_error_survives_pickling() -> None:
    error = ConfigError([Fault("a.b", "1", "2 is expected")])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.faults) == (str(error), error.faults)


# ---------------------------------------------------------------- assignment and mutation


def test_assignment_is_checked() -> None:
    config = StackWiseConfig()
    with pytest.raises(ValidationError):
        config.training.batch_size = 0
    with pytest.raises(ValidationError):
        config.training.progressive.building_mode = "sideways"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError):
        config.training.progressives = 1  # pyright: ignore[reportAttributeAccessIssue]
    config.training.batch_size = 8
    assert config.training.batch_size == 8


def test_nested_mutation_is_caught_by_validate() -> None:
    config = StackWiseConfig()
    config.training.progressive.max_stacks = 2
    config.training.progressive.trunk_strategy = "full"
    config.training.progressive.new_stack_precision = "nvfp4"
    with pytest.raises(ConfigError) as caught:
        config.validate()
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["training.progressive.target_stacks", "training.progressive.new_stack_precision"]


def test_mutated_lists_are_caught_by_validate() -> None:
    config = StackWiseConfig()
    config.training.progressive.stacks.append({"n_blocks": "two"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError):
        config.validate()


def test_default_lists_are_not_shared() -> None:
    StackWiseConfig().training.progressive.stacks.append(StackOverride(n_blocks=3))
    assert StackWiseConfig().training.progressive.stacks == []
