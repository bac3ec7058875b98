"""A full disk, quota or largest file: gc runs, and every error names the file and what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.saving import write_whole
from stackwise_core.stages.state_header import write_header
from stackwise_core.training.saved_state import write_state
from stackwise_core.training.training import TrainingState
from storage.artifacts import Artifacts
from storage.checkpoints import save_state
from storage.errors import StoreSpaceError
from storage.files import write_text
from storage.locks import FileLock
from support.commands import Run
from support.disk import mounted
from support.house import pretend

STATE = TrainingState(1, {"x": torch.zeros(5_000)}, [], {})
FREE = "free some space (`stackwise gc` removes what no run needs) and run the same command again"


@contextmanager
def largest_file(n_bytes: int) -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_up(file: Path) -> None:
    with file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_gc_frees_a_full_disk(tmp_path: Path, run: Run, quick_disk: None) -> None:
    with mounted(tmp_path / "disk", "size=2m"):
        artifacts = Artifacts(tmp_path / "disk" / "a").open()
        for seed, name in enumerate(("a", "b")):
            pretend(artifacts, name, run={"name": name, "seed": seed})
        (artifacts.root / "locks/gc").write_text("")  # an empty file has no room for the name of who holds the lock
        with pytest.raises(OSError, match="No space left"):
            fill_up(tmp_path / "disk/filler")
        for command in (["status"], ["status", "b"], ["du"], ["gc", "--dry-run"]):
            assert run(*command, "--artifacts", artifacts.root).code == 0, command
        done = run("gc", "--keep-last", 1, "--artifacts", artifacts.root)
        assert (done.code, done.err) == (0, "")
        assert os.statvfs(tmp_path / "disk").f_bavail >= 5
        assert os.listdir(artifacts.root / "runs") == ["b"]
        assert all(artifacts.manifest(ref) for ref in pretend(artifacts, "b", run={"name": "b", "seed": 1}).recipes)


def test_a_lock_that_cannot_be_signed_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with FileLock(tmp_path / "lock"):
        assert not FileLock(tmp_path / "lock").try_acquire()
        assert FileLock(tmp_path / "lock").holder() == "another process"


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (lambda at: write_text(at / "x", "y" * 20_000), "x"),
        (lambda at: write_state(at / "s", STATE), "s.tmp/state.safetensors"),
        (lambda at: save_state(at, STATE), "scratch/checkpoint.tmp/state.safetensors"),
        (lambda at: write_header(at, {"x": "y" * 20_000}), "state.json"),
        (lambda at: write_whole(at / "rack", [("stack-0/x", bytes(20_000))]), ".rack.saving/stack-0/x"),
        (lambda at: StackWiseConfig.from_dict({"data": {"source": "y" * 20_000}}).to_yaml(at / "c"), "c"),
    ],
)
def test_an_error_of_a_write_names_its_file(write: Callable[[Path], object], file: str, tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(OSError, match=re.escape(file)) as caught:
        write(tmp_path)
    assert isinstance(caught.value, StoreSpaceError) or caught.value.errno == errno.EFBIG
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, FREE), (errno.EDQUOT, FREE), (errno.EFBIG, "raise the limit (`ulimit -f`)")],
)
def test_a_command_says_what_to_do(number: int, remedy: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import du

    def fail(options: object) -> None:
        raise OSError(number, os.strerror(number), "/there/x")

    monkeypatch.setattr(du, "show_usage", fail)
    done = run("du")
    assert done.code == 1
    assert done.err.startswith("stackwise: /there/x: ")
    assert remedy in done.err


def test_a_folder_on_a_full_disk_is_not_called_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(
        StoreSpaceError, match=r"work/probe-\d+: no space left to write it in the quota of this user; free some space"
    ):
        Artifacts(tmp_path).open()
