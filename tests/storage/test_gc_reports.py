"""What `du`, `status`, `verify` and gc itself report of what could go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.artifacts import Artifacts
from storage.manifest import MANIFEST
from storage.reachability import pin
from support.commands import Run
from support.house import MORE, freeable, held_elsewhere, on_disk, plan_of, planned, pretend
from support.runs import digests, folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


# ---------------------------------------------------------------- du, status, the command


def test_du_adds_up_to_what_is_on_disk(artifacts: Artifacts, run: Run) -> None:
    one, two = pretend(artifacts), pretend(artifacts, "two", **MORE)
    third = pretend(artifacts, "three", training={"learning_rate": 0.9})
    pin(artifacts, third.stages[0].ref("stack"))
    shutil.rmtree(artifacts.root / "runs/three")
    artifacts.quarantine(third.stages[0].ref("activations"), "x")
    (artifacts.work(one.data_ref) / "half").write_text("1234")
    (artifacts.root / "trash/x").write_text("12345")
    (artifacts.root / "notes.txt").write_text("123456")
    document = run("du", "--json", "--artifacts", artifacts.root).document
    places = document["places"]
    assert sum(places.values()) == document["total"] == on_disk(artifacts.root)
    assert (places["work"], places["trash"]) == (4, 5)

    def n_bytes(names: set[str]) -> int:
        return sum(on_disk(folder) for folder in artifacts.everything() if folder.name in names)

    both = planned(one) & planned(two)
    by_run = {entry["name"]: entry for entry in document["runs"]}
    for name, plan in (("one", one), ("two", two)):
        record = on_disk(artifacts.root / "runs" / name)
        assert by_run[name]["shared"] == n_bytes(both) == places["reached by several runs"] > 0
        assert by_run[name]["unique"] == n_bytes(planned(plan) - both) + record
        assert by_run[name]["total"] == by_run[name]["shared"] + by_run[name]["unique"]
    assert places["pinned only"] == n_bytes(planned(third) - planned(one, two)) - places["reached by no run"] > 0
    # What du says no run reaches is what gc frees of artifacts.
    gc = run("gc", "--dry-run", "--json", "--artifacts", artifacts.root).document
    unreached = sum(item["bytes"] for item in gc["items"] if item["why"] == "no run reaches it")
    assert unreached == places["reached by no run"] > 0
    assert "pinned only" in run("du", "--artifacts", artifacts.root).out


def test_the_sum_that_gc_prints_is_what_it_frees(artifacts: Artifacts, run: Run) -> None:
    pretend(artifacts)
    (artifacts.root / "trash/x").write_text("12345")
    before = freeable(artifacts.root)
    where = ("--keep-last", 0, "--artifacts", artifacts.root)
    forecast = run("gc", "--dry-run", "--json", *where).document
    assert forecast["bytes"] == sum(item["bytes"] for item in forecast["items"])
    assert f"({forecast['bytes']:,} bytes) would be freed; nothing was removed" in run("gc", "--dry-run", *where).out
    assert freeable(artifacts.root) == before
    done = run("gc", *where)
    assert f"({forecast['bytes']:,} bytes) freed" in done.out
    assert all(Path(item["path"]).name in done.out for item in forecast["items"])
    assert before - freeable(artifacts.root) == forecast["bytes"]
    assert run("gc", "--keep-last", -1).code == 2


def test_status_names_who_holds_a_run_and_who_makes_what(artifacts: Artifacts, run: Run) -> None:
    with held_elsewhere(artifacts, "run") as process:
        ref = plan_of("live")[1].stages[0].ref("stack")
        with artifacts.lock(ref.name):
            document = run("status", "live", "--json", "--artifacts", artifacts.root).document
            text = run("status", "live", "--artifacts", artifacts.root).out
        (entry,) = run("status", "--json", "--artifacts", artifacts.root).document["runs"]
    assert document["holder"]["pid"] == process.pid
    assert document["locks"][ref.name]["pid"] == os.getpid()
    assert f"started: process {process.pid} on " in text
    assert f"{ref.name}: process {os.getpid()} on " in text
    assert (entry["holder"]["pid"], entry["locks"]) == (process.pid, {})
    (entry,) = run("status", "--json", "--artifacts", artifacts.root).document["runs"]
    assert (entry["holder"], entry["locks"]) == (None, {})


def test_keep_last_of_a_cache_frees_what_keep_all_holds(
    tmp_path: Path, reference: Callable[..., Path], run: Run
) -> None:
    held = {keep: reference({"cache.keep": keep} if keep == "all" else {}) for keep in ("last", "all")}
    dropped = folder_of(held["all"], "activations", 0)
    kept = folder_of(held["last"], "activations", 0)

    def chunks_of(root: Path) -> int:
        # Of the rows alone: manifests tell when and how fast, so two runs' differ by a digit.
        return sum(path.stat().st_size for path in root.rglob("c.*"))

    rows = {keep: chunks_of(root / "activations") for keep, root in held.items()}
    assert rows["all"] - rows["last"] == chunks_of(dropped) > 0 == chunks_of(kept)
    assert {path.name for path in kept.iterdir()} == {MANIFEST, "retired.json"}
    states = run("status", "tiny", "--json", "--artifacts", held["last"]).document["stage_list"]
    assert [stage["states"]["activations"] for stage in states] == ["retired", "sealed", "none"]


# ---------------------------------------------------------------- verify


def test_verify_tells_leftovers_and_does_not_fail_for_them(
    tmp_path: Path, reference: Callable[..., Path], run: Run
) -> None:
    root = tmp_path / "artifacts"
    shutil.copytree(reference(), root)
    unsealed = root / "stacks/stack-1-0123456789ab"
    stack = folder_of(root, "stack", 1)
    unsealed.mkdir()
    (root / "work" / stack.name).mkdir()
    (root / "runs/tiny/current.tmp").touch()
    result = run("verify")
    assert result.code == 0
    lines = result.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(root / "runs/tiny/current.tmp"),
        str(unsealed),
        str(root / "work" / stack.name),
    ]
    assert all(line.endswith("`stackwise gc` removes it") for line in lines)
    (stack / "head.safetensors").write_bytes(b"")
    assert run("verify").code == 3
    (stack / "head.safetensors").unlink()
    shutil.rmtree(stack)
    run("gc")
    assert not unsealed.exists()
    grown(tiny(tmp_path), root)
    result = run("verify")
    assert (result.code, result.err) == (0, "")
    assert digests(root) == digests(reference())
