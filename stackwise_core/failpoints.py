"""Named places at which a test can kill this process, or hold it.

STACKWISE_FAILPOINT="train:40:KILL" sends it SIGKILL at step 40 of training; "train:40:HOLD" waits there for a signal.
Several, parted by commas, are met one after the other, each once by whichever process comes there first: every
one leaves a file, named by its turn, in the folder STACKWISE_FAILPOINTS_MET.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType


def failpoint(task: str, step: int) -> None:
    """Send this process the signal that the environment names for this task and step, if any."""
    wanted = os.environ.get("STACKWISE_FAILPOINT")
    if wanted is None:
        return
    met = os.environ.get("STACKWISE_FAILPOINTS_MET")
    turn = len(os.listdir(met)) if met else 0
    name, at, action = [*wanted.split(","), "none:0:none"][turn].split(":")
    if name != task or int(at) != step:
        return
    released = _signalled() if action == "HOLD" else None
    if met:
        (Path(met) / str(turn)).touch()
    if released:
        released.wait()
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{action}"])


def _signalled() -> threading.Event:
    """Return what is set once this process has handled a SIGTERM, a SIGINT or, which does nothing else, a SIGCONT."""
    released = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT)}

    def handle(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        released.set()
        if number != signal.SIGCONT:
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    return released
