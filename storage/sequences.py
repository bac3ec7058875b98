"""Packed sequences on disk: arrays that are mapped into memory. Needs no torch, so that `plan` starts quickly."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path

import numpy as np

from stackwise_core.data.packing import PackedSequences
from stackwise_core.stages.identity import Ref
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError
from storage.files import write_bytes


def save_sequences(work: Path, train: PackedSequences, validation: PackedSequences) -> None:
    """Write both splits into a work folder: a file for each array that is there, such as `train_tokens.npy`."""
    for split, sequences in (("train", train), ("validation", validation)):
        for field in fields(sequences):
            array = getattr(sequences, field.name)
            if array is not None:
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                write_bytes(work / f"{split}_{field.name}.npy", buffer.getvalue())


def load_sequences(artifacts: Artifacts, ref: Ref) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a sealed data artifact; raises as `Artifacts.checked`."""
    folder = artifacts.checked(ref)
    try:
        return _load_split(folder, "train"), _load_split(folder, "validation")
    except (EOFError, OSError, TypeError, ValueError):  # sealed so, by a stranger
        remedy = f"Remove {folder} and run the same command again: it will be remade"
        raise ArtifactCorruptError(folder, "holds no sequences that can be read", remedy) from None


def _load_split(folder: Path, split: str) -> PackedSequences:
    paths = {field.name: folder / f"{split}_{field.name}.npy" for field in fields(PackedSequences)}
    found = {name: path for name, path in paths.items() if path.exists()}
    return PackedSequences(**{name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in found.items()})
