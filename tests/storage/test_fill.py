"""Filling a store: every row as its source gives it, and the same bytes after any interruption."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise_core.config.schema import QUANTISED_STREAMS
from stackwise_core.data.masks import VALIDATION_VIEW, IntArray
from stackwise_core.errors import StageInterruptedError, size
from stackwise_core.model.stream import ChannelStatistics
from storage.activations import fill as fill_module
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.reader import StoreReader
from storage.activations.writer import ShardRange, StoreWriter
from storage.errors import StoreSpaceError
from support.disk import ROOT
from support.fill import D, N, Source, T, content, fill, pairs, rows_to_store, value


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, tuple[int, str]]]:
    """Every byte of the folder, and the list that is sealed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    _, checksums, _ = fill(folder, Source())
    return content(folder), checksums


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_is_what_its_source_gives(dtype: str, tmp_path: Path) -> None:
    source = Source(getattr(torch, dtype))
    counts, checksums, told = fill(tmp_path, source, dtype=dtype)
    row_bytes = T * D * source.dtype.itemsize
    assert counts == {"train_rows": N + 3, "validation_rows": 5, "store_bytes": (N + 8) * row_bytes}
    assert source.asked == pairs()
    with StoreReader(tmp_path, checksums) as reader:
        assert reader.dtype == source.dtype
        assert reader.attributes == {"id": "x"}
        for sequence_id, view in pairs():
            (row,) = reader.rows(np.array([sequence_id]), view)
            assert torch.equal(row.view(torch.uint8), value(sequence_id, view, source.dtype).view(torch.uint8))
    total = (N + 8) * row_bytes
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    assert len(told) == 1 + 10


def test_the_sealed_list_is_every_file_as_it_lies_there(uninterrupted: Any) -> None:
    found, checksums = uninterrupted
    assert {name: f"sha256:{digest}" for name, digest in found.items()} == {
        name: checksum for name, (_, checksum) in checksums.items()
    }


def test_a_source_is_asked_for_one_view_and_few_rows_at_a_time(tmp_path: Path) -> None:
    source = Source()
    rows = rows_to_store()
    large = StoreRows(**{field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)})
    write = functools.partial(write_shards, large, source)
    fill_store(write, tmp_path, large, lambda *_: None, lambda: False)  # all in one shard
    assert source.asked == pairs()
    assert source.sizes == [32, 18, 3, 5]


def test_a_source_of_another_type_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    _, checksums, _ = fill(tmp_path, Source(torch.float32))
    with StoreReader(tmp_path, checksums) as reader:
        (row,) = reader.rows(np.array([7]), 0)
        assert torch.equal(row, value(7, 0, torch.float32).bfloat16())


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("n_shards", [1, 4, 6])
def test_stopped_and_resumed_it_has_the_same_bytes(n_shards: int, uninterrupted: Any, tmp_path: Path) -> None:
    before = Source()
    with pytest.raises(StageInterruptedError, match=r"stopped on request with .*B of .*B cached") as caught:
        fill(tmp_path, before, n_shards)
    durable = (n_shards + 2) * 6  # two more were computed when it was asked to stop
    row_bytes = T * D * 2
    assert f"{size(durable * row_bytes)} of" in str(caught.value)
    after = Source()
    _, checksums, told = fill(tmp_path, after)
    assert before.asked + after.asked == pairs()  # none is computed again or in vain
    assert len(before.asked) == durable
    assert told[0][0] == durable * row_bytes
    assert (content(tmp_path), checksums) == uninterrupted
    again = Source()
    assert fill(tmp_path, again)[1] == checksums
    assert again.asked == []


def test_a_shard_is_written_while_the_next_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, n_begun, written = threading.Condition(), 0, list[bool]()

    class Telling(Source):
        def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
            nonlocal n_begun
            with begun:
                n_begun += len(sequence_ids)
                begun.notify_all()
            return super().rows(sequence_ids, view)

    write = StoreWriter.write_shard

    def waiting(self: StoreWriter, shard: ShardRange, rows: Tensor) -> None:
        is_last = (shard.group, shard.index) == ("validation", 0)
        with begun:
            end = shard.first_row + shard.n_rows
            written.append(is_last or begun.wait_for(lambda: n_begun > end, timeout=240))
        write(self, shard, rows)

    monkeypatch.setattr(StoreWriter, "write_shard", waiting)
    fill(tmp_path, Telling())
    assert written == [True] * 10


class Computing(Source):
    """Reads the numbers of rows, and computes the rows from these; it remembers how many parts it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.read_so_far, self.has_read = 0, threading.Condition()
        self.ahead: list[bool] = []

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        with self.has_read:
            self.read_so_far += 1
            self.has_read.notify_all()
        return lambda: self.computed(sequence_ids, view)

    def computed(self, sequence_ids: IntArray, view: int) -> Tensor:
        n_before, is_last = len(self.ahead), view == VALIDATION_VIEW
        with self.has_read:
            self.ahead.append(is_last or self.has_read.wait_for(lambda: self.read_so_far > n_before + 1, timeout=240))
        return self.rows(sequence_ids, view)


def test_a_part_is_read_while_the_one_before_is_computed(tmp_path: Path, uninterrupted: Any) -> None:
    source = Computing()
    _, checksums, _ = fill(tmp_path, source)
    assert source.ahead == [True] * len(source.ahead)
    assert source.read_so_far == len(source.ahead)
    assert source.asked == pairs()
    assert (content(tmp_path), checksums) == uninterrupted


def test_stopped_while_it_reads_ahead_it_leaves_no_thread_and_the_same_bytes(
    tmp_path: Path, uninterrupted: Any
) -> None:
    before = set(threading.enumerate())
    source = Computing()
    with pytest.raises(StageInterruptedError):
        fill(tmp_path, source, n_shards=1)
    assert source.read_so_far == len(source.ahead) + 1  # one in vain
    assert set(threading.enumerate()) == before
    _, checksums, _ = fill(tmp_path, Computing())
    assert (content(tmp_path), checksums) == uninterrupted


def test_what_leaves_a_device_has_the_type_that_is_stored() -> None:
    leaving = fill_module._rounded(torch.empty(2, 3, 4, device="meta"), torch.bfloat16)
    assert leaving.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "fp8"])
def test_rows_of_a_gpu_are_stored_as_those_of_a_cpu(dtype: str, tmp_path: Path) -> None:
    channels = ChannelStatistics(torch.arange(D).float(), torch.arange(D) + 0.5) if dtype in QUANTISED_STREAMS else None
    rows = dataclasses.replace(rows_to_store(dtype), channels=channels)

    class OnDevice(Source):
        def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
            return super().rows(sequence_ids, view).cuda()

    for folder, source, pinned in (("a", Source(torch.float32), False), ("b", OnDevice(torch.float32), True)):
        write = functools.partial(write_shards, rows, source, pinned=pinned)
        fill_store(write, tmp_path / folder, rows, lambda *_: None, lambda: False)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_request_to_stop_with_the_last_shard_under_way_comes_too_late(uninterrupted: Any, tmp_path: Path) -> None:
    for n_shards in (8, 10):
        _, checksums, _ = fill(tmp_path / str(n_shards), Source(), n_shards=n_shards)
        assert (content(tmp_path / str(n_shards)), checksums) == uninterrupted


def test_a_stop_at_every_shard_ends_with_the_same_bytes(uninterrupted: Any, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    for _ in range(3):  # three of the ten shards each time
        source = Source()
        with pytest.raises(StageInterruptedError):
            fill(tmp_path, source, n_shards=1)
        asked += source.asked
    source = Source()
    _, checksums, _ = fill(tmp_path, source, n_shards=1)
    assert asked + source.asked == pairs()
    assert len(source.asked) == 5
    assert (content(tmp_path), checksums) == uninterrupted


def test_killed_and_resumed_it_has_the_same_bytes(uninterrupted: Any, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path;"
        "from support.fill import Source, fill;"
        "fill(Path(sys.argv[1]), Source())"
    )
    environment = {**os.environ, "STACKWISE_FAILPOINT": "cache:2:KILL"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    source = Source()
    _, checksums, _ = fill(tmp_path, source)
    assert not set(pairs()[:12]) & set(source.asked)
    assert set(pairs()[24:]) <= set(source.asked)  # two more shards were being written, and may have been durable
    assert (content(tmp_path), checksums) == uninterrupted


def test_a_source_that_fails_loses_one_shard(uninterrupted: Any, tmp_path: Path) -> None:
    class Failing(Source):
        def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
            if 20 in sequence_ids:
                raise ZeroDivisionError
            return super().rows(sequence_ids, view)

    with pytest.raises(ZeroDivisionError):
        fill(tmp_path, Failing())
    source = Source()
    _, checksums, _ = fill(tmp_path, source)
    assert source.asked == pairs()[18:]
    assert (content(tmp_path), checksums) == uninterrupted


@pytest.mark.parametrize(("n_allowed", "file"), [(4, "c.2.0.0"), (5, "train-00002.json")])
def test_a_full_disk_keeps_the_shards_before(
    n_allowed: int, file: str, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard without its record does not count."""
    write, n_writes = os.write, 0

    def nearly_full(fd: int, data: Any) -> int:
        nonlocal n_writes
        n_writes += 1
        if n_writes > n_allowed:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        patch.setattr(fill_module, "_WRITTEN_AT_ONCE", 1)  # so that it is known which write is the last
        with pytest.raises(StoreSpaceError, match=rf"/{re.escape(file)} .*no space left"):
            fill(tmp_path, Source())
    assert not list(tmp_path.rglob("*.tmp"))
    source = Source()
    _, checksums, _ = fill(tmp_path, source)
    assert source.asked == pairs()[12:]
    assert (content(tmp_path), checksums) == uninterrupted


def test_a_damaged_shard_is_made_again_and_no_other(uninterrupted: Any, tmp_path: Path) -> None:
    fill(tmp_path, Source())
    path = tmp_path / "store.zarr/activations/c.3.0.0"
    data = bytearray(path.read_bytes())
    data[11] ^= 1
    path.write_bytes(data)
    source = Source()
    _, checksums, _ = fill(tmp_path, source)
    assert source.asked == pairs()[18:24]
    assert (content(tmp_path), checksums) == uninterrupted


def test_other_rows_are_another_store(tmp_path: Path) -> None:
    """What lies in the work folder belongs to other rows: none of it is taken over."""
    fill(tmp_path, Source())
    source = Source()
    rows = rows_to_store()
    _, checksums, _ = fill(
        tmp_path, source, sequence_ids=np.flip(rows.sequence_ids).copy(), views=np.flip(rows.views).copy()
    )
    assert len(source.asked) == len(pairs())
    with StoreReader(tmp_path, checksums) as reader:
        assert torch.equal(reader.rows(np.array([2]), 1)[0], value(2, 1, torch.bfloat16))


# ---------------------------------------------------------------- the sample that validation checks


@pytest.mark.parametrize("n_rows", [1, 2, 7, 57, 58, 500])
def test_the_sample_is_spread_over_the_store(n_rows: int) -> None:
    rows = rows_to_store()
    sample = rows.sample(n_rows)
    assert sample == rows_to_store().sample(n_rows)
    assert set(sample) <= set(pairs())
    assert len(set(sample)) == len(sample) == min(n_rows, len(pairs()))
    assert sample == sorted(sample, key=pairs().index)
    assert sample[0] == pairs()[0]
    assert n_rows == 1 or sample[-1] == pairs()[-1]  # validation rows are looked at, too
    places = [pairs().index(pair) for pair in sample]
    steps = np.diff(places)
    assert n_rows == 1 or steps.max() - steps.min() <= 1


def test_the_sample_of_no_rows_is_empty() -> None:
    assert rows_to_store().sample(0) == []


@pytest.mark.parametrize("part", [slice(0, 1), (slice(None), slice(0, 1)), (..., slice(0, 1))])
def test_a_source_that_gives_too_little_is_refused(part: Any, tmp_path: Path) -> None:
    class Short(Source):
        def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
            return super().rows(sequence_ids, view)[part]

    with pytest.raises(ValueError, match="came as"):
        fill(tmp_path, Short())


def test_a_record_that_lacks_a_chunk_does_not_count(uninterrupted: Any, tmp_path: Path) -> None:
    fill(tmp_path, Source())
    path = tmp_path / "records/train-00001.json"
    record = json.loads(path.read_text())
    record["crc32c"] = base64.b64encode(base64.b64decode(record["crc32c"])[:-4]).decode()
    path.write_text(json.dumps(record))
    source = Source()
    _, checksums, _ = fill(tmp_path, source)
    assert source.asked == pairs()[6:12]
    assert (content(tmp_path), checksums) == uninterrupted
