"""The state of a stage in a folder: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from stackwise_core.files import recover_folder, replace_folder, write_file
from stackwise_core.model.saving import deserialised, serialised
from stackwise_core.stages.state_header import read_header, write_header
from stackwise_core.training.training import TrainingState

_TENSORS = "state.safetensors"


def write_state(folder: Path, state: TrainingState, made_by: dict[str, Any] | None = None) -> None:
    """Replace the state in a folder; after a kill the old one or the new one is there. `made_by` is JSON beside it."""
    fresh = folder.with_name(f"{folder.name}.tmp")
    fresh.mkdir(parents=True, exist_ok=True)
    payload = serialised(state.tensors)
    write_file(fresh / _TENSORS, payload)
    header = {"step": state.step, "tensors": hashlib.sha256(payload).hexdigest(), "records": state.records}
    more = {"fingerprint": state.fingerprint, "made_by": made_by}
    write_header(fresh, {**header, **{name: value for name, value in more.items() if value}})
    replace_folder(fresh, folder)


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]] | None:
    """Return the state in a folder and what it was made by; None if there is none, or if it is damaged."""
    recover_folder(folder)
    try:
        payload = (folder / _TENSORS).read_bytes()
    except OSError:
        return None
    header = read_header(folder)
    if header is None or hashlib.sha256(payload).hexdigest() != header["tensors"]:
        return None
    state = TrainingState(header["step"], deserialised(payload), header["records"], header.get("fingerprint", {}))
    return state, header.get("made_by", {})
