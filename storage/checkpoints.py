"""Weights and mid-stage state on disk: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from stackwise_core.model.adapters import adapter_names, adapter_state, base_state, load_adapter_state, load_base_state
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.growth_operators import give_adapter
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.plan import StagePlan
from stackwise_core.stages.stages import AdapterName, StageSpec, last_trained
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import TrainingState
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError
from storage.files import explain_full_disk, recover_folder, replace_folder, write_bytes, write_text
from storage.midstage import STATE_FOLDER, read_header, write_header

STACK, HEAD, EMBEDDING, METRICS = "stack.safetensors", "head.safetensors", "embedding.safetensors", "metrics.jsonl"
CHANNELS = "channels.safetensors"
"""Statistics of the outputs of the stacks that a stage changed, where the stream is quantised."""
Module = TypeVar("Module", bound=nn.Module)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, durably."""
    write_bytes(path, _serialised(tensors))


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    return save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return load_safetensors(path.read_bytes())
    except Exception as error:  # safetensors raises SafetensorError for bad headers, and others for bad shapes
        remedy = f"Remove {path.parent} and run the same command again: it will be remade"
        raise ArtifactCorruptError(path, f"is not a safetensors file ({error})", remedy) from None


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
        if is_new or trains == "everything":
            folder.mkdir(exist_ok=True)
            save_tensors(folder / STACK, base_state(stack))
        if is_new or trains != "nothing":
            folder.mkdir(exist_ok=True)
            for name in adapter_names(stack):
                save_tensors(folder / adapter_file(name), adapter_state(stack, name))
    if spec.anatomy.head_trains:
        save_tensors(work / HEAD, model.head.state_dict())
    if model.embedding is not None and spec.anatomy.embedding_trains:
        save_tensors(work / EMBEDDING, model.embedding.state_dict())
    write_text(work / METRICS, "".join(json.dumps(record) + "\n" for record in records))


def adapter_file(name: str) -> str:
    """Return the file name of an adapter."""
    return f"adapter-{name}.safetensors"


def load_stack(artifacts: Artifacts, stages: Sequence[StagePlan], stack: int) -> Stack:
    """Return a stack as successive stages left it: its base and its adapters, each from the last that trained it.

    Args:
        artifacts: of the run.
        stages: from the first to the one whose result is wanted; the adapters are those of that stage.
        stack: creation index.
    """
    anatomies = [stage.spec.anatomy for stage in stages]
    spec = stages[-1].spec.stacks[stack]
    loaded = Stack(stages[-1].shape, spec.n_blocks, stack, spec.precision)
    base = stages[last_trained(anatomies, stack, "base")]
    convert_storage(loaded, spec.precision)
    checked = functools.cache(artifacts.checked)  # both are often one artifact, looked up once
    _fill(loaded, load_base_state, checked(base.ref("stack")) / _folder_of(base.spec, stack) / STACK)
    trained = stages[last_trained(anatomies, stack, "adapters")]
    there = trained.spec.stacks[stack].adapters
    for name, adapter in spec.adapters.items():
        give_adapter(loaded, name, adapter, base.stack.order_seed)
        if name in there:
            path = checked(trained.ref("stack")) / _folder_of(trained.spec, stack) / adapter_file(name)
            _fill(loaded, functools.partial(_load_adapter, name), path)
    return loaded.requires_grad_(False)


def load_head(artifacts: Artifacts, stages: Sequence[StagePlan]) -> Head:
    """Return the head as the last of some stages left it; it has a separate tensor even where it is tied."""
    trained = [stage for stage in stages if stage.spec.anatomy.head_trains][-1]
    return _fill(Head(trained.shape), nn.Module.load_state_dict, artifacts.checked(trained.ref("stack")) / HEAD)


def load_embedding(artifacts: Artifacts, stages: Sequence[StagePlan]) -> TokenEmbedding:
    """Return the embedding as the last of some stages left it."""
    trained = [stage for stage in stages if stage.spec.anatomy.embedding_trains][-1]
    path = artifacts.checked(trained.ref("stack")) / EMBEDDING
    return _fill(TokenEmbedding(trained.shape), nn.Module.load_state_dict, path)


def save_channels(work: Path, channels: Mapping[int, ChannelStatistics]) -> None:
    """Write the statistics of the outputs of some stacks, by creation index, beside what the stage trained."""
    tensors = {f"stack-{stack}.{name}": t for stack, of in channels.items() for name, t in of._asdict().items()}
    save_tensors(work / CHANNELS, tensors)


def load_channels(artifacts: Artifacts, stages: Sequence[StagePlan], stack: int) -> ChannelStatistics:
    """Return the statistics of a stack's output from the last of some stages that could change it."""
    changed = [stage for stage in stages if stage.stack.statistics_rows and stack in stage.spec.anatomy.live][-1]
    path = artifacts.checked(changed.ref("stack")) / CHANNELS
    tensors = load_tensors(path)
    try:
        return ChannelStatistics(tensors[f"stack-{stack}.mean"], tensors[f"stack-{stack}.std"])
    except KeyError as missing:
        remedy = f"Remove {path.parent} and run the same command again: it will be remade"
        raise ArtifactCorruptError(path, f"has no {missing}", remedy) from None


def _load_adapter(name: AdapterName, stack: Stack, tensors: dict[str, Tensor]) -> None:
    load_adapter_state(stack, name, tensors)


def _fill(module: Module, load: Callable[[Module, dict[str, Tensor]], object], path: Path) -> Module:
    try:
        load(module, load_tensors(path))
    except (RuntimeError, ValueError) as error:
        problem = f"does not fit the model of the configuration ({str(error).splitlines()[-1].strip()})"
        raise ArtifactCorruptError(path, problem, "Check that it belongs to this artifact's recipe") from None
    return module


# ---------------------------------------------------------------- the middle of a stage


def save_state(work: Path, state: TrainingState) -> None:
    """Replace the mid-stage checkpoint of a work folder; after a kill the old one or the new one is there."""
    fresh = work / f"{STATE_FOLDER}.tmp"
    fresh.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(fresh):
        payload = _serialised(state.tensors)
        (fresh / "state.safetensors").write_bytes(payload)
        digest = hashlib.sha256(payload).hexdigest()
        header: dict[str, Any] = {"step": state.step, "tensors": digest, "records": state.records}
        if state.fingerprint:
            header["fingerprint"] = state.fingerprint
        write_header(fresh, header)
    replace_folder(fresh, work / STATE_FOLDER)


def load_state(work: Path) -> TrainingState | None:
    """Return the mid-stage checkpoint; None if there is none, or if it is damaged: the stage then starts again."""
    folder = work / STATE_FOLDER
    recover_folder(folder)
    try:
        payload = (folder / "state.safetensors").read_bytes()
    except OSError:
        return None
    header = read_header(folder)
    if header is None or hashlib.sha256(payload).hexdigest() != header["tensors"]:
        return None
    return TrainingState(header["step"], load_safetensors(payload), header["records"], header.get("fingerprint", {}))
