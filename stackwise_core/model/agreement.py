"""What rules a rack: the configuration that adds to it, within what its builder was told and what is trained already.

What neither can give up is refused with both values. A key that a configuration leaves at its default says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import describe
from stackwise_core.config.schema import GROWTH, ConfigSchema, Mode, ModelConfig, Precision, StackOverride
from stackwise_core.config.sizes import feed_forward_width, head_width, residual_blocks_of, vocab_size_of
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.resolve import ModelShape, TimeShape

_FREE = ("blocks_per_stack", "attention")
"""Keys of the model that no rack is bound to: each stack has its own blocks, and attention holds no weight."""


@dataclass(frozen=True)
class Told:
    """What a builder was told when it was made."""

    model: ModelConfig
    """The sizes of its rack."""
    dimensions: frozenset[str]
    """The keys of these that were given as arguments."""
    given: ModelConfig | None
    """The section of the configuration that it was given; None: it was made from dimensions alone."""
    replaced: dict[str, Any] = field(default_factory=dict)
    """The values in that section which dimensions took the place of."""
    building_mode: Mode | None = None
    default_precision: Precision | None = None

    def binds(self, key: str) -> bool:
        """Return whether a key of the model may not be said otherwise."""
        return key in self.dimensions or (self.given is not None and key not in _FREE)

    def overrides(self, model: ModelConfig, key: str) -> bool:
        """Return whether a dimension was given just to replace this value of this section."""
        return model is self.given and key in self.replaced and self.replaced[key] == getattr(model, key)


def agreed_model(told: Told, config: ConfigSchema) -> ModelConfig:
    """Return the section of a rack: what the builder was told, and else what this configuration says.

    Raises:
        ConfigError: lists every key that the two say differently, with both values.
    """
    model, agreed, faults = config.model, told.model.model_copy(), list[Fault]()
    for key in ModelConfig.model_fields:
        free = key == "blocks_per_stack" and key not in told.dimensions
        said = free or (_says_vocabulary(told, model) if key == "vocab_size" else key in model.model_fields_set)
        said = said and (key != "residual_blocks" or model.residual_blocks != 0)  # 0 is whatever the rack has
        if not said or told.overrides(model, key) or _value(config, key) == _value(ConfigSchema(model=told.model), key):
            continue
        if told.binds(key):
            allowed = f"the rack was built with {getattr(told.model, key)}; make the two equal, or make a new builder"
            faults.append(Fault(f"model.{key}", describe(getattr(model, key)), allowed))
        else:
            setattr(agreed, key, vocab_size_of(config) if key == "vocab_size" else getattr(model, key))
    if faults:
        raise ConfigError(faults)
    if agreed.residual_scale == "depth" and not agreed.residual_blocks:  # fixed, whatever is added by hand later
        agreed.residual_blocks = residual_blocks_of(config.model_copy(update={"model": agreed}))
    return agreed


def _says_vocabulary(told: Told, model: ModelConfig) -> bool:
    """Return whether the size of a vocabulary is said; 0, that of the tokenizer, gives way to a size that is bound."""
    return model.vocab_size != 0 if told.binds("vocab_size") else True


def _value(config: ConfigSchema, key: str) -> Any:
    """Return the value of a key, with what 0 stands for."""
    model = config.model
    if key in (sizes := {"d_ff": feed_forward_width, "vocab_size": vocab_size_of, "head_dim": head_width}):
        return sizes[key](config)
    return (model.n_kv_heads or model.n_heads) if key == "n_kv_heads" else getattr(model, key)


def agreed_config(told: Told, config: StackWiseConfig) -> StackWiseConfig:
    """Return a copy of a configuration with the sizes of a rack and the builder's own ways of adding to it."""
    agreed = config.model_copy(deep=True)
    agreed.model = agreed_model(told, config)
    growth: Any = agreed.training.progressive
    for key, value, _ in _defaults(told):
        setattr(growth, key, value)
    return agreed


def default_faults(told: Told, config: StackWiseConfig, stack: int) -> Iterator[Fault]:
    """Yield what the builder was given for all additions while the configuration says something else for a stack."""
    growth = config.training.progressive
    own = growth.stacks[stack] if stack < len(growth.stacks) else StackOverride()
    for key, value, argument in _defaults(told):
        entry = own.mode if key == "building_mode" else own.precision
        said = getattr(growth, key)
        if entry == "default" and key in growth.model_fields_set and said != value:
            allowed = f"the builder was given {argument}={value!r}: make the two equal, or leave one of them out"
            yield Fault(f"{GROWTH}.{key}", repr(said), allowed)


def _defaults(told: Told) -> list[tuple[str, Any, str]]:
    """Return key, value and argument of what the builder was given for all additions."""
    found = [
        ("building_mode", told.building_mode, "building_mode"),
        ("new_stack_precision", told.default_precision, "default_precision"),
    ]
    return [item for item in found if item[1] is not None]


def shape_faults(config: StackWiseConfig, has: ModelShape, wants: ModelShape) -> list[Fault]:
    """Return what a configuration wants of a rack that is trained, or edited by hand, in another shape."""
    faults: list[Fault] = []
    for name in ModelShape.model_fields:
        old, new = getattr(has, name), getattr(wants, name)
        if old == new:
            continue
        if name == "causal":
            faults.append(_attention_fault(config, causal=new))
        elif name == "time":
            faults.append(_time_fault(config, old, new))
        elif name == "residual_blocks":
            had, said = (f"depth for {blocks} blocks" if blocks else "one" for blocks in (old, new))
            allowed = f"the rack is trained or edited with {had}: set model.residual_scale and model.residual_blocks to"
            faults.append(Fault("model.residual_scale", said, f"{allowed} that, or make a new builder"))
        else:
            allowed = f"the rack is trained or edited with {old}: set it to that, or make a new builder"
            faults.append(Fault(f"model.{name}", repr(new), allowed))
    return faults


def _attention_fault(config: StackWiseConfig, *, causal: bool) -> Fault:
    objective, said = config.training.progressive.training_objective, config.model.attention
    if not causal:
        allowed = "the rack is trained or edited as a causal one: say causal to go on with it, or make a new builder"
        return Fault("model.attention", f"{said!r}, bidirectional for {objective}", allowed)
    allowed = "the rack is trained or edited as a bidirectional one, in which a position sees the next token; "
    if objective == "custom":
        allowed += "if the targets may be seen, say bidirectional, else "
    return Fault("model.attention", f"{said!r}, causal for {objective}", f"{allowed}make a new builder")


def _time_fault(config: StackWiseConfig, old: TimeShape | None, new: TimeShape | None) -> Fault:
    said = f"{config.training.progressive.time_interpretation!r}{_steps(new)}"
    if old is None:
        allowed = "the rack is trained or edited without a time embedding: use depth or none, or make a new builder"
    else:
        allowed = f"the rack is trained or edited with time as an input{_steps(old)}: use that, or make a new builder"
    return Fault(f"{GROWTH}.time_interpretation", said, allowed)


def _steps(time: TimeShape | None) -> str:
    return f" ({time.n_steps} steps, width {time.dim}, {time.encoding})" if time else ""
