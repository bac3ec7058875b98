"""Activation stores of random bits, so that rounding or a fill value cannot pass for data."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.model.stream import STREAM_DTYPES, ChannelStatistics, Quantised
from storage.activations.format import GroupSpec
from storage.activations.writer import ShardRange, StoreWriter
from storage.files import checksum_file

T, D = 3, 5  # positions and channels of the small stores here
ATTRIBUTES = {"boundary": 2, "mask": {"ratio": 0.15}, "trunk": "abc"}


def spec_of(
    rows: int, dtype: Any = "bfloat16", per_chunk: int = 1, per_shard: int = 4, t: int = T, d: int = D
) -> GroupSpec:
    """A spec cut into chunks of `per_chunk` rows and shards of `per_shard` chunks."""
    row_bytes = t * d * STREAM_DTYPES[dtype].itemsize
    return GroupSpec(rows, t, d, dtype, per_chunk * row_bytes, per_shard * per_chunk * row_bytes)


def random_bits(spec: GroupSpec) -> torch.Tensor:
    if spec.dtype == "fp8":  # but for NaN, which no two libraries write alike
        drawn = random_bits(dataclasses.replace(spec, dtype="int8"))
        return torch.where((drawn == 127) | (drawn == -1), 0, drawn).to(torch.int8).view(spec.torch_dtype)
    shape = (spec.rows, spec.seq_len, spec.d_model * spec.torch_dtype.itemsize)
    generator = torch.Generator().manual_seed(spec.rows)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).view(spec.torch_dtype)


@dataclasses.dataclass
class Store:
    """A store to be written: its layout, its index and its values."""

    specs: dict[Any, GroupSpec]
    index: dict[Any, tuple[np.ndarray, np.ndarray]]
    values: dict[Any, torch.Tensor]
    scales: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)
    channels: ChannelStatistics | None = None

    @classmethod
    def random(cls, train: GroupSpec, validation: GroupSpec, views: int = 1) -> Store:
        """Random bits; sequence ids that are neither sorted nor dense."""
        rng = np.random.default_rng(train.rows)
        specs = {"train": train, "validation": validation}
        n = -(-train.rows // views)
        ids = rng.permutation(10 * n + 1)[:n] - 3
        index = {
            "train": (np.tile(ids, views)[: train.rows], np.repeat(np.arange(views), n)[: train.rows]),
            "validation": (np.arange(validation.rows), np.full(validation.rows, VALIDATION_VIEW)),
        }
        store = cls(specs, index, {group: random_bits(spec) for group, spec in specs.items()})
        if train.is_quantised:
            draw = torch.Generator().manual_seed(1)
            store.scales = {g: torch.rand(spec.rows, spec.seq_len, 1, generator=draw) for g, spec in specs.items()}
            d_model = train.d_model
            store.channels = ChannelStatistics(
                torch.randn(d_model, generator=draw), torch.rand(d_model, generator=draw) + 0.5
            )
        return store

    def writer(self, folder: Path, attributes: dict[str, Any] = ATTRIBUTES) -> StoreWriter:
        return StoreWriter(folder, self.specs, attributes, self.index, self.channels)

    def rows_of(self, shard: ShardRange) -> Any:
        rows = slice(shard.first_row, shard.first_row + shard.n_rows)
        values = self.values[shard.group][rows]
        return Quantised(values, self.scales[shard.group][rows]) if self.scales else values

    def given(self, group: Any) -> torch.Tensor:
        """What the store gives: of quantised values what they stand for, by NumPy."""
        if self.channels is None:
            return self.values[group]
        mean, std = (statistic.numpy() for statistic in self.channels)
        values = self.values[group].view(torch.uint8).numpy().view(NATIVE[self.specs[group].dtype]).astype(np.float32)
        return torch.from_numpy(values * self.scales[group].numpy() * std + mean)

    def write(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Write what is missing and return the sealed list."""
        writer = self.writer(folder)
        self.write_missing(writer)
        return writer.files()

    def write_missing(self, writer: StoreWriter) -> None:
        for shard in writer.missing_shards():
            writer.write_shard(shard, self.rows_of(shard))


def small_store(dtype: str = "bfloat16") -> Store:
    """Two chunks of two rows to a shard, a last shard of one padded chunk; two views."""
    train, validation = (spec_of(rows, dtype, per_chunk=2, per_shard=2) for rows in (9, 3))
    return Store.random(train, validation, views=2)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


NATIVE = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


EVERY_DTYPE = list(STREAM_DTYPES)
both_ways = pytest.mark.parametrize("access", ["map", "read"])


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


def reseal(folder: Path) -> dict[str, tuple[int, str]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, checksum_file(p)) for p in paths}
