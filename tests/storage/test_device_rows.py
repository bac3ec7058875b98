"""Rows that cross to a device: as they are stored, on a stream of their own, and handed out when they are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stackwise_core.data.masks import VALIDATION_VIEW
from storage.activations import reader as reader_module
from storage.activations.reader import DeviceRows, StoreReader, empty_aligned
from support.stores import EVERY_DTYPE, small_store


class Streams(TorchFunctionMode):
    """Stands for CUDA: notes in `log` what is done on which stream. A copy to the device is one in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the model's")
        monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: self.log.append(f"kept for {stream}"))
        monkeypatch.setattr(reader_module, "empty_pinned", empty_aligned)

    @contextlib.contextmanager
    def current(self, stream: Streams) -> Iterator[None]:
        assert stream is self
        self.log.append("begin")
        yield
        self.log.append("end")

    def record_event(self) -> Streams:
        self.log.append("event")
        return self

    def synchronize(self) -> None:
        self.log.append("wait")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and (kwargs or {}).get("non_blocking"):
            self.log.append(f"copy {args[0].dtype}")
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def asked() -> list[tuple[np.ndarray, int]]:
    """Some rows, then fewer and more, of both groups."""
    ids = small_store().index["train"][0][:4]
    return [(ids[:2], 0), (ids[1:2], 1), (np.array([2, 0, 1]), VALIDATION_VIEW), (ids[::-1], 0)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_rows_cross_as_stored_and_are_handed_out_when_they_are_there(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = small_store(dtype).write(tmp_path)
    copies = {"bfloat16": ["bfloat16"], "int8": ["int8", "float32"], "fp8": ["float8_e4m3fn", "float32"]}[dtype]
    with StoreReader(tmp_path, files) as reader, Streams(monkeypatch) as streams:
        rows, cpu = DeviceRows(reader, torch.device("cpu")), torch.device("cpu")
        for ids, view in asked():
            streams.log.clear()
            given = rows.rows(ids, view)
            crossed = [f"copy torch.{name}" for name in copies]
            assert streams.log == ["begin", *crossed, "event", "end", "wait", "kept for the model's"]
            assert (given.device, given.dtype) == (cpu, reader.dtype)
            torch.testing.assert_close(given, reader.rows(ids, view), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_a_gpu_gets_the_bits_that_a_cpu_gets(dtype: str, tmp_path: Path) -> None:
    files = small_store(dtype).write(tmp_path)
    with StoreReader(tmp_path, files) as reader:
        rows = DeviceRows(reader, torch.device("cuda"))
        given = [rows.rows(ids, view) for ids, view in asked()]  # all kept: the buffers are used again and again
        for (ids, view), there in zip(asked(), given, strict=True):
            assert there.is_cuda
            torch.testing.assert_close(there.cpu(), reader.rows(ids, view), rtol=0, atol=0, equal_nan=True)
