"""Packed sequences on disk: arrays that are mapped into memory, not read."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.packing import PackedSequences
from stackwise_core.stages.identity import Ref
from storage.artifacts import Artifacts
from storage.files import write_bytes


def save_sequences(work: Path, train: PackedSequences, validation: PackedSequences) -> None:
    """Write both splits into a work folder: a file for each array that is there, such as `train_tokens.npy`."""
    for split, sequences in (("train", train), ("validation", validation)):
        for field in fields(sequences):
            array = getattr(sequences, field.name)
            if array is not None:
                _save(work / f"{split}_{field.name}.npy", array)


def load_sequences(artifacts: Artifacts, ref: Ref) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a sealed data artifact.

    Raises:
        ArtifactError: it is missing, unsealed or corrupt.
    """
    folder = artifacts.checked(ref)
    return _load_split(folder, "train"), _load_split(folder, "validation")


def _load_split(folder: Path, split: str) -> PackedSequences:
    paths = {field.name: folder / f"{split}_{field.name}.npy" for field in fields(PackedSequences)}
    return PackedSequences(**{name: _load(path) for name, path in paths.items() if path.exists()})


def _save(path: Path, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def _load(path: Path) -> NDArray[Any]:
    return np.load(path, mmap_mode="r", allow_pickle=False)
