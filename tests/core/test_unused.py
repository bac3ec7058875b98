"""Unused keys are in no id; every other key, in every mode, changes an id or is named here with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import RopeScaling
from stackwise_core.config.unused import notes, unused_keys
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_loss
from support.configurations import CORPUS, LEAVES, configuration, ids, values_of

G = "training.progressive."
CLM, CUSTOM = {f"{G}training_objective": "clm"}, {f"{G}training_objective": "custom"}
DEPTH, INPUT = {f"{G}time_interpretation": "depth"}, {f"{G}time_interpretation": "input"}
EXPONENTIAL = {**DEPTH, f"{G}stack_time_mapping": "exponential", f"{G}num_time_steps": 100}
ADAPTED, WHOLE = {f"{G}qlora_enabled": True}, {f"{G}enabled": False}
PATTERNED = {**ADAPTED, f"{G}qlora_strategy": "progressive"}
QLORA = {**ADAPTED, f"{G}trunk_strategy": "qlora"}
PREPEND = {f"{G}building_mode": "prepend"}
INSERT = {f"{G}building_mode": "insert"}
LIVE = {f"{G}cache_activations": False}
SECOND_ADAPTED = {
    f"{G}trunk_strategy": "qlora",
    f"{G}stacks": [{}, {"precision": "qlora"}],
    f"{G}trunk_trainable_top": 1,
}
ALONE = {f"{G}max_stacks": 1, f"{G}target_stacks": 1}
SIZES = {n: {"rank": 1, "alpha": 1.0} for n in range(3)}
VARIABLE = {**ADAPTED, f"{G}qlora_strategy": "variable", f"{G}qlora_configs": SIZES}
OWN = {f"{G}stacks": [{"n_blocks": 1, "precision": "half", "mode": "append", "steps": 80}] * 3}
MODES: dict[str, dict[str, Any]] = {
    "mlm": {},
    "clm": CLM,
    "custom": CUSTOM,
    "prepend": {f"{G}building_mode": "prepend"},
    "insert": INSERT,
    "insert frozen": {**INSERT, f"{G}tail_strategy": "frozen"},
    "insert qlora": {**INSERT, f"{G}tail_strategy": "qlora"},
    "full": {f"{G}trunk_strategy": "full"},
    "qlora": QLORA,
    "qlora top": {**QLORA, f"{G}trunk_trainable_top": 1},
    "depth-stable": {"model.residual_scale": "depth"},
    "one clock": {"training.schedule": "one_clock"},
    "one clock, annealed": {"training.schedule": "one_clock", "training.joint_steps": 20, "training.decay": "sqrt"},
    "whole by one clock": {**WHOLE, "training.schedule": "one_clock"},
    "whole": WHOLE,
    "whole depth": {**WHOLE, **DEPTH},
    "whole clm": {**WHOLE, **CLM},
    "anneal": {"training.joint_steps": 20},
    "live": {f"{G}cache_activations": False},
    "auto": {"cache.mode": "auto"},
    "one stack": ALONE,
    "depth": DEPTH,
    "depth exponential": EXPONENTIAL,
    "depth intervals": {**DEPTH, f"{G}stack_time_span": "interval"},
    "whole depth intervals": {**WHOLE, **DEPTH, f"{G}stack_time_span": "interval"},
    "depth custom": {**DEPTH, f"{G}stack_time_mapping": "custom", f"{G}time_mapping": [0, 0, 1]},
    "depth table": {**DEPTH, "training.mask_ratio_table": [0.1, 0.2, 0.3]},
    "depth clm": {**DEPTH, **CLM},
    "depth clm exponential": {**EXPONENTIAL, **CLM},
    "input": INPUT,
    "input of one step": {**INPUT, f"{G}num_time_steps": 1},
    "elbo": {**INPUT, "training.corruption": "mask", "training.loss_weighting": "elbo"},
    "adapted": ADAPTED,
    "trunk of adapters": {f"{G}trunk_strategy": "qlora"},
    "trunk of mixed adapters": SECOND_ADAPTED,
    "variable": VARIABLE,
    "patterned": {**PATTERNED, f"{G}qlora_rank_pattern": "increasing"},
    "progressive": {f"{G}progressive_qlora": True, f"{G}trunk_strategy": "qlora"},
    "progressive frozen": {f"{G}progressive_qlora": True},
    "nf4": {f"{G}new_stack_precision": "qlora"},
    "nvfp4": {f"{G}new_stack_precision": "nvfp4"},
    "mixed": {f"{G}stacks": [{}, {"n_blocks": 1, "precision": "bfloat16"}, {"mode": "prepend", "steps": 80}]},
    "all their own": OWN,
}
# Where and how fast it runs, how it is called, what is kept, what is checked, what would be too much.
NO_RESULT = {"run.name", "data.source", "training.checkpoint_every", "training.activation_checkpointing"}
NO_RESULT |= {"training.checkpoint_minutes", "validation.every"}
NO_RESULT |= {"hardware.device", "hardware.compile", "hardware.threads", "cache.keep", "cache.max_gb"}
NO_RESULT |= {"cache.fill_workers", "cache.task_runner", "hardware.processes", "hardware.deterministic"}
NO_RESULT |= {"hardware.tf32", "hardware.nodes", "hardware.rendezvous", "hardware.shard"}
NO_RESULT |= {"tracking.to", "tracking.project"}
NO_RESULT |= {f"{G}max_stacks", "validation.sampled_rows"}
# Another spelling of what is so anyway: 'causal' or 'copy' of auto, 1 of 0, constant patterns of one size, the same
# steps by another mapping, no caching where nothing may be cached.
SPELLINGS = {"model.attention", "training.new_stack_init", "cache.views", f"{G}qlora_strategy"}
SPELLINGS |= {"training.new_stack_source"}  # as many blocks, or no other stack
SPELLINGS |= {f"{G}cache_activations", f"{G}qlora_enabled", f"{G}stack_time_mapping"}
# What a loop of one's own is given, though no stage of a run makes numbers of it: the step of a stack without masks...
HANDED_ON = {f"{G}{key}" for key in ("time_interpretation", "time_per_stack", "num_time_steps")}
# ... and adapters beside a trunk that is frozen, which stay at zero.
HANDED_ON |= {f"{G}progressive_qlora{part}" for part in ("", "_rank", "_alpha")} | {"training.adapter_learning_rate"}
VALUES = {path: values_of(path) for path in LEAVES}
VALUES |= {
    f"{G}stacks": [[{"n_blocks": 3}], [{}, {"mode": "prepend"}], [{}, {"steps": 50}], [{}, {}, {"tail_stacks": 2}]],
    f"{G}trunk_trainable_top": [1, 2, 3],
    f"{G}qlora_configs": [{n: {"rank": 2, "alpha": 1.0} for n in range(3)}, {**SIZES, 3: {"rank": 1, "alpha": 1.0}}],
    "cache.views": [1, 3],
}


def value_of(config: StackWiseConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


# What a mode does use, though no stage of so small a rack happens to read it.
TOP = {f"{G}trunk_trainable_top"}
NOT_READ: dict[str, set[str]] = {
    "qlora": TOP,
    "progressive": TOP,
    "trunk of adapters": TOP | {f"{G}progressive_qlora"},  # which is so anyway
    "one stack": {
        "data.rows",
        "cache.dtype",
        "cache.mode",
        "training.new_stack_noise",
        "training.new_stack_output_scale",
        "training.optimizer_state",
        "training.residual_warmup_steps",
    }
    | {f"{G}{key}" for key in ("building_mode", "train_head", "trunk_strategy", "stacks")},
    "all their own": {"model.blocks_per_stack", "training.steps_per_stack"}
    | {f"{G}new_stack_precision", f"{G}building_mode"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_key_changes_an_id_or_is_unused_or_is_named(mode: str) -> None:
    """Racks that have reached all the stacks they may have, so that nothing is left for stages still to come."""
    base = {f"{G}max_stacks": 3, **MODES[mode]}
    before = configuration(base)
    made = ids(plan_run(before, CORPUS, 10**6))
    silent: set[str] = set()
    for path, value in ((path, value) for path, values in VALUES.items() for value in values):
        try:
            after = configuration({**base, path: value})
        except ConfigError:
            continue
        unused = any(f"{each}.".startswith(f"{path}.") for each in unused_keys(after))
        if value_of(after, path) != value_of(before, path) and ids(plan_run(after, CORPUS, 10**6)) == made:
            silent |= set() if unused else {path}
        else:
            assert path not in unused_keys(after) or not value_of(after, path)
    assert silent - NO_RESULT - SPELLINGS - NOT_READ.get(mode, set()) <= allowed_in(before)


def allowed_in(config: StackWiseConfig) -> set[str]:
    """The keys that are handed on and change no id, where that is so; an entry may repeat the common value."""
    growth = config.training.progressive
    handed_on = {path for path in HANDED_ON if "qlora" in path or "adapter" in path}
    allowed = handed_on if growth.trunk_strategy == "frozen" else set[str]()
    if growth.training_objective != "mlm":
        allowed |= HANDED_ON - handed_on
    return allowed | ({f"{G}stacks"} if growth.building_mode == "prepend" else set())


def without_unused(config: StackWiseConfig) -> StackWiseConfig:
    """The configuration with every unused key at its default."""
    plain, defaults = config.model_copy(deep=True), StackWiseConfig()
    scaling, unused = config.model.rope_scaling, unused_keys(config)
    used = {key: value for key, value in scaling if f"model.rope_scaling.{key}" not in unused}
    plain.model.rope_scaling = RopeScaling(**used)
    for path in (key.split(".") for key in unused_keys(config)):
        section, default = plain, defaults
        for name in path[:-1]:
            if name in ("stacks", "qlora_configs", "rope_scaling"):
                break
            section, default = getattr(section, name), getattr(default, name)
        else:
            setattr(section, path[-1], getattr(default, path[-1]))
    growth = plain.training.progressive
    growth.stacks = growth.stacks[: growth.max_stacks]
    for stack, own in enumerate(growth.stacks):
        own.steps = own.steps if growth.enabled else 0
        own.tail_stacks = 0 if f"{G}stacks.{stack}.tail_stacks" in unused else own.tail_stacks
    return plain


KEYS = st.sets(st.sampled_from([path for path, values in sorted(VALUES.items()) if values]), max_size=12)


@settings(max_examples=300, derandomize=True)
@given(
    mode=st.sampled_from(sorted(MODES)),
    changes=KEYS.flatmap(lambda keys: st.fixed_dictionaries({key: st.sampled_from(VALUES[key]) for key in keys})),
)
def test_unused_keys_are_in_no_id(mode: str, changes: dict[str, Any]) -> None:
    try:
        config = configuration({f"{G}max_stacks": 3, **MODES[mode], **changes})
    except ConfigError:
        return
    plain = without_unused(config)
    plain.validate()
    assert [key for key in unused_keys(plain) if "qlora_configs." not in key] == []
    assert ids(plan_run(config, CORPUS, 10**6)) == ids(plan_run(plain, CORPUS, 10**6))


def test_an_unused_loss_is_neither_loaded_nor_used() -> None:
    config = configuration({"training.custom_loss": "nowhere:loss", **CLM})
    assert resolve_loss(config) is None


def test_what_is_written_is_read_again_with_the_same_notes() -> None:
    for mode in MODES.values():
        config = configuration({f"{G}max_stacks": 3, **mode, f"{G}time_embedding_dim": 512})
        assert configuration(config.model_dump()) == config
        assert notes(configuration(config.model_dump())) == notes(config)
