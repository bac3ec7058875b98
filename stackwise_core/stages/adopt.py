"""What a run takes over from a saved rack: the recipes of its stacks, and its shape for the configuration.

Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.rules import rule_faults
from stackwise_core.config.schema import GROWTH, QUANTISED_STREAMS, ModelConfig, ProgressiveConfig, RopeScaling
from stackwise_core.config.stacks import StackSettings
from stackwise_core.config.unused import is_used
from stackwise_core.errors import ConfigError, Fault, SavedRackError
from stackwise_core.stages.identity import AdoptedRecipe, canonical_json
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.saved_rack import SavedRack
from stackwise_core.stages.stages import StackSpec

CHANNELS = "channels.safetensors"
_SIZES = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_ff", "tie_embeddings", "rope_theta", "norm_eps")
_AS_IT_IS = (*_SIZES, "qkv_bias", "qk_norm", "norm_outputs", "no_rope_interval")
"""Keys of `model` that mean the same in a shape."""
_STORAGE = {"full": "float32", "half": "float16", "bfloat16": "bfloat16", "nvfp4": "nvfp4", "qlora": "nf4"}


def adopted_recipes(saved: SavedRack) -> tuple[AdoptedRecipe, ...]:
    """Return the recipes of the stacks of a saved rack, in creation order.

    Raises:
        SavedRackError: there is none, or the stage of one is not over.
    """
    remedy = "Train it in the library and save it again"
    if not saved.stacks:
        raise SavedRackError(saved.folder, "the rack has no stack yet", remedy)
    for stack in saved.stacks:
        if not stack.trained or stack.storage != _STORAGE[stack.precision]:
            raise SavedRackError(saved.folder, f"stack {stack.index} of the rack is not trained yet", remedy)
    content = {path: saved.files[path] for path in saved.tensor_files}
    rack = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return tuple(
        AdoptedRecipe(
            shape=saved.shape,
            mode=stack.mode,
            tail=stack.tail,
            stack=StackSpec(**{name: getattr(stack, name) for name in StackSpec.model_fields}),
            files={name: content[path] for path, name in rack_files(saved, stack.index).items()},
            rack=rack,
        )
        for stack in saved.stacks
    )


def rack_files(saved: SavedRack, stack: int) -> dict[str, str]:
    """Return the files that the adopted artifact of a stack takes: path in the rack -> name in the artifact."""
    own, is_last = f"stack-{stack}/", stack == len(saved.stacks) - 1
    return {
        path: path.removeprefix(own)
        for path in saved.tensor_files
        if path.startswith(own) or (is_last and "/" not in path)
    }


def adopting(config: StackWiseConfig, adopted: Sequence[AdoptedRecipe]) -> StackWiseConfig:
    """Return a configuration with the shape and the stacks of the adopted rack in place of its own keys; idempotent."""
    stacks = tuple(
        StackSettings(
            n_blocks=recipe.stack.n_blocks,
            precision=recipe.stack.precision,
            mode=recipe.mode,
            tail_stacks=recipe.tail,
            steps=0,
            adapter=recipe.stack.adapters.get("stack"),
            progressive=recipe.stack.adapters.get("progressive"),
            imported=bool(recipe.family),
        )
        for recipe in adopted
    )
    filled = config.adopting(stacks)
    for section, key, value in _described(filled, adopted[-1].shape):
        setattr(section, key, value)
    return filled


def check_adopting(config: StackWiseConfig, adopted: Sequence[AdoptedRecipe]) -> StackWiseConfig:
    """Return `adopting`; raises ConfigError with every fault of the configuration for this rack."""
    filled = adopting(config, adopted)
    faults = [*_contradictions(config, adopted), *rule_faults(filled)]
    if faults:
        raise ConfigError(faults)
    return filled


def _described(
    config: StackWiseConfig, shape: ModelShape
) -> Iterator[tuple[ModelConfig | ProgressiveConfig, str, Any]]:
    """Yield each key that describes the shape of a rack: its section, its name, and the value for this shape."""
    model, growth = config.model, config.training.progressive
    for key in _AS_IT_IS:
        yield model, key, getattr(shape, key)
    yield model, "residual_scale", "depth" if shape.residual_blocks else "one"
    yield model, "residual_blocks", shape.residual_blocks
    yield model, "rope_scaling", shape.rope_scaling or RopeScaling()
    yield model, "head_dim", 0 if shape.has_usual_heads and not model.head_dim else shape.head_dim
    yield model, "attention", "causal" if shape.causal else "bidirectional"
    if shape.time:
        yield growth, "time_interpretation", "input"
        yield growth, "time_embedding_dim", shape.time.dim
        yield growth, "time_encoding_type", shape.time.encoding
        yield growth, "num_time_steps", shape.time.n_steps


def _contradictions(config: StackWiseConfig, adopted: Sequence[AdoptedRecipe]) -> Iterator[Fault]:
    growth, shape, count = config.training.progressive, adopted[-1].shape, len(adopted)
    rack = f"the model of run {config.model.from_}" if adopted[-1].family else f"the rack in {config.model.from_}"
    for section, key, value in _described(config, shape):
        given, field = getattr(section, key), type(section).model_fields[key]
        default = field.get_default(call_default_factory=True)
        if given not in (default, value):
            path = f"model.{key}" if section is config.model else f"{GROWTH}.{key}"
            yield Fault(path, repr(given), f"{rack} has {value!r}; leave the key out")
    if growth.time_interpretation == "input" and not shape.time:
        allowed = f"{rack} has no time embedding, which only a first stage could train; use depth or none"
        yield Fault(f"{GROWTH}.time_interpretation", "'input'", allowed)
    if growth.training_objective == "custom" and config.model.attention == "auto" and not shape.causal:
        allowed = f"{rack} is bidirectional: next-token targets would leak; if yours are others, say bidirectional"
        yield Fault("model.attention", "'auto'", allowed)
    window = adopted[-1].window
    if window and config.data.seq_len > window:
        allowed = f"{rack} attends within a window of {window:,} tokens: at most as many"
        yield Fault("data.seq_len", str(config.data.seq_len), allowed)
    if growth.target_stacks < count:
        allowed = f"{rack} has {count} stacks and one head, above all of them; use {count} or more"
        yield Fault(f"{GROWTH}.target_stacks", str(growth.target_stacks), allowed)
    grows = growth.target_stacks > count and is_used(config, "cache.dtype")
    if grows and config.cache.dtype in QUANTISED_STREAMS and CHANNELS not in adopted[-1].files:
        allowed = f"{rack} holds no statistics of its channels; use bfloat16, float16 or float32"
        yield Fault("cache.dtype", repr(config.cache.dtype), allowed)
