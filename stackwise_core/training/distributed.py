"""Several processes that train one stage: DDP, where each holds the whole model, or FSDP2, where each holds a part.

Importing this module imports torch.distributed, which takes a second.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stackwise_core.objectives.losses import Batch
from stackwise_core.training.ranks import Ranks
from stackwise_core.training.stage_model import StageModel


def join(device: torch.device, *, sharded: bool) -> Ranks:
    """Join the processes that torchrun started; this one is to end by `os._exit`, without leaving them.

    Taking DDP and gloo apart can wait for ever: a thread of gloo wants Python's lock to drop a tensor, while the
    main thread, which has it, waits for that thread [seen with torch 2.13.0].

    Args:
        device: of this process.
        sharded: each holds a part of every block (FSDP2) instead of the whole model (DDP).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Numbers go over gloo, so that no step waits for the device on their account.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Shards(device) if sharded else Replicas(device)


class Several(Ranks):
    """One of several processes of the default process group."""

    def __init__(self, device: torch.device) -> None:
        """Ask the process group which one this is."""
        self.device = device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.failpoint = f"rank-{self.rank}"

    def total(self, value: float) -> float:
        """Return the sum of every process's value; exact for integers."""
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number)
        return number.item()

    def any(self, flag: bool) -> bool:
        """Say whether some process says so."""
        return self.total(float(flag)) > 0

    def gathered(self, ids: list[int]) -> list[int]:
        """Return the ids of every process, by rank."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        dist.all_gather_object(found, ids)
        return [number for of_rank in found for number in of_rank]


class _SummedLoss(nn.Module):
    """The model and its loss as one module: what DDP and FSDP2 see is all of the graph, the head included."""

    def __init__(self, model: StageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.summed_loss(batch)[0]


class Replicas(Several):
    """Each process holds the whole model (DDP, Li et al. 2020)."""

    def share(self, model: StageModel) -> None:
        """Let gradients be averaged over the processes, while the backward pass goes on."""
        # The sum would take a hook in Python, whose thread can wait for this one, and this for it, at the end.
        self.divides_by = self.count
        self.live = DistributedDataParallel(
            _SummedLoss(model),
            # A process may hold no loss position of a batch, and then no gradient of the head.
            find_unused_parameters=True,
            forward_sync_buffers=False,  # packed weights, which do not change
            gradient_as_bucket_view=True,
        )

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return self.live(batch)

    def reducing(self, *, now: bool) -> contextlib.AbstractContextManager[None]:
        """Compute a part of a batch: gradients add up over the processes at its last part, `now`."""
        return contextlib.nullcontext() if now else self.live.no_sync()


class Shards(Several):
    """Each process holds a part of every block, and gathers one block at a time (FSDP2, Zhao et al. 2023)."""

    def share(self, model: StageModel) -> None:
        """Cut every parameter along its first dimension; embedding and head are gathered with the loss."""
        mesh = init_device_mesh(self.device.type, (self.count,))
        self.live = _SummedLoss(model)
        blocks = [block for stack in model.live_stacks() for block in stack.blocks]
        for module in (*blocks, self.live):
            part = fully_shard(module, mesh=mesh)
            part.set_gradient_divide_factor(1.0)  # the sum: FSDP2 itself takes the mean
            part.set_force_sum_reduction_for_comms(True)
            # A process may hold no loss position of a batch, and then no gradient of the head. Blocks that a step
            # leaves out are left out by all, and have none at all.
            part.set_reduce_scatter_unused_params(module is self.live, recurse=False)

    def summed_loss(self, model: StageModel, batch: Batch) -> Tensor:
        """Return the loss summed over the loss positions of this process's rows [nats]."""
        return self.live(batch)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor gathered from all processes; all of them must ask."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return of a whole tensor what this process holds, laid out like a parameter."""
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
