"""Weights and mid-stage state on disk: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import load_adapter_state
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.growth_operators import give_adapter
from stackwise_core.model.saving import (
    CHANNELS,
    CPU,
    EMBEDDING,
    HEAD,
    STACK,
    adapter_file,
    channel_tensors,
    channels_in,
    deserialised,
    empty_stack,
    fill,
    hold,
    serialised,
    stack_tensors,
)
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.identity import AdoptedRecipe
from stackwise_core.stages.plan import StagePlan
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import StageSpec, last_trained
from stackwise_core.training.saved_state import read_state, write_shard, write_state
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import TrainingState
from storage.artifacts import Artifacts
from storage.errors import AGAIN, ArtifactCorruptError
from storage.files import explain_full_disk, write_bytes, write_text
from storage.midstage import METRICS, RANKS, STATE_FOLDER

MOMENTS = "moments.safetensors"
_REMADE = f"Remove {{}} and {AGAIN}"
Module = TypeVar("Module", bound=nn.Module)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return deserialised(path.read_bytes())
    except (OSError, ValueError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"is not a safetensors file ({error})"
        raise ArtifactCorruptError(path, problem, _REMADE.format(path.parent)) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, durably."""
    write_bytes(path, serialised(tensors))


# ---------------------------------------------------------------- a trained stage


def _folder_of(spec: StageSpec, stack: int) -> str:
    """Return the folder of a stack inside the artifact of a stage: the new stack's files lie at the top."""
    return "" if _is_new(spec, stack) else f"stack-{stack}"


def _is_new(spec: StageSpec, stack: int) -> bool:
    return spec.mode != "joint" and stack == spec.index


def save_trained(work: Path, spec: StageSpec, model: StageModel, records: list[dict[str, float]]) -> None:
    """Write what a stage trained, each in its storage type, and the metrics.

    Of the new stack everything is written; of each other one what trained: base, adapters, or both, one file each.
    """
    for stack in model.live_stacks():
        trains = spec.anatomy.trains_of(stack.creation_index)
        is_new = _is_new(spec, stack.creation_index)
        folder = work / _folder_of(spec, stack.creation_index)
        written = stack_tensors(stack, base=is_new or trains == "everything", adapters=is_new or trains != "nothing")
        for name, tensors in written.items():
            folder.mkdir(exist_ok=True)
            save_tensors(folder / name, tensors)
    if spec.anatomy.head_trains:
        save_tensors(work / HEAD, model.head.state_dict())
    if model.embedding is not None and spec.anatomy.embedding_trains:
        save_tensors(work / EMBEDDING, model.embedding.state_dict())
    write_text(work / METRICS, "".join(json.dumps(record) + "\n" for record in records))


def load_stack(artifacts: Artifacts, stages: Sequence[StagePlan], stack: int, device: torch.device = CPU) -> Stack:
    """Return a stack as successive stages left it: its base and its adapters, each from the last that trained it.

    Args:
        artifacts: of the run.
        stages: from the first to the one whose result is wanted; the adapters are those of that stage.
        stack: creation index.
        device: where its tensors go, straight from the file.
    """
    anatomies = [stage.spec.anatomy for stage in stages]
    spec = stages[-1].spec.stacks[stack]
    loaded = empty_stack(stages[-1].shape, spec, spec.precision)
    base = stages[last_trained(anatomies, stack, "base")]
    checked = functools.cache(artifacts.checked)  # both are often one artifact, looked up once
    path = checked(base.ref("stack")) / _folder_of(base.spec, stack) / STACK
    _fill(loaded, functools.partial(hold, loaded, device=device), path)
    trained = stages[last_trained(anatomies, stack, "adapters")]
    there = trained.spec.stacks[stack].adapters
    for name, adapter in spec.adapters.items():
        give_adapter(loaded, name, adapter, stages[-1].stack.order_seed)
        if name in there:
            path = checked(trained.ref("stack")) / _folder_of(trained.spec, stack) / adapter_file(name)
            _fill(loaded, functools.partial(load_adapter_state, loaded, name), path)
    return loaded.requires_grad_(False)


def load_head(artifacts: Artifacts, stages: Sequence[StagePlan], device: torch.device = CPU) -> Head:
    """Return the head as the last of some stages left it; it has a separate tensor even where it is tied."""
    trained = _last_with([stage for stage in stages if stage.spec.anatomy.head_trains], stages)
    return _load_end(Head, artifacts, trained, HEAD, device)


def load_embedding(artifacts: Artifacts, stages: Sequence[StagePlan], device: torch.device = CPU) -> TokenEmbedding:
    """Return the embedding as the last of some stages left it."""
    trained = _last_with([stage for stage in stages if stage.spec.anatomy.embedding_trains], stages)
    return _load_end(TokenEmbedding, artifacts, trained, EMBEDDING, device)


def _load_end(
    kind: Callable[[ModelShape], Module], artifacts: Artifacts, trained: StagePlan, file: str, device: torch.device
) -> Module:
    with torch.device("meta"):
        end = kind(trained.shape)

    def load(tensors: dict[str, Tensor]) -> None:
        if isinstance(trained.stack, AdoptedRecipe):  # an imported model keeps its own type, often 16 bits
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        hold(end, tensors, device)

    return _fill(end, load, artifacts.checked(trained.ref("stack")) / file)


def _last_with(found: list[StagePlan], stages: Sequence[StagePlan]) -> StagePlan:
    """Return the last of the stages that left a head or an embedding, which of adopted stages only the last does."""
    if found:
        return found[-1]
    allowed = "the rack was adopted, and only the whole of it has a head; give at least the number of adopted stacks"
    raise ConfigError([Fault("depth", str(len(stages)), allowed)])


def save_channels(work: Path, channels: Mapping[int, ChannelStatistics]) -> None:
    """Write the statistics of the outputs of some stacks, by creation index, beside what the stage trained."""
    save_tensors(work / CHANNELS, channel_tensors(channels))


def load_channels(artifacts: Artifacts, stages: Sequence[StagePlan], stack: int) -> ChannelStatistics:
    """Return the statistics of a stack's output from the last of some stages that could change it."""
    changed = [stage for stage in stages if _has_channels(stage) and stack in stage.spec.anatomy.live][-1]
    path = artifacts.checked(changed.ref("stack")) / CHANNELS
    if stack not in (found := _channels_of(path)):
        raise ArtifactCorruptError(path, f"has no statistics of stack {stack}", _REMADE.format(path.parent))
    return found[stack]


def load_all_channels(artifacts: Artifacts, stages: Sequence[StagePlan]) -> dict[int, ChannelStatistics]:
    """Return the newest statistics of every stack's output that some stages took, by creation index."""
    found: dict[int, ChannelStatistics] = {}
    for stage in filter(_has_channels, stages):
        found |= _channels_of(artifacts.checked(stage.ref("stack")) / CHANNELS)
    return found


def _channels_of(path: Path) -> dict[int, ChannelStatistics]:
    tensors = load_tensors(path)
    try:
        return channels_in(tensors)
    except ValueError as error:
        raise ArtifactCorruptError(path, str(error), _REMADE.format(path.parent)) from None


def _has_channels(stage: StagePlan) -> bool:
    recipe = stage.stack
    return CHANNELS in recipe.files if isinstance(recipe, AdoptedRecipe) else recipe.statistics_rows > 0


def _fill(module: Module, load: Callable[[dict[str, Tensor]], object], path: Path) -> Module:
    tensors = load_tensors(path)
    try:
        fill(load, tensors)
    except ValueError as error:
        raise ArtifactCorruptError(path, str(error), "Check that it belongs to this artifact's recipe") from None
    return module


def save_moments(work: Path, moments: Mapping[str, Tensor]) -> None:
    """Write the state of a stage's optimizer after its last step."""
    save_tensors(work / MOMENTS, moments)


def load_moments(artifacts: Artifacts, stage: StagePlan) -> dict[str, Tensor]:
    """Return the state that a stage's optimizer was left in, as `<name>.<moment>`."""
    return load_tensors(artifacts.checked(stage.ref("optimizer")) / MOMENTS)


# ---------------------------------------------------------------- the middle of a stage


def save_state(work: Path, state: TrainingState) -> None:
    """Replace the mid-stage checkpoint of a work folder; after a kill the old one or the new one is there."""
    with explain_full_disk(work / STATE_FOLDER):
        write_state(work / STATE_FOLDER, state)


def save_shard(work: Path, state: TrainingState, ranks: Ranks) -> Callable[[], None] | None:
    """Write what one of several processes holds of the mid-stage checkpoint; see `write_shard` for what is returned."""
    fresh = work / RANKS / f"state-{state.step}"
    with explain_full_disk(fresh):
        rest = write_shard(work / STATE_FOLDER, fresh, state, ranks)
    return explain_full_disk(fresh)(rest) if rest else None


def load_state(
    work: Path, ranks: Ranks = ALONE, tell: Callable[[str], object] = lambda why: None
) -> TrainingState | None:
    """Return the mid-stage checkpoint; None if there is none, or if it is damaged: the stage then starts again.

    See `read_state` for what several processes read, and for `tell`.
    """
    found = read_state(work / STATE_FOLDER, ranks, tell)
    return found and found[0]
