"""Training one stage: the optimizer, the step, the state that goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stackwise_core.errors import ConfigError, Fault, NonFiniteLossError, StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.precision import compute_dtype
from stackwise_core.objectives.losses import Batch, loss_normaliser
from stackwise_core.stages.stages import OptimSpec
from stackwise_core.training.ranks import ALONE, Ranks
from stackwise_core.training.stage_model import StageModel


@dataclass
class TrainingState:
    """Everything a stage needs to go on with the same bits: nothing else is random or remembered."""

    step: int
    tensors: dict[str, Tensor]
    """Weights as `model.<name>`, AdamW's moments as `optimizer.<name>.<moment>`."""
    records: list[dict[str, float]]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """On what it was computed, as far as the numbers may depend on it."""


@dataclass
class Hooks:
    """What the surroundings of a stage want to know, and may ask."""

    on_step: Callable[[dict[str, float]], None] = lambda record: None
    on_checkpoint: Callable[[TrainingState], None] = lambda state: None
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes none."""
    checkpoint_last: bool = False
    """Whether to write one after the last step too: it is the result, where another process reads it."""
    should_stop: Callable[[], bool] = lambda: False


# ---------------------------------------------------------------- the optimizer


def make_optimizer(model: StageModel, spec: OptimSpec) -> torch.optim.AdamW:
    """Return AdamW over what trains: no weight decay on norms and embeddings, adapters at a rate of their own."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    adapters = {id(p) for stack in model.live_stacks() for p in adapter_parameters(stack)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        received, allowed = repr(model.anatomy.trains), "nothing would train; choose another trunk_strategy"
        raise ConfigError([Fault("training.progressive.trunk_strategy", received, allowed)])
    kinds = {
        "decayed": [p for p in trainable if p.dim() > 1 and id(p) not in embeddings | adapters],
        "others": [p for p in trainable if p.dim() <= 1 or id(p) in embeddings],
        "adapters": [p for p in trainable if id(p) in adapters],
    }
    decay = {"decayed": spec.weight_decay, "others": 0.0, "adapters": 0.0}
    peak = {"decayed": spec.learning_rate, "others": spec.learning_rate, "adapters": spec.adapter_learning_rate}
    groups = [{"params": kinds[kind], "weight_decay": decay[kind], "peak": peak[kind]} for kind in kinds if kinds[kind]]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), fused=True)


def learning_rate(spec: OptimSpec, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine from the peak to the minimum."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * cosine


class LossScale:
    """Dynamic loss scaling for fp16 products (Micikevicius et al. 2018, section 3.2); others need none.

    It halves where a gradient overflows, and that step changes no weight; it doubles after 2,000 steps without.
    All it remembers is in the records of the steps, so that a resumed stage scales as if it had not been killed.
    """

    growth_interval = 2000

    def __init__(self, start: float, records: list[dict[str, float]]) -> None:
        """Begin at a scale, and replay what happened so far."""
        self.value, self.steps_without = start, 0
        for record in records:
            self.update(overflowed=bool(record.get("skipped")))

    @classmethod
    def of(cls, model: StageModel, records: list[dict[str, float]]) -> LossScale | None:
        """Return the scale for a stage in which a stack computes in fp16; None for any other."""
        device = model.head.projection.weight.device
        kinds = {compute_dtype(stack.precision, device) for stack in model.live_stacks()}
        return cls(2.0**16, records) if torch.float16 in kinds else None

    def update(self, *, overflowed: bool) -> None:
        """Take note of a step."""
        self.steps_without = 0 if overflowed else self.steps_without + 1
        if overflowed:
            self.value /= 2
        elif self.steps_without % self.growth_interval == 0:
            self.value *= 2


# ---------------------------------------------------------------- one step, one stage


def train_step(
    model: StageModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    spec: OptimSpec,
    step: int,
    scale: LossScale | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Take one optimizer step.

    The loss is the mean over the loss positions of the whole batch, also when it is computed in
    `spec.accumulation_steps` parts, or by several processes that have a share of its rows each.

    Returns:
        step, loss [nats per loss position], learning_rate, gradient_norm (before clipping), and with a loss
        scale `skipped`, 1 where scaled gradients overflowed and no weight was changed.

    Raises:
        NonFiniteLossError: before any weight was changed; it names step and sequence ids.
    """
    rate = learning_rate(spec, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"] / spec.learning_rate
    optimizer.zero_grad(set_to_none=True)
    factor = scale.value if scale else 1.0
    loss = _backward(model, batch, spec.accumulation_steps, factor, ranks)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = _clip(trained, factor, spec.gradient_clip or math.inf, ranks)
    record = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
    overflowed = math.isfinite(loss) and not math.isfinite(norm) and factor > 1.0
    if scale:
        scale.update(overflowed=overflowed)
        record["skipped"] = float(overflowed)
    if overflowed:
        return {**record, "gradient_norm": 0.0}
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = ranks.gathered(batch["sequence_ids"].tolist())
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {norm}; sequence ids {ids}. No weight was touched by this step; "
            f"lower training.learning_rate (now {spec.learning_rate}) or raise training.warmup_steps "
            f"(now {spec.warmup_steps})"
        )
    optimizer.step()
    return record


def train_stack(
    model: StageModel,
    batches: Iterable[Batch],
    spec: OptimSpec,
    *,
    state: TrainingState | None = None,
    hooks: Hooks | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train a stage to its last step.

    Args:
        model: what trains.
        batches: from step 0, or from `state.step` when resuming.
        spec: the optimisation.
        state: where an earlier, killed attempt stood; the result has the same bits as without the kill.
        hooks: progress, checkpoints, a request to stop.
        ranks: the processes that train together; each calls this with its share of every batch.

    Returns:
        One record per step.

    Raises:
        StageInterruptedError: `hooks.should_stop()`; a checkpoint was handed over first.
        NonFiniteLossError: see `train_step`.
    """
    hooks = hooks or Hooks()
    ranks.share(model)
    optimizer = make_optimizer(model, spec)
    records: list[dict[str, float]] = []
    if state is not None:
        restore(model, optimizer, state, ranks)
        records = list(state.records)
    scale = LossScale.of(model, records)
    model.train()
    for step, batch in zip(range(len(records), spec.steps), batches, strict=False):
        record = train_step(model, batch, optimizer, spec, step, scale, ranks)
        records.append(record)
        hooks.on_step(record)
        failpoint(ranks.failpoint, step + 1)
        stop = ranks.any(hooks.should_stop())
        due = hooks.checkpoint_every and (step + 1) % hooks.checkpoint_every == 0
        if (stop or due) if step + 1 < spec.steps else hooks.checkpoint_last:
            hooks.on_checkpoint(capture(model, optimizer, records, ranks))
        if stop and step + 1 < spec.steps:
            raise StageInterruptedError(
                f"stopped on request after step {step + 1} of {spec.steps}; run the same command to go on"
            )
    if len(records) < spec.steps:
        fault = Fault("dataloader", f"{len(records)} batches", f"training.steps_per_stack = {spec.steps} are needed")
        raise ConfigError([fault])
    optimizer.zero_grad(set_to_none=True)  # gradients of what is frozen from now on would stay in memory
    return records


def _backward(model: StageModel, batch: Batch, n_parts: int, factor: float, ranks: Ranks) -> float:
    """Compute the gradients of a batch, times a factor, and return its loss: the mean over its loss positions."""
    positions = max(1, ranks.total(loss_normaliser(batch)))
    parts, loss = list(_parts(batch, n_parts)), 0.0
    for n, part in enumerate(parts, 1):
        with ranks.reducing(now=n == len(parts)):
            part_loss = ranks.summed_loss(model, part) / positions
            (part_loss * (factor * ranks.divides_by)).backward()
        loss += part_loss.item()
    return ranks.total(loss)


def _clip(trained: list[nn.Parameter], factor: float, limit: float, ranks: Ranks) -> float:
    """Divide the gradients by a factor, clip them to a norm of `limit` together, and return the norm before."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    for gradient in gradients if factor != 1.0 else ():
        gradient /= factor
    norm = ranks.whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm.item()


def _parts(batch: Batch, n_parts: int) -> Iterator[Batch]:
    """Cut a batch along its rows."""
    if n_parts == 1:
        yield batch
        return
    size = len(batch["sequence_ids"])
    for n in range(n_parts):
        rows = slice(n * size // n_parts, (n + 1) * size // n_parts)
        if rows.start == rows.stop:
            continue  # a loader's last batch may have fewer rows than there are parts
        yield {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what trains, by name; the rest does not change, so no checkpoint holds it."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, records: list[dict[str, float]], ranks: Ranks = ALONE
) -> TrainingState:
    """Return the state after the last record; the tensors are the live ones, save them before the next step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trainable(model):
        tensors[f"model.{name}"] = ranks.whole(parameter.detach())
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{moment}"] = ranks.whole(value)
    return TrainingState(len(records), tensors, list(records))


def fits(model: nn.Module, state: TrainingState) -> bool:
    """Say whether a state holds what trains in this model, under the names and shapes it has."""
    saved = {key: tensor.shape for key, tensor in state.tensors.items() if key.startswith("model.")}
    return saved == {f"model.{name}": parameter.shape for name, parameter in _trainable(model)}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, ranks: Ranks = ALONE) -> None:
    """Put a captured state back, bit for bit."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in state.tensors.items():
        if key.startswith("optimizer."):
            name, moment = key.removeprefix("optimizer.").rsplit(".", 1)
            moments.setdefault(name, {})[moment] = value
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(ranks.part(state.tensors[f"model.{name}"], parameter))
            if name in moments:
                # `step` is a scalar that fused AdamW wants on the parameter's device.
                optimizer.state[parameter] = {
                    moment: ranks.part(value.clone().to(parameter.device), parameter)
                    for moment, value in moments[name].items()
                }
