"""The errors a user can meet. Each carries the exit code of the command line."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST = 200
"""Characters of a value that a message shows."""
_MOST_OF_A_LINE = 5_000
_MOST_OF_A_MESSAGE = 50_000
_NO_LETTERS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of characters that a terminal obeys or cannot draw, those that turn the direction among them."""


def is_drawn(character: str) -> bool:
    """Say whether a terminal draws a character, instead of obeying it: ESC, C1, a change of direction, a line end."""
    return unicodedata.category(character) not in _NO_LETTERS


def shown(text: object, most: int = _MOST_OF_A_LINE, keep: str = "") -> str:
    r"""Return a text that others may have written as one line which a terminal only draws, cut if it is long.

    Characters that are not drawn become escapes, such as \x1b, except those to `keep`.
    """
    line = cut(str(text), most)
    if line.isprintable():
        return line
    return "".join(
        character if character in keep or is_drawn(character) else character.encode("unicode_escape").decode()
        for character in line
    )


def cut(text: str, most: int = _MOST) -> str:
    """Return a text as a message shows it: at most its first characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def shortened(value: Any, most: int = _MOST) -> str:
    """Return the repr of a value, cut for a message."""
    return cut(repr(value), most)


def size(n_bytes: float) -> str:
    """Return a number of bytes for people: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


_OUT_OF_MEMORY = {
    "CUDA out of memory": "not enough memory on the device",
    "allocate memory": "not enough memory",  # torch's allocator, the loader of libraries, the kernel
    "start new thread": "not enough memory or processes for another thread (ulimit -v, ulimit -u)",
    "failed to map segment": "not enough address space to load a library (ulimit -v)",
}
"""What libraries write of it in their errors, which have no class of their own."""


def why_no_memory(error: BaseException) -> str:
    """Say in a few words what memory was short of, '' if something else is wrong."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    known = isinstance(error, (RuntimeError, ImportError, OSError))
    return next((why for text, why in _OUT_OF_MEMORY.items() if known and text in str(error)), "")


class StackWiseError(Exception):
    """A fault that is explained to the user in one message, without a traceback.

    Exit codes: 1 a stage failed, 2 the command or configuration is wrong, 3 an artifact is bad.
    """

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, safe to print: it may repeat names and texts of others."""
        return shown(super().__str__(), _MOST_OF_A_MESSAGE, keep="\n")


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration: where, what was received, what is allowed."""

    path: str
    received: str
    allowed: str

    def __str__(self) -> str:
        return f"{shown(self.path, _MOST)}: got {shown(self.received, _MOST)}; {shown(self.allowed)}"


class ConfigError(StackWiseError, ValueError):
    """The configuration or the command is wrong. `faults` lists every fault, not only the first."""

    exit_code = 2

    def __init__(self, faults: list[Fault]) -> None:
        """The message has a line for each of the faults."""
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Fault]]]:
        return type(self), (self.faults,)


class SavedRackError(StackWiseError):
    """A folder does not hold the saved rack that it should, or holds something that a save would delete."""

    exit_code = 3

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        """The message says the path, what is wrong with it, and what to do."""
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{shown(path)}: {shown(problem)}. {shown(remedy)}")

    def __reduce__(self) -> tuple[type[SavedRackError], tuple[Path, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)


class CheckpointError(SavedRackError):
    """A folder does not hold the Hugging Face checkpoint that it should."""


class CorpusError(StackWiseError, ValueError):
    """The corpus is missing, empty, binary, too short, or not what it was."""

    exit_code = 2


class NonFiniteLossError(StackWiseError, ArithmeticError):
    """A loss or gradient was infinite or NaN, before weights were touched, or a validation loss was."""

    SIGN = "No weight was touched by this step"
    """What its message holds."""


class OutOfMemoryError(StackWiseError):
    """Training a stage needed more memory than there is."""


class StageInterruptedError(StackWiseError):
    """A stop was asked for (SIGTERM, Ctrl-C); a checkpoint was written first."""

    def __init__(self, message: str, state: Any = None) -> None:
        """`state` is the `TrainingState` to resume from, if training was interrupted; pickles leave it out."""
        self.state = state
        super().__init__(message)

    def __reduce__(self) -> tuple[type[StageInterruptedError], tuple[str]]:
        return type(self), (str(self),)
