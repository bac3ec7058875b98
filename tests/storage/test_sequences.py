"""Packed sequences on disk: the same arrays back, mapped and not read, and no changed byte passes."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences, write_split
from stackwise_core.stages.plan import plan_run
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError, ArtifactMissingError, ArtifactUnsealedError
from storage.sequences import load_sequences

PLAN = plan_run(StackWiseConfig(), "00" * 32)
REF = PLAN.data_ref
FILES = {f"{split}_{what}.npy" for split in ("train", "validation") for what in ("tokens", "sequence_ids")}


def split(rows: int, first_id: int, seed: int) -> PackedSequences:
    tokens = np.random.default_rng(seed).integers(0, 259, (rows, 8)).astype(np.uint16)
    return PackedSequences(tokens, first_id + np.arange(rows, dtype=np.int64))


def save_sequences(work: Path, train: PackedSequences, validation: PackedSequences) -> None:
    write_split(work, "train", train)
    write_split(work, "validation", validation)


TRAIN, VALIDATION = split(7, 0, 1), split(3, FIRST_VALIDATION_ID, 2)


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    artifacts = Artifacts(tmp_path).open()
    save_sequences(artifacts.work(REF), TRAIN, VALIDATION)
    artifacts.seal(REF, PLAN.data, (), {}, {})
    return artifacts


def test_round_trip_by_mapping(artifacts: Artifacts) -> None:
    assert {path.name for path in artifacts.folder(REF).iterdir()} == FILES | {"manifest.json"}
    for found, saved in zip(load_sequences(artifacts, REF), (TRAIN, VALIDATION), strict=True):
        for array, original in ((found.tokens, saved.tokens), (found.sequence_ids, saved.sequence_ids)):
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
            assert (array.dtype, array.shape) == (original.dtype, original.shape)
            assert array.tobytes() == original.tobytes()
        tokens, ids = found.take(found.rows_of(saved.sequence_ids[::-1]))
        assert tokens.dtype == np.int64
        assert (tokens == saved.tokens[::-1]).all()
        assert (ids == saved.sequence_ids[::-1]).all()


def test_targets_and_masks_round_trip_where_there_are_any(artifacts: Artifacts, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    saved = [
        dataclasses.replace(
            split, targets=draw.integers(-100, 2**40, (len(split), 8)), masks=draw.random((len(split), 8)) < 0.5
        )
        for split in (TRAIN, VALIDATION)
    ]
    other = Artifacts(tmp_path / "other").open()
    save_sequences(other.work(REF), *saved)
    other.seal(REF, PLAN.data, (), {}, {})
    names = {f"{split}_{what}.npy" for split in ("train", "validation") for what in ("targets", "masks")}
    assert {path.name for path in other.folder(REF).iterdir()} == FILES | names | {"manifest.json"}
    for found, split in zip(load_sequences(other, REF), saved, strict=True):
        for array, original in ((found.targets, split.targets), (found.masks, split.masks)):
            assert isinstance(array, np.memmap)
            assert original is not None
            assert (array.dtype, array.tobytes()) == (original.dtype, original.tobytes())
        assert (found.tokens == split.tokens).all()
    assert [split.targets for split in load_sequences(artifacts, REF)] == [None, None]
    (other.folder(REF) / "train_masks.npy").unlink()
    with pytest.raises(ArtifactCorruptError):
        load_sequences(Artifacts(other.root), REF)


def test_equal_sequences_have_equal_bytes(artifacts: Artifacts, tmp_path: Path) -> None:
    """So that preparing the same corpus again gives the same digest."""
    digest = artifacts.manifest(REF).digest
    save_sequences(artifacts.work(REF), TRAIN, VALIDATION)
    assert artifacts.seal(REF, PLAN.data, (), {}, {}).digest == digest
    fortran = PackedSequences(np.asfortranarray(TRAIN.tokens)[:5], TRAIN.sequence_ids[:5])
    other = Artifacts(tmp_path / "other").open()
    save_sequences(other.work(REF), fortran, VALIDATION)
    other.seal(REF, PLAN.data, (), {}, {})
    assert (load_sequences(other, REF)[0].tokens == TRAIN.tokens[:5]).all()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_byte_is_refused(name: str, artifacts: Artifacts) -> None:
    path = artifacts.folder(REF) / name
    original = path.read_bytes()
    for position in (0, 9, len(original) // 2, len(original) - 1):
        data = bytearray(original)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtifactCorruptError, match="checksum") as caught:
            load_sequences(Artifacts(artifacts.root), REF)
        assert caught.value.path == path
    path.write_bytes(original[:-2])
    with pytest.raises(ArtifactCorruptError, match="bytes, sealed with"):
        load_sequences(artifacts, REF)


def test_what_is_not_sealed_is_not_read(artifacts: Artifacts) -> None:
    (artifacts.folder(REF) / "manifest.json").unlink()
    with pytest.raises(ArtifactUnsealedError):
        load_sequences(artifacts, REF)
    artifacts.discard(REF)
    with pytest.raises(ArtifactMissingError):
        load_sequences(artifacts, REF)


class Bomb:
    """Unpickling this would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_not_opened(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed by a stranger: every checksum is right, and one of the arrays is a pickle."""
    monkeypatch.chdir(tmp_path)
    work = artifacts.work(REF)
    save_sequences(work, TRAIN, VALIDATION)
    np.save(work / "train_tokens.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    artifacts.seal(REF, PLAN.data, (), {}, {})
    with pytest.raises(ArtifactCorruptError, match="no sequences"):
        load_sequences(artifacts, REF)
    (artifacts.folder(REF) / "train_tokens.npy").unlink()
    save_sequences(artifacts.work(REF), TRAIN, VALIDATION)
    (artifacts.work(REF) / "train_tokens.npy").write_bytes(pickle.dumps(Bomb()))
    artifacts.seal(REF, PLAN.data, (), {}, {})
    with pytest.raises(ValueError, match="pickle"):
        load_sequences(artifacts, REF)
    assert not (tmp_path / "exploded").exists()
