"""What version 0.1 made is read, verified and grown by the code of today: two runs in one folder, with their corpus.

They were made once and are not to be made again: `masked` appends two stacks and keeps its store, `adapted` has NF4
stacks with adapters on a stream in int8, the last of them prepended.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from support.commands import Result, Run
from support.runs import digests, grown, made_by_stages, manifests
from support.snapshot import made_on

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

OLD = Path(__file__).parents[1] / "fixtures" / "artifacts-0.1"
OLD_MANIFESTS = manifests(OLD / "root")
STACKS = {"masked": 2, "adapted": 3}
AS_THEN = ("--set", "data.sample=first")
"""The only sample of a corpus that there was."""
# Rows are derived to the bit, which other kernels do not give.
SAME_NUMERICS = all(
    made_on().items() <= found["fingerprint"].items() for found in OLD_MANIFESTS.values() if found["fingerprint"]
)


@pytest.fixture
def root(tmp_path: Path, run: Run) -> Path:
    """Copy them into the working folder, which `run` has made the current one: `data.source` is relative to it."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    return tmp_path / "root"


def facts(name: str) -> dict[str, Any]:
    return OLD_MANIFESTS[name]["facts"]


def check_verified(result: Result) -> None:
    assert "BAD" not in result.out
    if SAME_NUMERICS:
        assert (result.code, result.err) == (0, "")
        assert "all as sealed" in result.out
    else:
        assert all("sampled rows differ from tokens" in line for line in result.err.splitlines())


def test_every_byte_is_as_sealed(root: Path, run: Run) -> None:
    result = run("verify", "--artifacts", root)
    assert result.out.count("ok  ") == len(OLD_MANIFESTS)
    assert "32 cached rows derived again" in result.out
    check_verified(result)


@pytest.mark.parametrize("name", STACKS)
def test_it_is_shown(name: str, root: Path, run: Run) -> None:
    there = ("--json", "--artifacts", root)
    runs = run("status", *there).document["runs"]
    assert {entry["name"]: entry["state"] for entry in runs} == dict.fromkeys(STACKS, "done")
    stages = run("status", name, *there).document["stage_list"]
    assert [stage["stage"] for stage in stages] == list(range(STACKS[name]))
    for stage in stages:
        assert stage["validation_loss"] == facts(stage["artifacts"]["validation"])["validation_loss"]
        assert run("inspect", stage["artifacts"]["stack"], *there).document["tensors"]
        if stage["states"]["activations"] == "sealed":
            store = run("inspect", stage["artifacts"]["activations"], *there).document
            assert store["store"]["dtype"] == {"masked": "bfloat16", "adapted": "int8"}[name]
            assert store["samples"]["why_no_text"] == ""
    plan = run("plan", f"{name}.yaml", *AS_THEN, *there).document
    assert plan["complete"]  # so their ids are those that today's recipes give
    assert [stage["artifacts"] for stage in plan["stages"]] == [stage["artifacts"] for stage in stages]


@pytest.mark.parametrize("name", STACKS)
def test_it_grows_by_a_stack_and_nothing_old_is_made_again(name: str, root: Path, run: Run) -> None:
    n_stacks = STACKS[name]
    before = digests(root)
    files = {path: path.read_bytes() for path in root.rglob("manifest.json")}
    changes = {"training.progressive.target_stacks": n_stacks + 1, "data.sample": "first"}
    recorder = grown(StackWiseConfig.from_yaml(f"{name}.yaml", changes), root)
    # The boundary that the new stage reads was not stored, and a validation names its cache.
    new = ["cache", "validate"]
    assert recorder.made == [f"{task} {n_stacks - 1}" for task in new] + made_by_stages(n_stacks + 1, n_stacks)
    assert {path: path.read_bytes() for path in files} == files
    assert before.items() < digests(root).items()
    stages = run("status", name, "--json", "--artifacts", root).document["stage_list"]
    assert len(stages) == n_stacks + 1
    for stage in stages[:-1]:
        old = facts(stage["artifacts"]["stack"])
        assert (stage["train_loss"], stage["rack_parameters"]) == (old["train_loss"], old["rack_parameters"])
    # What is validated anew, for its cache, is the same rack as before: so is its loss.
    losses = [found["facts"]["validation_loss"] for found in OLD_MANIFESTS.values() if is_validation(found)]
    for stage in stages[:-1]:
        assert any(stage["validation_loss"] == pytest.approx(loss, rel=0 if SAME_NUMERICS else 1e-3) for loss in losses)
    check_verified(run("verify", name, "--artifacts", root))


def test_an_old_run_is_not_trained_again_on_another_sample(root: Path) -> None:
    remedy = "'spread' is taken; run 'masked' was started with 'first': set it to that to go on with its stages"
    before = digests(root)
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        grown(StackWiseConfig.from_yaml("masked.yaml"), root)
    assert digests(root) == before
    assert StackWiseConfig.read_unchecked(root / "runs/masked/attempts/0001/config.yaml").data.sample == "first"


def is_validation(manifest: dict[str, Any]) -> bool:
    return manifest["ref"]["kind"] == "validation"
