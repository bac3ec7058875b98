"""Processes that grow a run, forked by a server that has imported torch already; they die at failpoints."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flows.cli.main import main
from flows.run.events import Message, StepTaken, TaskStarted, subscribed
from flows.run.run import grow
from stackwise_core.errors import StackWiseError
from support.runs import tiny

_SPAWN = multiprocessing.get_context("forkserver")
# torch._dynamo: the first optimizer of a process imports it.
_SPAWN.set_forkserver_preload(["pytest", "_pytest.config", "torch._dynamo", "flows.run.run", "flows.cli.status"])


def _child(pipe: Connection, folder: Path, root: Path, changes: dict[str, Any], failpoint: str, then: str) -> None:
    """Grow as the command line would, telling the parent what was made and how it ended."""
    if failpoint:
        os.environ["STACKWISE_FAILPOINT"] = failpoint
    os.fsync = lambda fd: None  # a kill loses no page cache

    def listen(event: Any) -> None:
        if isinstance(event, TaskStarted):
            pipe.send(f"{event.task} {event.stage}")
        elif isinstance(event, Message):
            pipe.send(f"message: {event.text}")
            if then == "twice" and event.text.startswith("stopping"):
                os.kill(os.getpid(), signal.SIGTERM)
        elif isinstance(event, StepTaken) and then == "tell":
            pipe.send(f"step {event.step}")
        elif isinstance(event, StepTaken) and event.step == 6 and then == "pause":
            pipe.send("paused")
            pipe.recv()

    pipe.send("ready")
    pipe.recv()
    code = 0
    try:
        with subscribed(listen):
            grow(tiny(folder, changes), str(root))
    except StackWiseError as error:
        pipe.send(f"error: {error}")
        code = error.exit_code
    pipe.close()
    sys.exit(code)


def _command(arguments: tuple[str, ...], failpoint: str) -> None:
    if failpoint:
        os.environ["STACKWISE_FAILPOINT"] = failpoint
    os.fsync = lambda fd: None
    sys.exit(main(list(arguments)))


def started(*arguments: object, failpoint: str = "") -> Any:
    """Start a command in a process of its own."""
    process = _SPAWN.Process(target=_command, args=(tuple(map(str, arguments)), failpoint), daemon=True)
    process.start()
    return process


def run_to(failpoint: str, *arguments: object) -> int:
    """Run a command in a process of its own that a failpoint ends; return its exit code (negative: the signal)."""
    process = started(*arguments, failpoint=failpoint)
    process.join(300)
    assert process.exitcode is not None, f"it hangs: {arguments}"
    return process.exitcode


class Child:
    """A process that grows a run."""

    def __init__(
        self, folder: Path, root: Path, changes: dict[str, Any] | None = None, failpoint: str = "", then: str = ""
    ) -> None:
        tiny(folder)  # the corpus is written here, or two children would write it at once
        self.pipe, other = _SPAWN.Pipe()
        arguments = (other, folder, root, changes or {}, failpoint, then)
        self.process = _SPAWN.Process(target=_child, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.said: list[str] = []
        assert self.listen() == "ready"

    def listen(self) -> str:
        """Return the next thing it says; a child that says nothing for minutes hangs."""
        if not self.pipe.poll(300):
            self.process.kill()
            raise AssertionError(f"it hangs; it said {self.said}")
        return self.pipe.recv()

    def go(self) -> Child:
        self.pipe.send("go")
        return self

    def hear(self, text: str) -> None:
        """Wait until it says this."""
        while (line := self.listen()) != text:
            self.said.append(line)
        self.said.append(line)

    def ended(self) -> int:
        """Return its exit code (negative: the signal) after all it said was heard."""
        try:
            while True:
                self.said.append(self.listen())
        except (EOFError, ConnectionResetError):
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def made(self) -> list[str]:
        return [line for line in self.said if not line.startswith(("message:", "error:"))]
