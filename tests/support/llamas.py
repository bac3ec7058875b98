"""Transformers' Llama with the weights of a rack: what a causal rack is compared with."""

from __future__ import annotations

from typing import Any

from stackwise_core.model.rack import Rack


def llama_names(n_blocks: tuple[int, ...]) -> dict[str, str]:
    """The rack's parameter names to transformers'."""
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.projection.weight": "lm_head.weight",
    }
    blocks = [(stack, block) for stack, count in enumerate(n_blocks) for block in range(count)]
    for layer, (stack, block) in enumerate(blocks):
        here, there = f"stacks.{stack}.blocks.{block}", f"model.layers.{layer}"
        for part in "qkvo":
            names[f"{here}.attention.{part}_proj.weight"] = f"{there}.self_attn.{part}_proj.weight"
        for part in ("gate", "up", "down"):
            names[f"{here}.ffn.{part}_proj.weight"] = f"{there}.mlp.{part}_proj.weight"
        names[f"{here}.attention_norm.weight"] = f"{there}.input_layernorm.weight"
        names[f"{here}.ffn_norm.weight"] = f"{there}.post_attention_layernorm.weight"
    return names


def llama_of(rack: Rack, attention: str = "eager") -> Any:
    """Return transformers' Llama with the shape and the weights of a rack of dense stacks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, n_blocks = rack.shape, tuple(len(stack.blocks) for stack in rack.stacks)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=sum(n_blocks),
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tie_embeddings,
            attention_bias=False,
            mlp_bias=False,
            attn_implementation=attention,
        )
    )
    names = llama_names(n_blocks)
    weights = {names[name]: value for name, value in rack.state_dict().items()}
    llama.load_state_dict(weights)
    return llama.eval()
