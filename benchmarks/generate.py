"""New tokens a second against `transformers.generate` of the same weights: greedy and sampled, both with a cache.

Both take turns in one process, so that other load on the machine slows both.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Measure, interleaved, ratios
from benchmarks.training_step import copy_weights
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape

SHAPE = ModelShape(
    vocab_size=49_152,
    d_model=576,
    n_heads=9,
    n_kv_heads=3,
    d_ff=1536,
    causal=True,
    tie_embeddings=True,
    rope_theta=100_000.0,
)
"""Of SmolLM2-135M; the weights are random."""
N_STACKS, N_BLOCKS = 15, 2
PROMPT, NEW = 32, 16
"""Tokens of a prompt, and new tokens."""
BATCHES = (1, 8)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
CASES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED}


def measure(quick: bool) -> list[Measure]:
    rack = random_rack()
    llama = _llama_of(rack)
    rounds, found = (1 if quick else 3), list[Measure]()
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for batch in BATCHES:
            for name, sampling in CASES.items():
                case = f"{name}, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"
                found += _measure(rack, llama, batch, case, sampling, rounds)
    return found


def _measure(rack: Rack, llama: Any, batch: int, case: str, sampling: dict[str, Any], rounds: int) -> list[Measure]:
    prompts = torch.randint(0, SHAPE.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    ours = {"temperature": 1.0, **sampling} if sampling else {}
    theirs = {"do_sample": True, "top_k": 0, **ours} if sampling else {"do_sample": False}

    def generate() -> list[list[int]]:
        return rack.generate(prompts, NEW, **ours)

    def transformers() -> list[list[int]]:
        mask = torch.ones_like(prompts)
        return llama.generate(prompts, attention_mask=mask, max_new_tokens=NEW, **theirs)[:, PROMPT:].tolist()

    if not sampling:
        assert generate() == transformers(), "other tokens for the same weights and prompts"
    seconds = interleaved({"StackWise": generate, "transformers": transformers}, rounds)
    measures = [Measure(case, who, "tokens/s", [batch * NEW / s for s in seconds[who]]) for who in seconds]
    speedup = ratios(seconds["transformers"], seconds["StackWise"])
    return [*measures, Measure(case, "StackWise / transformers", "x", speedup, at_least=1.0)]


def random_rack() -> Rack:
    rack = Rack(SHAPE)
    rack.stacks.extend(Stack(SHAPE, N_BLOCKS, index) for index in range(N_STACKS))
    initialise(rack, 0)
    return rack.requires_grad_(False).eval()


def _llama_of(rack: Rack) -> Any:
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.d_model,
        intermediate_size=SHAPE.d_ff,
        num_hidden_layers=N_STACKS * N_BLOCKS,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        rms_norm_eps=SHAPE.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        tie_word_embeddings=SHAPE.tie_embeddings,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).float().eval()
    blocks = [block for stack in rack.stacks for block in stack.get_submodule("blocks").children()]
    ours = [rack.embedding, *blocks, rack.head.norm, rack.head.projection]
    theirs = [llama.model.embed_tokens, *llama.model.layers, llama.model.norm, llama.lm_head]
    with torch.no_grad():
        for mine, yours in zip(ours, theirs, strict=True):
            copy_weights(mine, yours)
    return llama
