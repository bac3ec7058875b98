"""Training one stage: its inputs, the step, the state to resume from, and what happens after the last step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise_core.errors import ConfigError, Fault, NonFiniteLossError, StackWiseError, StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.model.growth_operators import freeze
from stackwise_core.model.pieces import shape_of
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.objectives.losses import Batch, batch_rows, loss_normaliser, loss_positions
from stackwise_core.stages.stages import OptimSpec, StageSpec
from stackwise_core.training.evaluate import output_statistics
from stackwise_core.training.hardware import peak_bytes
from stackwise_core.training.optimizer import LossScale, learning_rate, make_optimizer
from stackwise_core.training.peak import Peak
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.watch import Record, Watch

_now = time.monotonic
_MOMENT = "optimizer."
_MOST_IDS = 32
"""Sequence ids that a message shows."""


class FrozenChangedError(StackWiseError):
    """Training changed a weight that should be frozen."""


@dataclass
class TrainingState:
    """Everything that a stage needs to resume with the same bits."""

    step: int
    """How many steps of the stage were taken."""
    tensors: Mapping[str, Tensor]
    """Weights as `model.<name>`, AdamW's moments as `optimizer.<name>.<moment>`. Captured by one of several processes,
    those that it holds, or its rows of them."""
    records: list[Record]
    """What each of them measured."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """Hardware and library versions that the numbers may depend on."""

    def copy(self) -> TrainingState:
        """Return a copy on the CPU that further training does not change."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}
        return TrainingState(self.step, tensors, list(self.records), dict(self.fingerprint))


@dataclass
class Hooks:
    """Callbacks of a stage.

    A trainer of the library sets `validate` and `validate_every`, and with a `checkpoint_folder` also `settle` and
    `go_on`. `checkpoint_last` and `on_end_elsewhere` are for runs of several processes.
    """

    on_step: Callable[[Record], None] = lambda record: None
    """Gets what a step measured, after each step."""
    on_checkpoint: Callable[[TrainingState], None] = lambda state: None
    """Gets each checkpoint, whose tensors are live: save or `copy()` them before returning."""
    settle: Callable[[], None] = lambda: None
    """Called before a stage is stopped and at its end: waits for a checkpoint that is still being written, and raises
    what failed."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 makes none."""
    checkpoint_minutes: float = 0.0
    """Minutes after a checkpoint when the next is due, whatever its step; 0 is never."""
    checkpoint_last: bool = False
    """Whether to make one after the last step too, where another process reads the result from it."""
    on_end: Callable[[TrainingState], None] | None = None
    """Gets the live tensors after the last step."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step; training then makes a checkpoint and raises `StageInterruptedError`."""
    checkpoint_folder: str | Path | None = None
    """Where a trainer of the library keeps the rack after every stage, and every checkpoint. The same script run again
    goes on there with the same bits."""
    go_on: str = "the same call on the same builder goes on there, or give it `state=`"
    """What the message of a stop says about going on."""
    validate: Callable[[StageModel], float] | None = None
    """Returns the validation loss of what trains, which it leaves as it was; every rank calls it."""
    validate_every: int = 0
    """Steps between calls of `validate`; after the last step there is none, unless the best weights are kept."""
    on_end_elsewhere: bool = False
    """Whether another process reads the state of the optimizer at the end, so that it is kept with the best weights."""


@dataclass
class StageInputs:
    """Everything that training a stage reads, in memory; `spec` and `model` come from one anatomy."""

    spec: StageSpec
    model: StageModel
    batches: Iterable[Batch]
    """From step 0, or from `state.step` when resuming."""
    state: TrainingState | None = None
    """Where an interrupted attempt stood; the result has the same bits as without the interruption."""
    first_batches: Iterable[Batch] = ()
    """The rows over which channel statistics are taken at the end; empty where the stream needs none."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """What the optimizer begins with, as `<name>.<moment>`, unless it resumes; see `kept_moments`."""
    trunk: Sequence[nn.Module] = ()
    """What computes the boundary while the stage trains; empty where it is read."""


@dataclass
class Trained:
    """How a stage was trained to its last step."""

    records: list[Record]
    first_step: int
    """Where this attempt began."""
    seconds: float
    frozen: list[str]
    """The live parts that do not train, and were not changed."""
    peak_bytes: int | None = None
    """The most that this process's tensors held, if it was measured; see `Peak`."""
    kept: int | None = None
    """The number of steps after which the weights are kept, if there were more."""
    told: list[str] = field(default_factory=list)
    """How the stage ended, a line each, where that is worth saying."""


# ---------------------------------------------------------------- one stage


def train_stage(inputs: StageInputs, hooks: Hooks, ranks: Ranks = ALONE) -> Trained:
    """Train a stage to its end; of several ranks, each calls this with its share of every batch.

    It ends after its last step, or when validations inside it bring nothing better (`spec.optim.watch`). Where the best
    weights are kept, the model has them afterwards; of several ranks only the checkpoint of the end has them.

    Raises:
        StageInterruptedError: `hooks.should_stop()`; a checkpoint was handed over first.
        NonFiniteLossError: see `train_step`; it names the stage too.
        FrozenChangedError: a weight that does not train was changed.
    """
    began, first_step = time.monotonic(), inputs.state.step if inputs.state else 0
    device = inputs.model.head.projection.weight.device
    peak = Peak(device, (inputs.model, *inputs.trunk), ranks.count)
    how: dict[str, Any] = {"state": inputs.state, "moments": inputs.moments, "hooks": hooks, "ranks": ranks}
    with inputs.model.compiled(), _settling(hooks, ranks):
        ranks.wrap(inputs.model)
        frozen = _frozen(inputs.model)
        try:
            records = train_stack(inputs.model, inputs.batches, inputs.spec.optim, **how, peak=peak)
        except NonFiniteLossError as error:
            error.args = (_in_stage(inputs.spec.index, error),)
            raise
    seconds = time.monotonic() - began
    if any(tensor._version != writes for part in frozen.values() for tensor, writes in part):
        raise FrozenChangedError(f"stage {inputs.spec.index}: training changed frozen weights")
    watch = Watch(inputs.spec.optim, records)
    return Trained(records, first_step, seconds, sorted(frozen), peak.n_bytes, watch.kept, watch.told())


def _in_stage(index: int, error: Exception) -> str:
    """Return a message that begins with the stage; that of a validation already does."""
    stage = f"stage {index}: "
    return f"{stage}{str(error).removeprefix(stage)}"


def _settle_together(hooks: Hooks, ranks: Ranks) -> None:
    """Wait until all processes have written their checkpoints.

    The first one waits for theirs last: if one of them dies, a collective fails, and nobody waits for it forever. The
    others wait for the first, or torchrun would kill it, while it may still be writing, soon after they end.
    """
    if ranks.rank > 0:
        hooks.settle()
    ranks.any(False)
    hooks.settle()
    ranks.any(False)


@contextlib.contextmanager
def _settling(hooks: Hooks, ranks: Ranks) -> Generator[None]:
    """Wait at the end for a checkpoint that is still being written; an error of training is told before one of that."""
    try:
        yield
    except BaseException as error:
        ranks.failed = not isinstance(error, StackWiseError)
        with contextlib.suppress(Exception):
            hooks.settle()
        raise
    hooks.settle()


def end_stage(model: StageModel, first_batches: Iterable[Batch] = ()) -> dict[int, ChannelStatistics]:
    """Freeze the live part of a rack and convert what trained to the storage type of its precision.

    Returns channel statistics of the stacks' outputs over the batches, by creation index; empty without batches.
    """
    for stack in model.live_stacks():
        if stack.creation_index in model.anatomy.trained:
            convert_storage(stack, stack.precision)
    freeze(model)
    entering = ((model.entering(batch), batch.get("documents")) for batch in first_batches)
    return output_statistics(model.live_stacks(), entering)


def train_stack(
    model: StageModel,
    batches: Iterable[Batch],
    spec: OptimSpec,
    *,
    state: TrainingState | None = None,
    moments: Mapping[str, Tensor] | None = None,
    hooks: Hooks | None = None,
    ranks: Ranks = ALONE,
    peak: Peak | None = None,
) -> list[Record]:
    """Run the training loop of a stage, distributed already, and return one record per step that it took."""
    hooks = hooks or Hooks()
    if state is not None and ranks.count == 1 and (over := Watch(spec, state.records, state.tensors)).is_over:
        return _over_already(model, state, over, hooks, ranks)
    optimizer = make_optimizer(model, spec)
    records: list[Record] = list(state.records) if state else []
    if state is not None:
        restore(model, optimizer, state, ranks)
    else:
        give_moments(model, optimizer, moments or {}, ranks)
    scale, watch = LossScale.of(model, records), Watch(spec, records, state.tensors if state else None)
    due = _Due(hooks, ranks)
    model.train()
    before = _now()
    for step, batch in zip(range(spec.steps if watch.is_over else len(records), spec.steps), batches, strict=False):
        with peak.step(optimizer, batch) if peak else contextlib.nullcontext():
            record = train_step(model, batch, optimizer, spec, step, scale, ranks)
        record |= _clocked(model, batch, spec, ranks, _now() - before)
        if hooks.validate and watch.measures(step, hooks.validate_every):
            optimizer.zero_grad(set_to_none=True)  # their memory is free until the next step
            record["validation_loss"] = ranks.of_first(hooks.validate(model))
            model.train()
        records.append(record)
        if watch.see(record):
            best = capture(model, optimizer, records, ranks)
            watch.keep(best.tensors, with_optimizer=hooks.on_end is not None or hooks.on_end_elsewhere)
        hooks.on_step(record)
        failpoint(ranks.failpoint, step + 1)
        stop, is_last = ranks.any(hooks.should_stop()), watch.is_over
        if due.after(step, stop=stop, is_last=is_last):
            state = capture(model, optimizer, records, ranks)
            state = replace(state, tensors={**state.tensors, **(watch.saved if ranks.rank == 0 else {})})
            hooks.on_checkpoint(state)
        if stop or is_last:
            _settle_together(hooks, ranks)
        if is_last:
            break
        if stop:
            raise StageInterruptedError(
                f"stopped on request after step {step + 1} of {spec.steps}; {hooks.go_on}", state
            )
        before = _now()
    if isinstance(batches, Generator):
        batches.close()  # or a thread would still make batches of a stage that ended early
    if not watch.is_over:
        fault = Fault("dataloader", f"{len(records)} batches", f"training.steps_per_stack = {spec.steps} are needed")
        raise ConfigError([fault])
    if watch.kept and ranks.count == 1:
        restore(model, optimizer, TrainingState(watch.kept, watch.tensors, records))
    if hooks.on_end is not None:
        hooks.on_end(capture(model, optimizer, records, ranks))
    model.let_in(None)
    optimizer.zero_grad(set_to_none=True)  # or the gradients of what is frozen from now on would stay in memory
    return records


def _over_already(model: StageModel, state: TrainingState, over: Watch, hooks: Hooks, ranks: Ranks) -> list[Record]:
    """Give the model the weights that a stage ended with before it was killed, and return its records."""
    ended = replace(state, tensors=over.left(state.tensors))
    _restore_weights(model, ended, ranks)  # its moments need not fit the device once more
    if hooks.on_end is not None:
        hooks.on_end(ended)
    return list(state.records)


class _Due:
    """When checkpoints are due: every so many steps or minutes, at a stop, and after the last step if asked."""

    def __init__(self, hooks: Hooks, ranks: Ranks) -> None:
        self._hooks, self._ranks, self._since = hooks, ranks, _now()

    def after(self, step: int, *, stop: bool, is_last: bool) -> bool:
        """Return whether a checkpoint is due after a step, in all ranks alike."""
        every, seconds = self._hooks.checkpoint_every, 60 * self._hooks.checkpoint_minutes
        late = seconds > 0 and self._ranks.any(_now() - self._since >= seconds)
        regular = late or (every > 0 and (step + 1) % every == 0)
        due = self._hooks.checkpoint_last if is_last else stop or regular
        if due:
            self._since = _now()
        return due


# ---------------------------------------------------------------- one step


def train_step(
    model: StageModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    spec: OptimSpec,
    step: int,
    scale: LossScale | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Take one optimizer step.

    The loss is the mean over the loss positions of the whole batch, also when it is computed in
    `spec.accumulation_steps` parts, or by several processes that each have a share of its rows.

    Returns:
        step, loss [nats per loss position], learning_rate, gradient_norm (before clipping), and with a loss
        scale `skipped`, 1 where scaled gradients overflowed and no weight was changed.

    Raises:
        NonFiniteLossError: before any weight was changed; it names step and sequence ids.
    """
    rate = learning_rate(spec, step)
    model.let_in(step / spec.residual_warmup_steps if step < spec.residual_warmup_steps else None)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"] / spec.learning_rate
    optimizer.zero_grad(set_to_none=True)
    factor = scale.value if scale else 1.0
    n_parts = min(spec.accumulation_steps, max(1, spec.batch_size // ranks.count))  # the same in every rank
    loss = _backward(model, batch, n_parts, factor, ranks)
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
        ids = _listed(ranks.gather(batch["sequence_ids"].tolist()))
        raise NonFiniteLossError(
            f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; lower training.learning_rate (now "
            f"{spec.learning_rate}) or raise training.warmup_steps (now {spec.warmup_steps}). "
            f"{NonFiniteLossError.SIGN}, on the sequence ids {ids}"
        )
    optimizer.step()
    return record


def _listed(ids: list[int]) -> str:
    """Return ids for a message: of a large batch the first ones."""
    more = len(ids) - _MOST_IDS
    return f"{ids}" if more <= 0 else f"{ids[:_MOST_IDS]} and {more} more"


def _clocked(model: StageModel, batch: Batch, spec: OptimSpec, ranks: Ranks, seconds: float) -> Record:
    """Return what a record has of the machine: when, how quickly, and in how much memory the step was taken."""
    n_rows, seq_len = batch["input_ids"].shape
    n_tokens = seq_len * (n_rows if ranks.count == 1 else spec.batch_size)
    memory = peak_bytes(model.head.projection.weight.device)
    clocked = {"time": time.time(), "tokens_per_second": n_tokens / max(seconds, 1e-9), "memory_bytes": memory}
    return {name: round(value, 3) for name, value in clocked.items()}


def _backward(model: StageModel, batch: Batch, n_parts: int, factor: float, ranks: Ranks) -> float:
    """Compute the gradients of a batch, times a factor, and return its loss: the mean over its loss positions."""
    positions = max(1, ranks.sum(loss_normaliser(batch)))
    parts, loss = list(_parts(batch, n_parts)), 0.0
    for n, part in enumerate(parts, 1):
        with ranks.gradient_sync(enabled=n == len(parts)):
            part_loss = ranks.summed_loss(model, part) / positions
            (part_loss * (factor * ranks.gradient_divisor)).backward()
        loss += part_loss.item()
    if ranks.count > 1 and not ranks.any(bool(loss_positions(batch).any())):
        # As in one process: no gradient, where sharding leaves zeros. A matrix tied to the embedding has one.
        entry = set(model.embedding.parameters()) if model.embedding is not None else set[nn.Parameter]()
        for parameter in set(model.head.parameters()) - entry:
            parameter.grad = None
    return ranks.sum(loss)


def _clip(trained: list[nn.Parameter], factor: float, limit: float, ranks: Ranks) -> float:
    """Divide the gradients by a factor, clip their global norm to `limit`, and return the norm before clipping."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    for gradient in gradients if factor != 1.0 else ():
        gradient /= factor
    norm = ranks.full_tensor(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm.item()


def _parts(batch: Batch, n_parts: int) -> Iterator[Batch]:
    """Cut a batch along its rows; a loader's last batch may have fewer rows than there are parts."""
    if n_parts == 1:
        yield batch  # also an empty share, since every rank must join in reducing the gradients
        return
    size = len(batch["sequence_ids"])
    for n in range(n_parts):
        rows = slice(n * size // n_parts, (n + 1) * size // n_parts)
        if rows.start < rows.stop:
            yield batch_rows(batch, rows)


# ---------------------------------------------------------------- the state of training


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, records: list[Record], ranks: Ranks = ALONE
) -> TrainingState:
    """Return the state after the last record; its tensors are the live ones: save them before the next step.

    Each rank gets what it holds: everything is in one of them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model):
        tensors[f"model.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{moment}"] = value
    held = {name: ranks.held(tensor) for name, tensor in tensors.items()}
    return TrainingState(len(records), {name: t for name, t in held.items() if t is not None}, list(records))


def fits(model: nn.Module, state: TrainingState) -> bool:
    """Return whether a state holds exactly what trains in this model, by name and shape."""
    saved = {key: shape_of(state.tensors, key) for key in state.tensors if key.startswith("model.")}
    return saved == {f"model.{name}": parameter.shape for name, parameter in trainable(model)}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, ranks: Ranks = ALONE) -> None:
    """Restore a whole state, bit for bit."""
    _restore_weights(model, state, ranks)
    give_moments(model, optimizer, state.tensors, ranks, prefix=_MOMENT)


def _restore_weights(model: nn.Module, state: TrainingState, ranks: Ranks) -> None:
    with torch.no_grad():
        for name, parameter in trainable(model):
            parameter.copy_(ranks.local_shard(state.tensors, f"model.{name}", parameter))


def moments_of(state: TrainingState) -> dict[str, Tensor]:
    """Return the state of the optimizer alone, as `<name>.<moment>`."""
    return {key.removeprefix(_MOMENT): state.tensors[key] for key in state.tensors if key.startswith(_MOMENT)}


def give_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
    ranks: Ranks = ALONE,
    prefix: str = "",
) -> None:
    """Have an optimizer that has made no step go on from `moments`, which are copied; others begin with zeros.

    They are named `<prefix><name>.<moment>`.
    """
    by_name: dict[str, dict[str, str]] = {}
    for key in moments:
        name, moment = key.rsplit(".", 1)
        by_name.setdefault(name, {})[moment] = key
    with torch.no_grad():
        for name, parameter in trainable(model):
            if keys := by_name.get(f"{prefix}{name}"):
                # `step` is a scalar that fused AdamW wants on the parameter's device.
                optimizer.state[parameter] = {
                    moment: ranks.local_shard(moments, key, parameter).clone().to(parameter.device)
                    for moment, key in keys.items()
                }


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what trains, by name: nothing else changes, so checkpoints hold nothing else."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _frozen(model: StageModel) -> dict[str, list[tuple[Tensor, int]]]:
    """Return the tensors of every live part of which nothing trains, with how often torch has written to each.

    Hashing them before and after took as long as reading them twice; a write through `.data` is not counted.
    """
    parts: dict[str, nn.Module] = {f"stack {stack.creation_index}": stack for stack in model.live_stacks()}
    parts["head"] = model.head
    if model.embedding is not None:
        parts["embedding"] = model.embedding
    frozen = {name: part for name, part in parts.items() if not any(p.requires_grad for p in part.parameters())}
    return {name: [(p, p._version) for p in (*part.parameters(), *part.buffers())] for name, part in frozen.items()}
