"""A configuration that was written is read back as it was: as YAML, as JSON, and as the record of a run."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import LoraOverride, StackOverride
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from support.configurations import GROWTH, LEAVES, OTHERS, configuration, faults_of, nested, values_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
FUNCTIONS = st.from_regex(r"[\w.]{1,9}:[\w]{1,9}", fullmatch=True)  # such as 12:30, which YAML may read as a number
ADAPTERS = st.builds(LoraOverride, rank=st.integers(1, 2**40), alpha=st.floats(0, 1e300, exclude_min=True))
PRECISIONS = st.sampled_from(["default", "full", "qlora"])
STACKS = st.builds(StackOverride, n_blocks=st.integers(0, 128), precision=PRECISIONS, steps=st.integers(0, 2**40))
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    "tracking.project": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    "data.source": TEXT,
    "data.tokenizer": TEXT,
    "model.vocab_size": st.just(0) | st.integers(2, 2**24),
    # Whatever the others are, the low frequencies are below the high ones.
    "model.rope_scaling.low_freq_factor": st.floats(0, 1, exclude_min=True),
    "model.rope_scaling.high_freq_factor": st.floats(4, 1e9),
    "model.rope_scaling.beta_slow": st.floats(0, 1, exclude_min=True),
    "model.rope_scaling.beta_fast": st.floats(2, 1e9),
    "hardware.rendezvous": st.just("") | st.from_regex(r"[A-Za-z0-9._-]{1,20}:[0-9]{1,5}", fullmatch=True),
    "hardware.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:12"]),
    "training.custom_loss": FUNCTIONS | st.just(""),
    "training.mask_ratio_table": st.lists(st.floats(0, 1, exclude_min=True), max_size=3),
    f"{GROWTH}.stack_time_mapping": st.sampled_from(["linear", "exponential", "custom"]),
    f"{GROWTH}.time_mapping": FUNCTIONS | st.lists(st.integers(0, 2**70), max_size=3),
    f"{GROWTH}.qlora_configs": st.dictionaries(st.integers(-(2**40), 2**40), ADAPTERS, max_size=3),
    f"{GROWTH}.stacks": st.lists(STACKS, max_size=3),
}


def values_in_range(path: str) -> st.SearchStrategy[Any]:
    """Every value that type and range of a key allow."""
    if path in SPECIAL:
        return SPECIAL[path]
    found: st.SearchStrategy[Any] = st.from_type(Annotated[LEAVES[path].annotation, "", *LEAVES[path].metadata])
    return found.filter(math.isfinite) if LEAVES[path].annotation is float else found


RANGES = {path: values_in_range(path) for path in sorted(LEAVES)}
IN_RANGE = st.sets(st.sampled_from(sorted(LEAVES)), min_size=20, max_size=40).flatmap(  # whatever the rules say
    lambda keys: st.fixed_dictionaries({key: RANGES[key] for key in sorted(keys)})
)


@settings(max_examples=40, deadline=None)
@given(changes=IN_RANGE)
def test_every_value_of_every_key_comes_back(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, changes)
    config = StackWiseConfig.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        config.to_yaml(path := Path(folder, "run.yaml"))
        assert StackWiseConfig.read_unchecked(path) == config
    for written in (config.model_dump(), config.model_dump(mode="json"), json.loads(config.model_dump_json())):
        assert StackWiseConfig.model_validate(written) == config
    assert StackWiseConfig.model_validate_json(config.model_dump_json()) == config


SIZES = {f"{GROWTH}.qlora_enabled": True, f"{GROWTH}.qlora_strategy": "variable"}
CHOICES = {path: [value for value in values_of(path) if value not in ("custom", "elbo")] for path in LEAVES}
CHOSEN = st.sets(st.sampled_from([path for path, values in sorted(CHOICES.items()) if values]), max_size=6).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(CHOICES[key]) for key in sorted(keys)})
)


@settings(max_examples=30, deadline=None)
@given(changes=CHOSEN, variable=st.booleans())
def test_a_valid_configuration_is_valid_when_it_is_read_again(changes: dict[str, Any], variable: bool) -> None:
    sizes = {f"{GROWTH}.qlora_configs": OTHERS[f"{GROWTH}.qlora_configs"], **SIZES} if variable else {}
    try:
        config = configuration({**changes, **sizes})
    except ConfigError:
        return
    with tempfile.TemporaryDirectory() as folder:
        config.to_yaml(path := Path(folder, "run.yaml"))
        assert StackWiseConfig.from_yaml(path) == config
    assert StackWiseConfig.from_dict(config.model_dump(mode="json")) == config
    assert StackWiseConfig.from_dict(json.loads(config.model_dump_json())) == config


def test_stacks_are_written_as_numbers_and_read_as_text_too() -> None:
    """JSON has no other keys, and records of earlier versions quote them."""
    sizes = {n: {"rank": 2**n, "alpha": 1.0} for n in range(12)}
    config = configuration({**SIZES, f"{GROWTH}.qlora_configs": sizes})
    assert "      11:\n        rank: 2048\n" in config.to_yaml()
    as_text = {str(n): size for n, size in sizes.items()}
    assert configuration({**SIZES, f"{GROWTH}.qlora_configs": as_text}) == config
    config.training.progressive.qlora_configs = as_text  # pyright: ignore[reportAttributeAccessIssue]
    assert set(config.training.progressive.qlora_configs) == set(range(12))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"first": {"rank": 1, "alpha": 1.0}}, "valid integer"),
        ({"1.5": {"rank": 1, "alpha": 1.0}}, "valid integer"),
        ({True: {"rank": 1, "alpha": 1.0}}, "valid integer"),
        ({"1": {"rank": 1, "alpha": 1.0}, 1: {"rank": 2, "alpha": 1.0}}, "1 stands there twice"),
        ([1, 2], "valid dictionary"),
    ],
)
def test_other_keys_than_numbers_are_refused(sizes: Any, says: str) -> None:
    assert any(says in fault.allowed for fault in faults_of(nested(f"{GROWTH}.qlora_configs", sizes)))
