"""Keys that have no effect under the chosen modes.

A file may hold the settings of all modes, and a sweep may toggle one key of it. So such keys are named in a note, not
rejected, and they enter no id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from stackwise_core.config.adjusted import adjustments
from stackwise_core.config.corpus import corpus_notes
from stackwise_core.config.functions import shown
from stackwise_core.config.schema import GROWTH, ConfigSchema, StackOverride
from stackwise_core.config.stacks import settings_of
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.mixture import sources_of

Need = list[tuple[str, Collection[Any]]]
"""Pairs of a key and values, at least one of which must hold. A key that is itself unused does not count."""

_MANY = range(1, 2**63)
_GROWS: Need = [(f"{GROWTH}.enabled", (True,))]
_MLM: Need = [(f"{GROWTH}.training_objective", ("mlm",))]
_INPUT: Need = [(f"{GROWTH}.time_interpretation", ("input",))]
_DEPTH: Need = [(f"{GROWTH}.time_interpretation", ("depth",))]
_LINEAR = (f"{GROWTH}.stack_time_mapping", ("linear",))
_NO_MASKS: Need = [(f"{GROWTH}.training_objective", ("clm", "custom"))]
_TIMED: Need = [(f"{GROWTH}.time_interpretation", ("input", "depth"))]
_ADAPTED: Need = [
    (f"{GROWTH}.qlora_enabled", (True,)),
    (f"{GROWTH}.new_stack_precision", ("qlora",)),
    (f"{GROWTH}.stacks.precision", ("qlora",)),
]
_BY_RULE: Need = [(f"{GROWTH}.qlora_strategy", ("simplified", "progressive"))]
_PATTERNED: Need = [(f"{GROWTH}.qlora_strategy", ("progressive",))]
_PROGRESSIVE: Need = [(f"{GROWTH}.progressive_qlora", (True,))]
_OF_ADAPTERS: Need = [(f"{GROWTH}.trunk_strategy", ("qlora",)), (f"{GROWTH}.tail_strategy", ("qlora",))]
_DENSE = ("full", "half", "bfloat16", "nvfp4")
_FOR_BARE_TRUNKS: list[Need] = [  # also stacks without an adapter of their own get one, in a trunk of adapters
    [*_PROGRESSIVE, *_OF_ADAPTERS],
    [*_PROGRESSIVE, (f"{GROWTH}.qlora_enabled", (False,))],
    [*_PROGRESSIVE, (f"{GROWTH}.new_stack_precision", _DENSE), (f"{GROWTH}.stacks.precision", _DENSE)],
]
_INTERPOLATED: Need = [("training.mask_ratio_table", ([],))]
_FEW_ADAPTERS_TRAIN: Need = [(f"{GROWTH}.trunk_strategy", ("frozen",)), (f"{GROWTH}.trunk_trainable_top", _MANY)]
_FROZEN_BELOW: list[Need] = [  # a stage may read the stream of frozen stacks
    [(f"{GROWTH}.trunk_strategy", ("frozen", "qlora"))],
    _FEW_ADAPTERS_TRAIN,
    [(f"{GROWTH}.building_mode", ("append", "insert")), (f"{GROWTH}.stacks.mode", ("append", "insert"))],
]
_INSERTS: Need = [(f"{GROWTH}.building_mode", ("insert",)), (f"{GROWTH}.stacks.mode", ("insert",))]
_FROZEN_HEAD: list[Need] = [  # it trains with the first stage, with a trunk in full, and with a prepended stack never
    _GROWS,
    [(f"{GROWTH}.trunk_strategy", ("frozen", "qlora"))],
    [
        (f"{GROWTH}.building_mode", ("append",)),
        (f"{GROWTH}.stacks.mode", ("append",)),
        (f"{GROWTH}.tail_strategy", ("full",)),
    ],
]
_TRAINS_TWICE: Need = [  # something trains in two stages in a row, or begins with the state of what did
    (f"{GROWTH}.trunk_strategy", ("full", "qlora")),
    (f"{GROWTH}.building_mode", ("append",)),
    (f"{GROWTH}.stacks.mode", ("append",)),
    (f"{GROWTH}.tail_strategy", ("full", "qlora")),
    ("training.joint_steps", _MANY),
    ("training.new_state", ("copy",)),
]
_COPIES: Need = [("training.new_stack_init", ("auto", "copy", "copy_zero"))]
_STORED: Need = [(f"{GROWTH}.cache_activations", (True,))]
_KEPT: Need = [("training.optimizer_state", ("keep",))]
_STRETCHED: Need = [("model.rope_scaling.kind", ("linear", "llama3", "yarn"))]
_FROM_A_CONTEXT: Need = [("model.rope_scaling.kind", ("llama3", "yarn"))]
_LLAMA3: Need = [("model.rope_scaling.kind", ("llama3",))]
_YARN: Need = [("model.rope_scaling.kind", ("yarn",))]

BELONGS_TO: dict[str, list[Need]] = {
    "model.rope_scaling.factor": [_STRETCHED],
    "model.rope_scaling.original_max_position_embeddings": [_FROM_A_CONTEXT],
    "model.rope_scaling.low_freq_factor": [_LLAMA3],
    "model.rope_scaling.high_freq_factor": [_LLAMA3],
    "model.rope_scaling.beta_fast": [_YARN],
    "model.rope_scaling.beta_slow": [_YARN],
    "model.rope_scaling.attention_factor": [_YARN],
    "model.rope_scaling.truncate": [_YARN],
    "model.residual_blocks": [[("model.residual_scale", ("depth",))]],
    "training.new_stack_init": [_GROWS],
    "training.new_stack_source": [_GROWS, _COPIES],
    "training.new_stack_noise": [_GROWS, _COPIES],
    "training.new_stack_output_scale": [_GROWS, [("training.new_stack_init", ("auto", "copy", "random"))]],
    "training.residual_warmup_steps": [_GROWS],
    "training.joint_steps": [_GROWS],
    "training.joint_learning_rate": [[("training.joint_steps", _MANY)], [("training.schedule", ("per_stage",))]],
    "training.decay_steps": [[("training.schedule", ("one_clock",))]],
    "training.muon_learning_rate": [[("training.optimizer", ("muon",))]],
    "training.optimizer_state": [_GROWS, _TRAINS_TWICE],
    "training.new_state": [_KEPT, _COPIES],
    "hardware.rendezvous": [[("hardware.nodes", range(2, 2**63))]],
    "hardware.shard": [[("hardware.processes", range(2, 2**63)), ("hardware.nodes", range(2, 2**63))]],
    f"{GROWTH}.tail_stacks": [_INSERTS],
    f"{GROWTH}.tail_strategy": [_GROWS, _INSERTS],
    f"{GROWTH}.trunk_strategy": [_GROWS],
    f"{GROWTH}.train_head": _FROZEN_HEAD,
    f"{GROWTH}.trunk_trainable_top": [[(f"{GROWTH}.trunk_strategy", ("qlora",))]],
    f"{GROWTH}.qlora_strategy": [_ADAPTED],
    f"{GROWTH}.qlora_rank": [_BY_RULE],
    f"{GROWTH}.qlora_alpha": [_BY_RULE],
    f"{GROWTH}.qlora_rank_pattern": [_PATTERNED],
    f"{GROWTH}.qlora_alpha_pattern": [_PATTERNED],
    f"{GROWTH}.qlora_configs": [[(f"{GROWTH}.qlora_strategy", ("variable",))]],
    f"{GROWTH}.progressive_qlora": [_GROWS],
    f"{GROWTH}.progressive_qlora_rank": _FOR_BARE_TRUNKS,
    f"{GROWTH}.progressive_qlora_alpha": _FOR_BARE_TRUNKS,
    "training.adapter_learning_rate": [[*_ADAPTED, *_PROGRESSIVE, *_OF_ADAPTERS]],
    "training.custom_loss": [[(f"{GROWTH}.training_objective", ("custom",))]],
    "training.corruption": [_MLM],
    "training.mask_ratio": [_MLM, [(f"{GROWTH}.time_interpretation", ("none",))]],
    "training.mask_ratio_table": [_MLM, _TIMED, [("training.loss_weighting", ("mean",))]],
    "training.mask_ratio_min": [_INTERPOLATED],
    "training.mask_ratio_max": [_INTERPOLATED],
    "training.time_sampling": [_INPUT],
    f"{GROWTH}.time_embedding_dim": [_INPUT],
    f"{GROWTH}.time_encoding_type": [_INPUT],
    f"{GROWTH}.stack_time_mapping": [_DEPTH],
    f"{GROWTH}.stack_time_span": [_DEPTH, _MLM],
    f"{GROWTH}.time_mapping": [[(f"{GROWTH}.stack_time_mapping", ("custom",))]],
    f"{GROWTH}.time_per_stack": [  # linear steps are its multiples; else it may set how many steps there are
        _DEPTH,
        [(f"{GROWTH}.num_time_steps", (0,)), _LINEAR],
        [*_INTERPOLATED, *_NO_MASKS, _LINEAR],
    ],
    f"{GROWTH}.num_time_steps": [_TIMED],
    f"{GROWTH}.cache_activations": _FROZEN_BELOW,
    "data.documents": [[(f"{GROWTH}.training_objective", ("mlm", "clm"))]],
    "data.rows": [_GROWS],
    "data.sample": [[("data.max_sequences", _MANY)]],
    "cache.dtype": _FROZEN_BELOW,
    "cache.views": [_MLM],
    "cache.max_gb": [_STORED],
    "cache.keep": [[*_STORED, *_KEPT]],
    "cache.mode": [_STORED],
    "cache.fill_workers": [_STORED],
    "cache.task_runner": [[("cache.fill_workers", _MANY[1:])]],
    "validation.sampled_rows": [_STORED],
    "validation.patience": [[("validation.every", _MANY)]],
    "validation.keep": [[("validation.every", _MANY)]],
    "validation.cooldown_steps": [_GROWS, [("training.schedule", ("one_clock",))]],  # else each stage has cooled down
}
"""What each key needs to have an effect: all of its entries. Keys that always have an effect are left out."""


def notes(config: ConfigSchema) -> list[str]:
    """Return a line that names the unused keys of a valid configuration, and one for each value taken for another."""
    groups: dict[str, list[str]] = {}
    for path, because in unused_keys(config).items():
        value = _values(config, because)[0]
        groups.setdefault(f"{_short(because)}: {_spelled(value)}", []).append(_short(path))
    listed = "; ".join(f"{', '.join(keys)} ({because})" for because, keys in groups.items())
    return [*([f"not used: {listed}"] if listed else []), *adjustments(config), *corpus_notes(config)]


def unused_keys(config: ConfigSchema) -> dict[str, str]:
    """Return the keys that are set although they have no effect, each with the key whose value makes it so."""
    defaults = ConfigSchema()
    changed = [path for path in BELONGS_TO if _values(config, path) != _values(defaults, path)]
    found = {path: because for path in changed if (because := _blocker(config, path))}
    of_tokens = [source for source in sources_of(config.data.source) if holds_tokens(source.name)]
    if config.data.token_type != "auto" and not of_tokens:
        found["data.token_type"] = "data.source"
    return found | dict(_unused_entries(config))


def is_used(config: ConfigSchema, path: str) -> bool:
    """Return whether a key has an effect under the chosen modes."""
    return _blocker(config, path) is None


def _blocker(config: ConfigSchema, path: str, asked: frozenset[str] = frozenset()) -> str | None:
    """Return the key whose value leaves `path` without effect; `asked` are the keys that need this one."""
    if path in asked:  # two keys that need each other
        return None
    for need in BELONGS_TO.get(path, []):
        missing = [_blocker(config, key, asked | {path}) or _unless(config, key, values) for key, values in need]
        if all(missing):
            return missing[0]
    return None


def _unless(config: ConfigSchema, path: str, values: Collection[Any]) -> str | None:
    return None if any(value in values for value in _values(config, path)) else path


def _values(config: ConfigSchema, path: str) -> list[Any]:
    """Return the value of a key; of a key inside `stacks` those of all entries."""
    values: list[Any] = [config]
    for name in path.split("."):
        if name.isdecimal():
            values = [values[0][int(name)]]
            continue
        sections = [each for value in values for each in (value if isinstance(value, list) else [value])]
        values = [getattr(section, name) for section in sections if isinstance(section, BaseModel)]
    return values


def _unused_entries(config: ConfigSchema) -> Iterator[tuple[str, str]]:
    """Yield the entries of `stacks` and `qlora_configs` that no stack reads, each with the key that makes it so."""
    growth = config.training.progressive
    for stack, own in enumerate(growth.stacks):
        if stack < len(config.adopted) and own != StackOverride():
            yield f"{GROWTH}.stacks.{stack}", "model.from_"
        elif stack >= growth.max_stacks:
            yield f"{GROWTH}.stacks.{stack}", f"{GROWTH}.max_stacks"
        elif own.steps and not growth.enabled:
            yield f"{GROWTH}.stacks.{stack}.steps", f"{GROWTH}.enabled"
        elif own.tail_stacks and settings_of(config, stack).mode != "insert":
            of_all = own.mode == "default"
            yield (
                f"{GROWTH}.stacks.{stack}.tail_stacks",
                f"{GROWTH}.{'building_mode' if of_all else f'stacks.{stack}.mode'}",
            )
    if growth.qlora_strategy == "variable" and is_used(config, f"{GROWTH}.qlora_configs"):
        for stack in sorted(growth.qlora_configs):
            if 0 <= stack < len(config.adopted):
                yield f"{GROWTH}.qlora_configs.{stack}", "model.from_"
            elif stack < 0 or stack >= growth.max_stacks:
                yield f"{GROWTH}.qlora_configs.{stack}", f"{GROWTH}.max_stacks"
            elif settings_of(config, stack).adapter is None:
                yield f"{GROWTH}.qlora_configs.{stack}", f"{GROWTH}.qlora_enabled"


def _short(path: str) -> str:
    return path.removeprefix(f"{GROWTH}.").removeprefix("training.").removesuffix("_")


def _spelled(value: Any) -> str:
    """Return a value as YAML spells it, and a list as its length."""
    if isinstance(value, list):
        return f"{len(value)} values"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else shown(value)
