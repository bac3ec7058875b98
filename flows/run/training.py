"""Training a stage and its cool-down, without Prefect: open what they read, train, seal, return a reference."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from flows.run.events import GO_ON, Message, StepTaken, emit, stop_requested
from flows.run.inputs import open_stage, state_below, store_below
from flows.run.ranks import train_by_ranks
from flows.run.stage import Made, Stage, fingerprint_of, make, seal
from flows.run.validating import losses_of
from stackwise_core.errors import NonFiniteLossError, SavedRackError
from stackwise_core.model.precision import count_parameters
from stackwise_core.stages.adopt import adopted_recipes, rack_files
from stackwise_core.stages.costs import rack_parameters, stack_parameters
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.memory import memory
from stackwise_core.stages.plan import cooldown_flops
from stackwise_core.stages.remedies import explained
from stackwise_core.stages.saved_rack import SavedRack
from stackwise_core.training.saved_state import StateWriter
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import Hooks, Record, TrainingState, end_stage, moments_of, train_stage
from storage.artifacts import SCRATCH, State
from storage.checkpoints import load_state, save_channels, save_moments, save_shard, save_state, save_trained
from storage.errors import ArtifactCorruptError
from storage.files import checksum_file, write_bytes, write_text
from storage.midstage import METRICS, step_reached


def train(stage: Stage, build: Ref | None, trunk: Ref | None) -> Ref:
    """Train the live stacks on their boundary, cached or live, from the last checkpoint if there is one.

    An adopted stack is taken from its rack instead. Where a later stage may go on from the optimizer's state, it is
    sealed too, before the stack; if only the state is missing, the stage is trained again for it.
    """
    if trunk is None:
        return _adopt(stage)
    below = [*stage.stacks_below, *([build] if build else []), trunk, *store_below(stage), *state_below(stage)]
    inputs = [stage.run_plan.data_ref, *below]
    state = stage.plan.ref("optimizer") if stage.plan.optimizer else None

    def work(folder: Path) -> Made:
        made, moments = _train(stage, build, folder, folder)
        if state is not None:
            with stage.artifacts.lock(state.name):
                save_moments(stage.artifacts.work(state), moments)
                seal(stage, state, inputs, Made({"tensors": len(moments)}))
        return made

    def again(folder: Path) -> Made:
        reader = f"stage {stage.index + 1} goes on from the state of its optimizer, which was not kept"
        emit(Message(f"stage {stage.index} is trained again: {reader}"))
        weights = folder / SCRATCH / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        _, moments = _train(stage, build, folder, weights)
        _check_same(stage, stack, weights)
        save_moments(folder, moments)
        return Made({"tensors": len(moments)})

    stack = make(stage, "train", inputs, work)
    if state is not None and state.kind in stage.needed and stage.artifacts.state(state) is not State.SEALED:
        make(stage, "train", inputs, again, state.kind)
    return stack


def _train(stage: Stage, build: Ref | None, folder: Path, weights: Path) -> tuple[Made, dict[str, Tensor]]:
    """Train a stage in a work folder, write what it trained to `weights`, and return its optimizer's state if kept."""
    spec, shape, moments = stage.plan.spec, stage.plan.shape, dict[str, Tensor]()
    added = spec.stacks if spec.mode == "joint" else (spec.new,)
    hooks = hooks_of(stage, folder)

    def keep(state: TrainingState) -> None:
        if stage.plan.optimizer:
            moments.update(moments_of(state))
        if cools:
            state = replace(state, fingerprint=fingerprint_of(stage), tensors=dict(state.tensors))
            save_state(stage.artifacts.work(stage.plan.ref("cooldown")), state)

    cools = "cooldown" in stage.needed
    hooks = replace(hooks, on_end=keep if stage.plan.optimizer or cools else None)
    by_ranks = train_by_ranks(stage, build, folder) if stage.config.hardware.ranks > 1 else None
    with failures_explained(stage), open_stage(stage, build, folder) as opened:
        # After ranks have trained, the checkpoint is that of the last step, and this only restores it.
        trained = train_stage(opened, hooks)
        trainable = count_parameters(opened.model)["trainable_parameters"]
        channels = end_stage(opened.model, opened.first_batches)
    for line in trained.told:
        emit(Message(f"stage {stage.index} {line}"))
    save_trained(weights, spec, opened.model, trained.records)
    if channels:
        save_channels(weights, channels)
    attempt = by_ranks or trained
    n_tokens = (len(trained.records) - attempt.first_step) * spec.optim.batch_size * stage.config.data.seq_len
    facts = {
        "stack_parameters": sum(stack_parameters(shape, stack) for stack in added),
        "trainable_parameters": trainable,
        "rack_parameters": rack_parameters(shape, spec),
        "frozen_unchanged": attempt.frozen,
        "steps": (n_steps := len(trained.records)),
        **({"steps_planned": spec.optim.steps} if n_steps < spec.optim.steps else {}),
        **({"kept_step": trained.kept} if trained.kept else {}),
        "first_step": attempt.first_step,
        "train_loss": trained.records[(trained.kept or 0) - 1]["loss"],
        "tokens_per_second": round(n_tokens / attempt.seconds),
        "memory_bytes_forecast": memory(stage.setting).peak,
        **({"memory_bytes_peak": attempt.peak_bytes} if attempt.peak_bytes else {}),
    }
    return Made(facts, records=(METRICS,)), moments


@contextmanager
def failures_explained(stage: Stage) -> Generator[None]:
    """While the block trains a stage, give the cause and the remedy of a failure that looks like another one.

    Raises:
        OutOfMemoryError: it needs more memory than there is.
        ArtifactCorruptError: the loss is not finite because the store was damaged after it had first been read.
    """
    with explained(lambda: stage.setting, partial(step_reached, stage.artifacts, stage.plan.ref("stack"))):
        try:
            yield
        except NonFiniteLossError:
            for store in store_below(stage):
                problems, _ = stage.artifacts.verify(stage.artifacts.folder(store))
                if problems:
                    found = "was damaged while the stage read it, and gave a loss that is not finite"
                    raise ArtifactCorruptError(stage.artifacts.where(store), found, problems[0]) from None
            raise


def _check_same(stage: Stage, stack: Ref, weights: Path) -> None:
    """Raise ArtifactCorruptError unless a stage that was trained again has the weights that it was sealed with."""
    sealed = stage.artifacts.manifest(stack)
    for name, entry in sealed.files.items():
        if entry.content and checksum_file(weights / name, "sha256") != entry.checksum:
            raise ArtifactCorruptError(
                stage.artifacts.where(stack),
                f"has other weights in {name} than training it again gives, so no optimizer state fits it (was it made "
                "by another machine, device, number of threads or version of torch?)",
                f"Redo it and what follows: run the same command with --from-stack {stage.index}",
            )


def cool_down(stage: Stage, build: Ref | None, stack: Ref) -> Ref | None:
    """Train a copy of a stage on while its rate decays, measure its losses, and throw its weights away.

    It goes on from the last step's checkpoint, with the moments of its optimizer; where that is gone, since the stage
    was trained earlier, from the first step. Returns None for a stage that has no cool-down.
    """
    recipe = stage.plan.cooldown
    if recipe is None:
        return None
    cooling = stage.model_copy(update={"cooling": True})
    inputs = [stage.run_plan.data_ref, *stage.stacks_below, *([build] if build else []), stack]

    def work(folder: Path) -> Made:
        if load_state(folder) is None:
            emit(Message(f"stage {stage.index} trains again before its cool-down: its last checkpoint is not there"))
        if stage.config.hardware.ranks > 1:
            train_by_ranks(cooling, build, folder)
        with failures_explained(cooling), open_stage(cooling, build, folder) as opened:
            trained = train_stage(opened, hooks_of(cooling, folder))
            end_stage(opened.model)
            losses = losses_of(cooling, recipe.sequences, recipe.grid, opened.model)
        flops = cooldown_flops(stage.plan, stage.config.data.seq_len)
        facts = {**losses, "steps": recipe.steps, "train_loss": trained.records[-1]["loss"], "flops": flops}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    return make(cooling, "cool", inputs, work)


def _adopt(stage: Stage) -> Ref:
    """Copy the files of an adopted stack; raises SavedRackError if they are not those that were planned."""
    spec, shape = stage.plan.spec, stage.plan.shape

    def work(folder: Path) -> Made:
        saved = SavedRack.at(stage.config.model.from_)
        if adopted_recipes(saved) != stage.adopted:
            raise SavedRackError(saved.folder, "the rack changed while the run was starting", "Start again")
        for path, name in rack_files(saved, stage.index).items():
            write_bytes(folder / name, saved.read(path))
        facts = {
            "adopted": True,
            "stack_parameters": stack_parameters(shape, spec.new),
            "rack_parameters": rack_parameters(shape, spec),
        }
        return Made(facts)

    return make(stage, "train", [], work)


def hooks_of(stage: Stage, folder: Path, ranks: Ranks = ALONE) -> Hooks:
    """Return hooks that report steps as events and write checkpoints to the work folder.

    Only one rank reports. The first one writes, or each its shard; the checkpoint of the last step is the result.
    """
    optim = stage.plan.spec.optim
    n_tokens = optim.batch_size * stage.config.data.seq_len

    def validation_loss(model: StageModel) -> float:
        recipe = stage.plan.validation
        assert recipe
        return losses_of(stage, recipe.sequences, (), model)["validation_loss"]

    def on_step(record: Record) -> None:
        step, rate = int(record["step"]) + 1, record["learning_rate"]
        validated = record.get("validation_loss")
        emit(StepTaken(stage.index, step, optim.steps, record["loss"], n_tokens, rate, validated, record))

    save = partial(save_shard, folder, ranks=ranks) if ranks.sharded else partial(save_state, folder)
    writer = StateWriter(save)

    def on_checkpoint(state: TrainingState) -> None:
        state.fingerprint = fingerprint_of(stage)
        writer.put(state)

    hooks = Hooks(on_checkpoint=on_checkpoint, settle=writer.settle) if ranks.rank == 0 or ranks.sharded else Hooks()
    if ranks.reports:
        hooks.on_step = on_step
    return replace(
        hooks,
        checkpoint_every=stage.config.training.checkpoint_every,
        checkpoint_minutes=stage.config.training.checkpoint_minutes,
        validate=None if ranks.sharded else validation_loss,
        validate_every=stage.config.validation.every,
        on_end_elsewhere=ranks.count > 1 and stage.plan.optimizer is not None,
        checkpoint_last=ranks.count > 1,
        should_stop=stop_requested,
        go_on=GO_ON,
    )
