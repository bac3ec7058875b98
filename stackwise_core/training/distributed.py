"""Distributed training of one stage: DDP, where each process holds the whole model, or FSDP2, where each holds a shard.

Importing this module imports torch.distributed, which takes a second.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.pieces import rows_of, shape_of
from stackwise_core.model.precision import compute_dtype
from stackwise_core.objectives.losses import Batch, loss_positions
from stackwise_core.training.stage_model import Ranks, StageModel


def init_process_group(device: torch.device) -> None:
    """Join the process group that torchrun set up; the process must end by `os._exit`, without destroying the group.

    Destroying DDP and gloo can deadlock: a thread of gloo needs Python's lock to free a tensor, while the main
    thread, which holds it, waits for that thread [seen with torch 2.13.0].
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Numbers go over gloo, so that a step does not wait for the device because of them.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def check_alike(software: Mapping[str, Any]) -> None:
    """Raise ConfigError in every process, unless all of them run the same; each calls this with what it runs."""
    found: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, dict(software))
    first = found[0]
    other = next((rank for rank, each in enumerate(found) if each != first), None)
    if other is None:
        return
    differ = [name for name in {**first, **found[other]} if first.get(name) != found[other].get(name)]
    runs = [", ".join(f"{name} {each.get(name, 'unknown')}" for name in differ) for each in (first, found[other])]
    allowed = "processes that train together must run the same software on the same kind of machine"
    raise ConfigError([Fault("hardware.processes", f"{runs[0]} in rank 0 and {runs[1]} in rank {other}", allowed)])


class DistributedRanks(Ranks):
    """One process of the default process group."""

    live: nn.Module
    """The distributed model with its loss."""

    def __init__(self, device: torch.device) -> None:
        """Get rank and world size from the process group."""
        self.device = device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.reports = self.rank == 0
        self.failpoint = f"rank-{self.rank}"

    def sum(self, value: float) -> float:
        """Return the sum of every process's value; exact for integers."""
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number)
        return number.item()

    def gather(self, ids: list[int]) -> list[int]:
        """Return the ids of every process, by rank."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        dist.all_gather_object(found, ids)
        return [number for of_rank in found for number in of_rank]

    def held(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor in the first process, and None in the others."""
        return tensor if self.rank == 0 else None

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return self.live(batch)


class _SummedLoss(nn.Module):
    """The model and its loss as one module, so that DDP and FSDP2 see the whole graph including the head."""

    def __init__(self, model: StageModel, *, head_always: bool = False) -> None:
        super().__init__()
        self.model = model
        self.head_always = head_always
        """Whether the head gets a gradient, of zeros, where no position carries the loss."""

    def forward(self, batch: Batch) -> Tensor:
        loss = self.model.summed_loss(batch)[0]
        if self.head_always and not loss_positions(batch).any():
            for parameter in self.model.head.parameters():
                loss = loss + 0.0 * parameter.sum()
        return loss


class Replicas(DistributedRanks):
    """Each process holds the whole model (DDP, Li et al. 2020)."""

    def wrap(self, model: StageModel) -> None:
        """Average gradients over the processes during the backward pass."""
        # Summing instead would need a hook in Python, whose thread can deadlock with this one at the end.
        self.gradient_divisor = self.count
        self.live = self.replica = DistributedDataParallel(
            _SummedLoss(model),
            # Where a process has no loss position of a batch, it has no gradient of the head.
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            **_sync_no_buffers(),  # packed weights, which do not change
        )

    def gradient_sync(self, *, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a backward pass reduces gradients over the processes, if enabled."""
        return contextlib.nullcontext() if enabled else self.replica.no_sync()


def _sync_no_buffers() -> dict[str, Any]:
    """Return the key that keeps DDP from syncing buffers in every forward pass, by the name that this torch has."""
    newer = "forward_sync_buffers"
    return {newer if newer in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False}


class Shards(DistributedRanks):
    """Each process holds a shard of every block, and gathers one block at a time (FSDP2, Zhao et al. 2023)."""

    sharded = True

    def wrap(self, model: StageModel) -> None:
        """Shard what trains along its first dimension; embedding and head are gathered with the loss.

        What is frozen stays whole in every process: it has no gradient and no moments, and is mostly quantised.
        """
        mesh = init_device_mesh(self.device.type, (self.count,))
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        # Where a process has no loss position of a batch, it has no gradient of the head, and would not take part in
        # the reduction. Blocks that a step leaves out are left out by all processes and have no gradient in any.
        torch_fills_in = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # from 2.12 or 2.13 on
        self.live = _SummedLoss(model, head_always=not torch_fills_in)
        blocks = [block for stack in model.live_stacks() for block in stack.blocks if {*block.parameters()} - frozen]
        kinds = {compute_dtype(stack.precision, self.device) for stack in model.live_stacks()}
        low = kinds.pop() if len(kinds) == 1 else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            if low is torch.float32:
                fully_shard(block, mesh=mesh, ignored_params=frozen)
            else:  # gathered in the type of their products; norms, which are small and used in float32, with the head
                halves = [block.get_submodule("attention"), block.get_submodule("ffn")]
                fully_shard(halves, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        root = fully_shard(self.live, mesh=mesh, ignored_params=frozen)
        for sharded in (module for module in self.live.modules() if isinstance(module, FSDPModule)):
            sharded.set_gradient_divide_factor(1.0)  # the sum: FSDP2 itself takes the mean
            sharded.set_force_sum_reduction_for_comms(True)
            if torch_fills_in:
                sharded.set_reduce_scatter_unused_params(sharded is root, recurse=False)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor gathered from all processes; all of them must call this."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def held(self, tensor: Tensor) -> Tensor | None:
        """Return the rows of a tensor that this process has; of one that all have, the first process holds it."""
        if not isinstance(tensor, DTensor):
            return super().held(tensor)
        local = tensor.to_local()
        return local if local.numel() else None

    def local_shard(self, tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """Return the rows of a tensor that this process holds, if a parameter of its shape is sharded; else all."""
        if not isinstance(parameter, DTensor) or shape_of(tensors, name) != parameter.shape:
            return tensors[name]
        each = -(-len(parameter) // self.count)  # as torch.chunk cuts
        rows = rows_of(tensors, name, self.rank * each, min((self.rank + 1) * each, len(parameter)))
        layout: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(rows.to(parameter.device), parameter.device_mesh, parameter.placements, **layout)
