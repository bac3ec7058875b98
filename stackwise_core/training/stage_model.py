"""What one stage trains, as one module from the boundary to the head, and the processes that train it together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.precision import compute_dtype, convert_storage
from stackwise_core.objectives.losses import Batch, LossFunction, input_time_step, loss_positions, several, summed_loss
from stackwise_core.objectives.raw_batch import check_padding
from stackwise_core.stages.resolve import resolve_loss
from stackwise_core.stages.stages import Anatomy
from stackwise_core.training import hardware
from stackwise_core.training.hardware import compiler_fault, many_kinds_of_code


class StageModel(nn.Module):
    """The live part of a rack: stacks that train, and those that gradients only flow through."""

    def __init__(
        self,
        anatomy: Anatomy,
        stacks: Sequence[Stack],
        head: Head,
        embedding: TokenEmbedding | None = None,
        *,
        loss_function: LossFunction | None = None,
        checkpointing: bool = False,
        compiles: bool = False,
    ) -> None:
        """Take modules, which stay shared with their rack, and set `requires_grad` as the anatomy says.

        Args:
            anatomy: of the stage.
            stacks: the live ones, in data-flow order.
            head: trained or frozen, as the anatomy says.
            embedding: None where the live part begins at a boundary.
            loss_function: None is cross-entropy.
            checkpointing: keep only the stream between blocks for the backward pass, and recompute the rest.
            compiles: see `compiled`.
        """
        super().__init__()
        assert [stack.creation_index for stack in stacks] == list(anatomy.live)
        self.anatomy = anatomy
        # Registered first, so that a tied matrix is named after it and the gradient norm is summed in data-flow order.
        self.embedding = embedding
        self.stacks = nn.ModuleDict({str(stack.creation_index): stack for stack in stacks})
        self.head = head
        self.loss_function = loss_function
        self.checkpointing = checkpointing
        self.compiles = compiles
        self._share: Tensor | None = None
        self._set_requires_grad()

    @classmethod
    def assemble(
        cls,
        config: StackWiseConfig,
        anatomy: Anatomy,
        stacks: Mapping[int, Stack],
        head: Head,
        embedding: TokenEmbedding | None,
        device: torch.device,
    ) -> StageModel:
        """Return the live part of a rack on a device, ready to train.

        `stacks`, by creation index, may hold other stacks too; those whose weights train become float32.
        """
        live = [stacks[index] for index in anatomy.live]
        for stack in live:
            if anatomy.trains_of(stack.creation_index) == "everything":
                convert_storage(stack, "full")
        return cls(
            anatomy,
            live,
            head,
            None if anatomy.boundary else embedding,
            loss_function=resolve_loss(config),
            checkpointing=config.training.activation_checkpointing,
            compiles=config.hardware.compile and not compiler_fault(device),
        ).to(device)

    def live_stacks(self) -> list[Stack]:
        """Return the stacks in data-flow order."""
        return [stack for stack in self.stacks.values() if isinstance(stack, Stack)]

    def _set_requires_grad(self) -> None:
        self.requires_grad_(False)
        self.head.requires_grad_(self.anatomy.head_trains)
        if self.embedding is not None:
            self.embedding.requires_grad_(self.anatomy.embedding_trains)
        for stack in self.live_stacks():
            trains = self.anatomy.trains_of(stack.creation_index)
            if trains == "everything":
                stack.requires_grad_(True)
            elif trains == "adapters":
                for parameter in adapter_parameters(stack):
                    parameter.requires_grad_(True)

    def forward(self, batch: Batch) -> Tensor:
        """Return the stream before the head: [B, T, D].

        Where joint training draws a depth, stacks created after `stack_idx` are left out.
        """
        stream_BTD, documents = self.entering(batch), several(batch.get("documents"))
        for stack in self.live_stacks():
            if stack.creation_index > batch["stack_idx"]:
                continue
            share = self._share if stack.creation_index == self.anatomy.newest else None
            given = {"documents_BT": documents, "share": share, "recompute": self.checkpointing or None}
            # What is None is left out: hooks on a stack see no more than there is.
            stream_BTD = stack(stream_BTD, **{name: each for name, each in given.items() if each is not None})
        return stream_BTD

    @contextlib.contextmanager
    def compiled(self) -> Generator[None]:
        """Run the blocks through torch.compile inside the block, if they are to be; what else runs them is not.

        One at a time: blocks that are alike share their code, and FSDP2 gathers one at a time. It is begun before the
        model is distributed.
        """
        blocks = [block for stack in self.live_stacks() for block in stack.blocks] if self.compiles else []
        try:
            for block in blocks:
                block.compile(backend=hardware.BACKEND)
            with many_kinds_of_code() if blocks else contextlib.nullcontext():
                yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def let_in(self, share: float | None) -> None:
        """Set how much of what the newest stack would add to the stream is added; None stands for all of it."""
        # A tensor, which changes from step to step without being compiled anew.
        self._share = None if share is None else torch.tensor(share, device=self.head.projection.weight.device)

    def entering(self, batch: Batch) -> Tensor:
        """Return the stream below the first live stack, float32: from the tokens, or the trunk's boundary."""
        if "attention_mask" in batch:
            check_padding(batch["attention_mask"], causal=self.live_stacks()[0].shape.causal)
        device = self.head.projection.weight.device
        if self.embedding is not None:
            _check_tokens("token", batch["input_ids"], self.embedding.num_embeddings)
            return self.embedding(batch["input_ids"].to(device), input_time_step(batch))
        if batch["trunk_activations"] is None:
            raise ConfigError([Fault("trunk_activations", "None", "a stack on a trunk needs the trunk's activations")])
        # Rows of a store are on the device already. Of others, those in pinned memory come while Python goes on; a step
        # ends by waiting for its loss, and so for them.
        return batch["trunk_activations"].to(device, non_blocking=True).float()

    def summed_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the loss summed over the loss positions [nats], and their number."""
        hidden_BTD = self(batch)
        if self.loss_function is None:  # the targets of a custom loss need not be tokens
            targets = batch["targets"][loss_positions(batch)]
            _check_tokens("target", targets, self.head.projection.out_features)
        newest = max(self.live_stacks(), key=lambda stack: stack.creation_index)
        # Not in float16, which would flush the gradient of every unlikely token to zero.
        low = compute_dtype(newest.precision, hidden_BTD.device) is torch.bfloat16
        compute = torch.bfloat16 if low else torch.float32
        return summed_loss(hidden_BTD, self.head, batch, self.loss_function, compute)


def _check_tokens(what: str, tokens: Tensor, vocab_size: int) -> None:
    """Reject tokens that the embedding or the head has no row for; torch's own message would not name the token."""
    if not tokens.numel():
        return
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest >= vocab_size:
        found = largest if largest >= vocab_size else smallest
        raise ConfigError([Fault("model.vocab_size", str(vocab_size), f"the batch holds {what} {found}")])


class Ranks:
    """The processes that train a stage together: here a single one, which reads every row.

    A rank reads its share of every batch; sums over ranks are sums over the batch, so that a step of several
    processes is the step that one process would take, up to the order in which floats are added.
    """

    rank, count = 0, 1
    reports = True
    """Whether this process tells of the steps of all."""
    failed = False
    """Whether training ended by an error that other processes need not have met."""
    sharded = False
    """Whether no process has a whole stack."""
    gradient_divisor = 1
    """Multiplies the loss, because reducing the gradients over the processes divides them by the same number."""
    failpoint = "train"
    """The name of the step's failpoint."""

    def wrap(self, model: StageModel) -> None:
        """Distribute a model, before an optimizer is made of its parameters."""

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return model.summed_loss(batch)[0]

    def gradient_sync(self, *, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a backward pass reduces gradients over the processes, if enabled."""
        return contextlib.nullcontext()

    def sum(self, value: float) -> float:
        """Return the sum of every process's value."""
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all processes get the same answer."""
        return self.sum(float(flag)) > 0

    def of_first(self, value: float) -> float:
        """Return the first process's value, to the bit, in all of them."""
        return self.sum(value if self.rank == 0 else 0.0)

    def gather(self, ids: list[int]) -> list[int]:
        """Return the ids of every process, in the order of the batch."""
        return ids

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor, such as the gradient norm, gathered from all processes; all must call this."""
        return tensor

    def held(self, tensor: Tensor) -> Tensor | None:
        """Return what this process adds of a parameter or moment to a checkpoint."""
        return tensor

    def local_shard(self, tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return what this process holds of a named tensor, laid out like a parameter of the same shape."""
        return tensors[name]


ALONE = Ranks()
