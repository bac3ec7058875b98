"""Parameters, FLOPs and bytes of a stage, counted from shapes. Needs no torch.

A weight is one parameter however it is stored; `model.precision.count_parameters` counts the same from modules.
A multiply-add is two FLOPs. Norms, rotations and AdamW are left out: below 1 % at usual sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import StackSpec, StageSpec

STREAM_BYTES: dict[StreamDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
"""Bytes of one stored value of the stream."""


def base_parameters(shape: ModelShape, n_blocks: int) -> int:
    """Parameters of a stack without adapters: attention, SwiGLU and the norms of its blocks."""
    biases = shape.q_width + 2 * shape.kv_width if shape.qkv_bias else 0
    norms = 2 * shape.d_model + (sum(shape.qk_norm_widths) if shape.qk_norm else 0)
    return n_blocks * (_matrix_parameters(shape) + biases + norms)


def _matrix_parameters(shape: ModelShape) -> int:
    """Parameters of the matrices of a block: attention and SwiGLU."""
    return 2 * shape.d_model * (shape.q_width + shape.kv_width) + 3 * shape.d_model * shape.d_ff


def n_adapter_parameters(shape: ModelShape, n_blocks: int, rank: int) -> int:
    """Parameters of one LoRA adapter on every matrix of a stack: the sum of rank * (in + out).

    A matrix has no higher rank than its narrowest side.
    """
    widths = [shape.q_width] * 2 + [shape.kv_width] * 2 + [shape.d_ff] * 3
    matrices = [(shape.d_model, width) for width in widths]
    return n_blocks * sum(min(rank, *sides) * sum(sides) for sides in matrices)


def trainable_parameters(shape: ModelShape, spec: StageSpec) -> int:
    """Parameters that a stage trains; tied embedding and head count once."""
    anatomy = spec.anatomy
    if spec.adopted:
        return 0
    count = _head_parameters(shape) if anatomy.head_trains else 0
    if anatomy.embedding_trains:
        count += _embedding_parameters(shape, spec)
    for index in anatomy.trained:
        stack = spec.stacks[index]
        count += adapter_parameters(shape, stack)
        if anatomy.trains_of(index) == "everything":
            count += base_parameters(shape, stack.n_blocks)
    return count


def rack_parameters(shape: ModelShape, spec: StageSpec) -> int:
    """Parameters of the whole rack at a stage, including adapters."""
    return _stacks_parameters(shape, spec.stacks) + _head_parameters(shape) + _embedding_parameters(shape, spec)


def _stacks_parameters(shape: ModelShape, stacks: Iterable[StackSpec]) -> int:
    """Parameters of stacks; equal ones are counted once and multiplied, since a rack may have a thousand."""
    kinds = Counter((stack.n_blocks, *(adapter.rank for adapter in stack.adapters.values())) for stack in stacks)
    adapters = (
        (times, n_blocks, sum(n_adapter_parameters(shape, n_blocks, rank) for rank in ranks))
        for (n_blocks, *ranks), times in kinds.items()
    )
    return sum(times * (base_parameters(shape, n_blocks) + n_more) for times, n_blocks, n_more in adapters)


def stack_parameters(shape: ModelShape, stack: StackSpec) -> int:
    """Parameters of a stack, including its adapters."""
    return base_parameters(shape, stack.n_blocks) + adapter_parameters(shape, stack)


def adapter_parameters(shape: ModelShape, stack: StackSpec) -> int:
    """Parameters of the adapters of a stack."""
    return sum(n_adapter_parameters(shape, stack.n_blocks, adapter.rank) for adapter in stack.adapters.values())


def _head_parameters(shape: ModelShape) -> int:
    return shape.d_model + shape.vocab_size * shape.d_model


def _embedding_parameters(shape: ModelShape, spec: StageSpec) -> int:
    """Parameters of the embeddings of tokens (none if tied, as they may be in the first stage) and of time."""
    count = 0 if shape.tie_embeddings and spec.index == 0 else shape.vocab_size * shape.d_model
    if shape.time:
        count += shape.time.n_steps * shape.time.dim if shape.time.encoding == "learned" else 0
        count += shape.time.dim * shape.d_model if shape.time.dim != shape.d_model else 0
    return count


def stack_flops(shape: ModelShape, n_blocks: int, seq_len: int) -> float:
    """FLOPs of one forward pass of a stack over one sequence; causal attention does half the scores."""
    scores = 2 * seq_len * shape.q_width * (0.5 if shape.causal else 1.0)
    return n_blocks * seq_len * 2.0 * (_matrix_parameters(shape) + scores)


def head_flops(shape: ModelShape, seq_len: int, loss_fraction: float) -> float:
    """FLOPs of one forward pass of the head over the positions of a sequence that have a loss."""
    return 2.0 * seq_len * loss_fraction * shape.d_model * shape.vocab_size


def stage_flops(shape: ModelShape, spec: StageSpec, seq_len: int, loss_fraction: float) -> tuple[float, float]:
    """FLOPs of training a stage: (live stacks and head, forward and backward; frozen stacks below, forward).

    A frozen live stack needs no gradient of its weights, only of its input: two of the three products. The head runs at
    `loss_fraction` of the positions.
    """
    sequences = spec.optim.steps * spec.optim.batch_size
    head = head_flops(shape, seq_len, loss_fraction)
    live = (3.0 if spec.anatomy.head_trains else 2.0) * head
    for index in spec.anatomy.live:
        products = 3.0 if spec.anatomy.trains_of(index) == "everything" else 2.0
        live += products * stack_flops(shape, spec.stacks[index].n_blocks, seq_len)
    below = stack_flops(shape, sum(spec.stacks[index].n_blocks for index in spec.anatomy.below), seq_len)
    return sequences * live + _muon_flops(shape, spec), sequences * below


def _muon_flops(shape: ModelShape, spec: StageSpec) -> float:
    """FLOPs of Muon's own products: five iterations over every matrix in each step, whatever the batch is."""
    if not spec.optim.muon_learning_rate:
        return 0.0
    widths = [shape.q_width] * 2 + [shape.kv_width] * 2 + [shape.d_ff] * 3
    sides = (sorted((shape.d_model, width)) for width in widths)
    per_block = sum(5 * (4.0 * short**2 * long + 2.0 * short**3) for short, long in sides)
    anatomy = spec.anatomy
    whole = [spec.stacks[index].n_blocks for index in anatomy.trained if anatomy.trains_of(index) == "everything"]
    return spec.optim.steps * per_block * sum(whole)


def fill_flops(shape: ModelShape, below: Sequence[StackSpec], seq_len: int, from_tokens: int, advanced: int) -> float:
    """FLOPs of filling a store: rows from tokens through all stacks below the boundary, others through the last one."""
    flops = [stack_flops(shape, stack.n_blocks, seq_len) for stack in below]
    return from_tokens * sum(flops) + advanced * flops[-1]


def store_bytes(rows: int, seq_len: int, d_model: int, dtype: StreamDtype) -> int:
    """Bytes of a store's activations and their scales, without checksums and indices (below 0.1 %)."""
    values = rows * seq_len * d_model * STREAM_BYTES[dtype]
    # A scale per token, and two statistics per channel, which training and validation rows each hold, in fp32.
    return values + (4 * rows * seq_len + 2 * 4 * 2 * d_model if dtype in QUANTISED_STREAMS else 0)
