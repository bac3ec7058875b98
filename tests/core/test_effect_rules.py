"""A key that is accepted does something: every key, in every mode, changes an id or is named here with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from stackwise_core.config.schema import StackWiseConfig
from stackwise_core.config.unused import _stages
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from stackwise_core.stages.anatomy import stage_anatomy
from stackwise_core.stages.plan import plan_run
from support.configurations import CORPUS, LEAVES, configuration, faults_of, ids, values_of

G = "training.progressive."
CLM, CUSTOM = {f"{G}training_objective": "clm"}, {f"{G}training_objective": "custom"}
DEPTH, INPUT = {f"{G}time_interpretation": "depth"}, {f"{G}time_interpretation": "input"}
EXPONENTIAL = {**DEPTH, f"{G}stack_time_mapping": "exponential", f"{G}num_time_steps": 100}
ADAPTED, WHOLE = {f"{G}qlora_enabled": True}, {f"{G}enabled": False}
PATTERNED = {**ADAPTED, f"{G}qlora_strategy": "progressive"}
QLORA = {**ADAPTED, f"{G}trunk_strategy": "qlora"}
PREPEND = {f"{G}building_mode": "prepend"}
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
    "full": {f"{G}trunk_strategy": "full"},
    "qlora": QLORA,
    "qlora top": {**QLORA, f"{G}trunk_trainable_top": 1},
    "whole": WHOLE,
    "whole depth": {**WHOLE, **DEPTH},
    "whole clm": {**WHOLE, **CLM},
    "anneal": {"training.joint_steps": 20},
    "live": {f"{G}cache_activations": False},
    "auto": {"cache.mode": "auto"},
    "one stack": ALONE,
    "depth": DEPTH,
    "depth exponential": EXPONENTIAL,
    "depth custom": {**DEPTH, f"{G}stack_time_mapping": "custom", f"{G}time_mapping": [0, 0, 1]},
    "depth table": {**DEPTH, "training.mask_ratio_table": [0.1, 0.2, 0.3]},
    "depth clm": {**DEPTH, **CLM},
    "depth clm exponential": {**EXPONENTIAL, **CLM},
    "input": INPUT,
    "input of one step": {**INPUT, f"{G}num_time_steps": 1},
    "elbo": {**INPUT, "training.corruption": "mask", "training.loss_weighting": "elbo"},
    "adapted": ADAPTED,
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
NO_RESULT |= {"hardware.device", "hardware.compile", "hardware.threads", "cache.keep", "cache.max_gb"}
NO_RESULT |= {"cache.fill_workers", "cache.task_runner", "hardware.processes"}
NO_RESULT |= {f"{G}max_stacks", "validation.sampled_rows"}
# Another spelling of what is so anyway: 'causal' or 'copy' of auto, 1 of 0, constant patterns of one size, the same
# steps by another mapping, no caching where nothing may be cached.
SPELLINGS = {"model.attention", "training.new_stack_init", "cache.views", f"{G}qlora_strategy"}
SPELLINGS |= {f"{G}cache_activations", f"{G}qlora_enabled", f"{G}stack_time_mapping"}
# What a loop of one's own is given, though no stage of a run makes numbers of it: the step of a stack without masks...
HANDED_ON = {f"{G}{key}" for key in ("time_interpretation", "time_per_stack", "num_time_steps")}
# ... and adapters beside a trunk that is frozen, which stay at zero.
HANDED_ON |= {f"{G}progressive_qlora{part}" for part in ("", "_rank", "_alpha")} | {"training.adapter_learning_rate"}
VALUES = {path: values_of(path) for path in LEAVES}
VALUES |= {
    f"{G}stacks": [[{"n_blocks": 3}], [{}, {"mode": "prepend"}], [{}, {"steps": 50}]],
    f"{G}trunk_trainable_top": [1, 2, 3],
    f"{G}qlora_configs": [{n: {"rank": 2, "alpha": 1.0} for n in range(3)}, {**SIZES, 3: {"rank": 1, "alpha": 1.0}}],
    "cache.views": [1, 3],
}


def value_of(config: StackWiseConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("mode", MODES)
def test_an_accepted_key_changes_an_id_or_is_named(mode: str) -> None:
    """Racks that have reached all the stacks they may have, so that nothing is left for stages still to come."""
    base = {f"{G}max_stacks": 3, **MODES[mode]}
    before = configuration(base)
    made = ids(plan_run(before, CORPUS, 10**6))
    without_effect: set[str] = set()
    for path, value in ((path, value) for path, values in VALUES.items() for value in values):
        try:
            after = configuration({**base, path: value})
        except ConfigError:
            continue
        if value_of(after, path) != value_of(before, path) and ids(plan_run(after, CORPUS, 10**6)) == made:
            without_effect.add(path)
    assert without_effect - NO_RESULT - SPELLINGS <= allowed_in(before)


def allowed_in(config: StackWiseConfig) -> set[str]:
    """The keys that are handed on and change no id, where that is so; an entry may repeat the common value."""
    growth = config.training.progressive
    handed_on = {path for path in HANDED_ON if "qlora" in path or "adapter" in path}
    allowed = handed_on if growth.trunk_strategy == "frozen" else set[str]()
    if growth.training_objective != "mlm":
        allowed |= HANDED_ON - handed_on
    return allowed | ({f"{G}stacks"} if growth.building_mode == "prepend" else set())


FOUR_GIB = {"cache.max_gb": 4.0}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        # No stage reads a frozen trunk's stream...
        *(({**mode, "cache.dtype": "float32"}, "cache.dtype") for mode in (WHOLE, ALONE, QLORA)),
        ({**PREPEND, "cache.dtype": "float32"}, "cache.dtype"),
        ({f"{G}trunk_strategy": "full", "cache.dtype": "float32"}, "cache.dtype"),
        (
            {f"{G}max_stacks": 3, f"{G}stacks": [{}, *[{"mode": "prepend"}] * 2], "cache.dtype": "float32"},
            "cache.dtype",
        ),
        # ... or none is stored.
        *(({**mode, **FOUR_GIB}, "cache.max_gb") for mode in (WHOLE, ALONE, QLORA, LIVE)),
        *(
            ({f"{G}building_mode": "prepend", **change}, next(iter(change)))
            for change in (FOUR_GIB, {"cache.keep": "all"})
        ),
        ({**QLORA, "cache.mode": "auto"}, "cache.mode"),
        # One worker needs no runner; none fills a store that is not there.
        *(({**mode, "cache.fill_workers": 2}, "cache.fill_workers") for mode in (WHOLE, ALONE, QLORA, LIVE)),
        ({"cache.task_runner": "processes"}, "cache.task_runner"),
        # The trunk never has more adapters than the top takes.
        ({**QLORA, f"{G}trunk_trainable_top": 11}, f"{G}trunk_trainable_top"),
        ({**QLORA, f"{G}max_stacks": 3, f"{G}trunk_trainable_top": 2}, f"{G}trunk_trainable_top"),
        ({**SECOND_ADAPTED, f"{G}max_stacks": 3}, f"{G}trunk_trainable_top"),
        # The one adapter of the trunk lies below the top in every stage.
        ({**PREPEND, **SECOND_ADAPTED}, f"{G}trunk_strategy"),
        # Nothing grows.
        ({**WHOLE, f"{G}stacks": [{"steps": 50}]}, f"{G}stacks.0.steps"),
        ({**WHOLE, f"{G}progressive_qlora": True}, f"{G}progressive_qlora"),
        ({**ALONE, f"{G}building_mode": "prepend"}, f"{G}building_mode"),
        ({**ALONE, f"{G}trunk_strategy": "full"}, f"{G}trunk_strategy"),
        ({**ALONE, "training.new_stack_init": "random"}, "training.new_stack_init"),
        # Every stack has its own.
        *(
            ({f"{G}max_stacks": 3, **OWN, path: value}, path)
            for path, value in {
                "model.blocks_per_stack": 3,
                "training.steps_per_stack": 100,
                f"{G}new_stack_precision": "bfloat16",
                f"{G}building_mode": "prepend",
            }.items()
        ),
        # Adapters that are not there, patterns that give the same.
        ({**VARIABLE, f"{G}qlora_configs": {**SIZES, 12: {"rank": 1, "alpha": 1.0}}}, f"{G}qlora_configs.12"),
        (
            {**ADAPTED, **ALONE, f"{G}qlora_strategy": "progressive", f"{G}qlora_rank_pattern": "linear"},
            f"{G}qlora_rank_pattern",
        ),
        # Nothing is masked, or not by time.
        *(({**mode, "training.mask_ratio": 0.3}, "training.mask_ratio") for mode in (CLM, CUSTOM, DEPTH, INPUT)),
        *(
            ({**CLM, **DEPTH, f"training.{key}": 0.5}, f"training.{key}")
            for key in ("mask_ratio_min", "mask_ratio_max")
        ),
        ({**CLM, **DEPTH, "training.mask_ratio_table": [0.5] * 12}, "training.mask_ratio_table"),
        ({**CLM, **DEPTH, "training.corruption": "mask"}, "training.corruption"),
        ({**CLM, **DEPTH, f"{G}num_time_steps": 20}, f"{G}num_time_steps"),
        ({**INPUT, f"{G}num_time_steps": 1, "training.mask_ratio_max": 0.8}, "training.mask_ratio_max"),
    ],
)
def test_a_key_that_changes_nothing_is_told_once(changes: dict[str, Any], path: str) -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, changes)
    (fault,) = [fault for fault in faults_of(values) if fault.path == path]
    assert fault.allowed.startswith("changes nothing here: it belongs to ")


@pytest.mark.parametrize(
    "changes",
    [
        # The live trunk's stream is cast to it all the same; one store only is read, but it is read.
        {**LIVE, "cache.dtype": "float32"},
        {f"{G}max_stacks": 3, f"{G}stacks": [{}, {"mode": "prepend"}], "cache.dtype": "float32", "cache.keep": "all"},
        {f"{G}max_stacks": 3, **QLORA, f"{G}trunk_trainable_top": 1, **FOUR_GIB},
        # Raising target_stacks, up to max_stacks, goes on from here.
        {
            f"{G}target_stacks": 1,
            "cache.dtype": "float32",
            f"{G}building_mode": "prepend",
            f"{G}stacks": [{}] * 3 + [{"mode": "append"}],
        },
        {**QLORA, f"{G}trunk_trainable_top": 10},
        {f"{G}target_stacks": 1, f"{G}trunk_strategy": "full", "training.new_stack_init": "random"},
        SECOND_ADAPTED,
        # Masks are drawn by view also where nothing is stored; joint training reads the order of the stacks.
        {**WHOLE, "cache.views": 2, f"{G}stacks": [{}, {"mode": "prepend", "n_blocks": 1}]},
        # Another spelling of the common value.
        {f"{G}stacks": [{"mode": "append"}]},
        {**PREPEND, f"{G}stacks": [{"mode": "append"}, {"mode": "prepend"}]},
        {f"{G}max_stacks": 3, f"{G}stacks": [{"steps": 50, "n_blocks": 1}] * 2, "training.steps_per_stack": 90},
    ],
)
def test_a_key_that_matters_somewhere_is_accepted(changes: dict[str, Any]) -> None:
    configuration(changes)


def test_a_thousand_stacks_are_judged_at_once() -> None:
    """By the stages that stand for the others: what each leaves frozen is found with them as with all."""
    config = configuration({**QLORA, f"{G}max_stacks": 1024, f"{G}trunk_trainable_top": 500, **FOUR_GIB})
    assert len(list(_stages(config))) == 1
    entries = [{}, {"mode": "prepend"}, {"precision": "qlora"}, {"mode": "prepend", "precision": "nvfp4"}]
    for top in (0, 1, 3, 6):
        for mode in ("append", "prepend"):
            base = {
                f"{G}max_stacks": 9,
                f"{G}trunk_strategy": "qlora",
                f"{G}building_mode": mode,
                f"{G}stacks": entries,
            }
            values: dict[str, Any] = {}
            apply_overrides(values, {**base, f"{G}trunk_trainable_top": top})
            some = StackWiseConfig.model_validate(values)
            every = [stage_anatomy(some, stage) for stage in range(1, 9)]
            for judged in (lambda a: a.boundary > 0, lambda a: len(a.trained) > 1):
                assert any(map(judged, _stages(some))) == any(map(judged, every))


def test_what_is_at_its_default_is_never_refused() -> None:
    """`to_yaml` writes every key, and what it writes must be readable."""
    for mode in MODES.values():
        config = configuration({f"{G}max_stacks": 3, **mode})
        assert configuration(config.model_dump()) == config
