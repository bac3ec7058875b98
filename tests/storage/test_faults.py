"""Real file systems that are full or cannot be written, not simulated ones."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.activations.reader import StoreReader
from storage.errors import ArtifactsFolderError, StoreSpaceError
from support.disk import mounted
from support.fill import Source, content, fill, pairs, value
from support.runs import digests, grown, tiny


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_moment_costs_no_row_that_was_written(tmp_path: Path) -> None:
    fill(tmp_path / "whole", Source())
    whole = content(tmp_path / "whole")
    n_pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "whole").rglob("*") if path.is_file())
    draw = random.Random(0)
    for attempt, n_first in enumerate([1, *sorted(draw.sample(range(2, n_pages), 8))]):
        disk = tmp_path / f"disk-{attempt}"
        with mounted(disk, f"size={4 * n_first}k"):
            asked: list[tuple[int, int]] = []
            for n in (n_first, n_first + 2, n_first + 5):  # full again and again, at other moments
                remount(disk, f"size={4 * n}k")
                source = Source()
                with contextlib.suppress(StoreSpaceError):
                    fill(disk / "store", source)
                    break
                asked += source.asked
                assert not list(disk.rglob("c.*.tmp"))
            remount(disk, "size=4m")
            last = Source()
            _, files, _ = fill(disk / "store", last)
            assert content(disk / "store") == whole
            wanted = set(last.asked)  # two shards are written at once: the second may be there without the first
            assert last.asked == [pair for pair in pairs() if pair in wanted]
            with StoreReader(disk / "store", files) as reader:
                row = reader.rows(torch.tensor([7]), 0)[0]
            assert torch.equal(row, value(7, 0, torch.bfloat16))


def test_finished_work_is_read_from_a_medium_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli.main import main

    config = tiny(tmp_path, {"cache.keep": "all"})
    disk = tmp_path / "disk"
    with mounted(disk, "size=64m"):
        root = disk / "artifacts"
        grown(config, root)
        before = digests(root)
        remount(disk, "ro")
        config.to_yaml(tmp_path / "tiny.yaml")
        activations = next(name for name in before if name.startswith("activations-0"))
        artifacts = ["--artifacts", str(root)]
        commands: list[list[str]] = [["status"], ["status", "tiny"], ["inspect", activations], ["verify"]]
        for command in commands:
            assert main([*command, *artifacts]) == 0, command
        assert main(["plan", str(tmp_path / "tiny.yaml"), *artifacts]) == 0
        capsys.readouterr()
        config.training.progressive.target_stacks = 4
        with pytest.raises(ArtifactsFolderError, match=r"cannot be written .*give a folder this user may write to"):
            grown(config, root)
        assert digests(root) == before


def test_a_disk_that_is_full_in_the_middle_of_a_run(tmp_path: Path) -> None:
    config: Any = tiny(tmp_path, {"cache.keep": "all"})
    grown(config, tmp_path / "reference")
    disk = tmp_path / "disk"
    with mounted(disk, "size=220k"):
        told: list[str] = []
        for size in range(220, 4000, 170):
            remount(disk, f"size={size}k")
            try:
                grown(config, disk / "artifacts")
                break
            except OSError as error:  # StoreSpaceError is one
                told.append(str(error))
        assert len(told) >= 3
        assert all("space" in message for message in told)
        assert digests(disk / "artifacts") == digests(tmp_path / "reference")
