"""Results of `stackwise` commands run in the process of the test, by the fixture `run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class Result:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in out + err

    @property
    def faults(self) -> list[str]:
        """The lines on stderr, the name of the program taken off."""
        assert self.err.startswith("stackwise: ")
        return self.err.removeprefix("stackwise: ").splitlines()

    @property
    def document(self) -> Any:
        assert self.err == ""
        return json.loads(self.out)


Run = Callable[..., Result]
