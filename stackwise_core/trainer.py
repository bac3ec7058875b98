"""Training one stack: the step, the stage, and the trainer that grows a rack in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.dataloader import ProgressiveDataLoader
from stackwise_core.errors import ConfigError, Fault, NonFiniteLossError, StageInterruptedError
from stackwise_core.failpoints import reach
from stackwise_core.model import Head, Rack, Stack
from stackwise_core.objectives import Batch, loss_positions, summed_loss
from stackwise_core.rack_builder import ProgressiveRackBuilder
from stackwise_core.resolve import OptimSpec, resolve_mask, resolve_stage, resolve_stream_dtype, resolve_views
from stackwise_core.trunk import STREAM_DTYPES, LiveTrunk, RowSource

# ---------------------------------------------------------------- what trains


class StageModel(nn.Module):
    """What one stage trains: the new stack, the head and, in the first stage, the embedding."""

    def __init__(self, stack: Stack, head: Head, embedding: nn.Embedding | None = None) -> None:
        """Take the modules as they are; they stay shared with their rack."""
        super().__init__()
        self.embedding = embedding
        self.stack = stack
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """Return the stream after the new stack: [B, T, D]."""
        return self.stack(self.entering(batch))

    def entering(self, batch: Batch) -> Tensor:
        """Return the stream below the new stack, float32: the embedding, or the frozen trunk's boundary."""
        device = self.head.projection.weight.device
        if self.embedding is not None:
            largest, rows = int(batch["input_ids"].max()), self.embedding.num_embeddings
            if largest >= rows:
                raise ConfigError([Fault("model.vocab_size", str(rows), f"the batch holds token {largest}")])
            return self.embedding(batch["input_ids"].to(device))
        if batch["trunk_activations"] is None:
            raise ConfigError([Fault("trunk_activations", "None", "a stack on a trunk needs the trunk's activations")])
        return batch["trunk_activations"].to(device).float()


@dataclass
class TrainingState:
    """Everything a stage needs to go on with the same bits: nothing else is random or remembered."""

    step: int
    tensors: dict[str, Tensor]
    """Weights as `model.<name>`, AdamW's moments as `optimizer.<name>.<moment>`."""
    records: list[dict[str, float]]


@dataclass
class Hooks:
    """What the surroundings of a stage want to know, and may ask."""

    on_step: Callable[[dict[str, float]], None] = lambda record: None
    on_checkpoint: Callable[[TrainingState], None] = lambda state: None
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes none."""
    should_stop: Callable[[], bool] = lambda: False


# ---------------------------------------------------------------- the optimizer


def make_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.AdamW:
    """Return AdamW over what has requires_grad; no weight decay on norms and embeddings."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.dim() > 1 and id(p) not in embeddings]
    others = [p for p in trainable if p.dim() <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), fused=True)


def learning_rate(spec: OptimSpec, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine from the peak to the minimum."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * cosine


# ---------------------------------------------------------------- one step, one stage


def train_step(
    model: StageModel, batch: Batch, optimizer: torch.optim.Optimizer, spec: OptimSpec, step: int
) -> dict[str, float]:
    """Take one optimizer step.

    The loss is the mean over the loss positions of the whole batch, also when it is computed in
    `spec.accumulation_steps` parts.

    Returns:
        step, loss [nats per loss position], learning_rate, gradient_norm (before clipping).

    Raises:
        NonFiniteLossError: before any weight was changed; it names step and sequence ids.
    """
    rate = learning_rate(spec, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    positions = max(1, int(loss_positions(batch).sum()))
    loss = 0.0
    for part in _parts(batch, spec.accumulation_steps):
        part_sum, _ = summed_loss(model(part), model.head, part)
        part_loss = part_sum / positions
        part_loss.backward()
        loss += part_loss.item()
    limit = spec.gradient_clip or math.inf
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], limit).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = batch["sequence_ids"].tolist()
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {norm}; sequence ids {ids}. No weight was touched by this step; "
            f"lower training.learning_rate (now {spec.learning_rate}) or raise training.warmup_steps "
            f"(now {spec.warmup_steps})"
        )
    optimizer.step()
    return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}


def train_stack(
    model: StageModel,
    batches: Iterable[Batch],
    spec: OptimSpec,
    *,
    state: TrainingState | None = None,
    hooks: Hooks | None = None,
) -> list[dict[str, float]]:
    """Train a stage to its last step.

    Args:
        model: what trains.
        batches: from step 0, or from `state.step` when resuming.
        spec: the optimisation.
        state: where an earlier, killed attempt stood; the result has the same bits as without the kill.
        hooks: progress, checkpoints, a request to stop.

    Returns:
        One record per step.

    Raises:
        StageInterruptedError: `hooks.should_stop()`; a checkpoint was handed over first.
        NonFiniteLossError: see `train_step`.
    """
    hooks = hooks or Hooks()
    optimizer = make_optimizer(model, spec)
    records: list[dict[str, float]] = []
    if state is not None:
        restore(model, optimizer, state)
        records = list(state.records)
    model.train()
    for step, batch in zip(range(len(records), spec.steps), batches, strict=False):
        record = train_step(model, batch, optimizer, spec, step)
        records.append(record)
        hooks.on_step(record)
        reach("train", step + 1)
        stop = hooks.should_stop()
        due = hooks.checkpoint_every and (step + 1) % hooks.checkpoint_every == 0
        if (stop or due) and step + 1 < spec.steps:
            hooks.on_checkpoint(capture(model, optimizer, records))
        if stop and step + 1 < spec.steps:
            raise StageInterruptedError(
                f"stopped on request after step {step + 1} of {spec.steps}; run the same command to go on"
            )
    if len(records) < spec.steps:
        fault = Fault("dataloader", f"{len(records)} batches", f"training.steps_per_stack = {spec.steps} are needed")
        raise ConfigError([fault])
    return records


def _parts(batch: Batch, n_parts: int) -> Iterator[Batch]:
    """Cut a batch along its rows."""
    if n_parts == 1:
        yield batch
        return
    size = len(batch["sequence_ids"])
    for n in range(n_parts):
        rows = slice(n * size // n_parts, (n + 1) * size // n_parts)
        yield {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, records: list[dict[str, float]]) -> TrainingState:
    """Return the state after the last record; the tensors are the live ones, save them before the next step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{moment}"] = value
    return TrainingState(len(records), tensors, list(records))


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Put a captured state back, bit for bit."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in state.tensors.items():
        if key.startswith("optimizer."):
            name, moment = key.removeprefix("optimizer.").rsplit(".", 1)
            moments.setdefault(name, {})[moment] = value
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.tensors[f"model.{name}"])
            if name in moments:
                # `step` is a scalar that fused AdamW wants on the parameter's device.
                optimizer.state[parameter] = {k: v.clone().to(parameter.device) for k, v in moments[name].items()}


# ---------------------------------------------------------------- growing in memory


@dataclass
class StageResult:
    """What one stage did."""

    index: int
    records: list[dict[str, float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Training loss of the last step [nats]."""
        return self.records[-1]["loss"]


class ProgressiveTrainer:
    """Grows a rack in memory, through the same functions the flow uses."""

    def __init__(self, config: StackWiseConfig | None = None) -> None:
        """Take a configuration; it is validated at every call, since it may be edited in between."""
        self.config = config or StackWiseConfig()

    def train_progressively(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        *,
        cache: Mapping[int, RowSource] | None = None,
        hooks: Hooks | None = None,
    ) -> list[StageResult]:
        """Add stacks until there are `target_stacks`, training each; untrained ones train first.

        Args:
            rack_builder: the rack so far.
            dataloader: any iterable of token batches, iterated as often as the steps need.
            target_stacks: how many stacks to reach; None takes the configuration's.
            cache: boundary k -> the activations after the first k stacks, made from the same trunk.
            hooks: progress and stop requests.

        Returns:
            One result per stage that was trained here.
        """
        self.config.validate()
        target = target_stacks or self.config.training.progressive.target_stacks
        self._check(rack_builder, target)
        results: list[StageResult] = []
        for index in range(rack_builder.n_trained, target):
            if index == rack_builder.n_stacks:
                rack_builder.append_stack()
            records = self._train_stage(rack_builder, index, dataloader, (cache or {}).get(index), hooks)
            rack_builder.mark_trained(index)
            results.append(StageResult(index, records))
        return results

    def train_rack(
        self, rack_builder: ProgressiveRackBuilder, dataloader: Iterable[Any], target_stacks: int | None = None
    ) -> list[StageResult]:
        """Grow to `target_stacks`; see `train_progressively`."""
        if target_stacks is None:
            fault = Fault("target_stacks", "None", "joint training is not built yet in this version; give a number")
            raise ConfigError([fault])
        return self.train_progressively(rack_builder, dataloader, target_stacks)

    def _check(self, builder: ProgressiveRackBuilder, target: int) -> None:
        """Refuse before the first step what would go wrong after the last."""
        growth = self.config.training.progressive
        limit = builder.config.training.progressive.max_stacks
        if target > limit:
            raise ConfigError([Fault("target_stacks", str(target), f"the builder's max_stacks is {limit}")])
        if growth.training_objective == "clm" and not builder.build_rack().shape.causal:
            allowed = "the builder's rack is bidirectional: every position would see its own target"
            raise ConfigError([Fault("training.progressive.training_objective", "'clm'", allowed)])

    def _train_stage(
        self,
        builder: ProgressiveRackBuilder,
        index: int,
        dataloader: Iterable[Any],
        store: RowSource | None,
        hooks: Hooks | None,
    ) -> list[dict[str, float]]:
        rack = builder.build_rack()
        spec = resolve_stage(self.config, index).optim
        builder.prepare_stage(index)
        trunk = LiveTrunk(rack.embedding, builder.stacks[:index], STREAM_DTYPES[resolve_stream_dtype(self.config)])
        loader = ProgressiveDataLoader(
            base_dataloader=dataloader,
            masking_strategy=resolve_mask(self.config, index),
            stack_idx=index,
            trunk_activations=(store or trunk) if index else None,
            cache_activations=self.config.training.progressive.cache_activations,
            views=resolve_views(self.config),
        )
        model = stage_model(rack, index)
        return train_stack(model, _endless(loader), spec, hooks=hooks)


def stage_model(rack: Rack, index: int) -> StageModel:
    """Return what stage `index` of a rack trains."""
    stack = rack.stacks[index]
    assert isinstance(stack, Stack)
    return StageModel(stack, rack.head, rack.embedding if index == 0 else None)


def _endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Pass over a loader again and again; a pass without a batch ends it."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return
