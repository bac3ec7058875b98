"""A run in a process of its own: `stackwise train`, which ends when this process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from flows.run.children import ending_with_us
from stackwise_core.config import StackWiseConfig
from storage.artifacts import Artifacts
from storage.files import write_text
from storage.place import COMPARISONS

_MAIN = "import sys; from flows.cli.main import main; sys.exit(main())"
_MOST_OF_A_LOG = 4096
"""Bytes of its end in which the message of a failure is looked for."""


class TrainProcess:
    """`stackwise train` of a configuration, with its output in a log beside the results of comparisons."""

    def __init__(self, config: StackWiseConfig, artifacts: Artifacts) -> None:
        """Start it on the server of PREFECT_API_URL."""
        path = logs_of(artifacts) / f"{config.run.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, config.to_yaml())
        self.log = path.with_suffix(".log")
        command = [sys.executable, "-P", "-c", _MAIN, "train", str(path), "--artifacts", artifacts.uri]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ending_with_us(command, signal.SIGTERM),
                # Prefect's runtime would take the flow run of the comparison for that of the run.
                env={name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches it once, by `stop`
            )

    def poll(self) -> str | None:
        """Return None while it runs, then '' or what went wrong."""
        code = self._process.poll()
        if code is None or code == 0:
            return None if code is None else ""
        killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{self._complaint() or killed}; its log is {self.log}"

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""
        self._process.terminate()

    def _complaint(self) -> str:
        """Return what it said last in the name of our program."""
        with self.log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _MOST_OF_A_LOG))
            lines = log.read().decode(errors="replace").splitlines()
        said = [line.removeprefix("stackwise: ") for line in lines if line.startswith("stackwise: ")]
        return said[-1] if said else ""


def logs_of(artifacts: Artifacts) -> Path:
    """Return the folder of this machine with the configurations and logs of the runs of comparisons."""
    return artifacts.root / COMPARISONS / "logs"
