"""How long a stage takes on this machine, from two steps of it with random weights and tokens."""

from __future__ import annotations

import time

import numpy as np
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.growth_operators import give_adapters
from stackwise_core.model.precision import convert_storage
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.plan import StagePlan
from stackwise_core.training.hardware import torch_restored, use_hardware
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import train_step


def probe(config: StackWiseConfig, stage: StagePlan) -> float:
    """Return the seconds of a training step of a stage, at its real size; one process takes it, not compiled.

    The first of two steps also warms up, and is not counted.

    Raises:
        Exception: whatever such a step raises: too little memory, a custom objective whose batches are the user's.
    """
    spec, shape, anatomy = stage.spec, stage.shape, stage.spec.anatomy
    with torch_restored(), torch.random.fork_rng():
        device, stacks = use_hardware(config.hardware), dict[int, Stack]()
        for index in anatomy.live:
            stack = Stack(shape, spec.stacks[index].n_blocks, index, spec.stacks[index].precision)
            convert_storage(stack, stack.precision)
            give_adapters(stack, spec.stacks[index], seed=0)
            stacks[index] = stack
        model = StageModel.assemble(config, anatomy, stacks, Head(shape), TokenEmbedding(shape), device)
        optimizer, size = make_optimizer(model, spec.optim), (spec.optim.batch_size, config.data.seq_len)
        tokens = {"input_ids": np.random.default_rng(0).integers(shape.vocab_size, size=size)}
        batch = validation_batch(tokens, stage.mask, config.training.progressive.training_objective)
        batch |= {"stack_idx": anatomy.newest}
        if anatomy.boundary:
            batch["trunk_activations"] = torch.randn(*size, shape.d_model)
        seconds = 0.0
        for step in range(2):
            began = time.perf_counter()
            train_step(model, batch, optimizer, spec.optim, step)  # its loss is read, so the device has finished
            seconds = time.perf_counter() - began
    return seconds
