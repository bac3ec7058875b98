"""Weights and mid-stage state on disk: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from stackwise_core.identity import Ref, StagePlan, canonical_json
from stackwise_core.model import Head, Stack
from stackwise_core.trainer import StageModel, TrainingState
from storage.durable import explain_full_disk, replace_folder, settle_folder, write_bytes, write_text
from storage.errors import ArtifactCorruptError
from storage.layout import SCRATCH, Artifacts

STACK, HEAD, EMBEDDING, METRICS = "stack.safetensors", "head.safetensors", "embedding.safetensors", "metrics.jsonl"
_STATE_FOLDER = f"{SCRATCH}/checkpoint"
Module = TypeVar("Module", bound=nn.Module)


def tensor_digest(module: nn.Module) -> str:
    """Return the hash of a module's tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_plain(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, contiguous, at least one-dimensional, without gradient."""
    return torch.atleast_1d(tensor.detach().cpu().contiguous())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, durably."""
    write_bytes(path, save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ArtifactCorruptError: it is no safetensors file.
    """
    try:
        return load_safetensors(path.read_bytes())
    except Exception as error:  # safetensors raises its own type for bad headers, and others for bad shapes
        remedy = f"Remove {path.parent} and run the same command again: it will be remade"
        raise ArtifactCorruptError(path, f"is no safetensors file ({error})", remedy) from None


# ---------------------------------------------------------------- a trained stage


def save_trained(work: Path, model: StageModel, records: list[dict[str, float]]) -> None:
    """Write what a stage trained: stack, head, in the first stage the embedding, and its metrics."""
    save_tensors(work / STACK, model.stack.state_dict())
    save_tensors(work / HEAD, model.head.state_dict())
    if model.embedding is not None:
        save_tensors(work / EMBEDDING, model.embedding.state_dict())
    write_text(work / METRICS, "".join(json.dumps(record) + "\n" for record in records))


def load_stack(artifacts: Artifacts, stage: StagePlan) -> Stack:
    """Return the trained stack of a stage."""
    stack = Stack(stage.build.shape, stage.build.n_blocks, stage.index)
    return _fill(stack, artifacts, stage.ref("stack"), STACK)


def load_head(artifacts: Artifacts, stage: StagePlan) -> Head:
    """Return the head as a stage left it; it is a tensor of its own, tied or not."""
    return _fill(Head(stage.build.shape), artifacts, stage.ref("stack"), HEAD)


def load_embedding(artifacts: Artifacts, first: StagePlan) -> nn.Embedding:
    """Return the embedding; only the first stage trains it."""
    shape = first.build.shape
    return _fill(nn.Embedding(shape.vocab_size, shape.d_model), artifacts, first.ref("stack"), EMBEDDING)


def _fill(module: Module, artifacts: Artifacts, ref: Ref, name: str) -> Module:
    path = artifacts.checked(ref) / name
    try:
        module.load_state_dict(load_tensors(path), strict=True)
    except RuntimeError as error:
        problem = f"does not fit the model of the configuration ({str(error).splitlines()[-1].strip()})"
        raise ArtifactCorruptError(path, problem, "Check that it belongs to this artifact's recipe") from None
    return module


# ---------------------------------------------------------------- the middle of a stage


def save_state(work: Path, state: TrainingState) -> None:
    """Replace the mid-stage checkpoint of a work folder; a kill leaves the old one or the new one."""
    fresh = work / f"{_STATE_FOLDER}.tmp"
    fresh.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(fresh):
        payload = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()})
        (fresh / "state.safetensors").write_bytes(payload)
        header = {"step": state.step, "tensors": hashlib.sha256(payload).hexdigest(), "records": state.records}
        (fresh / "state.json").write_text(json.dumps({"header": header, "sha256": _header_digest(header)}))
    replace_folder(fresh, work / _STATE_FOLDER)


def load_state(work: Path) -> TrainingState | None:
    """Return the mid-stage checkpoint; None if there is none, or if it is not what was written.

    A damaged checkpoint costs the steps since the start of the stage, never a wrong weight.
    """
    folder = work / _STATE_FOLDER
    settle_folder(folder)
    try:
        written = json.loads((folder / "state.json").read_bytes())
        payload = (folder / "state.safetensors").read_bytes()
        header: dict[str, Any] = written["header"]
        intact = written["sha256"] == _header_digest(header)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not intact or hashlib.sha256(payload).hexdigest() != header["tensors"]:
        return None
    return TrainingState(header["step"], load_safetensors(payload), header["records"])


def _header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(header).encode()).hexdigest()
