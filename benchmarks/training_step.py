"""One training step against `transformers.LlamaForCausalLM`: same shape, weights, batch, objective, optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.config import StackWiseConfig
from stackwise_core.model.growth_operators import grow_stack, new_rack
from stackwise_core.model.rack import Rack
from stackwise_core.objectives.losses import Batch, summed_loss
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import OptimSpec, StageSpec, resolve_stage
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import train_step

SEQ_LEN = 256
N_BLOCKS = 2
SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "d=256": (8, {"d_model": 256, "n_heads": 4}),
    "d=512": (4, {"d_model": 512, "n_heads": 8}),
    "d=768": (4, {"d_model": 768, "n_heads": 12}),
    # So many loss positions that the logits of the head are computed in chunks.
    "SmolLM2-135M's blocks and vocabulary": (
        8,
        {"d_model": 576, "n_heads": 9, "n_kv_heads": 3, "d_ff": 1536, "vocab_size": 49_152},
    ),
}
"""By name: sequences per batch, and keys of the model."""
MATMUL_SIZE = 1024

Step = Callable[[], float]


def measure(quick: bool) -> list[Measure]:
    threads = [1] if quick else [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    rounds = 5 if quick else 20
    return [m for name in SHAPES for n in threads for m in measure_shape(name, *SHAPES[name], n, rounds)]


def measure_shape(name: str, batch_size: int, model: Mapping[str, int], n_threads: int, rounds: int) -> list[Measure]:
    torch.set_num_threads(n_threads)
    config = _config(batch_size, model)
    shape, first, later = resolve_shape(config), resolve_stage(config, 0), resolve_stage(config, 1)
    batch = _batch(shape.vocab_size, batch_size)
    rack, stack = new_rack(shape, seed=0), grow_stack(shape, N_BLOCKS, 0, "random", seed=0)
    rack.stacks.append(stack)
    llama = llama_like(rack)
    check_same_loss(rack, llama, batch)

    optim, ids = first.optim, batch["input_ids"]
    step_flops = stage_flops(shape, first, SEQ_LEN, loss_fraction=1.0)[0] / optim.steps
    seconds = interleaved(
        {
            "first stage": stackwise_step(StageModel(first.anatomy, [stack], rack.head, rack.embedding), batch, optim),
            "later stage": stackwise_step(_later_stage(shape, later), _on_trunk(batch, shape.d_model), optim),
            "Llama": llama_step(llama, lambda: llama(input_ids=ids, labels=ids).loss, optim),
            "matmul": matmul,
        },
        rounds,
    )

    case = f"{name}, batch {batch_size}, {n_threads} thread{'s' if n_threads > 1 else ''}"
    tokens = batch_size * SEQ_LEN
    measures = [
        Measure(case, name, "tokens/s", [tokens / s for s in seconds[name]])
        for name in ("first stage", "later stage", "Llama")
    ]
    measures += [
        Measure(case, f"{name} / Llama", "x", ratios(seconds["Llama"], seconds[name]), at_least=1.0)
        for name in ("first stage", "later stage")
    ]
    measures += [
        Measure(case, name, "GFLOP/s", [flops / s / 1e9 for s in seconds[name]])
        for name, flops in {"first stage": step_flops, "Llama": step_flops, "matmul": 2.0 * MATMUL_SIZE**3}.items()
    ]
    return measures


# ---------------------------------------------------------------- what is compared


def _config(batch_size: int, model: Mapping[str, int]) -> StackWiseConfig:
    return StackWiseConfig.from_dict(
        {
            "data": {"seq_len": SEQ_LEN},
            "model": {**model, "blocks_per_stack": N_BLOCKS},
            "training": {"batch_size": batch_size, "progressive": {"training_objective": "clm"}},
        }
    )


def _later_stage(shape: ModelShape, spec: StageSpec) -> StageModel:
    rack = new_rack(shape, seed=0)
    rack.untie()
    return StageModel(spec.anatomy, [grow_stack(shape, N_BLOCKS, 1, "random", seed=0)], rack.head)


def _batch(vocab_size: int, batch_size: int) -> Batch:
    tokens = np.random.default_rng(0).integers(vocab_size, size=(batch_size, SEQ_LEN))
    ids = torch.arange(batch_size)
    return {**make_batch({"input_ids": tokens, "sequence_ids": ids}, None), "trunk_activations": None, "stack_idx": 0}


def _on_trunk(batch: Batch, d_model: int) -> Batch:
    stream = torch.randn(*batch["input_ids"].shape, d_model, generator=torch.Generator().manual_seed(0))
    return {**batch, "trunk_activations": stream.bfloat16(), "stack_idx": 1}


def llama_like(rack: Rack) -> LlamaForCausalLM:
    """Return transformers' Llama with the same shape and weights, configured to be as fast as eager mode allows."""
    shape = rack.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=SEQ_LEN,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).float().train()
    ours = [rack.embedding, *rack.stacks[0].blocks, rack.head.norm, rack.head.projection]
    theirs = [llama.model.embed_tokens, *llama.model.layers, llama.model.norm, llama.lm_head]
    with torch.no_grad():
        for mine, yours in zip(ours, theirs, strict=True):
            copy_weights(mine, yours)
    return llama


_LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}


def copy_weights(mine: nn.Module, yours: nn.Module) -> None:
    """Copy the weights of a part of a rack into its counterpart in transformers."""
    for name, parameter in mine.named_parameters():
        first, _, rest = name.partition(".")
        path = f"{_LLAMA_NAMES[first]}.{rest}" if rest else name
        yours.get_parameter(path).copy_(parameter)


def check_same_loss(rack: Rack, llama: LlamaForCausalLM, batch: Batch) -> None:
    """Check that both do the same work: equal loss for equal weights and tokens."""
    total, positions = summed_loss(rack.hidden(batch["input_ids"]), rack.head, batch)
    ours = total.item() / positions
    ids = batch["input_ids"]
    theirs = llama(input_ids=ids, labels=ids).loss.item()
    assert abs(ours - theirs) < 1e-4, f"another loss for the same weights: {ours} here, {theirs} in transformers"


def stackwise_step(model: StageModel, batch: Batch, optim: OptimSpec) -> Step:
    optimizer = make_optimizer(model, optim)
    return lambda: train_step(model, batch, optimizer, optim, 0)["loss"]


def llama_step(llama: nn.Module, loss_of: Callable[[], torch.Tensor], optim: OptimSpec) -> Step:
    """Return a step of AdamW on a loss, with the groups and the clipping of a stage."""
    parameters = list(llama.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optim.gradient_clip)
        optimizer.step()
        return loss.item()

    return step


_FACTORS = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)


def matmul() -> torch.Tensor:
    """Multiply two matrices: the upper limit of the cores."""
    return _FACTORS[0] @ _FACTORS[1]
