"""The families of Hugging Face models whose blocks are ours, and what each calls its tensors. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from stackwise_core.stages.resolve import ModelShape

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The tensors outside the blocks: those of `embedding`, `head.norm` and `head.projection` of a rack."""


@dataclass(frozen=True)
class Family:
    """A family: its name, what its config.json says, and how its blocks differ from Llama's."""

    name: str
    architecture: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_outputs: bool = False
    no_rope: bool = False
    """Some of its layers have no RoPE."""
    causal: bool = True


FAMILIES = (
    Family("Llama", "LlamaForCausalLM", "llama"),
    Family("Mistral", "MistralForCausalLM", "mistral"),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True),
    Family("SmolLM3", "SmolLM3ForCausalLM", "smollm3", no_rope=True),
    Family("OLMo2", "Olmo2ForCausalLM", "olmo2", qk_norm=True, norm_outputs=True),
)
EUROBERT = Family("EuroBERT", "EuroBertForMaskedLM", "eurobert", causal=False)
"""What racks that were trained on masked tokens are exported as."""

_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_NORMS_OF_OUTPUTS = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
_BIASED = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def family_of(shape: ModelShape) -> Family | None:
    """Return the first family that a causal rack of a shape belongs to; None if no family has such blocks."""
    wanted = (shape.qkv_bias, shape.qk_norm, shape.norm_outputs, shape.no_rope_interval > 0)
    return next((f for f in FAMILIES if (f.qkv_bias, f.qk_norm, f.norm_outputs, f.no_rope) == wanted), None)


def block_tensors(shape: ModelShape) -> dict[str, str]:
    """Return the tensors of a block by their names here, such as `attention.q_proj.weight`, with those in a layer."""
    modules = _MODULES | (_NORMS if shape.qk_norm else {}) | (_NORMS_OF_OUTPUTS if shape.norm_outputs else {})
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in modules.items()}
    return names | ({f"{ours}.bias": f"{_MODULES[ours]}.bias" for ours in _BIASED} if shape.qkv_bias else {})


def layer(number: int) -> str:
    """Return the prefix of the tensors of a layer, counted in data-flow order from 0."""
    return f"model.layers.{number}."
