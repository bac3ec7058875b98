"""Later stages of the shapes of 8B and 70B models: time, memory, and what a checkpoint costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.record import Run
from benchmarks.harness import Measure, ratios
from benchmarks.peak import peak_bytes
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.model.blocks import INIT_STD, Head, Stack
from stackwise_core.model.growth_operators import give_adapters
from stackwise_core.model.precision import convert_storage
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.memory import Setting, memory
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import StageSpec, resolve_stage
from stackwise_core.training.hardware import torch_restored, use_hardware
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.saved_state import StateWriter
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import capture, train_step

Values = Mapping[str, Any]
_CHECKPOINTING = {"training.activation_checkpointing": True}


@dataclass(frozen=True)
class Shape:
    """The sizes of a stage, and those of its toy."""

    name: str
    batch_size: int
    seq_len: int
    values: Values

    def of(self, run: Run) -> Shape:
        """Return this shape, or the toy."""
        return run.size(self, Shape(self.name, 2, 8, _TOY))


_TOY = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "vocab_size": 264}
SHAPE_8B = Shape(
    "8B shape", 8, 2048, {"d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336, "vocab_size": 128_256}
)
SHAPE_70B = Shape(
    "70B shape", 8, 4096, {"d_model": 8192, "n_heads": 64, "n_kv_heads": 8, "d_ff": 28672, "vocab_size": 128_256}
)


@dataclass
class Later:
    """The second stage of a causal rack, on a batch that is on the device."""

    config: StackWiseConfig
    shape: ModelShape
    spec: StageSpec
    model: StageModel
    optimizer: torch.optim.Optimizer
    batch: Batch

    @property
    def forecast(self) -> int:
        """What `plan` says of its peak memory [bytes]."""
        cuda = self.batch["trunk_activations"].is_cuda
        how: dict[str, Any] = {"loss_fraction": None, "cached": True, "cuda": cuda}
        return memory(Setting.of(self.config, self.shape, self.spec, **how)).peak

    def step(self) -> float:
        """Take a step and return its loss."""
        return train_step(self.model, self.batch, self.optimizer, self.spec.optim, 0)["loss"]


def settings(run: Run, shape: Shape, changes: Values, batch_size: int = 0) -> StackWiseConfig:
    """Return the configuration of a second stage in bf16, and have torch use its hardware."""
    shape = shape.of(run)
    values: dict[str, Any] = {
        "data": {"seq_len": shape.seq_len},
        "model": {**shape.values, "blocks_per_stack": 2},
        "training": {
            "batch_size": batch_size or shape.batch_size,
            "progressive": {"target_stacks": 2, "training_objective": "clm", "new_stack_precision": "bfloat16"},
        },
        "hardware": {"device": str(run.device), "threads": run.size(0, 1)},
    }
    apply_overrides(values, dict(changes))
    config = StackWiseConfig.from_dict(values)
    use_hardware(config.hardware)
    return config


def later(run: Run, shape: Shape, changes: Values, batch_size: int = 0, ranks: Ranks = ALONE) -> Later:
    """Return a stage whose weights are drawn on the device; several processes draw the same."""
    config = settings(run, shape, changes, batch_size)
    resolved, spec = resolve_shape(config), resolve_stage(config, 1)
    with torch.device(run.device):
        stack, head = Stack(resolved, spec.new.n_blocks, 1, spec.new.precision), Head(resolved)
    with torch.no_grad():
        for weight in (*stack.parameters(), *head.parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, INIT_STD)
    if spec.new.precision == "qlora":
        convert_storage(stack, "qlora")
        give_adapters(stack, spec.new, seed=0)
    model = StageModel.assemble(config, spec.anatomy, {1: stack}, head, None, run.device)
    ranks.wrap(model)
    return Later(config, resolved, spec, model, make_optimizer(model, spec.optim), batch_of(run, config, resolved))


def batch_of(run: Run, config: StackWiseConfig, shape: ModelShape) -> Batch:
    """Return a batch of random tokens and a random boundary in bf16 on the device."""
    size = (config.training.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(shape.vocab_size, size=size)
    batch = make_batch({"input_ids": tokens, "sequence_ids": torch.arange(size[0])}, None)
    stream = torch.randn(*size, shape.d_model, device=run.device, dtype=torch.bfloat16)
    return {**batch, "trunk_activations": stream, "stack_idx": 1}


# ---------------------------------------------------------------- D: 8B shape


def later_stage(run: Run) -> Iterator[Measure]:
    """A step of 8B shape: eager, compiled, and with checkpointing; and transformers' Llama, compiled, beside it."""
    seconds: dict[str, list[float]] = {}
    # A toy is not compiled: that would take longer than all the rest.
    cases: dict[str, Values] = {
        "eager": {},
        "compiled": {"hardware.compile": not run.quick},
        "checkpointed": _CHECKPOINTING,
    }
    for name, changes in cases.items():
        with peak_bytes(run.device) as peak:
            stage = later(run, SHAPE_8B, changes)
            with stage.model.compiled():
                seconds[name] = run.seconds(stage.step)
        if name == "eager":
            with torch_restored():
                torch.use_deterministic_algorithms(False)
                free = run.seconds(stage.step)
            yield Measure("8B shape", "step, eager, any kernel / deterministic", "x", ratios(free, seconds[name]))
        goal = 200.0 if name == "compiled" else None
        yield Measure("8B shape", f"step, {name}", "ms", [s * 1e3 for s in seconds[name]], at_most=goal)
        yield Measure("8B shape", f"peak, {name}", "GB", [peak[0] / 1e9])
        flops = stage_flops(stage.shape, stage.spec, stage.config.data.seq_len, 1.0)[0] / stage.spec.optim.steps
        if name != "checkpointed" and ("product", "bfloat16") in run.found:
            ceiling = run.found["product", "bfloat16"] * 1e12
            shares = [flops / s / ceiling for s in seconds[name]]
            goal = 0.55 if name == "compiled" else None
            yield Measure("8B shape", f"share of A's bf16 product, {name}", "x", shares, at_least=goal)
        if name != "checkpointed":
            del stage
    with torch_restored():
        torch.use_deterministic_algorithms(False)  # as it is used elsewhere
        llama = run.seconds(_llama(run, stage))
    yield Measure("8B shape", "step, Llama compiled", "ms", [s * 1e3 for s in llama])
    best = ratios(llama, seconds["compiled"])
    yield Measure("8B shape", "Llama compiled / compiled", "x", best, at_least=1.0)


def _llama(run: Run, like: Later) -> Callable[[], float]:
    """Return a step of transformers' Llama of the same shape on the same boundary, in the same autocast, compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.training_step import llama_step

    shape = like.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=like.spec.new.n_blocks,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=like.config.data.seq_len,
        tie_word_embeddings=True,  # one matrix of the vocabulary, as in the stage, which has no embedding
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(run.device):
        llama = LlamaForCausalLM(config).float().train()
    compiled = run.size(torch.compile, lambda whole: whole)(llama)
    stream = like.batch["trunk_activations"].float()
    labels = like.batch["input_ids"].to(run.device)

    def loss() -> Tensor:
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            return compiled(inputs_embeds=stream, labels=labels).loss

    return llama_step(llama, loss, like.spec.optim)


# ---------------------------------------------------------------- E: 70B shape


def large_stage(run: Run) -> Iterator[Measure]:
    """A step of 70B shape with everything that saves memory, for one sequence and for eight."""
    for batch_size in (1, run.size(8, 2)):
        changes = {
            **_CHECKPOINTING,
            "training.optimizer": "adamw8bit",
            "training.accumulation_steps": batch_size,
        }
        with peak_bytes(run.device) as peak:
            stage = later(run, SHAPE_70B, changes, batch_size)
            seconds = run.seconds(stage.step, rounds=3)
        case, forecast = f"70B shape, batch {batch_size}", stage.forecast
        del stage
        yield Measure(case, "peak", "GB", [peak[0] / 1e9], at_most=40)
        yield Measure(case, "forecast / peak", "x", [forecast / peak[0]], at_least=0.9, at_most=1.1)
        goal = 180.0 if batch_size == 1 else None
        yield Measure(case, "step", "ms", [s * 1e3 for s in seconds], at_most=goal)


# ---------------------------------------------------------------- K: a checkpoint


def checkpoint_stall(run: Run) -> Iterator[Measure]:
    """How long training of 8B shape stands still for a checkpoint, and how long it is written meanwhile."""
    from storage.checkpoints import save_state

    stage = later(run, SHAPE_8B, {})
    stage.step()
    writer = StateWriter(lambda state: save_state(run.scratch / "checkpoint", state) if state.step else None)
    # The first state is copied alone: what it takes more is the memory, which all later ones use again.
    for what, records, at_most in (("the first time", [], None), ("later", [{}], 1.0)):
        run.wait()
        began = time.perf_counter()
        state = capture(stage.model, stage.optimizer, records)
        writer.put(state)
        stall = time.perf_counter() - began
        yield Measure("8B shape", f"training stands still, {what}", "s", [stall], at_most=at_most)
    n_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
    yield Measure("8B shape", "bytes of a checkpoint", "GB", [n_bytes / 1e9])
    writer.settle()
    yield Measure("8B shape", "written after", "s", [time.perf_counter() - began])
