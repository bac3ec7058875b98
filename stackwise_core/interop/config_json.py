"""What the config.json of a Hugging Face checkpoint says of its blocks, or why ours are not these. Needs no torch.

The file is a stranger's: a key that the block does not do is refused with its value, and never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from stackwise_core.config.schema import RopeScaling
from stackwise_core.errors import ConfigError, Fault, shortened
from stackwise_core.interop.families import EUROBERT, FAMILIES, Family
from stackwise_core.stages.resolve import ModelShape

_Size = Annotated[int, Field(ge=1, le=2**24)]
_SUPPORTED = ", ".join(family.name for family in FAMILIES)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "eurobert": {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
    },
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}
"""What transformers takes for a key that a family's config.json leaves out, where it is not the same for all."""


class ConfigJson(BaseModel, strict=True, frozen=True):
    """The keys of config.json that say what the blocks are; others, such as those of training, are not read."""

    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)]
    num_attention_heads: _Size
    vocab_size: Annotated[int, Field(ge=2, le=2**24)]
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)]
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: Annotated[float, Field(gt=0.0, lt=0.1)] = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: _Size | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    no_rope_layer_interval: _Size = 4
    partial_rotary_factor: float = 1.0
    quantization_config: Any = None
    auto_map: Any = None
    rope_theta: Annotated[float, Field(gt=1.0)] = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)] | None = None


class Described(NamedTuple):
    """A checkpoint by its config.json."""

    family: Family
    shape: ModelShape
    n_layers: int
    context: int
    """`max_position_embeddings`: the length that it was made for [tokens]."""
    has_rope: list[bool]
    """Of each layer."""
    window: int
    """The longest sequence over which every position sees all before it, where attention has a window; else 0."""


def describe(values: dict[str, Any]) -> Described:
    """Return what a config.json describes.

    Raises:
        ConfigError: it is of another architecture, or says something that the block does not do; with every fault.
    """
    family = _family(values)
    given = {key: value for key, value in values.items() if value is not None or key == "sliding_window"}
    try:
        said = ConfigJson.model_validate({**_DEFAULTS[family.model_type], **given})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ConfigError([_fault(".".join(map(str, of["loc"])), _input(of), of["msg"]) for of in faults]) from None
    heads = said.num_key_value_heads or said.num_attention_heads
    width = said.head_dim or said.hidden_size // said.num_attention_heads
    interval = said.no_rope_layer_interval if family.no_rope else 0
    has_rope = [not interval or (n + 1) % interval != 0 for n in range(said.num_hidden_layers)]
    if family.no_rope and said.no_rope_layers is not None:
        has_rope = [bool(value) for value in said.no_rope_layers[: len(has_rope)]]
    if faults := [*_undone(said), *_widths(said, heads, width), *_counted(said, has_rope)]:
        raise ConfigError(faults)
    theta, scaling = _rope(said)
    shape = ModelShape(
        vocab_size=said.vocab_size,
        d_model=said.hidden_size,
        n_heads=said.num_attention_heads,
        n_kv_heads=heads,
        d_ff=said.intermediate_size,
        causal=family.causal,
        tie_embeddings=said.tie_word_embeddings,
        rope_theta=theta,
        norm_eps=said.rms_norm_eps,
        head_dim=width,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_outputs=family.norm_outputs,
        no_rope_interval=interval,
        rope_scaling=scaling,
    )
    window = _window(family, said)
    return Described(family, shape, said.num_hidden_layers, said.max_position_embeddings, has_rope, window)


def _fault(key: str, value: Any, allowed: str) -> Fault:
    return Fault(f"config.json: {key}", shortened(value), allowed)


def _input(fault: Any) -> Any:
    return "nothing" if fault["type"] == "missing" else fault["input"]


def _family(values: dict[str, Any]) -> Family:
    """Return the family by its architecture; by `model_type` if no architecture is named."""
    named = values.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    kind = values.get("model_type")
    for family in (*FAMILIES, EUROBERT):
        if name == family.architecture or (name is None and kind == family.model_type):
            if kind not in (None, family.model_type):
                raise ConfigError([_fault("model_type", kind, f"{family.architecture} has {family.model_type!r}")])
            return family
    key, value = ("architectures", named) if name is not None else ("model_type", kind)
    raise ConfigError([_fault(key, value, f"its blocks are others than ours; {_SUPPORTED} can be imported")])


def _undone(said: ConfigJson) -> Iterator[Fault]:
    """Yield what a checkpoint has and our block has not."""
    if said.hidden_act != "silu":
        yield _fault("hidden_act", said.hidden_act, "the feed-forward has silu")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(said, key):
            yield _fault(key, True, "these layers have no biases")
    if said.partial_rotary_factor != 1.0:
        yield _fault("partial_rotary_factor", said.partial_rotary_factor, "all channels of a head are rotated")
    if said.quantization_config is not None:
        yield _fault("quantization_config", said.quantization_config, "give the checkpoint in bf16, fp16 or fp32")
    if said.auto_map is not None:
        yield _fault("auto_map", said.auto_map, "it names code of its own, which is not run")


def _widths(said: ConfigJson, n_kv_heads: int, head_dim: int) -> Iterator[Fault]:
    if said.head_dim is None and said.hidden_size % said.num_attention_heads:
        yield _fault("num_attention_heads", said.num_attention_heads, f"must divide hidden_size = {said.hidden_size}")
    if said.num_attention_heads % n_kv_heads:
        allowed = f"must divide num_attention_heads = {said.num_attention_heads}"
        yield _fault("num_key_value_heads", n_kv_heads, allowed)
    if head_dim % 2:
        yield _fault("head_dim", head_dim, "RoPE turns pairs of channels and needs an even number")


def _counted(said: ConfigJson, has_rope: list[bool]) -> Iterator[Fault]:
    if len(has_rope) != said.num_hidden_layers:
        yield _fault("no_rope_layers", said.no_rope_layers, f"a 0 or 1 for each of {said.num_hidden_layers} layers")


def _window(family: Family, said: ConfigJson) -> int:
    of_layers = "sliding_attention" in (said.layer_types or ())
    slides = family.model_type == "mistral" or said.use_sliding_window or of_layers
    if slides and family.model_type != "llama" and said.sliding_window:
        return said.sliding_window if said.sliding_window < said.max_position_embeddings else 0
    return 0


# ---------------------------------------------------------------- RoPE


def _rope(said: ConfigJson) -> tuple[float, RopeScaling | None]:
    """Return the base of the frequencies, and how they were stretched: in the words of transformers 5 or 4."""
    key = "rope_parameters" if said.rope_parameters is not None else "rope_scaling"
    given = getattr(said, key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", said.rope_theta)
    if not isinstance(theta, (int, float)) or not theta > 1.0:
        raise ConfigError([_fault(f"{key}.rope_theta", theta, "a number above 1 is expected")])
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        fault = _fault(f"{key}.partial_rotary_factor", given["partial_rotary_factor"], "all channels are rotated")
        raise ConfigError([fault])
    if kind == "default":
        if nested := [name for name, value in given.items() if isinstance(value, dict)]:
            raise ConfigError([_fault(f"{key}.{nested[0]}", given[nested[0]], "all layers have the same positions")])
        return float(theta), None
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError([_fault(f"{key}.rope_type", kind, "default, linear, llama3 or yarn is possible")])
    try:
        return float(theta), RopeScaling.model_validate({"kind": kind, **_numbers(said, kind, given)})
    except (ValidationError, TypeError, ArithmeticError, ValueError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError([_fault(key, given, f"its numbers do not fit ({told})")]) from None


def _numbers(said: ConfigJson, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    if kind == "linear":
        return {"factor": given.get("factor")}
    before = said.original_max_position_embeddings or given.get("original_max_position_embeddings")
    numbers: dict[str, Any] = {
        "factor": given.get("factor"),
        "original_max_position_embeddings": before or said.max_position_embeddings,
    }
    if kind == "llama3":
        return numbers | {key: given.get(key) for key in ("low_freq_factor", "high_freq_factor")}
    if numbers["factor"] is None:
        numbers["factor"] = said.max_position_embeddings / numbers["original_max_position_embeddings"]
    numbers |= {key: given[key] for key in ("beta_fast", "beta_slow") if given.get(key)}
    numbers["truncate"] = given.get("truncate", True)
    return numbers | {"attention_factor": _attention_factor(numbers["factor"], given)}


def _attention_factor(factor: float, given: dict[str, Any]) -> float:
    """Return the factor on cosines and sines; 0 leaves it to the factor of the context."""
    if given.get("attention_factor") is not None:
        return given["attention_factor"]
    scale, of_all = given.get("mscale"), given.get("mscale_all_dim")
    if not (scale and of_all and factor > 1):
        return 0.0
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * of_all * math.log(factor) + 1.0)
