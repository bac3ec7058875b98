"""Parameters, FLOPs and bytes of a stage, counted from shapes. Needs no torch.

A multiply-add counts as two FLOPs. Norms, rotations and the optimizer are left out: below 1 % at the
sizes this is for.
"""

from __future__ import annotations

from stackwise_core.resolve import ModelShape, OptimSpec

STREAM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
"""Bytes of one value of the stream."""
_TRAINING_BYTES = 16
"""fp32 weight, gradient and AdamW's two moments, per trainable parameter."""


def stack_parameters(shape: ModelShape, n_blocks: int) -> int:
    """Parameters of a stack: attention, SwiGLU and two norms per block."""
    kv_width = shape.n_kv_heads * shape.head_dim
    attention = 2 * shape.d_model * (shape.d_model + kv_width)
    return n_blocks * (attention + 3 * shape.d_model * shape.d_ff + 2 * shape.d_model)


def n_adapter_parameters(shape: ModelShape, n_blocks: int, rank: int) -> int:
    """Parameters of one LoRA adapter on every matrix of a stack: the sum of rank * (in + out)."""
    kv_width = shape.n_kv_heads * shape.head_dim
    attention = 2 * (shape.d_model + shape.d_model) + 2 * (shape.d_model + kv_width)
    return n_blocks * rank * (attention + 3 * (shape.d_model + shape.d_ff))


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of the embedding."""
    return shape.vocab_size * shape.d_model


def head_parameters(shape: ModelShape) -> int:
    """Parameters of final norm and projection."""
    return shape.d_model + embedding_parameters(shape)


def trainable_parameters(shape: ModelShape, n_blocks: int, stage: int) -> int:
    """Parameters that a stage trains: stack and head, in the first stage the embedding (once, if tied)."""
    count = stack_parameters(shape, n_blocks) + head_parameters(shape)
    if stage == 0 and not shape.tie_embeddings:
        count += embedding_parameters(shape)
    return count


def rack_parameters(shape: ModelShape, blocks: list[int]) -> int:
    """Parameters of a whole rack; from the second stack on the head is a tensor of its own."""
    stacks = sum(stack_parameters(shape, n_blocks) for n_blocks in blocks)
    tied = shape.tie_embeddings and len(blocks) == 1
    return stacks + head_parameters(shape) + (0 if tied else embedding_parameters(shape))


def stack_flops(shape: ModelShape, n_blocks: int, seq_len: int) -> float:
    """FLOPs of one forward pass of a stack over one sequence; causal attention does half the scores."""
    kv_width = shape.n_kv_heads * shape.head_dim
    matrices = 2 * shape.d_model * (shape.d_model + kv_width) + 3 * shape.d_model * shape.d_ff
    scores = 2 * seq_len * shape.d_model * (0.5 if shape.causal else 1.0)
    return n_blocks * seq_len * 2.0 * (matrices + scores)


def stage_flops(
    shape: ModelShape, blocks: list[int], stage: int, optim: OptimSpec, seq_len: int, loss_fraction: float
) -> tuple[float, float]:
    """FLOPs of training a stage: (new stack and head, forward and backward; frozen trunk, forward).

    Args:
        shape: of the rack.
        blocks: blocks of every stack up to this one.
        stage: which one trains.
        optim: its steps and batch size.
        seq_len: T.
        loss_fraction: share of positions at which the head runs.
    """
    sequences = optim.steps * optim.batch_size
    head = 2.0 * seq_len * loss_fraction * shape.d_model * shape.vocab_size
    own = 3.0 * (stack_flops(shape, blocks[stage], seq_len) + head)
    trunk = sum(stack_flops(shape, n_blocks, seq_len) for n_blocks in blocks[:stage])
    return sequences * own, sequences * trunk


def store_bytes(rows: int, seq_len: int, d_model: int, dtype: str) -> int:
    """Bytes of a store's activations, checksums and indices left out (below 0.1 %)."""
    return rows * seq_len * d_model * STREAM_BYTES[dtype]


def training_bytes(shape: ModelShape, n_blocks: int, stage: int, batch: int, seq_len: int) -> int:
    """Estimate of the peak bytes of a cached stage: weights with optimizer state, and kept activations.

    A block keeps about 10 tensors of width d_model and 4 of width d_ff per position for its backward pass.
    """
    kept = n_blocks * (10 * shape.d_model + 4 * shape.d_ff) * 4
    return trainable_parameters(shape, n_blocks, stage) * _TRAINING_BYTES + batch * seq_len * kept
