"""Processes killed before every step by which they change a folder, recorded flushes, small file systems.

`die_everywhere` kills a real process (SIGKILL) before each of its steps, one process for each step, and has the
folder checked after each kill.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

ROOT = Path(__file__).parents[2]


class Story(Protocol):
    """Something a process does to a folder, and what must hold wherever it was killed."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """Set the scene."""
        ...

    @staticmethod
    def act(folder: Path) -> None:
        """What is killed."""
        ...

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        """What holds afterwards; `finished` if it was not killed."""
        ...


def die_everywhere(story: type[Story]) -> Counter[str]:
    """Tell a story in a process of its own, killing it before its first step, its second, and so on to its last.

    Returns:
        The steps it was killed at: how often each kind.
    """
    # A kill loses nothing that was written, so a file system in memory shows as much as a disk, and sooner.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        code = "import sys; sys.path.insert(0, 'tests'); from support.disk import tell;"
        code += f"tell{inspect.getfile(story), story.__name__, folder}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Counter(done.stdout.split())


def tell(file: str, name: str, folder: str) -> None:
    """Run in a fresh process, which has no threads and may therefore fork."""
    story: Story = runpy.run_path(file)[name]
    finished, point = False, 0
    while not finished:
        point += 1
        here = Path(folder, str(point))
        here.mkdir(parents=True)
        story.prepare(here)
        steps, status = _killed_at(point, lambda: story.act(here), here)  # noqa: B023
        finished = status == 0
        if not finished:
            assert os.WIFSIGNALED(status), f"the act failed: {status}"
            print(steps[-1])
        try:
            story.check(here, finished)
        except BaseException as error:
            what = "at its end" if finished else f"killed at step {point}: {steps[-1]}, after {steps[:-1]}"
            raise AssertionError(f"{name}, {what}: left {sorted(map(str, here.rglob('*')))}") from error
        shutil.rmtree(here)


def _killed_at(point: int, act: Callable[[], None], folder: Path) -> tuple[list[str], int]:
    """Fork a process that dies before its step number `point`; return its steps and exit status."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            _hook(point, folder, into)
            act()
            code = 0
        os._exit(code)
    os.close(into)
    with os.fdopen(out) as told:
        steps = told.read().split()
    return steps, os.waitpid(pid, 0)[1]


def _hook(point: int, folder: Path, told: int) -> None:
    """Count every open for writing, rename, remove, write and fsync in the folder, and die before one of them."""
    write, fsync = os.write, os.fsync
    n_steps = 0

    def step(kind: str, before: Callable[[], Any] = lambda: None) -> None:
        nonlocal n_steps
        n_steps += 1
        write(told, f"{kind}\n".encode())
        if n_steps == point:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            # A path without a folder is relative to a descriptor: shutil.rmtree works like that.
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else "/"
            if not path.startswith("/") or f"{path}/".startswith(f"{folder}/"):
                step(event.removeprefix("os."))

    def half_write(fd: int, data: Any) -> int:
        step("write", lambda: write(fd, data[: len(data) // 2]))
        return write(fd, data)

    def counted_fsync(fd: int) -> None:
        step("fsync")
        fsync(fd)

    def half_write_bytes(path: Path, data: bytes) -> int:
        with path.open("wb", buffering=0) as file:
            return half_write(file.fileno(), data)

    os.write, os.fsync = half_write, counted_fsync
    pathlib.Path.write_bytes = half_write_bytes  # type: ignore[method-assign]
    pathlib.Path.write_text = lambda path, text: half_write_bytes(path, text.encode())  # type: ignore
    sys.addaudithook(on_event)


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """List (what, path) of every flush and rename."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def on_fsync(fd: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def on_rename(source: Any, target: Any) -> None:
        seen.append(("rename", str(target)))
        rename(source, target)

    def on_replace(source: Any, target: Any) -> None:
        seen.append(("rename", str(target)))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", on_fsync)
        patch.setattr(os, "rename", on_rename)
        patch.setattr(os, "replace", on_replace)
        yield seen


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Generator[None]:
    """A file system in memory, of a size or of a kind that one can fill."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def open_below(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open, once for each descriptor."""
    found: list[str] = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing, or of another thread
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(path for path in found if path.startswith(f"{folder}/"))
