"""What is inside sealed artifacts, opened: packed sequences, mapped into memory, and activation stores."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path

import numpy as np

from stackwise_core.data.packing import PackedSequences
from stackwise_core.stages.identity import Ref
from storage.activations.format import is_shard
from storage.activations.reader import StoreReader
from storage.activations.shard import ShardObjects
from storage.artifacts import Artifacts
from storage.files import write_bytes
from storage.manifest import Manifest


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
    return _load_split(folder, "train"), _load_split(folder, "validation")


def _load_split(folder: Path, split: str) -> PackedSequences:
    paths = {field.name: folder / f"{split}_{field.name}.npy" for field in fields(PackedSequences)}
    found = {name: path for name, path in paths.items() if path.exists()}
    return PackedSequences(**{name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in found.items()})


def open_store(artifacts: Artifacts, ref: Ref) -> StoreReader:
    """Return a reader of a sealed store; of one in an object store, only the metadata is downloaded."""
    found = artifacts.sealed_folder(ref)
    remote = artifacts.place.range_reader(found)
    folder = artifacts.place.fetch(found, _metadata(found.manifest))
    return StoreReader(folder, found.manifest.checksums(), objects=ShardObjects(remote) if remote else None)


def open_at(artifacts: Artifacts, folder: Path, manifest: Manifest) -> StoreReader:
    """Return a reader of a sealed store in a folder, which need not be that of `artifacts`."""
    if artifacts.folder(manifest.ref) == folder:
        return open_store(artifacts, manifest.ref)
    return StoreReader(folder, manifest.checksums())


def fetch_metadata(artifacts: Artifacts, folder: Path, manifest: Manifest) -> None:
    """Make sure that everything of a sealed store except its shards is in its folder."""
    if artifacts.folder(manifest.ref) == folder:
        artifacts.place.fetch(artifacts.sealed_folder(manifest.ref), _metadata(manifest))


def _metadata(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if not is_shard(name)]
