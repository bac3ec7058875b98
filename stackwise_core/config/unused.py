"""Keys that change nothing under a configuration: one that is set all the same is refused, and told what it belongs to.

Growth is judged as far as `max_stacks` lets it go, since raising `target_stacks` later goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from stackwise_core.config.functions import shown
from stackwise_core.config.stacks import GROWTH, adapter_size, has_adapter
from stackwise_core.config.time_steps import corrupts_by_time, n_time_steps
from stackwise_core.errors import Fault
from stackwise_core.stages.anatomy import Anatomy, stage_anatomy

if TYPE_CHECKING:
    from stackwise_core.config.schema import StackWiseConfig

_Condition = Callable[["StackWiseConfig"], bool]


def effect_faults(config: StackWiseConfig) -> Iterator[Fault]:
    """Yield the keys that were set although nothing of this configuration reads them."""
    defaults = type(config)()
    for path, (matters, where) in ONLY_WITH.items():
        value = _lookup(config, path)
        if value != _lookup(defaults, path) and not matters(config):
            yield _fault(path, shown(value), where)
    yield from _entry_faults(config)


def _entry_faults(config: StackWiseConfig) -> Iterator[Fault]:
    """Yield what changes nothing inside `stacks` and `qlora_configs`."""
    growth = config.training.progressive
    for stack, own in enumerate(growth.stacks):
        if own.steps and not growth.enabled:
            where = f"{GROWTH}.enabled: true; the one joint stage takes training.steps_per_stack"
            yield _fault(f"{GROWTH}.stacks.{stack}.steps", str(own.steps), where)
    if _variable(config):
        adapted = _adapted_stacks(config)
        for stack in sorted(growth.qlora_configs.keys() - set(adapted)):
            where = f"stacks that have adapters, 0 to {GROWTH}.max_stacks - 1 = {growth.max_stacks - 1} at most"
            yield _fault(f"{GROWTH}.qlora_configs.{stack}", "an entry", where)


def _fault(path: str, received: str, where: str) -> Fault:
    return Fault(path, received, f"changes nothing here: it belongs to {where}; leave it out")


def _lookup(config: BaseModel, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


# ---------------------------------------------------------------- growth


def _growth_is(**wanted: Any) -> _Condition:
    return lambda config: any(getattr(config.training.progressive, key) == value for key, value in wanted.items())


def _grows(config: StackWiseConfig) -> bool:
    growth = config.training.progressive
    return growth.enabled and growth.max_stacks > 1


def _someone_follows(name: str, first: int = 0) -> _Condition:
    """Say whether a stack, from the `first` on, has no value of its own in `stacks` and takes the common one."""

    def follows(config: StackWiseConfig) -> bool:
        growth = config.training.progressive
        own = [getattr(entry, name) for entry in growth.stacks[first : growth.max_stacks]]
        return len(own) < growth.max_stacks - first or any(value in (0, "default") for value in own)

    return follows


def _steps_are_taken(config: StackWiseConfig) -> bool:
    return not config.training.progressive.enabled or _someone_follows("steps")(config)


# ---------------------------------------------------------------- adapters


def _adapted_stacks(config: StackWiseConfig) -> list[int]:
    return [stack for stack in range(config.training.progressive.max_stacks) if has_adapter(config, stack)]


def _adapted(config: StackWiseConfig) -> bool:
    return bool(_adapted_stacks(config))


def _any_adapter(config: StackWiseConfig) -> bool:
    return _adapted(config) or config.training.progressive.progressive_qlora


def _by_rule(config: StackWiseConfig) -> bool:
    return _adapted(config) and config.training.progressive.qlora_strategy != "variable"


def _variable(config: StackWiseConfig) -> bool:
    return _adapted(config) and config.training.progressive.qlora_strategy == "variable"


def _patterned(part: int) -> _Condition:
    """Say whether the pattern gives some adapter another rank (part 0) or alpha (1) than the common one."""

    def changes(config: StackWiseConfig) -> bool:
        growth = config.training.progressive
        common = (growth.qlora_rank, growth.qlora_alpha)[part]
        return growth.qlora_strategy == "progressive" and any(
            adapter_size(config, stack)[part] != common for stack in _adapted_stacks(config)
        )

    return changes


# ---------------------------------------------------------------- the trunk


def _stages(config: StackWiseConfig) -> Iterator[Anatomy]:
    """Yield the stages that stand for all growth on a trunk: those with an entry in `stacks`, the next, and the last.

    Those between add a stack in the way of the last, on less of the same trunk: what one of them leaves frozen is
    frozen in the last, and what trains in one of them trains in the next or the last.
    """
    growth = config.training.progressive
    if _grows(config):
        last = growth.max_stacks - 1
        for stage in sorted({*range(1, min(len(growth.stacks) + 1, last)), last}):
            yield stage_anatomy(config, stage)


def _streams(config: StackWiseConfig) -> bool:
    """Say whether some stage reads the stream of a frozen trunk."""
    return any(anatomy.boundary for anatomy in _stages(config))


def _stores(config: StackWiseConfig) -> bool:
    return config.training.progressive.cache_activations and _streams(config)


def _stores_by_several(config: StackWiseConfig) -> bool:
    return _stores(config) and config.cache.fill_workers > 1


def _trunk_may_train(config: StackWiseConfig) -> bool:
    """Say whether a strategy other than frozen makes a difference; without any adapter `growth_faults` tells."""
    if config.training.progressive.trunk_strategy != "qlora" or not _any_adapter(config):
        return _grows(config)
    return any(len(anatomy.trained) > 1 for anatomy in _stages(config))


def _leaves_adapters_out(config: StackWiseConfig) -> bool:
    """Say whether the adapters of some trunk stack lie below the top that trains."""
    growth = config.training.progressive
    return growth.trunk_strategy == "qlora" and any(
        anatomy.trains_of(stack) == "nothing" and (growth.progressive_qlora or has_adapter(config, stack))
        for anatomy in _stages(config)
        for stack in anatomy.order
    )


# ---------------------------------------------------------------- objective and time


def _masked(config: StackWiseConfig) -> bool:
    return config.training.progressive.training_objective == "mlm"


def _one_ratio(config: StackWiseConfig) -> bool:
    return _masked(config) and config.training.progressive.time_interpretation == "none"


def _schedule_is_free(config: StackWiseConfig) -> bool:
    return corrupts_by_time(config) and config.training.loss_weighting != "elbo"


def _interpolated(config: StackWiseConfig) -> bool:
    return _schedule_is_free(config) and not config.training.mask_ratio_table


def _interpolated_to_the_last(config: StackWiseConfig) -> bool:
    return _interpolated(config) and n_time_steps(config) > 1


def _mapped(config: StackWiseConfig) -> bool:
    growth = config.training.progressive
    return growth.time_interpretation == "depth" and growth.stack_time_mapping == "custom"


def _linear(config: StackWiseConfig) -> bool:
    growth = config.training.progressive
    return growth.time_interpretation == "depth" and growth.stack_time_mapping == "linear"


def _steps_are_spread(config: StackWiseConfig) -> bool:
    growth = config.training.progressive
    return _linear(config) or (growth.time_interpretation != "none" and not growth.num_time_steps)


def _steps_are_counted(config: StackWiseConfig) -> bool:
    """Say whether the number of steps decides about one, or about its ratio; linear steps alone never reach it."""
    growth = config.training.progressive
    return growth.time_interpretation != "none" and (_masked(config) or not _linear(config))


# ---------------------------------------------------------------- what belongs to what

_ADAPTED = (_adapted, f"{GROWTH}.qlora_enabled: true, or a stack of precision qlora")
_BY_RULE = (_by_rule, f"{GROWTH}.qlora_enabled: true or precision qlora, and no qlora_strategy: variable")
_PATTERNS = f"{GROWTH}.qlora_strategy: progressive, on stacks with adapters to which the pattern gives another size"
_PROGRESSIVE = (_growth_is(progressive_qlora=True), f"{GROWTH}.progressive_qlora: true")
_ON_A_TRUNK = (_grows, f"{GROWTH}.enabled: true, and max_stacks above 1")
_APPENDS = "stages that append to a trunk whose lowest stack does not train"
_STORED = (_stores, f"{GROWTH}.cache_activations: true, in {_APPENDS}")
_INPUT = (_growth_is(time_interpretation="input"), f"{GROWTH}.time_interpretation: input")
_MLM = (_masked, f"{GROWTH}.training_objective: mlm")
_BY_TIME = f"{GROWTH}.time_interpretation: depth or input, with training_objective: mlm and loss_weighting: mean"
_OWN = "a stack without one of its own in stacks; all have"
ONLY_WITH: dict[str, tuple[_Condition, str]] = {
    "model.blocks_per_stack": (_someone_follows("n_blocks"), _OWN),
    "training.steps_per_stack": (_steps_are_taken, _OWN),
    f"{GROWTH}.new_stack_precision": (_someone_follows("precision"), _OWN),
    f"{GROWTH}.building_mode": (
        _someone_follows("mode", 1),
        "a stack after the first, without one of its own in stacks",
    ),
    f"{GROWTH}.trunk_strategy": (
        _trunk_may_train,
        f"{_ON_A_TRUNK[1]}, and with qlora to adapters in the top that trains",
    ),
    "training.new_stack_init": _ON_A_TRUNK,
    f"{GROWTH}.progressive_qlora": _ON_A_TRUNK,
    f"{GROWTH}.trunk_trainable_top": (
        _leaves_adapters_out,
        f"{GROWTH}.trunk_strategy: qlora, on a trunk that grows to more stacks with adapters",
    ),
    f"{GROWTH}.qlora_rank": _BY_RULE,
    f"{GROWTH}.qlora_alpha": _BY_RULE,
    f"{GROWTH}.qlora_strategy": _ADAPTED,
    f"{GROWTH}.qlora_rank_pattern": (_patterned(0), _PATTERNS),
    f"{GROWTH}.qlora_alpha_pattern": (_patterned(1), _PATTERNS),
    f"{GROWTH}.qlora_configs": (_variable, f"{GROWTH}.qlora_strategy: variable, on stacks that have adapters"),
    f"{GROWTH}.progressive_qlora_rank": _PROGRESSIVE,
    f"{GROWTH}.progressive_qlora_alpha": _PROGRESSIVE,
    "training.adapter_learning_rate": (_any_adapter, f"adapters: {GROWTH}.qlora_enabled or progressive_qlora"),
    "training.joint_learning_rate": (lambda config: config.training.joint_steps > 0, "training.joint_steps above 0"),
    "training.custom_loss": (_growth_is(training_objective="custom"), f"{GROWTH}.training_objective: custom"),
    "training.corruption": _MLM,
    "training.mask_ratio": (_one_ratio, f"{GROWTH}.training_objective: mlm with time_interpretation: none"),
    "training.mask_ratio_min": (_interpolated, f"{_BY_TIME}, and no mask_ratio_table"),
    "training.mask_ratio_max": (_interpolated_to_the_last, f"{_BY_TIME}, no mask_ratio_table, and steps after step 0"),
    "training.mask_ratio_table": (_schedule_is_free, _BY_TIME),
    "training.time_sampling": _INPUT,
    f"{GROWTH}.time_embedding_dim": _INPUT,
    f"{GROWTH}.time_encoding_type": _INPUT,
    f"{GROWTH}.stack_time_mapping": (_growth_is(time_interpretation="depth"), f"{GROWTH}.time_interpretation: depth"),
    f"{GROWTH}.time_mapping": (_mapped, f"{GROWTH}.time_interpretation: depth with stack_time_mapping: custom"),
    f"{GROWTH}.time_per_stack": (
        _steps_are_spread,
        f"{GROWTH}.time_interpretation: depth with stack_time_mapping: linear, or any with num_time_steps: 0",
    ),
    f"{GROWTH}.num_time_steps": (
        _steps_are_counted,
        f"{GROWTH}.time_interpretation: depth or input with training_objective: mlm, or depth with steps that are not "
        "linear",
    ),
    "cache.dtype": (_streams, _APPENDS),
    "cache.max_gb": _STORED,
    "cache.keep": _STORED,
    "cache.mode": _STORED,
    "cache.fill_workers": _STORED,
    "cache.task_runner": (_stores_by_several, f"cache.fill_workers above 1, and {_STORED[1]}"),
}
"""Keys that matter only together with others: when, and what to say otherwise."""
