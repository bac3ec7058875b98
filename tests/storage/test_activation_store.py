"""The activation store: what was written is what is read, or an error says which file is wrong.

Every value is random bits, compared as bits, so that rounding or a fill value cannot pass for data.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.data.masks import VALIDATION_VIEW
from storage.activations import metadata, sharded_array
from storage.activations.dtypes import BFloat16, Float8E4M3FN
from storage.activations.format import GROUP_FOLDERS, GroupSpec, shard_path
from storage.activations.reader import PAGE_BYTES, ReusedRows, RowMissingError, StoreReader, empty_aligned
from storage.errors import ArtifactError
from storage.files import checksum_file, verify_files
from support.disk import open_below
from support.stores import ATTRIBUTES, EVERY_DTYPE, D, Store, T, bits, both_ways, same_bits, small_store, spec_of

MIB = 2**20


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


def test_a_store_shows_its_sizes_in_a_notebook(tmp_path: Path) -> None:
    store = small_store()
    folder = tmp_path / "<i>"
    with StoreReader(folder, store.write(folder)) as reader:
        shown = reader._repr_html_()
    train, validation = (store.given(group) for group in GROUP_FOLDERS)
    for expected in (len(train), len(validation), f"{T} positions of {D} channels, bfloat16"):
        assert f">{expected}<" in shown
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown


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
    with StoreReader(folder, files, "always", access) as reader, ThreadPoolExecutor(4) as pool:
        orders = [torch.randperm(9) for _ in range(40)]
        for order, rows in zip(orders, pool.map(lambda o: reader.read("train", o), orders), strict=True):
            assert same_bits(rows, store.values["train"][order])
        assert len(open_below(folder)) == (2 if access == "map" else 1)  # a mapping holds one too
    assert open_below(folder) == []


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
