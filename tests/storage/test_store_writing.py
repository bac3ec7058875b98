"""Writing an activation store: resumed, interrupted, on a full disk or in several processes, the bytes are the same."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.model.stream import ChannelStatistics, Quantised
from storage.activations.format import shard_path
from storage.activations.reader import StoreReader
from storage.activations.writer import ShardRange
from storage.errors import ArtifactUnsealedError, StoreSpaceError
from storage.files import verify_files
from support.disk import ROOT
from support.stores import ATTRIBUTES, content, flip, reseal, same_bits, small_store, store_to_kill


def delete_record(folder: Path) -> None:
    (folder / "records/train-00001.json").unlink()


def cut_record(folder: Path) -> None:
    (folder / "records/train-00001.json").write_text('{"rows": [4')


def cut_shard(folder: Path) -> None:
    os.truncate(folder / shard_path("train", 1), 50)


def delete_shard(folder: Path) -> None:
    (folder / shard_path("train", 1)).unlink()


def flip_shard(folder: Path) -> None:
    flip(folder / shard_path("train", 1), 7)


def swap_shard(folder: Path) -> None:
    # Whole in itself, of the right size, and with the same crc32c as any shard of this shape.
    shutil.copy(folder / shard_path("train", 0), folder / shard_path("train", 1))


def delete_scale_record(folder: Path) -> None:
    (folder / "records/train-scale-00001.json").unlink()


def cut_scale(folder: Path) -> None:
    os.truncate(folder / shard_path("train", 1, "scale"), 50)


def delete_scale(folder: Path) -> None:
    (folder / shard_path("train", 1, "scale")).unlink()


def flip_scale(folder: Path) -> None:
    flip(folder / shard_path("train", 1, "scale"), 7)


def swap_scale(folder: Path) -> None:
    shutil.copy(folder / shard_path("train", 0, "scale"), folder / shard_path("train", 1, "scale"))


WHOLE_DAMAGE = [delete_record, cut_record, cut_shard, delete_shard, flip_shard, swap_shard]
SCALE_DAMAGE = [delete_scale_record, cut_scale, delete_scale, flip_scale, swap_scale]


@pytest.mark.parametrize(
    ("dtype", "damage"), [("bfloat16", d) for d in WHOLE_DAMAGE] + [("int8", d) for d in WHOLE_DAMAGE + SCALE_DAMAGE]
)
def test_resume_rewrites_exactly_the_damaged_shard(dtype: str, damage: Any, request: pytest.FixtureRequest) -> None:
    store, folder, files = request.getfixturevalue("sealed" if dtype == "bfloat16" else "sealed_int8")
    whole, inode = content(folder), (folder / shard_path("train", 0)).stat().st_ino
    damage(folder)
    (folder / (shard_path("train", 1) + ".tmp")).write_bytes(b"left by a killed process")
    writer = store.writer(folder)
    assert writer.missing_shards() == [ShardRange("train", 1, 4, 4)]
    assert store.write(folder) == files
    assert content(folder) == whole
    assert (folder / shard_path("train", 0)).stat().st_ino == inode


@pytest.mark.parametrize("file", ["zarr.json", "activations/zarr.json", "sequence_id/c.0", "validation/view/c.0"])
def test_damaged_metadata_starts_afresh(sealed: Any, file: str, caplog: pytest.LogCaptureFixture) -> None:
    store, folder, files = sealed
    flip(folder / "store.zarr" / file, 5)
    assert len(store.writer(folder).missing_shards()) == 4
    assert "removed, to be made afresh" in caplog.text
    assert store.write(folder) == files


def test_other_attributes_start_afresh_but_key_order_does_not(sealed: Any) -> None:
    store, folder, _ = sealed
    assert not store.writer(folder, dict(reversed(ATTRIBUTES.items()))).missing_shards()
    assert len(store.writer(folder, ATTRIBUTES | {"boundary": 3}).missing_shards()) == 4


def test_unfinished_store_has_no_list(sealed: Any) -> None:
    store, folder, _ = sealed
    delete_record(folder)
    with pytest.raises(ArtifactUnsealedError, match=r"c\.1\.0\.0.*has not been written"):
        store.writer(folder).files()


def test_writer_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    store = small_store()
    shard = store.writer(tmp_path).missing_shards()[0]
    for rows in (store.rows_of(shard)[:1], store.rows_of(shard).float(), store.rows_of(shard).to("meta")):
        with pytest.raises(ValueError, match="needs"):
            store.writer(tmp_path).write_shard(shard, rows)
    for index, problem in [
        ((np.zeros(9), np.zeros(9)), "more than one row"),
        ((np.arange(8), np.zeros(8)), "8 sequence ids for 9 rows"),
        ((np.arange(9), np.zeros(8)), r"must be \[rows\]"),
        ((np.arange(9), np.full(9, VALIDATION_VIEW)), "means validation rows"),
    ]:
        store.index["train"] = index
        with pytest.raises(ValueError, match=problem):
            store.writer(tmp_path)


def test_writer_refuses_values_without_their_scales(tmp_path: Path) -> None:
    store = small_store("int8")
    writer = store.writer(tmp_path)
    shard = writer.missing_shards()[0]
    rows = store.rows_of(shard)
    with pytest.raises(ValueError, match="needs activations and scale, got 1 tensors"):
        writer.write_shard(shard, rows.values)
    for wrong in (Quantised(rows.values, rows.scale[..., 0]), Quantised(rows.values, rows.scale.double())):
        with pytest.raises(ValueError, match=r"needs \(4, 3, 1\) torch.float32"):
            writer.write_shard(shard, wrong)
    assert store.channels is not None
    for channels in (None, ChannelStatistics(store.channels.mean[:4], store.channels.std)):
        with pytest.raises(ValueError, match="do not go with int8 and 5"):
            dataclasses.replace(store, channels=channels).writer(tmp_path)
    with pytest.raises(ValueError, match="do not go with bfloat16"):
        dataclasses.replace(small_store(), channels=store.channels).writer(tmp_path)


def test_a_row_may_be_any_view_of_memory(tmp_path: Path) -> None:
    store = small_store()
    writer = store.writer(tmp_path)
    for shard in writer.missing_shards():
        writer.write_shard(shard, store.rows_of(shard).mT.contiguous().mT.requires_grad_())
    assert writer.files() == store.write(tmp_path / "straight")


def test_processes_write_disjoint_shards(tmp_path: Path) -> None:
    store = small_store()
    writer = store.writer(tmp_path / "many")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(writer.write_shard, s, store.rows_of(s)) for s in writer.missing_shards()]
        assert [job.result() for job in jobs] == [None] * 4
    assert writer.files() == store.write(tmp_path / "one")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = small_store(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2 + 1]))
    files = store.write(tmp_path)
    assert files == reseal(tmp_path)
    assert verify_files(tmp_path, files) == []
    with StoreReader(tmp_path, files) as reader:
        assert same_bits(reader.read("train", range(9)), store.values["train"])


@pytest.mark.parametrize("n_whole", range(8))  # four shards, each with its record
def test_full_disk_is_one_error_and_leaves_nothing_half_named(
    tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch, n_whole: int
) -> None:
    store, write, writes = small_store(), os.write, itertools.count()
    writer = store.writer(tmp_path)

    def full(fd: int, data: Any) -> int:
        if next(writes) < n_whole:
            return write(fd, data)
        write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreSpaceError, match=rf"{tmp_path}.*no space left"):
            store.write_missing(writer)
    assert content(tmp_path).items() <= content(original[0]).items()
    assert store.write(tmp_path) == original[1]


def test_full_disk_while_the_metadata_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr.Group, "create_array", full)
    with pytest.raises(StoreSpaceError, match="no space left"):
        small_store().writer(tmp_path)
    assert not content(tmp_path)


def test_sigkill_at_any_step_then_resume_gives_identical_bytes(tmp_path: Path) -> None:
    # The forks are not of this process: it has threads, for which a child would wait in vain.
    code = (
        "import pathlib, sys; sys.path.insert(0, 'tests')\n"
        "from support.stores import write_and_die_at_every_step\n"
        "write_and_die_at_every_step(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 2)"
    )
    commands = ([sys.executable, "-c", code, str(tmp_path / "killed"), odd] for odd in "01")
    runs = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [run.wait() for run in runs] == [0, 0]

    store = store_to_kill()
    files = store.write(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    killed = sorted((tmp_path / "killed").iterdir())
    assert len(killed) > 30
    assert content(killed[-1]) == whole  # one of the two that lived
    for folder in killed:
        named = {name: data for name, data in content(folder).items() if ".tmp" not in name}
        assert named.items() <= whole.items(), folder.name  # nothing half-written has its name
        assert store.write(folder) == files, folder.name
        assert content(folder) == whole, folder.name
