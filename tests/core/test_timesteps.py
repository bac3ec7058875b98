"""Diffusion time against its closed forms: steps of stacks, ratios of steps, faults, the embedding of a step."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.rules import time_faults
from stackwise_core.config.stacks import (
    mask_ratio_of,
    n_time_steps,
    resolve_time_input,
    stack_time_step,
)
from stackwise_core.config.unused import unused_keys
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import INIT_STD, Stack, TokenEmbedding, initialise
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape, TimeShape

DEPTH, INPUT = {"time_interpretation": "depth"}, {"time_interpretation": "input"}
CUSTOM = {**DEPTH, "stack_time_mapping": "custom"}


def config_of(growth: dict[str, Any], **training: Any) -> StackWiseConfig:
    """A configuration by schema alone: what its rules say about time is what is tested here."""
    return StackWiseConfig.model_validate({"training": {**training, "progressive": growth}})


def with_function(function: Any, key: str = "time_mapping", **growth: Any) -> StackWiseConfig:
    """A configuration of the library, where a mapping may be a function."""
    config = config_of({**CUSTOM, **growth})
    object.__setattr__(config.training.progressive, key, function)
    return config


def faults_of(config: StackWiseConfig) -> list[str]:
    return [str(fault) for fault in time_faults(config)]


# ---------------------------------------------------------------- steps and ratios


def test_number_of_steps() -> None:
    assert n_time_steps(config_of({"max_stacks": 5, "time_per_stack": 3})) == 15
    assert n_time_steps(config_of({"max_stacks": 5, "time_per_stack": 3, "num_time_steps": 40})) == 40


def test_time_as_an_input_has_a_thousand_steps_and_a_table_one_for_each_of_its_ratios() -> None:
    assert n_time_steps(config_of({**INPUT, "max_stacks": 5, "time_per_stack": 3})) == 1000
    for kind in (INPUT, DEPTH):
        table = config_of({**kind, "max_stacks": 5}, mask_ratio_table=[0.1, 0.4, 0.5, 0.9])
        assert n_time_steps(table) == 4
        assert [mask_ratio_of(table, t) for t in range(4)] == [0.1, 0.4, 0.5, 0.9]
    unused = {"mask_ratio_table": [0.1, 0.4]}
    assert n_time_steps(config_of(INPUT, **unused, loss_weighting="elbo")) == 1000
    assert n_time_steps(config_of({**DEPTH, "training_objective": "clm"}, **unused)) == 12


def test_linear_steps() -> None:
    config = config_of({**DEPTH, "max_stacks": 5, "time_per_stack": 3})
    assert [stack_time_step(config, c) for c in range(5)] == [0, 3, 6, 9, 12]


def test_linear_never_clamps() -> None:
    config = config_of({**DEPTH, "max_stacks": 5, "time_per_stack": 3, "num_time_steps": 9, "target_stacks": 3})
    assert stack_time_step(config, 2) == 6
    assert faults_of(config) == []
    with pytest.raises(ConfigError, match=r"num_time_steps: got 9; stack 3 gets the step 9, outside 0 to 8; raise it"):
        stack_time_step(config, 3)
    config.training.progressive.target_stacks = 4
    (fault,) = faults_of(config)
    assert "stack 3 gets the step 9" in fault


@given(st.integers(2, 40), st.integers(1, 400))
def test_exponential_steps(n_stacks: int, n_steps: int) -> None:
    config = config_of(
        {**DEPTH, "stack_time_mapping": "exponential", "max_stacks": n_stacks, "num_time_steps": n_steps}
    )
    steps = [stack_time_step(config, c) for c in range(n_stacks)]
    assert (steps[0], steps[-1]) == (0, n_steps - 1)
    for c, step in enumerate(steps):
        exact = (n_steps - 1) * (math.exp(c / (n_stacks - 1)) - 1) / (math.e - 1)
        assert abs(step - exact) <= 0.5 + 1e-9


@pytest.mark.parametrize("n_stacks", [*range(1, 40), 100, 1024])
@pytest.mark.parametrize("per_stack", [1, 2, 9])
def test_exponential_steps_are_as_many_as_stacks_need(n_stacks: int, per_stack: int) -> None:
    """Where nothing says how many: those of `time_per_stack` if all stacks differ, or else more of them."""
    growth = {**DEPTH, "stack_time_mapping": "exponential", "max_stacks": n_stacks, "time_per_stack": per_stack}
    config, usual = config_of(growth), n_stacks * per_stack
    steps = [stack_time_step(config, c) for c in range(n_stacks)]
    assert len(set(steps)) == n_stacks
    assert steps[-1] == (n_time_steps(config) - 1 if n_stacks > 1 else 0)
    given = config_of({**growth, "num_time_steps": usual})
    distinct = len({stack_time_step(given, c) for c in range(n_stacks)}) == n_stacks
    assert n_time_steps(config) == (
        usual if distinct else 1 + math.ceil((math.e - 1) / (math.exp(1 / (n_stacks - 1)) - 1))
    )


def test_exponential_of_a_single_stack_is_the_first_step() -> None:
    config = config_of({**DEPTH, "stack_time_mapping": "exponential", "max_stacks": 1, "num_time_steps": 9})
    assert stack_time_step(config, 0) == 0


@pytest.mark.parametrize("c", [-1, 12])
@pytest.mark.parametrize("mapping", ["linear", "exponential"])
def test_there_is_no_such_stack(mapping: str, c: int) -> None:
    with pytest.raises(ConfigError, match=f"stack_idx: got {c}; .*max_stacks allows stacks 0 to 11"):
        stack_time_step(config_of({**DEPTH, "stack_time_mapping": mapping, "num_time_steps": 1000}), c)


def test_custom_steps_from_a_list() -> None:
    config = config_of({**CUSTOM, "time_mapping": [0, 4, 4, 11]})
    assert [stack_time_step(config, c) for c in range(4)] == [0, 4, 4, 11]
    assert faults_of(config) == []


@pytest.mark.parametrize("key", ["time_mapping", "stack_time_mapping"])
def test_custom_steps_from_a_function(key: str) -> None:
    config = with_function(lambda c, stacks, steps: steps - stacks + c - 1, key, max_stacks=5, num_time_steps=9)
    assert [stack_time_step(config, c) for c in range(5)] == [3, 4, 5, 6, 7]
    assert faults_of(config) == []


@pytest.mark.parametrize("told", [True, False])
def test_custom_steps_by_name_come_from_the_path_and_not_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    function = "def f(stack_idx, max_stacks, num_time_steps):\n    return 2 * stack_idx\n"
    (tmp_path / "my_mapping.py").write_text("import my_helper\n" + function)
    (tmp_path / "my_helper.py").touch()
    program = (
        "from stackwise_core.config import StackWiseConfig\n"
        "from stackwise_core.config.rules import time_faults\n"
        "from stackwise_core.config.stacks import stack_time_step\n"
        "import sys; before = list(sys.path)\n"
        "config = StackWiseConfig()\n"
        "growth = config.training.progressive\n"
        "growth.time_interpretation, growth.stack_time_mapping = 'depth', 'custom'\n"
        "growth.time_mapping = 'my_mapping:f'\n"
        "print([stack_time_step(config, c) for c in range(4)], list(time_faults(config)), sys.path == before)\n"
        "assert 'torch' not in sys.modules\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), *([str(tmp_path)] if told else [])]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if told:
        assert done.stdout == "[0, 2, 4, 6] [] True\n", done.stderr
    else:
        assert "No module named 'my_mapping'); say where the module is, such as PYTHONPATH=." in done.stderr


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ([], "got 0 steps; has no step for stack 0"),
        ([0, 1], "got 2 steps; has no step for stack 2"),
        ([0, 1, 12], "stack 2 gets the step 12, outside 0 to 11"),
        ([0, 5, 4], "falls from 5 to 4 between stacks 1 and 2; steps must not decrease"),
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError"),
        ("math:no_such_function", "module math has nothing called 'no_such_function'"),
        ("math:pi", "module math has no function called 'pi'"),
        ("math:sqrt", "fails for stack 0 with TypeError"),
        ("operator:truediv", "fails for stack 0 with TypeError"),
        (lambda c, stacks, steps: c / 2, "returns 0.0 for stack 0; an int is needed"),
        (lambda c, stacks, steps: -1, "stack 0 gets the step -1, outside 0 to 11"),
        (lambda c, stacks, steps: 5 - c, "falls from 5 to 4 between stacks 0 and 1"),
        (lambda c, stacks, steps: 1 // (2 - c), "fails for stack 2 with ZeroDivisionError"),
    ],
)
def test_a_wrong_mapping_is_one_fault(mapping: Any, says: str) -> None:
    config = with_function(mapping) if callable(mapping) else config_of({**CUSTOM, "time_mapping": mapping})
    (fault,) = faults_of(config)
    assert fault.startswith("training.progressive.time_mapping: got ")
    assert says in fault


def test_ratios_are_interpolated() -> None:
    config = config_of({**DEPTH, "num_time_steps": 5}, mask_ratio_min=0.2, mask_ratio_max=0.6)
    assert [mask_ratio_of(config, t) for t in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], rel=1e-12)
    assert mask_ratio_of(config_of({**DEPTH, "num_time_steps": 1}), 0) == 0.15
    assert type(mask_ratio_of(config, 0)) is float


def test_a_table_comes_first() -> None:
    config = config_of({**DEPTH, "num_time_steps": 3}, mask_ratio_table=[0.1, 0.5, 1.0])
    assert [mask_ratio_of(config, t) for t in range(3)] == [0.1, 0.5, 1.0]


def test_the_bound_sets_its_own_ratios() -> None:
    """The mean over steps is the mean of (1 - 1e-3) t + 1e-3 over t in [0, 1)."""
    config = config_of({**INPUT, "num_time_steps": 10}, loss_weighting="elbo", corruption="mask")
    ratios = [mask_ratio_of(config, t) for t in range(10)]
    assert ratios == pytest.approx([0.999 * (t + 0.5) / 10 + 0.001 for t in range(10)], rel=1e-12)
    assert sum(ratios) / 10 == pytest.approx(0.999 / 2 + 0.001, rel=1e-12)


@pytest.mark.parametrize("t", [-1, 12])
def test_there_is_no_such_step(t: int) -> None:
    with pytest.raises(ConfigError, match=f"time_step: got {t}; there are 12 time steps: 0 to 11"):
        mask_ratio_of(config_of(DEPTH, mask_ratio_table=[0.5] * 12), t)


def test_time_is_an_input_only_of_the_masked_objective() -> None:
    for growth in ({}, DEPTH, {**INPUT, "training_objective": "clm"}, {**INPUT, "training_objective": "custom"}):
        assert resolve_time_input(config_of(growth)) is None
    time = resolve_time_input(config_of(INPUT, time_sampling="stratified"))
    assert time is not None
    assert (time.n_steps, time.sampling, time.ratio_min, time.ratio_max) == (1000, "stratified", 0.15, 0.90)


def test_ratios_that_are_not_used_are_not_part_of_the_value() -> None:
    table = {"mask_ratio_table": [0.5] * 12}
    elbo = {"loss_weighting": "elbo", "corruption": "mask"}
    for training in (table, elbo):
        plain = resolve_time_input(config_of(INPUT, **training))
        assert plain == resolve_time_input(config_of(INPUT, **training, mask_ratio_min=0.3, mask_ratio_max=0.4))
    assert resolve_time_input(config_of(INPUT)) != resolve_time_input(config_of(INPUT, mask_ratio_min=0.3))


# ---------------------------------------------------------------- faults


VALID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"mask_ratio": 0.3}),
    (DEPTH, {}),
    ({**DEPTH, "time_per_stack": 2}, {"mask_ratio_min": 0.2, "mask_ratio_max": 0.5}),
    ({**DEPTH, "num_time_steps": 4, "stack_time_mapping": "exponential"}, {"mask_ratio_table": [0.1, 0.1, 0.3, 0.4]}),
    ({**DEPTH, "stack_time_mapping": "exponential", "time_per_stack": 9}, {}),
    ({**DEPTH, "training_objective": "clm"}, {}),
    (INPUT, {"time_sampling": "stratified"}),
    ({**INPUT, "time_embedding_dim": 7, "time_encoding_type": "learned", "time_per_stack": 4}, {}),
    ({**INPUT, "num_time_steps": 3}, {"mask_ratio_table": [0.5, 0.1, 0.9]}),
    (INPUT, {"mask_ratio_table": [0.5, 0.1, 0.9]}),
    (DEPTH, {"mask_ratio_table": [0.1, 0.5, 0.9]}),
    (INPUT, {"loss_weighting": "elbo", "corruption": "mask"}),
]


@pytest.mark.parametrize(("growth", "training"), VALID)
def test_no_fault(growth: dict[str, Any], training: dict[str, Any]) -> None:
    if growth.get("num_time_steps") == 4:
        growth = {**growth, "max_stacks": 3}
    assert faults_of(config_of(growth, **training)) == []


G, R = "training.progressive", "training"
FAULTS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {**DEPTH, "stack_time_mapping": "exponential", "num_time_steps": 12},
        {},
        [f"{G}.stack_time_mapping: got 'exponential'; gives stacks 1 and 2 the same step 1; raise {G}.num_time_steps"],
    ),
    (
        {**DEPTH, "stack_time_mapping": "exponential"},
        {"mask_ratio_table": [0.1] * 12},
        [f"{G}.stack_time_mapping: got 'exponential'; gives stacks 1 and 2 the same step 1; give mask_ratio_table"],
    ),
    (
        DEPTH,
        {"mask_ratio_table": [0.1, 0.2]},
        [f"{R}.mask_ratio_table: got 2 ratios; stack 2 gets the step 2, outside 0 to 1; give more ratios, or lower"],
    ),
    (
        {**INPUT, "num_time_steps": 12},
        {"mask_ratio_table": [0.1] * 13},
        [f"{R}.mask_ratio_table: got 13 ratios; needs a ratio for each"],
    ),
    (
        {**DEPTH, "num_time_steps": 3},
        {"mask_ratio_table": [0.1, 0.3, 0.2]},
        [f"{R}.mask_ratio_table: got [0.1, 0.3, 0.2]; must not decrease"],
    ),
    ({**INPUT, "training_objective": "clm"}, {}, [f"{G}.time_interpretation: got 'input'; time as an input needs"]),
    ({**INPUT, "training_objective": "custom"}, {}, [f"{G}.time_interpretation: got 'input'; time as an input needs"]),
    ({**INPUT, "time_embedding_dim": 7}, {}, [f"{G}.time_embedding_dim: got 7; a sinusoidal encoding"]),
    # the bound
    (
        {},
        {"loss_weighting": "elbo"},
        [
            f"{R}.loss_weighting: got 'elbo'; needs {G}.time_interpretation: input (now none), "
            f"{R}.corruption: mask (now bert); set what is missing, or use mean",
        ],
    ),
    (
        {**DEPTH, "training_objective": "clm"},
        {"loss_weighting": "elbo", "corruption": "mask"},
        [
            f"{R}.loss_weighting: got 'elbo'; needs {G}.time_interpretation: input (now depth), "
            f"{G}.training_objective: mlm (now clm); set",
        ],
    ),
]


@pytest.mark.parametrize(("growth", "training", "expected"), FAULTS)
def test_each_broken_rule_is_told_once(growth: dict[str, Any], training: dict[str, Any], expected: list[str]) -> None:
    faults = faults_of(config_of(growth, **training))
    assert len(faults) == len(expected), faults
    for fault, beginning in zip(sorted(faults), sorted(expected), strict=True):
        assert fault.startswith(beginning)


UNUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        INPUT,
        {"loss_weighting": "elbo", "corruption": "mask", "mask_ratio_table": [0.1] * 3, "mask_ratio_min": 0.1},
        "mask_ratio_table mask_ratio_min",
    ),
    (
        {"time_embedding_dim": 7, "time_encoding_type": "learned", "stack_time_mapping": "exponential"},
        {},
        "time_embedding_dim time_encoding_type stack_time_mapping",
    ),
    (
        {"time_mapping": [0], "time_per_stack": 2, "num_time_steps": 5},
        {},
        "time_mapping time_per_stack num_time_steps",
    ),
    (
        {},
        {"mask_ratio_min": 0.95, "mask_ratio_max": 0.8, "mask_ratio_table": [0.5], "time_sampling": "stratified"},
        "mask_ratio_min mask_ratio_max mask_ratio_table time_sampling",
    ),
    (
        {**DEPTH, "time_mapping": [0, 1, 2]},
        {"mask_ratio": 0.3, "time_sampling": "per_sequence"},
        "time_mapping mask_ratio time_sampling",
    ),
    (
        {**DEPTH, "num_time_steps": 12, "time_per_stack": 2, "stack_time_mapping": "custom", "time_mapping": [0, 1, 2]},
        {"mask_ratio_min": 0.2, "mask_ratio_table": [0.5] * 12},
        "time_per_stack mask_ratio_min",
    ),
    (
        {**INPUT, "num_time_steps": 12, "time_per_stack": 2, "stack_time_mapping": "exponential"},
        {"mask_ratio": 0.3},
        "stack_time_mapping time_per_stack mask_ratio",
    ),
    (INPUT, {}, ""),
    ({**INPUT, "time_per_stack": 2}, {}, "time_per_stack"),
    ({**CUSTOM, "time_mapping": [0, 0, 0], "time_per_stack": 2}, {}, ""),  # which sets how many there are
    ({**CUSTOM, "time_mapping": [0, 0, 0], "time_per_stack": 2}, {"mask_ratio_table": [0.5]}, "time_per_stack"),
    ({**DEPTH, "time_per_stack": 2}, {"mask_ratio_table": [0.5] * 9}, ""),
    (
        {**CUSTOM, "time_mapping": [0, 0, 0], "time_per_stack": 2, "training_objective": "clm"},
        {"mask_ratio_table": [0.5]},
        "mask_ratio_table",
    ),
    (
        {**DEPTH, "training_objective": "clm"},
        {"mask_ratio_min": 0.2, "mask_ratio_table": [0.5], "corruption": "mask"},
        "mask_ratio_min mask_ratio_table corruption",
    ),
]


@pytest.mark.parametrize(("growth", "training", "names"), UNUSED)
def test_keys_of_another_kind_of_time_are_unused_and_not_refused(
    growth: dict[str, Any], training: dict[str, Any], names: str
) -> None:
    config = config_of(growth, **training)
    assert faults_of(config) == []
    assert {path.rpartition(".")[2] for path in unused_keys(config)} == set(names.split())


# ---------------------------------------------------------------- the embedding of a step

N_STEPS, V, D = 50, 40, 16


def embedding_of(encoding: Any, dim: int, d_model: int = D) -> TokenEmbedding:
    embedding = TokenEmbedding(shape_of(TimeShape(n_steps=N_STEPS, dim=dim, encoding=encoding), d_model))
    initialise(embedding, 5)
    return embedding


def shape_of(time: TimeShape | None, d_model: int = D) -> ModelShape:
    values = {"vocab_size": V, "d_model": d_model, "n_heads": 2, "n_kv_heads": 2, "d_ff": 24, "causal": False}
    return ModelShape.model_validate({**values, "time": time})


def test_without_time_the_embedding_is_as_it_was() -> None:
    embedding, tokens = TokenEmbedding(shape_of(None)), torch.randint(0, V, (2, 5))
    assert list(embedding.state_dict()) == ["weight"]
    assert embedding(tokens).equal(embedding.weight[tokens])
    with pytest.raises(ConfigError, match="time_step: got steps; this rack has no time embedding"):
        embedding(tokens, torch.tensor([0, 1]))


def test_a_sinusoidal_step_is_the_published_formula_at_the_size_of_a_token() -> None:
    embedding, tokens = embedding_of("sinusoidal", D), torch.tensor([[3, 7], [7, 3], [1, 1]])
    added = embedding(tokens, torch.tensor([0, 1, 49])) - embedding.weight[tokens]
    for row, step in enumerate((0, 1, 49)):
        angles = [step / 10000 ** (2 * i / D) for i in range(D // 2)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)]) * INIT_STD * math.sqrt(2)
        for position in range(2):
            torch.testing.assert_close(added[row, position], expected, rtol=1e-4, atol=1e-7)
    assert list(embedding.state_dict()) == ["weight"]


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
@pytest.mark.parametrize("dim", [64, 256])
def test_a_fresh_step_is_as_large_as_a_fresh_token(encoding: str, dim: int) -> None:
    """Root mean square of 50 x 256 channels; a projection of N(0, 0.02) and learned rows leave 10 % of play."""
    embedding = embedding_of(encoding, dim, d_model=256)
    assert embedding.time is not None
    size = embedding.time(torch.arange(N_STEPS)).square().mean().sqrt().item()
    assert size == pytest.approx(INIT_STD, rel=0.1)


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_steps_differ_and_a_projection_stands_only_where_widths_differ(encoding: str) -> None:
    for dim in (8, D):
        time = embedding_of(encoding, dim).time
        assert time is not None
        assert (time.projection is not None) == (dim != D)
        assert (time.table is not None) == (encoding == "learned")
        rows = time(torch.arange(N_STEPS))
        for one, other in itertools.combinations(range(N_STEPS), 2):
            assert not rows[one].equal(rows[other])


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_a_step_has_the_same_bits_alone_and_in_a_batch(encoding: str) -> None:
    embedding = embedding_of(encoding, 64, d_model=256)
    tokens, steps = torch.randint(0, V, (23, 5)), torch.randint(0, N_STEPS, (23,))
    whole = embedding(tokens, steps)
    for row in range(23):
        assert embedding(tokens[row : row + 1], steps[row : row + 1]).equal(whole[row : row + 1])


def test_every_part_of_the_time_embedding_trains() -> None:
    embedding = embedding_of("learned", 8)
    assert sorted(embedding.state_dict()) == ["time.projection.weight", "time.table.weight", "weight"]
    embedding(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([4, 9])).square().sum().backward()
    for parameter in embedding.parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() > 0
    table = embedding.time.table  # pyright: ignore[reportOptionalMemberAccess]
    assert table is not None
    assert table.weight.grad is not None
    assert table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [4, 9]


def test_a_rack_with_time_needs_its_steps() -> None:
    shape = shape_of(TimeShape(n_steps=N_STEPS, dim=8, encoding="sinusoidal"))
    rack, tokens = Rack(shape), torch.zeros(2, 3, dtype=torch.int64)
    rack.stacks.append(Stack(shape, 1))
    initialise(rack, 0)
    logits = rack(tokens, torch.tensor([2, 0]))
    torch.testing.assert_close(logits, rack(tokens, torch.tensor([0, 2])).flip(0), rtol=1e-5, atol=1e-6)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="time_step: got None; this rack has time as an input"):
        rack(tokens)
    for outside in (-1, N_STEPS):
        with pytest.raises(ConfigError, match=f"time_step: got {outside}; there are 50 time steps: 0 to 49"):
            rack(tokens, torch.tensor([0, outside]))
