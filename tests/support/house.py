"""Artifacts folders for the tests of housekeeping: runs as they lie on disk, without training anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts
from storage.demand import reads
from storage.locks import no_wait
from storage.runs import begin_attempt
from support.disk import ROOT

CORPUS = "00" * 32
MORE: dict[str, Any] = {"training": {"progressive": {"stacks": [{}, {}, {"n_blocks": 1}]}}}
"""Another last stage: what lies below it is shared."""


def plan_of(name: str = "one", **sections: Any) -> tuple[StackWiseConfig, RunPlan]:
    config = StackWiseConfig.from_dict({"run": {"name": name}, **sections})
    return config, plan_run(config, CORPUS)


def pretend(artifacts: Artifacts, name: str = "one", **sections: Any) -> RunPlan:
    """Bring a run to its end: every artifact it plans is sealed, its content made of its name."""
    config, plan = plan_of(name, **sections)
    with begin_attempt(artifacts, config, plan, no_wait):
        for ref in plan.recipes:
            if artifacts.sealed(ref) is None:
                put(artifacts, plan, ref)
    return plan


def put(artifacts: Artifacts, plan: RunPlan, ref: Ref) -> None:
    work = artifacts.work(ref)
    (work / "sub").mkdir(exist_ok=True)
    (work / "content").write_bytes(ref.name.encode() * (ref.stage + 2))
    (work / "sub" / "more").write_bytes(b"more")
    inputs = tuple(artifacts.input_entry(read) for read in reads(ref, plan))
    artifacts.seal(ref, plan.recipes[ref], inputs, {}, {})


def on_disk(root: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(root) for name in names)


def freeable(root: Path) -> int:
    """Return the bytes of all files but locks: taking one signs it."""
    return on_disk(root) - on_disk(root / "locks")


def files_of(root: Path) -> dict[str, bytes]:
    """Return every file but locks, whose text says who was here last."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("locks/")}


def planned(*plans: Any) -> set[str]:
    return {ref.name for plan in plans for ref in plan.recipes}


# ---------------------------------------------------------------- others at work

HOLD = """
import sys
from storage.collect import exclusive
from storage.artifacts import Artifacts
from storage.locks import no_wait
from storage.runs import begin_attempt
sys.path.insert(0, "tests")
from support.house import plan_of

artifacts = Artifacts(sys.argv[1])
with exclusive(artifacts) if sys.argv[2] == "gc" else begin_attempt(artifacts, *plan_of("live"), no_wait):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_elsewhere(artifacts: Artifacts, by: str) -> Generator[subprocess.Popen[str]]:
    """Another process that is at work: a live run, or a gc."""
    command = [sys.executable, "-c", HOLD, str(artifacts.root), by]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
