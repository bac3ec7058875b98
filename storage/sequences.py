"""Packed sequences on disk: four arrays that are mapped into memory, not read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data import PackedSequences
from stackwise_core.identity import Ref
from storage.durable import write_bytes
from storage.layout import Artifacts


def save_sequences(work: Path, train: PackedSequences, validation: PackedSequences) -> None:
    """Write both splits into a work folder."""
    for split, sequences in (("train", train), ("validation", validation)):
        _save(work / f"{split}_tokens.npy", sequences.tokens)
        _save(work / f"{split}_sequence_ids.npy", sequences.sequence_ids)


def load_sequences(artifacts: Artifacts, ref: Ref) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a sealed data artifact.

    Raises:
        ArtifactError: it is missing, unsealed or corrupt.
    """
    folder = artifacts.checked(ref)
    train, validation = (
        PackedSequences(_load(folder / f"{split}_tokens.npy"), _load(folder / f"{split}_sequence_ids.npy"))
        for split in ("train", "validation")
    )
    return train, validation


def _save(path: Path, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def _load(path: Path) -> NDArray[Any]:
    return np.load(path, mmap_mode="r", allow_pickle=False)
