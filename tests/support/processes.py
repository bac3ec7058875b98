"""Processes that tests start: found by the environment they were started with, waited for, and ended if left behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

MARK = "STACKWISE_TESTS"
"""Environment variable that every process of one test session inherits; its value is unique to the session."""


def processes_with(variable: str) -> list[int]:
    """Return every process that was started with this in its environment: NAME=VALUE."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended, or belongs to another user
            continue
    return found


def wait_until_gone(pid: int, seconds: float = 600) -> None:
    """Wait, on a descriptor of the process, until it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], seconds)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def kill_leftovers(seconds: float = 60) -> list[str]:
    """Kill what this session started and what has not ended after some seconds; return a line about each."""
    end = time.monotonic() + seconds
    while (left := _started_here()) and time.monotonic() < end:
        time.sleep(0.1)
    lines = [_described(pid) for pid in left]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return lines


def _started_here() -> list[int]:
    """Return the processes of this session, but for the servers of `multiprocessing`, which end with this process."""
    marked = processes_with(f"{MARK}={os.environ[MARK]}")
    return [pid for pid in marked if pid != os.getpid() and not _is_server_of_ours(pid)]


def _is_server_of_ours(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return False
    servers = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
    return int(parent) == os.getpid() and any(name in command for name in servers)


def _described(pid: int) -> str:
    """Return the command of a process and the test during which it was started."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return f"{pid}: it has just ended"
    tests = [value for name, _, value in (line.partition("=") for line in variables) if name == "PYTEST_CURRENT_TEST"]
    return f"{pid}: {command[:200]} (started during {tests[0] if tests else 'no test'})"
