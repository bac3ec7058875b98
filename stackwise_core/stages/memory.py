"""The memory of training a stage, forecast from shapes: what is held, and its peak.

Counted are the tensors of one process, as the allocators of torch count them; the libraries themselves, buffers on
their way from a store, and the copy that a checkpoint makes in the memory of the host are not. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import Precision
from stackwise_core.stages.costs import adapter_parameters, base_parameters
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import StackSpec, StageSpec

MOST_LOGITS = 2**26
"""With no more logits, 256 MiB of them in float32, a CPU computes the loss whole."""
SMALLEST_IN_8_BITS = 4096
"""Values of the smallest matrix whose moments `training.optimizer: adamw8bit` keeps in 8 bits."""
_BYTES: dict[Precision, float] = {"full": 4, "half": 2, "bfloat16": 2, "nvfp4": 0.5 + 1 / 16, "qlora": 0.5 + 1 / 64}
"""Bytes of a stored value of a frozen matrix, with its scales."""
_IN_8_BITS = 2 + 2 * 4 / 256
"""Bytes of two moments: a byte each, and a float32 for every 256."""


def chunk_positions(d_model: int, *, cuda: bool) -> int:
    """Return the positions of a chunk of the loss: what a GPU needs to be busy, or on a CPU what little memory allows.

    There the logits are a twelfth of the matrix, its gradient, and both of the stream.
    """
    return 2048 if cuda else max(64, min(2048, d_model // 6))


class Memory(NamedTuple):
    """Bytes of what training a stage holds. Not all of it exists at the same time: see `peak`."""

    weights: int
    """float32 of what trains, the stored type of what is frozen; with those of a trunk that is not cached."""
    gradients: int
    moments: int
    """What the optimizer keeps."""
    casts: int
    """Copies of live matrices in the type of their products, which autograd keeps until its backward pass."""
    activations: int
    """What live stacks keep for the backward pass of one part of a batch."""
    logits: int
    """At the most, with the gradients that the loss makes of them."""
    boundary: int
    """The stream that enters the first live stack."""
    peak: int


_ADAMW_BYTES, _MUON_BYTES = 8, 4


class _Tensor(NamedTuple):
    """Equal tensors that train."""

    of: Literal["stack", "adapter", "head", "embedding", "vector"]
    n: int
    """Values of each."""
    times: int


@dataclass(frozen=True)
class Setting:
    """What the memory of a stage depends on."""

    shape: ModelShape
    spec: StageSpec
    seq_len: int
    loss_fraction: float = 1.0
    """Share of the positions that have a loss."""
    cached: bool = True
    """Whether the boundary is read; else the trunk is in memory too."""
    checkpointing: bool = False
    cuda: bool = False
    processes: int = 1
    shards: int = 1
    """Processes that hold a share each of what trains; with 1, each holds all of it."""

    @classmethod
    def of(
        cls,
        config: StackWiseConfig,
        shape: ModelShape,
        spec: StageSpec,
        *,
        loss_fraction: float | None,
        cached: bool,
        cuda: bool,
        there: int = 0,
    ) -> Setting:
        """Return the setting of a stage of a configuration; without a fraction every position has a loss.

        `there` are the bytes that each process has, if they are known: `hardware.shard: auto` asks for them.
        """
        checkpointing, hardware = config.training.activation_checkpointing, config.hardware
        ranks, fraction = hardware.ranks, loss_fraction or 1.0
        whole = cls(shape, spec, config.data.seq_len, fraction, cached, checkpointing, cuda, ranks)
        shared = hardware.shards(joint=spec.mode == "joint")
        # 8-bit moments need whole matrices, and validations that decide something the whole stage.
        can_be = not spec.optim.eight_bit and spec.optim.watch is None
        if hardware.shard == "auto" and can_be and 0 < there < memory(whole).peak:
            shared = True
        return replace(whole, shards=ranks) if shared else whole

    @property
    def part(self) -> int:
        """Sequences that one process computes at once."""
        share = -(-self.spec.optim.batch_size // self.processes)
        return -(-share // min(self.spec.optim.accumulation_steps, share))

    @property
    def live(self) -> list[StackSpec]:
        """The live stacks, in data-flow order."""
        return [self.spec.stacks[index] for index in self.spec.anatomy.live]

    def trains(self, stack: StackSpec) -> str:
        """Return what of a live stack trains."""
        return self.spec.anatomy.trains_of(stack.index)

    def autocast(self, stack: StackSpec) -> bool:
        """Return whether a stack computes in a type of 2 bytes."""
        return self.cuda and stack.precision != "full"


def memory(setting: Setting) -> Memory:
    """Return the forecast of a stage; all zeros for an adopted one, which does not train."""
    if setting.spec.adopted:
        return Memory(*[0] * 8)
    shape, n_positions = setting.shape, setting.part * setting.seq_len
    blocks = [(stack, _kept(setting, stack) * n_positions) for stack in setting.live for _ in range(stack.n_blocks)]
    stream = 4 * shape.d_model * n_positions
    kept = [stream if setting.checkpointing else each for _, each in blocks]
    one = max((each for _, each in blocks), default=0) if setting.checkpointing else 0
    cast = [2 * _matrices(shape, stack) for stack in setting.live if setting.autocast(stack)]
    casts = max(cast, default=0) if setting.checkpointing else sum(cast)
    logits, after = _logits(setting)
    weights, gradients, moments = _weights(setting), 4 * _trained(setting), _moments(setting)
    gradients, moments = gradients // setting.shards, moments // setting.shards
    whole = setting.spec.optim.accumulation_steps > 1 or setting.processes > 1  # gradients of a part before, or buckets
    # At the loss all activations are there; going down they end block by block, and gradients come.
    held = [sum(kept) + casts + stream + logits + (max(0, gradients - after) if whole else 0)]
    made = after
    for number, (stack, _) in reversed(list(enumerate(blocks))):
        made += 4 * _trained_in_block(setting, stack)
        width = 2 if setting.autocast(stack) else 4
        passing = n_positions * (2 * shape.d_ff * width + 8 * shape.d_model)
        left = casts * (number + 1) // len(blocks)
        held.append(sum(kept[: number + 1]) + one + left + passing + stream + (gradients if whole else made))
    held.append(gradients + _table(setting) + _stepping(setting))
    peak = weights + moments + max(held)
    return Memory(weights, gradients, moments, casts, int(sum(kept) + one), logits, stream, int(peak))


# ---------------------------------------------------------------- what trains


def _tensors(setting: Setting) -> Iterator[_Tensor]:
    """Yield everything that trains."""
    shape, anatomy = setting.shape, setting.spec.anatomy
    if anatomy.head_trains:
        tied = anatomy.embedding_trains and shape.tie_embeddings and setting.spec.index == 0
        yield _Tensor("embedding" if tied else "head", shape.vocab_size * shape.d_model, 1)
        yield _Tensor("vector", shape.d_model, 1)
    if anatomy.embedding_trains:
        if not (anatomy.head_trains and shape.tie_embeddings and setting.spec.index == 0):
            yield _Tensor("embedding", shape.vocab_size * shape.d_model, 1)
        if shape.time and shape.time.encoding == "learned":
            yield _Tensor("embedding", shape.time.n_steps * shape.time.dim, 1)
        if shape.time and shape.time.dim != shape.d_model:
            yield _Tensor("head", shape.time.dim * shape.d_model, 1)
    for stack in setting.live:
        yield from _of_stack(setting, stack)


def _of_stack(setting: Setting, stack: StackSpec) -> Iterator[_Tensor]:
    shape, trains = setting.shape, setting.trains(stack)
    sides = [(shape.d_model, width) for width in _widths(shape)]
    if trains == "everything":
        yield from (_Tensor("stack", narrow * wide, stack.n_blocks) for narrow, wide in sides)
        matrices = sum(narrow * wide for narrow, wide in sides)
        yield _Tensor("vector", base_parameters(shape, 1) - matrices, stack.n_blocks)
    if trains != "nothing":
        for adapter in stack.adapters.values():
            for pair in sides:
                yield from (_Tensor("adapter", min(adapter.rank, *pair) * side, stack.n_blocks) for side in pair)


def _widths(shape: ModelShape) -> list[int]:
    """Return the other side of each matrix of a block, whose first is the width of the stream."""
    return [shape.q_width] * 2 + [shape.kv_width] * 2 + [shape.d_ff] * 3


def _matrices(shape: ModelShape, stack: StackSpec) -> int:
    """Return the values of the matrices of a stack, adapters included."""
    return stack.n_blocks * shape.d_model * sum(_widths(shape)) + adapter_parameters(shape, stack)


def _trained(setting: Setting) -> int:
    return sum(each.n * each.times for each in _tensors(setting))


def _trained_in_block(setting: Setting, stack: StackSpec) -> int:
    return sum(each.n for each in _of_stack(setting, stack))


# ---------------------------------------------------------------- what is held


def _weights(setting: Setting) -> int:
    """Return the bytes of all weights in memory: of live stacks, of head and embedding, and of a live trunk."""
    shape, spec = setting.shape, setting.spec
    trained, frozen = 4 * _trained(setting), 0.0
    if not spec.anatomy.head_trains:
        frozen += 4 * (shape.vocab_size + 1) * shape.d_model
    if not setting.cached and not spec.anatomy.embedding_trains:
        frozen += 4 * shape.vocab_size * shape.d_model
    below = [] if setting.cached else [spec.stacks[index] for index in spec.anatomy.below]
    for stack in [*setting.live, *below]:
        trains = setting.trains(stack)
        if trains != "everything":
            matrices = stack.n_blocks * shape.d_model * sum(_widths(shape))
            others = base_parameters(shape, stack.n_blocks) - matrices
            frozen += _BYTES[stack.precision] * matrices + 4 * others
        if trains == "nothing":
            frozen += 4 * adapter_parameters(shape, stack)
    return trained // setting.shards + int(frozen) + (_gathered(setting) if setting.shards > 1 else 0)


def _gathered(setting: Setting) -> int:
    """Return the bytes of what a process holds whole for a while of shared weights: the ends, and two blocks."""
    ends = sum(each.n * each.times for each in _tensors(setting) if each.of in ("head", "embedding"))
    blocks = [_trained_in_block(setting, stack) for stack in setting.live]
    return 4 * (ends + 2 * max(blocks, default=0))


def _moments(setting: Setting) -> int:
    """Return the bytes of the optimizer's state."""
    optim = setting.spec.optim

    def width(tensor: _Tensor) -> float:
        if optim.muon_learning_rate and tensor.of == "stack":
            return _MUON_BYTES
        large = tensor.n >= SMALLEST_IN_8_BITS and tensor.of not in ("embedding", "vector")
        return _IN_8_BITS if optim.eight_bit and large else _ADAMW_BYTES

    return int(sum(width(each) * each.n * each.times for each in _tensors(setting)))


def _kept(setting: Setting, stack: StackSpec) -> float:
    """Return the bytes that one block keeps of a position: what each operation needs for its gradient."""
    shape, trains = setting.shape, setting.trains(stack)
    width = 2 if setting.autocast(stack) else 4
    product, stream = width * shape.d_model, 4 * shape.d_model
    whole = trains == "everything"
    kept = 2 * (stream + 4) + (2 * stream if whole else 0)  # both norms, and what their weights are multiplied with
    kept += width * 2 * (shape.q_width + shape.kv_width) + 4 * shape.n_heads  # q, k, v, what comes out, and its sums
    kept += width * shape.d_ff * (3 if trains == "nothing" else 4)  # gate, its SiLU, up, and their product
    kept += 0 if trains == "nothing" else 2 * product  # the inputs of q, k, v, and of gate and up
    if shape.qk_norm:
        kept += 4 * (shape.q_width + shape.kv_width) * (2 if whole else 1)
    ranks = sum(adapter.rank for adapter in stack.adapters.values())
    return kept + (0 if trains == "nothing" else width * 7 * ranks)


def _logits(setting: Setting) -> tuple[int, int]:
    """Return the bytes of the loss at its peak, and of the gradients of the head that are left of it."""
    shape, spec, n_positions = setting.shape, setting.spec, setting.part * setting.seq_len
    n_losses = max(1, round(n_positions * setting.loss_fraction))
    trains = spec.anatomy.head_trains
    of_weight = 4 * shape.vocab_size * shape.d_model if trains else 0
    of_hidden = 4 * n_losses * shape.d_model
    entering = (3 if trains else 1) * of_hidden  # what the norm and the product keep
    if setting.cuda or n_losses * shape.vocab_size > MOST_LOGITS:
        newest = spec.stacks[spec.anatomy.newest]
        low = setting.autocast(newest) and newest.precision != "half"
        chunk = min(n_losses, chunk_positions(shape.d_model, cuda=setting.cuda)) * shape.vocab_size
        most = of_hidden + of_weight + (6 if low else 4) * chunk
        most += 2 * (shape.vocab_size + n_losses) * shape.d_model if low else 0
    else:
        logits = 4 * n_losses * shape.vocab_size
        most = max(3 * logits, logits + of_hidden + of_weight)
    return entering + most, of_weight + 4 * shape.d_model


def _table(setting: Setting) -> int:
    """Return the bytes of the embedding's gradient before it is added to that of the head it is tied to."""
    shape, spec = setting.shape, setting.spec
    tied = spec.anatomy.embedding_trains and shape.tie_embeddings and spec.index == 0
    return 4 * shape.vocab_size * shape.d_model if tied else 0


def _stepping(setting: Setting) -> int:
    """Return the bytes that an optimizer step takes for itself: on a CPU, moments of 8 bits become float32."""
    optim = setting.spec.optim
    if not optim.eight_bit or setting.cuda:
        return 0
    large = [each.n for each in _tensors(setting) if each.of not in ("embedding", "vector")]
    return 4 * 4 * max((n for n in large if n >= SMALLEST_IN_8_BITS), default=0)
