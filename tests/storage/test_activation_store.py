"""The activation store: what was written is what is read, or an error says which file is wrong.

Every value is random bits, compared as bits, so that rounding or a fill value cannot pass for data.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.model.stream import STREAM_DTYPES, ChannelStatistics, Quantised
from storage.activations import metadata, sharded_array
from storage.activations import reader as reader_module
from storage.activations.bfloat16 import BFloat16
from storage.activations.buffers import PAGE_BYTES, empty_aligned
from storage.activations.float8 import Float8E4M3FN
from storage.activations.format import GROUP_FOLDERS, GROUPS, GroupSpec, is_shard, record_path, shard_path
from storage.activations.reader import RowMissingError, StoreReader
from storage.activations.record import parse_record
from storage.activations.reused import ReusedRows
from storage.activations.shard_file import ShardFile
from storage.activations.writer import ShardRange
from storage.checksums import checksum_file, verify_files
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactUnsealedError,
    StoreSpaceError,
)
from support.stores import ATTRIBUTES, D, Store, T, bits, same_bits, small_store, spec_of

MIB = 2**20


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


EVERY_DTYPE = list(STREAM_DTYPES)
both_ways = pytest.mark.parametrize("access", ["map", "read"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("original")
    return folder, small_store().write(folder)


@pytest.fixture(scope="module")
def original_int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("int8")
    return folder, small_store("int8").write(folder)


@pytest.fixture
def sealed_int8(original_int8: Any, tmp_path: Path) -> tuple[Store, Path, dict[str, tuple[int, str]]]:
    folder, files = original_int8
    return small_store("int8"), shutil.copytree(folder, tmp_path / "a"), files


@pytest.fixture
def sealed(original: Any, tmp_path: Path) -> tuple[Store, Path, dict[str, tuple[int, str]]]:
    folder, files = original
    return small_store(), shutil.copytree(folder, tmp_path / "a"), files


# ---------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("rows", "row_kib", "per_chunk", "shard_mib", "n_shards"),
    [
        (100, 256, 1, 25, 1),  # smaller than a shard
        (2**12, 256, 1, 64, 16),  # 1 GiB: shards as small as they get
        (2**16, 1024, 1, 1024, 64),  # 64 GiB: 64 of the largest
        (2**17, 1024, 1, 1024, 128),  # 128 GiB: more of them
        (2**15, 1024, 1, 512, 64),  # 32 GiB: a 64th
        (2**12, 30, 3, 63.984375, 2),  # 3 rows make 64 KiB; whole chunks make up a shard
    ],
)
def test_sizes_follow_the_rule(rows: int, row_kib: int, per_chunk: int, shard_mib: float, n_shards: int) -> None:
    spec = GroupSpec(rows, row_kib, 512, "bfloat16")
    assert (spec.rows_per_chunk, spec.shard_bytes / MIB, spec.n_shards) == (per_chunk, shard_mib, n_shards)
    assert dataclasses.replace(spec) == spec
    assert list(itertools.chain(*map(spec.shard_range, range(n_shards)))) == list(range(rows))


@pytest.mark.parametrize("wrong", [{"rows": -1}, {"seq_len": 0}, {"d_model": 0}, {"dtype": "int4"}, {"chunk_bytes": 0}])
def test_impossible_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got 'int4'" if "dtype" in wrong else "out of range"):
        GroupSpec(**({"rows": 1, "seq_len": 1, "d_model": 1, "dtype": "float32"} | wrong))


def test_padding_is_nan_and_absent_chunks_are_marked(tmp_path: Path) -> None:
    store = Store.random(spec_of(7, "float32", per_chunk=2, per_shard=3), spec_of(0, "float32"))
    store.write(tmp_path)
    row, stride = T * D * 4, 2 * T * D * 4 + 4
    last = (tmp_path / shard_path("train", 1)).read_bytes()  # row 6 of 7 in the first of three chunks
    assert last[:row] == store.values["train"][6].numpy().tobytes()
    assert np.isnan(np.frombuffer(last[row : 2 * row], "<f4")).all()
    index = np.frombuffer(last[stride:-4], "<u8").reshape(3, 2).tolist()
    assert index == [[0, stride], [2**64 - 1] * 2, [2**64 - 1] * 2]


def test_zeros_are_written(tmp_path: Path) -> None:
    store = small_store()
    store.values = {group: torch.zeros_like(rows) for group, rows in store.values.items()}
    store.index["validation"] = np.arange(3) * 0 + [0, 1, 2], np.full(3, VALIDATION_VIEW)
    store.index["train"] = np.arange(9), np.zeros(9)
    files = store.write(tmp_path)
    assert files[shard_path("train", 0)][0] == 2 * (2 * T * D * 2 + 4) + 2 * 16 + 4
    assert "store.zarr/view/c.0" in files  # all zero, which zarr-python leaves out by default
    with StoreReader(tmp_path, files) as reader:
        assert same_bits(reader.read("train", range(9)), store.values["train"])


# ------------------------------------------------------------------------------------------ round trip


@both_ways
@pytest.mark.parametrize("check", ["first_touch", "always", "never"])
@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_round_trip(tmp_path: Path, dtype: Any, per_chunk: int, check: Any, access: Any) -> None:
    store = Store.random(spec_of(23, dtype, per_chunk), spec_of(5, dtype, per_chunk), views=3)
    files = store.write(tmp_path)
    ids, views = (torch.from_numpy(np.asarray(part)) for part in store.index["train"])
    with StoreReader(tmp_path, files, check, access) as reader:
        assert (reader.attributes, reader.dtype) == (ATTRIBUTES, store.given("train").dtype)
        assert (reader.train, reader.validation) == (store.specs["train"], store.specs["validation"])
        for _ in range(2):  # the second time, chunks have been checked
            for view in range(3):
                of_view = torch.nonzero(views == view)[:, 0].flip(0).repeat(2)
                assert same_bits(reader.rows(ids[of_view], view), store.given("train")[of_view])
            assert same_bits(reader.rows(np.arange(5), VALIDATION_VIEW), store.given("validation"))


@settings(max_examples=15)
@given(st.data())
def test_any_shape_round_trips_here_and_in_zarr(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    dtype = data.draw(st.sampled_from(EVERY_DTYPE))
    shape = {"t": draw(1, T), "d": draw(1, D), "per_chunk": draw(1, 4), "per_shard": draw(1, 4)}
    store = Store.random(spec_of(draw(0, 30), dtype, **shape), spec_of(draw(0, 5), dtype, **shape))
    with tempfile.TemporaryDirectory() as folder:
        files = store.write(Path(folder))
        with StoreReader(Path(folder), files) as reader:
            for group, values in store.values.items():
                order = np.random.default_rng(0).permutation(len(values))
                assert same_bits(reader.read(group, order), store.given(group)[torch.from_numpy(order)])
                array: Any = zarr.open_array(Path(folder) / GROUP_FOLDERS[group] / "activations", mode="r")
                assert array[:].tobytes() == bits(values)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_other_zarr_readers_agree(tmp_path: Path, dtype: Any) -> None:
    store = Store.random(spec_of(11, dtype, 2), spec_of(3, dtype, 2))
    store.write(tmp_path)
    root: Any = zarr.open_group(tmp_path / "store.zarr", mode="r")
    quantised = store.channels is not None
    assert dict(root.attrs) == ATTRIBUTES | {"format_version": 2 if quantised else 1}
    for group, node in (("train", root), ("validation", root["validation"])):
        assert node["activations"].metadata.dimension_names == ("row", "position", "channel")
        fill_value = float(node["activations"].fill_value)
        assert fill_value == 0 if dtype == "int8" else np.isnan(fill_value)
        assert [node[k].dtype for k in ("sequence_id", "view")] == [np.int64, np.int32]
        assert node["sequence_id"][:].tolist() == store.index[group][0].tolist()
        assert node["view"][:].tolist() == store.index[group][1].tolist()
        expected = {"activations": store.values[group]}
        if store.channels is not None:
            expected |= {"scale": store.scales[group][..., 0]}
            expected |= {"channel_mean": store.channels.mean, "channel_std": store.channels.std}
        assert set(node.array_keys()) == {*expected, "sequence_id", "view"}
        for name, values in expected.items():
            place = {"driver": "file", "path": str(tmp_path / GROUP_FOLDERS[group] / name)}
            array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
            assert array.dtype.name == str(values.dtype).removeprefix("torch.")
            for read in (node[name][:], array.read().result()):
                assert (read.shape, read.tobytes()) == (tuple(values.shape), bits(values))
        if store.channels is not None:  # by hand, from what any Zarr reader gives
            arrays = {name: node[name][:].astype(np.float32) for name in expected}
            by_hand = (
                arrays["activations"] * arrays["scale"][..., None] * arrays["channel_std"] + arrays["channel_mean"]
            )
            assert by_hand.tobytes() == bits(store.given(group))


def test_an_older_reader_refuses_a_quantised_store(sealed_int8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, files = sealed_int8
    monkeypatch.setattr(metadata, "FORMAT_VERSION", 1)
    with pytest.raises(ArtifactError, match="format version 2 is newer than 1, the newest this StackWise reads"):
        StoreReader(folder, files)


@pytest.mark.parametrize(("data_type", "dtype"), [(BFloat16(), torch.bfloat16), (Float8E4M3FN(), torch.float8_e4m3fn)])
def test_our_data_types_write_through_zarr_too(tmp_path: Path, data_type: Any, dtype: torch.dtype) -> None:
    values = torch.randn(4, 3).to(dtype).view(torch.uint8).numpy().view(data_type.to_native_dtype())
    zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(2, 3))
    place = {"driver": "file", "path": str(tmp_path / "a.zarr")}
    read = tensorstore.open({"driver": "zarr3", "kvstore": place}).result().read().result()
    assert read.tobytes() == values.tobytes()


def test_results_are_aligned_and_not_overwritten(sealed: Any) -> None:
    store, folder, files = sealed
    with StoreReader(folder, files) as reader:
        first = reader.read("train", [3])
        assert first.data_ptr() % PAGE_BYTES == 0
        reader.read("train", [4])
        assert same_bits(first, store.values["train"][3:4])
        out = empty_aligned((2, T, D), torch.bfloat16)
        assert reader.read("train", [8, 0], out) is out
        assert same_bits(out, store.values["train"][[8, 0]])
        assert reader.read("train", []).shape == (0, T, D)
        for wrong in (out[:1], out.float(), torch.empty(2, D, T, dtype=torch.bfloat16).mT):
            with pytest.raises(ValueError, match="out must be"):
                reader.read("train", [8, 0], wrong)


def test_unknown_rows_are_errors(sealed: Any) -> None:
    store, folder, files = sealed
    known = int(store.index["train"][0][0])
    with StoreReader(folder, files) as reader:
        with pytest.raises(RowMissingError, match=r"no train row of sequence 999, view 1") as caught:
            reader.rows(np.array([known, 999]), 1)
        assert isinstance(caught.value, KeyError)
        with pytest.raises(RowMissingError, match=r"no train row of view 2; the views are \[0, 1\]"):
            reader.rows(np.array([known]), 2)
        with pytest.raises(RowMissingError, match="no validation row of sequence 3"):
            reader.rows(np.array([3]), VALIDATION_VIEW)
        for outside in ([9], [-1]):
            with pytest.raises(IndexError, match="train rows"):
                reader.read("train", outside)


def test_reused_rows_are_the_rows_in_few_buffers(sealed: Any) -> None:
    store, folder, files = sealed
    ids, views = store.index["train"]
    rows = np.flatnonzero(np.asarray(views) == 0)
    batches = [rows[[n % len(rows), (n + 1) % len(rows)]] for n in range(7)] + [rows[:1]]
    with StoreReader(folder, files) as reader:
        reused = ReusedRows(reader, 3)
        given: list[torch.Tensor] = []
        for n, batch in enumerate(batches):
            given.append(reused.rows(ids[batch], 0))
            for values, asked in zip(given[-3:], batches[max(0, n - 2) : n + 1], strict=True):
                assert same_bits(values, store.values["train"][asked])  # the last three are valid
        assert len({values.data_ptr() for values in given}) == 3
        assert all(values.data_ptr() % 4096 == 0 for values in given)


@both_ways
def test_few_open_files_and_many_threads(sealed: Any, access: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder, files = sealed
    monkeypatch.setattr(sharded_array, "MAX_OPEN_SHARDS", 1)
    before = len(os.listdir("/proc/self/fd"))
    with StoreReader(folder, files, "always", access) as reader, ThreadPoolExecutor(4) as pool:
        orders = [torch.randperm(9) for _ in range(40)]
        for order, rows in zip(orders, pool.map(lambda o: reader.read("train", o), orders), strict=True):
            assert same_bits(rows, store.values["train"][order])
        assert len(os.listdir("/proc/self/fd")) == before + (2 if access == "map" else 1)  # a mapping holds one too
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------- resume


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


def store_to_kill() -> Store:
    """Two shards and one, no more: every step of it is a process."""
    return Store.random(spec_of(3, per_chunk=2, per_shard=1), spec_of(1))


def die_at(step: int) -> None:
    """Have this process kill itself just before its `step`-th change to the disk, or halfway into a write.

    What SIGKILL leaves depends neither on fsync nor on an empty file being made, so these are no steps.
    """
    steps, write = itertools.count(), os.write

    def die_if_due(before: Any = lambda: None) -> None:
        if next(steps) == step:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        changes = event in {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
        # zarr-python's own renames happen in a folder that does not count yet; its mkdirs stand for them.
        if changes and not str(args[0]).endswith(".partial"):
            die_if_due()

    def dying_write(fd: int, data: Any) -> int:
        die_if_due(lambda: write(fd, data[: len(data) // 2]))
        return write(fd, data)

    os.write = dying_write
    sys.addaudithook(audit)


def write_and_die_at_every_step(folder: Path, first: int, stride: int) -> None:
    """Write the store over and over in children that die ever later, until one lives."""
    for step in itertools.count(first, stride):
        if (child := os.fork()) == 0:
            die_at(step)
            store_to_kill().write(folder / f"{step:03d}")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def test_sigkill_at_any_step_then_resume_gives_identical_bytes(tmp_path: Path) -> None:
    # The forks are not of this process: it has threads, for which a child would wait in vain.
    code = (
        "import pathlib, sys, test_activation_store as test\n"
        "test.write_and_die_at_every_step(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 2)"
    )
    path = os.pathsep.join((str(Path(__file__).parents[2]), str(Path(__file__).parent)))
    commands = ([sys.executable, "-c", code, str(tmp_path / "killed"), odd] for odd in "01")
    runs = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) for command in commands]
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


# ---------------------------------------------------------------------------------------------- damage


@both_ways
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("check", ["first_touch", "always"])
@pytest.mark.parametrize(("store_of", "array"), [("sealed", "activations"), ("sealed_int8", "scale")])
def test_every_flipped_byte_of_a_shard_is_found(
    store_of: str, array: Any, group: Any, check: Any, access: Any, request: pytest.FixtureRequest
) -> None:
    store, folder, files = request.getfixturevalue(store_of)
    for index in range(store.specs[group].n_shards):
        name = shard_path(group, index, array)
        path, rows = folder / name, list(store.specs[group].shard_range(index))
        for position in range(0, files[name][0], 11):
            flip(path, position)
            with StoreReader(folder, files, check, access) as reader, pytest.raises(ArtifactCorruptError) as caught:
                reader.read(group, rows)
            assert caught.value.path == path
            assert "checksum of" in caught.value.problem
            assert f"delete {folder} and run the same command again" in str(caught.value)
            flip(path, position)
        flip(path, 0)
        assert [line.partition(": ")[0] for line in verify_files(folder, files)] == [str(path)]
        flip(path, 0)


@both_ways
@pytest.mark.parametrize("check", ["first_touch", "always"])
def test_a_shard_in_the_place_of_another_is_not_taken_for_it(sealed: Any, check: Any, access: Any) -> None:
    """Each is whole, of the right size, with checksums that fit; only what was sealed tells them apart."""
    _, folder, files = sealed
    first, second = (folder / shard_path("train", index) for index in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with StoreReader(folder, files, check, access) as reader:
        for path, row in ((first, 0), (second, 4)):
            with pytest.raises(
                ArtifactCorruptError, match="chunk 0 is whole, but not the one that was sealed"
            ) as caught:
                reader.read("train", [row])
            assert caught.value.path == path


@both_ways
def test_a_chunk_in_the_place_of_another_is_not_taken_for_it(sealed: Any, access: Any) -> None:
    store, folder, files = sealed
    path, stride = folder / shard_path("train", 0), store.specs["train"].chunk_bytes + 4
    data = path.read_bytes()
    path.write_bytes(data[stride : 2 * stride] + data[:stride] + data[2 * stride :])
    with StoreReader(folder, files, access=access) as reader:
        for row, slot in ((0, 0), (2, 1)):
            with pytest.raises(ArtifactCorruptError, match=f"chunk {slot} is whole, but not"):
                reader.read("train", [row])


def test_a_record_that_was_changed_vouches_for_nothing(sealed: Any) -> None:
    _, folder, files = sealed
    path = folder / record_path("train", 0)
    path.write_bytes(path.read_bytes().replace(b'"rows": [0', b'"rows": [1'))
    with StoreReader(folder, files) as reader, pytest.raises(ArtifactCorruptError, match="record of a shard") as caught:
        reader.read("train", [0])
    assert caught.value.path == path


def test_a_store_whose_records_know_no_chunks_is_read_and_filled_anew(sealed: Any) -> None:
    """Those of an early version."""
    store, folder, _ = sealed
    for path in (folder / "records").iterdir():
        record = json.loads(path.read_bytes())
        del record["crc32c"]
        path.write_text(json.dumps(record))
    with StoreReader(folder, reseal(folder)) as reader:
        assert same_bits(reader.read("train", range(9)), store.values["train"])
    assert parse_record((folder / record_path("train", 0)).read_bytes()).chunks.size == 0
    store.write(folder)
    assert parse_record((folder / record_path("train", 0)).read_bytes()).chunks.size == 2


def test_damage_is_confined_to_its_chunk(sealed: Any) -> None:
    store, folder, files = sealed
    flip(folder / shard_path("train", 0), 0)
    with StoreReader(folder, files) as reader:
        assert same_bits(reader.read("train", range(2, 9)), store.values["train"][2:])
        for row in (0, 1, 0):
            with pytest.raises(ArtifactCorruptError, match="chunk 0"):
                reader.read("train", [row])


@pytest.mark.parametrize("per_chunk", [1, 2])
@both_ways
def test_policies(tmp_path: Path, access: Any, per_chunk: int) -> None:
    store, folder = Store.random(spec_of(9, per_chunk=per_chunk), spec_of(3)), tmp_path
    files = store.write(folder)
    path = folder / shard_path("train", 0)
    with (
        StoreReader(folder, files, "always", access) as always,
        StoreReader(folder, files, access=access) as first_touch,
    ):
        for _ in range(2):
            assert same_bits(always.read("train", [0, 5, 0]), store.values["train"][[0, 5, 0]])
        first_touch.read("train", [0])
        flip(path, 0)
        with pytest.raises(ArtifactCorruptError, match="chunk 0"):
            always.read("train", [0])
        assert not same_bits(first_touch.read("train", [0]), store.values["train"][:1])
    with StoreReader(folder, files, "never", access) as never:
        assert not same_bits(never.read("train", [0]), store.values["train"][:1])
    flip(path, 0)
    flip(path, -1)
    with StoreReader(folder, files, "never", access) as never, pytest.raises(ArtifactCorruptError, match="the index"):
        never.read("train", [0])


@pytest.mark.parametrize("per_chunk", [1, 2])
@both_ways
def test_a_shard_that_was_replaced_is_checked_again(tmp_path: Path, access: Any, per_chunk: int) -> None:
    spec = spec_of(9, per_chunk=per_chunk)
    store, folder = Store.random(spec, spec_of(3)), tmp_path / "a"
    files = store.write(folder)
    other = Store.random(spec, spec_of(3))
    other.values["train"] = other.values["train"].flip(0)
    other.write(tmp_path / "b")
    name = shard_path("train", 0)
    with StoreReader(folder, files, access=access) as reader:
        reader.read("train", range(9))
        reader.close()  # as when it makes room for others
        shutil.copy(tmp_path / "b" / name, folder / (name + ".new"))
        (folder / (name + ".new")).rename(folder / name)
        for _ in range(2):
            with pytest.raises(ArtifactCorruptError, match="not the one that was sealed"):
                reader.read("train", [0])


@pytest.mark.parametrize("store_of", ["sealed", "sealed_int8"])
def test_missing_empty_short_or_long_file_is_found_at_open(store_of: str, request: pytest.FixtureRequest) -> None:
    _, folder, files = request.getfixturevalue(store_of)
    for name, (size, _) in files.items():
        path = folder / name
        kept = path.read_bytes()
        for wrong in (None, b"", kept[: size - 1], kept + b"\0"):
            path.unlink()
            if wrong is not None:
                path.write_bytes(wrong)
            with pytest.raises(ArtifactCorruptError) as caught:
                StoreReader(folder, files)
            assert caught.value.path == path
            problem = "missing" if wrong is None else f"{len(wrong)} bytes, sealed with {size}"
            assert verify_files(folder, files) == [f"{path}: {problem}"]
            path.write_bytes(kept)
    assert verify_files(folder, files) == []


@pytest.mark.parametrize("size", [None, 0, 30, 140, 163])
@pytest.mark.parametrize("check", ["first_touch", "always", "never"])
@both_ways
def test_shard_that_shrinks_after_open_is_found_on_touch(
    sealed: Any, check: Any, size: int | None, access: Any
) -> None:
    _, folder, files = sealed
    path = folder / shard_path("train", 1)
    with StoreReader(folder, files, check, access) as reader:
        reader.read("train", [0])
        if size is None:
            path.unlink()
        else:
            os.truncate(path, size)
        with pytest.raises(ArtifactCorruptError, match="missing" if size is None else "cut off") as caught:
            reader.read("train", [4])
        assert caught.value.path == path


@both_ways
def test_shard_that_shrinks_after_its_index_was_read(sealed: Any, access: Any) -> None:
    _, folder, files = sealed
    for check in ("first_touch", "never"):
        shutil.copytree(folder, copy := folder.with_name(check))
        with StoreReader(copy, files, check, access) as reader:
            reader.read("train", [7])
            os.truncate(copy / shard_path("train", 1), 100)
            with pytest.raises(ArtifactCorruptError, match="cut off: 100 bytes"):
                reader.read("train", [7])


def test_a_store_is_mapped_where_it_fits_into_memory_on_a_local_disk(
    sealed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, files = sealed
    noted: list[bool] = []

    class Noted(ShardFile):
        def __init__(self, path: Path, size: int, *, mapped: bool) -> None:
            noted.append(mapped)
            super().__init__(path, size, mapped=mapped)

    monkeypatch.setattr(sharded_array, "ShardFile", Noted)

    def read() -> bool:
        noted.clear()
        with StoreReader(folder, files) as reader:
            reader.read("train", [0])
        return noted[0]

    assert read()
    monkeypatch.setattr(reader_module, "is_local", lambda path: path != folder)
    assert not read()
    monkeypatch.undo()
    monkeypatch.setattr(sharded_array, "ShardFile", Noted)
    monkeypatch.setattr(
        os, "sysconf", lambda name: 2 * sum(size for size, _ in files.values()) - 1 if "PHYS" in name else 1
    )
    assert not read()


def test_what_is_new_is_announced_before_the_first_of_it_is_read(sealed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder, files = sealed
    told: list[str] = []
    reads: dict[str, Any] = {
        "will_need": ShardFile.will_need,
        "read_checked": ShardFile.read_checked,
        "read": ShardFile.read,
        "mapping_now": ShardFile.mapping_now,
    }
    for name, method in reads.items():

        def noted(self: Any, *arguments: Any, name: str = name, method: Any = method) -> Any:
            told.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(ShardFile, name, noted)
    for access, second in (("map", ["mapping_now"] * 3), ("read", ["will_need"] * 3 + ["read"] * 3)):
        with StoreReader(folder, files, access=access) as reader:
            reader.read("train", [1])  # the index of the first shard
            told.clear()
            assert same_bits(reader.read("train", [8, 4, 2]), store.values["train"][[8, 4, 2]])
            assert [name for name in told if name == "will_need"] == ["will_need"] * 3
            assert told.index("will_need") == told.count("read_checked") - 3  # but for two indices, first
            told.clear()
            reader.read("train", [8, 4, 2])
            assert told == second


@pytest.mark.parametrize(("store_of", "n_files"), [("sealed", 12), ("sealed_int8", 12 + 2 * 5)])
def test_flipped_byte_of_metadata_is_found_at_open(store_of: str, n_files: int, request: pytest.FixtureRequest) -> None:
    _, folder, files = request.getfixturevalue(store_of)
    names = [name for name in files if name.startswith("store.zarr") and not is_shard(name)]
    assert len(names) == n_files
    for name in names:
        flip(folder / name, files[name][0] // 2)
        with pytest.raises(ArtifactCorruptError) as caught:
            StoreReader(folder, files)
        assert caught.value.path == folder / name
        assert [line.partition(": ")[0] for line in verify_files(folder, files)] == [str(folder / name)]
        flip(folder / name, files[name][0] // 2)


@pytest.mark.parametrize("store_of", ["sealed", "sealed_int8"])
def test_list_that_lacks_a_file_is_refused(store_of: str, request: pytest.FixtureRequest) -> None:
    _, folder, files = request.getfixturevalue(store_of)
    for name in [name for name in files if name.startswith("store.zarr")]:
        with pytest.raises(ArtifactCorruptError, match="not in the sealed list") as caught:
            StoreReader(folder, {k: v for k, v in files.items() if k != name})
        assert caught.value.path == folder / name


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingError, match="no such activation store"):
        StoreReader(tmp_path / "none", {})


# ---------------------------------------------- stores that are whole, but are not what this reader reads


def reseal(folder: Path) -> dict[str, tuple[int, str]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, checksum_file(p)) for p in paths}


@pytest.mark.parametrize(
    ("version", "error", "problem"),
    [
        (3, ArtifactError, "format version 3 is newer than 2"),
        (2, ArtifactCorruptError, "format version 2, but bfloat16 is stored in version 1"),
        (0, ArtifactCorruptError, "version 0 is not a version"),
        ("1", ArtifactCorruptError, "'1' is not a version"),
        (None, ArtifactCorruptError, "None is not a version"),
    ],
)
def test_other_versions(sealed: Any, version: Any, error: type[Exception], problem: str) -> None:
    _, folder, _ = sealed
    path = folder / "store.zarr/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["format_version"] = version
    path.write_text(json.dumps(metadata))
    with pytest.raises(error, match=problem) as caught:
        StoreReader(folder, reseal(folder))
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["codecs"][0]["configuration"].update(index_location="start"), "not this format's"),
        (lambda m: m["codecs"][0]["configuration"]["codecs"].pop(), "not this format's"),
        (lambda m: m["codecs"][0]["configuration"]["codecs"].insert(1, {"name": "zstd"}), "activation"),
        (lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[2, T, 1]), "not"),
        (lambda m: m.update(data_type="int16", fill_value=0), "dtype must be"),
        (lambda m: m.update(data_type="float64"), "dtype must be"),
        (lambda m: m.update(data_type="int8", fill_value=0), "not"),
        (lambda m: m.update(shape=[8, T, D]), "8 rows, but 9 sequence ids"),
        (lambda m: m.update(shape=[9, T]), "not an activation store"),
        (lambda m: m.update(node_type="group"), "not an activation store"),
    ],
)
def test_other_arrays_are_refused(sealed: Any, change: Any, problem: str) -> None:
    _, folder, _ = sealed
    path = folder / "store.zarr/activations/zarr.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))
    with pytest.raises(ArtifactCorruptError, match=problem):
        StoreReader(folder, reseal(folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(shape=[9, T + 1]), "not this format's"),
        (lambda m: m.update(data_type="float64"), "float64, .* not this format's"),
        (lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[1, T]), "not this format's"),
        (lambda m: m.update(node_type="group"), "not an activation store"),
    ],
)
def test_scales_that_do_not_go_with_their_rows_are_refused(sealed_int8: Any, change: Any, problem: str) -> None:
    _, folder, _ = sealed_int8
    path = folder / "store.zarr/scale/zarr.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))
    with pytest.raises(ArtifactCorruptError, match=problem):
        StoreReader(folder, reseal(folder))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ((2**64 - 1, 2**64 - 1), "chunk 1 is not there"),
        ((64, 63), "chunk 1 is said to be 63 bytes"),
        ((2**64 - 64, 64), "chunk 1 is said to be"),
        ((65, 64), "chunk 1 is said to be 64 bytes at offset 65"),
    ],
)
def test_index_that_lies_is_refused(sealed: Any, entry: tuple[int, int], problem: str) -> None:
    _, folder, _ = sealed
    path = folder / shard_path("train", 0)
    data = bytearray(path.read_bytes())
    data[-20:-4] = np.array(entry, "<u8").tobytes()
    data[-4:] = google_crc32c.value(bytes(data[-36:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    with StoreReader(folder, reseal(folder)) as reader, pytest.raises(ArtifactCorruptError, match=problem):
        reader.read("train", [0])


# ---------------------------------------------------------------------------------------------- verify


def test_checksums_and_extra_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123456789")
    files = {"a": (9, "crc32c:e3069283")}  # the check value of RFC 3720
    assert checksum_file(tmp_path / "a", "crc32c") == "crc32c:e3069283"
    assert verify_files(tmp_path, files) == []
    (tmp_path / "manifest.json").touch()
    (tmp_path / "b").touch()
    assert verify_files(tmp_path, files) == [f"{tmp_path}/b: not in the sealed list"]
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert verify_files(tmp_path, files | {"b": (0, empty)}) == []
    assert "unknown kind" in verify_files(tmp_path, files | {"b": (0, "md5:00")})[0]
    with pytest.raises(ValueError, match="must be one of"):
        checksum_file(tmp_path / "a", "md5")


def test_stores_with_other_values_have_other_checksums(tmp_path: Path) -> None:
    # crc32c fails this: over bytes that end in their own crc32c it is a constant.
    store = small_store()
    before = store.write(tmp_path / "before")
    store.values["train"] = store.values["train"].flip(0)
    store.index["train"] = store.index["train"][0] + 1, store.index["train"][1]
    after = store.write(tmp_path / "after")
    differ = {name for name in after if after[name] != before[name] and name.startswith("store.zarr")}
    assert differ == {*(shard_path("train", i) for i in range(3)), "store.zarr/sequence_id/c.0"}
