"""Every key of the configuration has an effect, or a note says which setting it needs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import BELONGS_TO, notes, unused_keys
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
        (
            {
                f"{GROWTH}.trunk_strategy": "qlora",
                f"{GROWTH}.qlora_enabled": True,
                f"{GROWTH}.progressive_qlora_rank": 4,
            },
            "not used: progressive_qlora_rank (progressive_qlora: false)",
        ),
    ],
)
def test_a_key_that_has_no_effect_is_noted_with_the_setting_that_makes_it_so(values: dict[str, Any], line: str) -> None:
    assert notes(configuration(values)) == [line]


def test_a_configuration_that_uses_all_it_sets_has_no_notes() -> None:
    assert notes(StackWiseConfig()) == []
    assert notes(configuration({f"{GROWTH}.time_interpretation": "depth", f"{GROWTH}.time_per_stack": 3})) == []


RANK_8 = "taken: a progressive adapter of rank {} for trunk stacks without an adapter (trunk_strategy: qlora)"


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({f"{GROWTH}.trunk_strategy": "qlora"}, [RANK_8.format(8)]),
        ({f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.progressive_qlora_rank": 4}, [RANK_8.format(4)]),
        ({f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.stacks": [{"precision": "qlora"}]}, [RANK_8.format(8)]),
        (
            {f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.progressive_qlora_rank": 200},
            [
                RANK_8.format(128),
                "taken: progressive_qlora_rank 128 instead of 200 in layers of width 128 (model.d_model: 128)",
            ],
        ),
        (
            {f"{GROWTH}.qlora_enabled": True, f"{GROWTH}.qlora_rank": 512},
            ["taken: qlora_rank 128 instead of 512 for stacks 0, 1, 2 in layers of width 128 (model.d_model: 128)"],
        ),
        (
            {
                **(PATTERNED := {f"{GROWTH}.qlora_enabled": True, f"{GROWTH}.qlora_strategy": "progressive"}),
                f"{GROWTH}.qlora_rank_pattern": "increasing",
                f"{GROWTH}.target_stacks": 12,
            },
            [
                "taken: qlora_rank 128 instead of 256 to 32768 for stacks 4, 5, 6, 7 and 4 more in layers of width 128 "
                "(model.d_model: 128)"
            ],
        ),
        ({**PATTERNED, f"{GROWTH}.qlora_rank_pattern": "increasing"}, []),  # 64 is the largest of three stacks
        (
            {
                f"{GROWTH}.qlora_strategy": "variable",
                f"{GROWTH}.qlora_enabled": True,
                f"{GROWTH}.qlora_configs": {n: {"rank": 60 * (n + 1), "alpha": 1.0} for n in range(3)},
                "model.n_kv_heads": 2,
                "model.d_ff": 96,
            },
            [
                "taken: rank 128 instead of 180 for stack 2 in layers of width 128 (model.d_model: 128)",
                "taken: rank 96 instead of 120 to 180 for stacks 1, 2 in layers of width 96 (model.d_ff: 96)",
                "taken: rank 64 instead of 120 to 180 for stacks 1, 2 in layers of width 64 (model.n_kv_heads: 2)",
            ],
        ),
        ({f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.progressive_qlora": True}, []),
        ({f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.new_stack_precision": "qlora"}, []),
        (
            {f"{GROWTH}.trunk_strategy": "qlora", f"{GROWTH}.enabled": False},
            ["not used: trunk_strategy (enabled: false)"],
        ),
    ],
)
def test_a_value_that_is_taken_for_another_is_noted(values: dict[str, Any], lines: list[str]) -> None:
    assert notes(configuration(values)) == lines


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


@pytest.mark.parametrize("path", sorted(BELONGS_TO.keys() & NEEDS.keys()))
def test_a_key_without_the_setting_it_needs_is_noted_with_that_setting(path: str) -> None:
    config = configuration({path: other_value(path)})
    assert path in unused_keys(config)
    reasons = set(unused_keys(config).values())
    assert reasons <= {key for keys in NEEDS.values() for key in keys}
    needed = configuration(
        {**NEEDS[path], **MORE_FOR_VALUE.get((path, str(other_value(path))), {}), path: other_value(path)}
    )
    assert path not in unused_keys(needed)


@pytest.mark.parametrize(("path", "value"), [(path, value) for path in LEAVES for value in values_of(path)])
def test_every_value_is_accepted_where_it_belongs(path: str, value: Any) -> None:
    more = MORE_FOR_VALUE.get((path, str(value)), {})
    config = configuration({**NEEDS.get(path, {}), **more, path: value})
    assert config.model_dump() == configuration(config.model_dump()).model_dump()


def test_the_table_names_keys_of_the_schema_and_none_is_unused_by_default() -> None:
    named = {key for needs in BELONGS_TO.values() for need in needs for key, _ in need}
    assert {*BELONGS_TO, *NEEDS, *named} - set(LEAVES) == {f"{GROWTH}.stacks.precision", f"{GROWTH}.stacks.mode"}
    assert unused_keys(StackWiseConfig()) == {}


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
SECTIONS |= {"ValidationConfig": "validation", "TrackingConfig": "tracking", "RopeScaling": "model.rope_scaling"}


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


JUDGES = {"schema.py", "config.py", "rules.py", "unused.py", "adjusted.py"}
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
    "data.token_type",  # as tokens of this type
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "validation.every",
    "training.activation_checkpointing",
    f"{GROWTH}.max_stacks",  # it is a limit
    f"{GROWTH}.qlora_strategy",  # the ranks it gives are
    "cache.max_gb",
    "cache.keep",
    "cache.fill_workers",
    "cache.task_runner",
    "hardware.device",
    "hardware.nodes",
    "hardware.processes",
    "hardware.rendezvous",
    "hardware.shard",
    "hardware.compile",
    "hardware.deterministic",
    "hardware.threads",
    "hardware.tf32",
    "tracking.to",
    "tracking.project",
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
    "hardware.rendezvous": {"hardware.rendezvous": "node-1:29400"},
}
"""Keys whose default is not valid in their mode."""
