"""One stack artifact of a plan, with content and a log, to be sealed without training anything."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import plan_run
from storage.artifacts import Artifacts
from storage.manifest import InputEntry, Manifest

PLAN = plan_run(StackWiseConfig(), "00" * 32)
STAGE = PLAN.stages[1]
REF = STAGE.ref("stack")
STORE = PLAN.stages[0].ref("activations")
CONTENT = {"stack.safetensors": b"weights " * 9, "sub/deep/head.safetensors": b"head", "empty": b""}
OTHER_CONTENT = {"stack.safetensors": b"other weights", "fresh": b"x"}
LOG = {"metrics.jsonl": b'{"seconds": 1}\n'}


def fill_work(artifacts: Artifacts, files: dict[str, bytes], ref: Ref = REF) -> Path:
    work = artifacts.work(ref)
    for name, data in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)
    return work


def seal(
    artifacts: Artifacts, files: dict[str, bytes] = CONTENT, logs: dict[str, bytes] = LOG, ref: Ref = REF
) -> Manifest:
    fill_work(artifacts, {**files, **logs}, ref)
    inputs, recipe = (InputEntry(ref=PLAN.data_ref, digest="d" * 64),), PLAN.stages[ref.stage].recipe(ref.kind)
    assert recipe is not None
    return artifacts.seal(ref, recipe, inputs, {"steps": 3}, {"torch": "x"}, records=tuple(logs))


def content(folder: Path, *without: str) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if name not in without}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
