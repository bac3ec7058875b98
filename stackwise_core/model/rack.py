"""A rack: its parts, and the folder that it is saved in."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise_core.config.schema import Mode
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.generate import OnToken, Prompts, generate
from stackwise_core.generation.sampling import Sampling
from stackwise_core.generation.unmask import Denoiser, Unmasking, unmask
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.precision import count_parameters
from stackwise_core.model.saving import (
    CHANNELS,
    EMBEDDING,
    HEAD,
    channel_tensors,
    described_stacks,
    fill_from,
    folder_of,
    hold,
    load_saved_channels,
    load_saved_stack,
    serialised,
    stack_tensors,
    write_whole,
)
from stackwise_core.model.shown import parts_table
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.saved_rack import RACK, SavedRack


class Rack(nn.Module):
    """Embedding, stacks in data-flow order, head."""

    def __init__(self, shape: ModelShape) -> None:
        """A new one has no stacks."""
        super().__init__()
        self.shape = shape
        self.embedding = TokenEmbedding(shape)
        self.stacks = nn.ModuleList()
        self.head = Head(shape)
        self.tied = False
        if shape.tie_embeddings:
            self.tie()

    def tie(self) -> None:
        """Have embedding and head share one matrix: that of the embedding."""
        self.head.projection.weight = self.embedding.weight
        self.tied = True

    def untie(self) -> None:
        """Stop sharing one tensor between embedding and head.

        From the second stage on the embedding is frozen while the head trains; a shared tensor would change
        the embedding under every cache.
        """
        if self.tied:
            self.head.projection.weight = nn.Parameter(self.embedding.weight.detach().clone())
            self.tied = False

    def hidden(
        self,
        input_ids_BT: Tensor,
        depth: int | None = None,
        time_step: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return the stream after the first `depth` stacks (all by default): [B, T, D]; `documents` as in `forward`."""
        x_BTD = self.embedding(input_ids_BT, time_step)
        for stack in self.stacks[:depth]:
            x_BTD = stack(x_BTD, documents_BT=documents)
        return x_BTD

    def forward(self, input_ids_BT: Tensor, time_step: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V]; `documents` [B, T] numbers the documents that are to be kept apart."""
        return self.head(self.hidden(input_ids_BT, time_step=time_step, documents=documents))

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 128,
        *,
        end_token: int | None = None,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, without the prompt and without `end_token`, which ends a text.

        Args:
            prompts: token ids [B, T], or lists of any lengths.
            max_new_tokens: at most as many for each.
            end_token: a text ends where it is chosen.
            on_token: called with the number of a prompt and its next token, as soon as it is known; a text ends where
                it returns True.
            sampling: `temperature, top_k, top_p, min_p, repetition_penalty, seed`, see `Sampling`; by default the most
                likely token is taken. The draws for a prompt do not depend on the others in the batch.

        Raises:
            ConfigError: a value cannot be, or the rack is not causal.
        """
        ends = () if end_token is None else (end_token,)
        chosen = Sampling(**sampling)
        found = generate(self, prompts, max_new_tokens, chosen, end_tokens=ends, on_token=on_token)
        return [text.tokens for text in found]

    def unmask(
        self, tokens: Prompts, mask_token: int, *, step_ratios: Sequence[float] = (), **how: Any
    ) -> list[list[int]]:
        """Return token ids with every masked token filled in, the surest first.

        Args:
            tokens: ids [B, T], or lists of any lengths, some of them `mask_token`, which are filled in.
            mask_token: stands for a token that is not known yet.
            step_ratios: where time is an input, the share of masked tokens of each time step.
            how: `order, steps, block_length, temperature, seed, guidance`, see `Unmasking`.

        Raises:
            ConfigError: a value cannot be, or the rack needs `step_ratios`.
        """
        n_steps = self.shape.time.n_steps if self.shape.time else 0
        if len(step_ratios) != n_steps:
            allowed = f"this rack has {n_steps} time steps; give the share of masked tokens of each"
            raise ConfigError([Fault("step_ratios", f"{len(step_ratios)} ratios", allowed)])
        return unmask([Denoiser(self, step_ratios=tuple(step_ratios))], tokens, mask_token, Unmasking(**how))

    def _repr_html_(self) -> str:
        return self.shown({})

    def shown(self, how: Mapping[int, str]) -> str:
        """Return its parts in the order of the data, as HTML; `how` says more of stacks, by creation index."""
        stacks = [stack for stack in self.stacks if isinstance(stack, Stack)]
        named = [(f"stack {stack.creation_index}{how.get(stack.creation_index, '')}", stack) for stack in stacks]
        shape, total = self.shape, count_parameters(self)["parameters"]
        title = f"Rack: {len(stacks)} stacks, {total:,} parameters, {shape.d_model} channels"
        return parts_table(title, [("embedding", self.embedding), *named, ("head", self.head)])

    def save(self, folder: str | Path) -> None:
        """Write the rack into a folder, whole or not at all, in the place of a rack that was saved there before.

        Raises:
            SavedRackError: the folder holds something else; it is left as it is.
        """
        save_rack(folder, self)

    @staticmethod
    def load(folder: str | Path) -> Rack:
        """Return a rack as it was saved, by itself or by its builder, on the CPU.

        Raises:
            SavedRackError: there is none, a file is missing or damaged, or another version wrote it.
        """
        return load_rack(folder)[0]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors as torch does; a tied rack refuses, with a ConfigError, two matrices that differ.

        A state has neither the precisions nor the alphas of its stacks: `save` and `load` keep a rack whole.
        """
        ends = [state_dict.get(f"{end}.weight") for end in ("embedding", "head.projection")]
        if self.tied and ends[0] is not None and ends[1] is not None and not _same(ends[0], ends[1]):
            allowed = "two matrices that differ, but this rack ties them: call rack.untie() first, or use Rack.load"
            raise ConfigError([Fault("state_dict", "embedding.weight and head.projection.weight", allowed)])
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.tied:  # `assign` gave each its own
            self.tie()
        return found


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu()))


def save_rack(folder: str | Path, rack: Rack, **how: Any) -> None:
    """Write a rack, on any device, into a folder; see `Rack.save`, and `rack_files` for what else can be said."""
    write_whole(folder, rack_files(rack, **how))


def load_rack(folder: str | Path) -> tuple[Rack, SavedRack, dict[int, ChannelStatistics]]:
    """Return a rack as it was saved, on the CPU, with its description and the statistics of its stream.

    Raises:
        SavedRackError: there is none, a file is missing or damaged, or another version wrote it.
    """
    saved = SavedRack.at(folder)
    with torch.device("meta"):
        rack = Rack(saved.shape)
    by_index = [load_saved_stack(saved, stack) for stack in saved.stacks]
    fill_from(saved, HEAD, partial(hold, rack.head))
    fill_from(saved, EMBEDDING, partial(hold, rack.embedding))
    rack.tied = saved.tied
    if saved.tied:
        rack.tie()
    rack.stacks.extend(by_index[index] for index in saved.order)
    for name, parameter in rack.named_parameters():
        parameter.requires_grad_(name in saved.trainable)
    return rack.eval(), saved, load_saved_channels(saved)


def rack_files(
    rack: Rack,
    *,
    seed: int | None = None,
    trained: Collection[int] | None = None,
    channels: Mapping[int, ChannelStatistics] | None = None,
    modes: Sequence[Mode] = (),
    no_config: str = "",
    others: Iterable[tuple[str, bytes]] = (),
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a saved rack, path and bytes, one at a time; its description is the last.

    Args:
        rack: on any device.
        seed: of the builder's configuration.
        trained: creation indices of the stacks whose stage is over; None stands for all.
        channels: statistics of the stacks' outputs, where the stream is quantised.
        modes: how each stack was added, in creation order; see `described_stacks`.
        no_config: why there is no `config.yaml`.
        others: more files, such as that.
    """
    stacks = [stack for stack in rack.stacks if isinstance(stack, Stack)]
    described, digests = described_stacks(stacks, trained, modes), dict[str, str]()
    if types := {str(parameter.dtype) for parameter in rack.parameters()} - {"torch.float32"}:
        allowed = "the rack was cast: save it before, or build stacks of that precision"
        raise ConfigError([Fault("rack", f"parameters of {', '.join(sorted(types))}", allowed)])
    for name, data in itertools.chain(_tensor_files(rack, stacks, channels or {}), others):
        digests[name] = hashlib.sha256(data).hexdigest()
        yield name, data
    saved = SavedRack(
        shape=rack.shape,
        seed=seed,
        tied=rack.tied,
        order=tuple(stack.creation_index for stack in stacks),
        stacks=described,
        trainable=tuple(name for name, parameter in rack.named_parameters() if parameter.requires_grad),
        no_config=no_config,
        files=digests,
    )
    yield RACK, saved.to_json()


def _tensor_files(
    rack: Rack, stacks: Sequence[Stack], channels: Mapping[int, ChannelStatistics]
) -> Iterator[tuple[str, bytes]]:
    yield EMBEDDING, serialised(rack.embedding.state_dict())
    yield HEAD, serialised(rack.head.state_dict())
    for stack in stacks:
        for name, tensors in stack_tensors(stack).items():
            yield f"{folder_of(stack.creation_index)}/{name}", serialised(tensors)
    if channels:
        yield CHANNELS, serialised(channel_tensors(channels))
