"""Damage to an activation store: any changed byte is found, and the error names the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from storage.activations import reader as reader_module
from storage.activations import sharded_array
from storage.activations.format import GROUPS, is_shard, parse_record, record_path, shard_path
from storage.activations.reader import StoreReader
from storage.activations.shard import ShardFile
from storage.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError
from storage.files import verify_files
from support.stores import D, Store, T, both_ways, flip, reseal, same_bits, spec_of


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
                ArtifactCorruptError, match="chunk 0 is intact, but not the one that was sealed"
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
            with pytest.raises(ArtifactCorruptError, match=f"chunk {slot} is intact, but not"):
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
        "checked_mapping": ShardFile.checked_mapping,
    }
    for name, method in reads.items():

        def noted(self: Any, *arguments: Any, name: str = name, method: Any = method) -> Any:
            told.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(ShardFile, name, noted)
    for access, second in (("map", ["checked_mapping"] * 3), ("read", ["will_need"] * 3 + ["read"] * 3)):
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
