"""The configuration: every key, every fault at once, YAML there and back, and no key that nothing reads."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import LoraOverride, StackOverride
from stackwise_core.config.unused import BELONGS_TO, notes, unused_keys
from stackwise_core.config.yaml import parse_value
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.stages import resolve_stage
from support.configurations import (
    GROWTH,
    LEAVES,
    NEEDS,
    NOT_BUILT,
    configuration,
    faults_of,
    nested,
    other_value,
    values_of,
)

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
    "hardware": "device compile processes threads",
}


def read_yaml(text: str | bytes, **overrides: Any) -> StackWiseConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return StackWiseConfig.from_yaml(path, overrides)


# ---------------------------------------------------------------- the schema


def test_every_promised_key_exists_with_a_default() -> None:
    promised = {f"{section}.{name}" for section, names in PROMISED_KEYS.items() for name in names.split()}
    assert promised - set(LEAVES) == set()
    assert set(StackOverride.model_fields) == {"n_blocks", "precision", "mode", "steps"}
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
                "accumulation_steps": 4,
                "learning_rate": "fast",
                "corruption": "rot13",
                "stepz_per_stack": 3,
                "progressive": {"target_stacks": 5, "max_stacks": 4},
            },
            "cache": {"dtype": "int4"},
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
        "model.vocab_size": ("100", "the byte tokenizer needs at least 259"),
        "training.accumulation_steps": ("4", "must divide training.batch_size = 30"),
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
        ({"training": {"min_learning_rate": 0.5}}, "training.min_learning_rate", "0.5"),
        ({"training": {"warmup_steps": 201}}, "training.warmup_steps", "201"),
        ({"training": {"progressive": {"stacks": [{"steps": 19}]}}}, "training.warmup_steps", "20"),
        (
            {"cache": {"views": 2}, "training": {"progressive": {"training_objective": "clm"}}},
            "cache.views",
            "2",
        ),
        ({"data": {"tokenizer": "words.json"}}, "data.tokenizer", "'words.json'"),
        ({"hardware": {"processes": 9}, "training": {"accumulation_steps": 4}}, "hardware.processes", "9"),
        ({"hardware": {"processes": 2, "device": "cuda:1"}}, "hardware.device", "'cuda:1'"),
        ({"training": {"progressive": {"trunk_strategy": "qlora"}}}, f"{GROWTH}.trunk_strategy", "'qlora'"),
        (  # the last stack is in no stage's trunk
            {"training": {"progressive": {"trunk_strategy": "qlora", "stacks": [{}, {}, {"precision": "qlora"}]}}},
            f"{GROWTH}.trunk_strategy",
            "'qlora'",
        ),
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
        (
            {"training": {"progressive": {"progressive_qlora": True, "progressive_qlora_rank": 129}}},
            f"{GROWTH}.progressive_qlora_rank",
            "129",
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
            {f"{GROWTH}.trunk_strategy": "qlora"},
            "training.progressive.trunk_strategy: got 'qlora'; no trunk stack has an adapter that could train; set "
            "training.progressive.qlora_enabled or progressive_qlora, or use frozen",
        ),
        (
            {"training.loss_weighting": "elbo"},
            "training.loss_weighting: got 'elbo'; needs training.progressive.time_interpretation: input (now none), "
            "training.corruption: mask (now bert); set what is missing, or use mean",
        ),
        (
            {**ADAPTERS, f"{GROWTH}.qlora_rank": 512},
            "training.progressive.qlora_rank: got 512; of stack 0 exceeds its narrowest layer (model.d_model: "
            "128); lower it",
        ),
        (
            {
                **ADAPTERS,
                f"{GROWTH}.qlora_rank": 64,
                f"{GROWTH}.qlora_strategy": "progressive",
                f"{GROWTH}.qlora_rank_pattern": "increasing",
            },
            "training.progressive.qlora_rank: got 256; of stack 2 exceeds its narrowest layer (model.d_model: "
            "128); lower it",
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
    paths = [fault.path for fault in faults_of({"training": {**broken, "accumulation_steps": 5}})]
    assert "training.accumulation_steps" in paths


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
    config.training.progressive.trunk_strategy = "qlora"
    with pytest.raises(ConfigError) as caught:
        config.validate()
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["training.progressive.target_stacks", "training.progressive.trunk_strategy"]


def test_mutated_lists_are_caught_by_validate() -> None:
    config = StackWiseConfig()
    config.training.progressive.stacks.append({"n_blocks": "two"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError):
        config.validate()


def test_default_lists_are_not_shared() -> None:
    StackWiseConfig().training.progressive.stacks.append(StackOverride(n_blocks=3))
    assert StackWiseConfig().training.progressive.stacks == []


# ---------------------------------------------------------------- YAML


@settings(max_examples=40)
@example(name="x", seed=0, source="null", rate=2e-4, beta2=0.0, steps=20, tie=False, threads=0, n_blocks=0)
@example(
    name="true", seed=1, source="a: b # c\x85\ufeff", rate=1e16, beta2=0.5, steps=20, tie=True, threads=1, n_blocks=1
)
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    seed=st.integers(0, 2**31 - 1),
    source=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), min_size=1),
    rate=st.floats(2e-4, 1e300),
    beta2=st.floats(0, 1, exclude_max=True),
    steps=st.integers(20, 10**9),
    tie=st.booleans(),
    threads=st.integers(0, 64),
    n_blocks=st.integers(0, 128),
)
def test_yaml_round_trip(
    name: str, seed: int, source: str, rate: float, beta2: float, steps: int, tie: bool, threads: int, n_blocks: int
) -> None:
    config = StackWiseConfig.from_dict(
        {
            "run": {"name": name, "seed": seed},
            "data": {"source": source},
            "model": {"tie_embeddings": tie},
            "training": {
                "learning_rate": rate,
                "beta2": beta2,
                "steps_per_stack": steps,
                "progressive": {"stacks": [{}, {"n_blocks": n_blocks, "steps": steps}]},
            },
            "hardware": {"threads": threads},
        }
    )
    assert read_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("name", ["1e3", "12e4567"])
def test_names_that_look_like_numbers_round_trip(name: str) -> None:
    config = StackWiseConfig.from_dict({"run": {"name": name}})
    assert read_yaml(config.to_yaml()) == config


def test_next_line_round_trips() -> None:
    config = StackWiseConfig.from_dict({"data": {"source": "a\x85b"}})
    assert read_yaml(config.to_yaml()) == config


def test_to_yaml_writes_what_it_returns(tmp_path: Path) -> None:
    config = StackWiseConfig.from_dict({"run": {"seed": 3}, "data": {"source": "texts/*.txt"}})
    text = config.to_yaml(tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == text
    assert StackWiseConfig.from_yaml(tmp_path / "run.yaml") == config


def test_to_yaml_writes_utf8_in_any_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from stackwise_core.config import StackWiseConfig as C;"
        "C.from_dict({'data': {'source': chr(252) + '.txt'}}).to_yaml(sys.argv[1])"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **locale}, check=True, capture_output=True)
    assert StackWiseConfig.from_yaml(tmp_path / "run.yaml").data.source == "ü.txt"


def test_a_callable_cannot_be_written() -> None:
    config = StackWiseConfig()
    config.training.progressive.time_mapping = lambda *_: 0
    with pytest.raises(ConfigError, match=r"training\.progressive\.time_mapping"):
        config.to_yaml()


def test_numbers_of_yaml() -> None:
    text = "training: {learning_rate: 1e-3, min_learning_rate: 1E-4, weight_decay: 5e-2, gradient_clip: 2}"
    training = read_yaml(text).training
    assert (training.learning_rate, training.min_learning_rate) == (0.001, 0.0001)
    assert (training.weight_decay, training.gradient_clip) == (0.05, 2.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("+2E5", 2e5),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{0: {rank: 4}}", {0: {"rank": 4}}),
        ("clm", "clm"),
        ("e5", "e5"),
        ("cuda:0", "cuda:0"),
        ("'8'", "8"),
        ("[1, 2", "[1, 2"),
    ],
)
def test_values_on_the_command_line(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_are_applied_on_top() -> None:
    overrides = {"training.batch_size": 8, "training.progressive.target_stacks": 2, "run.seed": 7}
    config = read_yaml("training: {batch_size: 4, steps_per_stack: 50}", **overrides)
    assert (config.training.batch_size, config.training.steps_per_stack) == (8, 50)
    assert (config.training.progressive.target_stacks, config.run.seed) == (2, 7)
    with pytest.raises(ConfigError, match=r"training\.batch_size\.x: got 1; batch_size is a value"):
        read_yaml("training: {batch_size: 4}", **{"training.batch_size.x": 1})


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("run: {seed: 1}\ntraining:\n  batch_size: 4\n  batch_size: 8\n", 4, "the key 'batch_size' stands here twice"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", 2, "the key 'run' stands here twice"),
        ("run:\n  seed: 1\n bad\n", 3, "mend the YAML on this line"),
        ("run: {seed: 1\n\ndata: x}}", 3, "mend the YAML on this line"),
        ("run: !!python/object/apply:os.getcwd []\n", 1, "constructor"),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_yaml(text)
    assert caught.value.faults[0].path.endswith(f"run.yaml:{line}")


@pytest.mark.parametrize("text", ["run:\n  name: {{ name }}\n", "? [a, b]\n: 1\n"])
def test_unhashable_keys_are_broken_yaml(text: str) -> None:
    assert parse_value("{{ name }}") == "{{ name }}"
    with pytest.raises(ConfigError, match=r"run\.yaml:\d"):
        read_yaml(text)


def test_merge_keys_work() -> None:
    text = "training:\n  progressive:\n    stacks: [&a {steps: 30}, {<<: *a, n_blocks: 3}]\n"
    assert read_yaml(text).training.progressive.stacks[1] == StackOverride(steps=30, n_blocks=3)


@pytest.mark.parametrize("text", ["- run\n- data\n", "just words", "3", b"run: {name: \xff}", b"run: {name: 'a\x00'}"])
def test_no_configuration_at_all(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(text)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: got no such file"):
        StackWiseConfig.from_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        StackWiseConfig.from_yaml(tmp_path)
    assert read_yaml("# nothing but a comment\n") == StackWiseConfig()


# ---------------------------------------------------------------- unused keys are noted


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {f"{GROWTH}.time_interpretation": "depth", f"{GROWTH}.time_embedding_dim": 512, "training.mask_ratio": 0.3},
            "not used: mask_ratio, time_embedding_dim (time_interpretation: depth)",
        ),
        ({f"{GROWTH}.qlora_rank": 8}, "not used: qlora_rank (qlora_enabled: false)"),
        (
            {f"{GROWTH}.enabled": False, "training.joint_steps": 5, "training.joint_learning_rate": 1e-4},
            "not used: joint_steps, joint_learning_rate (enabled: false)",
        ),
        (
            {"training.joint_learning_rate": 1e-4, f"{GROWTH}.cache_activations": False, "cache.mode": "auto"},
            "not used: joint_learning_rate (joint_steps: 0); cache.mode (cache_activations: false)",
        ),
        ({"cache.task_runner": "dask"}, "not used: cache.task_runner (cache.fill_workers: 1)"),
        (
            {f"{GROWTH}.max_stacks": 3, f"{GROWTH}.stacks": [{}, {}, {}, {"n_blocks": 3}]},
            "not used: stacks.3 (max_stacks: 3)",
        ),
        (
            {f"{GROWTH}.enabled": False, f"{GROWTH}.stacks": [{"steps": 5}, {"n_blocks": 1}]},
            "not used: stacks.0.steps (enabled: false)",
        ),
        (
            {
                f"{GROWTH}.qlora_strategy": "variable",
                f"{GROWTH}.stacks": [{}, {"precision": "qlora"}],
                f"{GROWTH}.qlora_configs": {n: {"rank": 2, "alpha": 2.0} for n in (0, 1, 12)},
            },
            "not used: qlora_configs.0 (qlora_enabled: false); qlora_configs.12 (max_stacks: 12)",
        ),
        (
            {f"{GROWTH}.trunk_strategy": "full", "cache.max_gb": 4.0, "cache.dtype": "int8"},
            "not used: cache.dtype, cache.max_gb (trunk_strategy: full)",
        ),
        ({"training.custom_loss": "losses:loss"}, "not used: custom_loss (training_objective: mlm)"),
        ({"training.mask_ratio_min": 0.95}, "not used: mask_ratio_min (time_interpretation: none)"),
    ],
)
def test_a_key_that_has_no_effect_is_noted_with_the_setting_that_makes_it_so(values: dict[str, Any], line: str) -> None:
    assert notes(configuration(values)) == [line]


def test_a_configuration_that_uses_all_it_sets_has_no_notes() -> None:
    assert notes(StackWiseConfig()) == []
    assert notes(configuration({f"{GROWTH}.time_interpretation": "depth", f"{GROWTH}.time_per_stack": 3})) == []


@pytest.mark.parametrize("block", range(3))
def test_the_files_of_the_documentation_that_users_come_from_load(block: int) -> None:
    """Each sets the keys of several modes beside one another."""
    dual = {"qlora_enabled": True, "qlora_rank": 16, "qlora_alpha": 32}
    blocks: list[dict[str, Any]] = [
        {**dual, "progressive_qlora": True, "progressive_qlora_rank": 8, "progressive_qlora_alpha": 16},
        {
            "enabled": True,
            "trunk_strategy": "frozen",
            "new_stack_precision": "full",
            "cache_activations": True,
            **dual,
            "qlora_strategy": "simplified",
            "max_stacks": 12,
            "building_mode": "append",
            "time_interpretation": "depth",
            "time_embedding_dim": 512,
            "time_encoding_type": "sinusoidal",
            "stack_time_mapping": "linear",
            "time_per_stack": 100,
        },
        {
            "qlora_strategy": "variable",
            "qlora_configs": {n: {"rank": 8 * 2**n, "alpha": 16 * 2**n} for n in range(4)},
        },
    ]
    StackWiseConfig.from_dict({"training": {"progressive": blocks[block]}})


# ---------------------------------------------------------------- no key is accepted and ignored


MORE_FOR_VALUE: dict[tuple[str, str], dict[str, Any]] = {
    (f"{GROWTH}.qlora_strategy", "variable"): {f"{GROWTH}.qlora_configs": other_value(f"{GROWTH}.qlora_configs")},
    (f"{GROWTH}.stack_time_mapping", "custom"): {f"{GROWTH}.time_mapping": other_value(f"{GROWTH}.time_mapping")},
}


@pytest.mark.parametrize("path", sorted(BELONGS_TO.keys() & NEEDS.keys() - {f"{GROWTH}.trunk_strategy"}))
def test_a_key_without_the_setting_it_needs_is_noted_with_that_setting(path: str) -> None:
    config = configuration({path: other_value(path)})
    assert path in {unused.path for unused in unused_keys(config)}
    reasons = {unused.because for unused in unused_keys(config)}
    assert reasons <= {key for keys in NEEDS.values() for key in keys}
    needed = configuration(
        {**NEEDS[path], **MORE_FOR_VALUE.get((path, str(other_value(path))), {}), path: other_value(path)}
    )
    assert path not in {unused.path for unused in unused_keys(needed)}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path in LEAVES for value in values_of(path)])
def test_every_value_is_accepted_where_it_belongs(path: str, value: Any) -> None:
    more = MORE_FOR_VALUE.get((path, str(value)), {})
    config = configuration({**NEEDS.get(path, {}), **more, path: value})
    assert config.model_dump() == configuration(config.model_dump()).model_dump()


def test_the_table_names_keys_of_the_schema_and_none_is_unused_by_default() -> None:
    named = {key for needs in BELONGS_TO.values() for need in needs for key, _ in need}
    assert {*BELONGS_TO, *NEEDS, *named} - set(LEAVES) == {f"{GROWTH}.stacks.precision", f"{GROWTH}.stacks.mode"}
    assert unused_keys(StackWiseConfig()) == []


def test_the_bound_is_refused_without_masks() -> None:
    """Unlike an unused key it would be another loss than the one asked for."""
    (fault,) = faults_of({"training": {"loss_weighting": "elbo", "progressive": {"training_objective": "clm"}}})
    assert fault.path == "training.loss_weighting"
    assert "training_objective: mlm" in fault.allowed


def test_a_quantised_stack_with_a_progressive_adapter_joins_the_anneal() -> None:
    growth = {"new_stack_precision": "nvfp4", "progressive_qlora": True}
    StackWiseConfig.from_dict({"training": {"joint_steps": 30, "progressive": growth}})


def test_overrides_of_a_stack_reach_its_stage() -> None:
    config = StackWiseConfig.from_dict(nested("training.progressive.stacks", [{}, {"n_blocks": 5, "steps": 77}]))
    assert [(resolve_stage(config, n).n_blocks, resolve_stage(config, n).optim.steps) for n in range(3)] == [
        (2, 200),
        (5, 77),
        (2, 200),
    ]


SECTIONS = {"RunConfig": "run", "DataConfig": "data", "ModelConfig": "model", "TrainingConfig": "training"}
SECTIONS |= {"ProgressiveConfig": "training.progressive", "CacheConfig": "cache", "HardwareConfig": "hardware"}
SECTIONS |= {"ValidationConfig": "validation"}


def section_of(node: ast.expr, names: dict[str, str]) -> str | None:
    """The section an expression stands for: `config.training`, `self.config.cache`, a name bound to one."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = node.value
    if (isinstance(owner, ast.Name) and owner.id == "config") or (
        isinstance(owner, ast.Attribute) and owner.attr == "config"
    ):
        return node.attr if node.attr in SECTIONS.values() else None
    above = section_of(owner, names)
    below = f"{above}.{node.attr}"
    return below if below in SECTIONS.values() else None


def assigned(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """The targets and values of `a = b` and of `a, b = c, d`."""
    if not isinstance(node, ast.Assign):
        return []
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def keys_read_in(function: ast.FunctionDef) -> set[str]:
    names: dict[str, str] = {}
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id in SECTIONS:
            names[argument.arg] = SECTIONS[argument.annotation.id]
    for node in ast.walk(function):
        for target, value in assigned(node):
            if isinstance(target, ast.Name) and (section := section_of(value, names)):
                names[target.id] = section
    return {
        f"{section}.{node.attr}"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and (section := section_of(node.value, names))
    }


JUDGES = {"schema.py", "config.py", "rules.py", "unused.py"}
"""Modules of the configuration that read keys only to judge them."""


def keys_read_by_the_code() -> set[str]:
    """The keys that code outside the rules reads."""
    trees = [
        ast.parse(path.read_text())
        for folder in ("stackwise_core", "storage", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent.name == "config" and path.name in JUDGES)
    ]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {key for function in functions for key in keys_read_in(function)}


def test_the_search_for_readers_tells_reads_from_names() -> None:
    code = """
def f(config, x: CacheConfig):
    t = config.training
    spec.seed
    return t.batch_size, x.keep, t.progressive.stacks
"""
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    read = keys_read_in(function) & set(LEAVES)
    assert read == {"training.batch_size", "cache.keep", "training.progressive.stacks"}


@pytest.mark.parametrize("path", LEAVES)
def test_no_key_is_accepted_and_ignored(path: str, keys_read: set[str]) -> None:
    assert path in keys_read or path in NOT_BUILT


@pytest.fixture(scope="module")
def keys_read() -> set[str]:
    return keys_read_by_the_code()


# What a key changes that is part of no id: where and how fast it runs, what is kept, how a run is called.
NOT_IN_THE_PLAN = {
    "run.name",
    "data.source",  # its content is
    "training.checkpoint_every",
    "training.activation_checkpointing",
    f"{GROWTH}.max_stacks",  # it is a limit
    f"{GROWTH}.qlora_strategy",  # the ranks it gives are
    "cache.max_gb",
    "cache.keep",
    "cache.fill_workers",
    "cache.task_runner",
    "hardware.device",
    "hardware.processes",
    "hardware.compile",
    "hardware.threads",
}


@pytest.mark.parametrize("path", sorted(LEAVES.keys() - NOT_BUILT))
def test_a_key_changes_what_will_be_made(path: str) -> None:
    """Where its mode is chosen: a key that is accepted there and leaves every id as it was would be ignored."""
    needed = {**NEEDS.get(path, {}), **BEFORE.get(path, {})}
    before, after = configuration(needed), configuration({**needed, path: other_value(path)})
    assert (plan_run(before, "0" * 64) == plan_run(after, "0" * 64)) == (path in NOT_IN_THE_PLAN)


BEFORE: dict[str, dict[str, Any]] = {
    f"{GROWTH}.time_mapping": {f"{GROWTH}.time_mapping": [0, 0, 1]},
    f"{GROWTH}.qlora_configs": {f"{GROWTH}.qlora_configs": {n: {"rank": 2, "alpha": 1.0} for n in range(3)}},
}
"""Keys whose default is not valid in their mode."""
