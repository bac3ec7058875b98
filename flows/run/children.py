"""Child processes that end when their parent does, even if the parent is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "STACKWISE_PARENT"
"""Environment variable with the process id of the process that `ending_with_us` started."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# The kernel sends the signal when the thread that started the child ends, also after SIGKILL. A wrapper sets it,
# since preexec_fn is unsafe with threads.
_WITH_PARENT = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, int(sys.argv[2]))\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    f"os.environ['{PARENT}'] = str(os.getpid())\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


def ending_with_us(command: list[str], by: signal.Signals) -> list[str]:
    """Wrap a command so that it gets a signal when this thread ends; its first word is the path of a program."""
    return [sys.executable, "-S", "-c", _WITH_PARENT, str(os.getpid()), str(int(by)), *command]


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent, started through `ending_with_us`, ends."""
    end_with(int(os.environ[PARENT]))


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent, given by process id, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
