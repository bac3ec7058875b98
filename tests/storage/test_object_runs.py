"""Whole runs with artifacts in an object store, from several machines: the same bytes as in a folder, made once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from stackwise_core.model.digests import tensor_digest
from storage.artifacts import artifacts_at
from storage.errors import ArtifactCorruptError, RunBusyError
from storage.object_store import ObjectStore
from storage.racks import load_rack
from support.runs import digests, grown, made_by_stages, tiny
from support.s3_server import KEY, SECRET, copy_bucket, delete, machine, objects, put, scratch_root

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ONE, TWO = ({"training.progressive.target_stacks": stacks} for stacks in (1, 2))


def sealed_digests(uri: str) -> dict[str, str]:
    """Return the digest of every artifact in a bucket, as boto3 reads it."""
    manifests = {name: data for name, data in objects(uri).items() if name.endswith("/manifest.json")}
    return {name.split("/")[-2]: json.loads(data)["digest"] for name, data in manifests.items()}


@pytest.fixture(scope="module")
def first(s3_server: Any, tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Generator[tuple[str, Path]]:
    """A run of two stacks by a first machine: its URI, and the folder of its corpus and of its scratch."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch, machine(folder / "scratch"):
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        uri = s3_server.bucket()
        assert grown(tiny(folder, TWO), uri).made == ["prepare data -1", *made_by_stages(2)]
        yield uri, folder


@pytest.fixture
def copy(first: tuple[str, Path], s3: str) -> str:
    """A copy of its bucket, to be changed."""
    return copy_bucket(first[0], s3)


def test_the_bytes_are_those_of_a_local_run(first: tuple[str, Path], s3: str, reference: Reference) -> None:
    assert sealed_digests(first[0]) == digests(reference(TWO))


def test_the_library_opens_its_rack(first: tuple[str, Path], tmp_path: Path, reference: Reference) -> None:
    with machine(tmp_path):
        for depth in (1, 2):
            found, local = load_rack(first[0], "tiny", depth), load_rack(reference(TWO), "tiny", depth)
            assert tensor_digest(found) == tensor_digest(local)


def test_a_second_machine_makes_nothing_again(copy: str, first: tuple[str, Path], tmp_path: Path) -> None:
    before = objects(copy)
    with machine(tmp_path):
        assert grown(tiny(first[1], TWO), copy).made == []
    after = objects(copy)
    assert {name: data for name, data in after.items() if not name.startswith("runs/")} == {
        name: data for name, data in before.items() if not name.startswith("runs/")
    }
    assert "runs/tiny/attempts/0002/outcome.json" in after.keys() - before.keys()


def test_a_second_machine_raises_the_target_on_a_store_that_stays_away(
    copy: str, first: tuple[str, Path], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    ranges = ObjectStore.ranges

    def noted(self: ObjectStore, key: str, offsets: Any, n_bytes: int) -> Any:
        asked.add(key)
        return ranges(self, key, offsets, n_bytes)

    monkeypatch.setattr(ObjectStore, "ranges", noted)
    with machine(tmp_path):
        told = grown(tiny(first[1]), copy)
    assert [task for task in told.made if task.startswith("train")] == ["train 2"]
    assert sealed_digests(copy).items() >= digests(reference()).items()
    shards = {key for key in asked if "/activations/c." in key}
    assert {key.split("/")[1].rsplit("-", 1)[0] for key in shards} == {"activations-0"}
    brought = [path for path in scratch_root(tmp_path).rglob("activations/activations-0-*/**/c.*.0.0")]
    assert brought == []


def test_a_stage_trains_on_rows_that_come_by_ranges(copy: str, first: tuple[str, Path], tmp_path: Path) -> None:
    before = sealed_digests(copy)
    with machine(tmp_path):
        assert grown(tiny(first[1], TWO), copy, from_stack=1, force="train").made == ["train 1"]
    assert sealed_digests(copy) == before
    assert not list(scratch_root(tmp_path).rglob("activations/activations-0-*/**/c.*.0.0"))


_GROW = (
    "import os, sys; os.fsync = lambda fd: None\n"
    "sys.path.insert(0, sys.argv[3])\n"
    "from pathlib import Path\nfrom support.runs import grown, tiny\n"
    "grown(tiny(Path(sys.argv[1]), {'training.progressive.target_stacks': 1}), sys.argv[2])\n"
)


def test_a_kill_in_the_middle_of_an_upload_costs_no_training(
    s3: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path)
    with machine(tmp_path / "scratch"):
        environment = {**os.environ, "STACKWISE_FAILPOINT": "upload-stack:2:KILL"}
        command = [sys.executable, "-c", _GROW, str(tmp_path), s3, str(ROOT / "tests")]
        assert subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        there = {name.rpartition("/")[2] for name in objects(s3) if name.startswith("stacks/")}
        assert len(there) >= 2
        assert "manifest.json" not in there
        written: list[str] = []
        write = ObjectStore.write

        def noted(self: ObjectStore, key: str, data: Any) -> None:
            written.append(key)
            write(self, key, data)

        monkeypatch.setattr(ObjectStore, "write", noted)
        told = grown(tiny(tmp_path, ONE), s3)  # at once: a lease of this machine's dead is no one's
    assert told.made == ["validate 0"]
    again = {key.rpartition("/")[2] for key in written if key.startswith("stacks/stack-0-")}
    assert again == {"embedding.safetensors", "head.safetensors", "metrics.jsonl", "stack.safetensors"} - there
    assert sealed_digests(s3) == digests(reference(ONE))


def test_a_run_that_lives_on_another_machine_is_seen(copy: str, first: tuple[str, Path], tmp_path: Path) -> None:
    with machine(tmp_path / "a"):
        there = artifacts_at(copy).open()
    with there.lock("run-tiny", shared=True), machine(tmp_path / "b"):
        with pytest.raises(RunBusyError, match="is running it with another configuration"):
            grown(tiny(first[1]), copy)
        assert _says("status", copy, "--json")[1].count('"state": "running"') == 1


def test_keys_are_written_nowhere(first: tuple[str, Path], s3: str) -> None:
    texts = [path.read_bytes() for path in first[1].rglob("*") if path.is_file()] + list(objects(first[0]).values())
    assert len(texts) > 100
    assert not [text for text in texts if KEY.encode() in text or SECRET.encode() in text]


# ---------------------------------------------------------------- the command line


def _says(command: str, uri: str, *more: str) -> tuple[int, str, str]:
    """Run a command in this process, and return its exit code and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([command, *more, "--artifacts", uri])
    return code, out.getvalue(), err.getvalue()


def test_commands_work_from_a_machine_that_has_nothing(first: tuple[str, Path], s3: str, tmp_path: Path) -> None:
    uri, folder = first
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny(folder, TWO).to_yaml())
    with machine(tmp_path / "scratch"):
        code, out, _ = _says("status", uri, "--json")
        runs = json.loads(out)
        assert (code, runs["artifacts"]) == (0, uri)
        assert [(run["name"], run["state"], run["stages_done"]) for run in runs["runs"]] == [("tiny", "done", 2)]
        code, out, _ = _says("status", uri, "tiny", "--json")
        states = [stage["states"]["activations"] for stage in json.loads(out)["stage_list"]]
        assert (code, states) == (0, ["sealed", "none"])

        code, out, _ = _says("plan", uri, str(config), "--json")
        plan = json.loads(out)
        assert (code, plan["complete"], plan["artifacts"]) == (0, True, uri)

        code, out, _ = _says("inspect", uri, "activations-0", "--json")
        store = json.loads(out)
        assert (code, store["state"], store["store"]["non_finite"]) == (0, "sealed", 0)
        assert store["folder"].startswith(f"{uri}/activations/activations-0-")

        code, out, err = _says("verify", uri)
        assert (code, err) == (0, "")
        assert "all as sealed: 10 artifacts" in out
        assert "0 cached rows" not in out
        assert _says("verify", uri, "tiny")[0] == 0


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_verify_names_what_is_damaged(how: str, copy: str, tmp_path: Path) -> None:
    kept = objects(copy)
    wanted = ("/stack.safetensors", "/activations/c.0.0.0", "/report.json")
    names = [next(name for name in sorted(kept) if name.endswith(end)) for end in wanted]
    for name in names:
        if how == "missing":
            delete(copy, name)
        else:
            put(copy, name, kept[name][:-1] if how == "cut off" else kept[name][:-1] + bytes([kept[name][-1] ^ 1]))
    with machine(tmp_path):
        code, _, err = _says("verify", copy)
    lines = err.splitlines()
    assert code == 3
    assert {line.partition(": ")[0] for line in lines} == {f"{copy}/{name}" for name in names}
    assert all("it will be remade" in line for line in lines)


def test_a_run_does_not_go_on_over_damage(copy: str, first: tuple[str, Path], tmp_path: Path) -> None:
    name = next(name for name in objects(copy) if "stacks/stack-1-" in name and name.endswith("/stack.safetensors"))
    put(copy, name, b"x" + objects(copy)[name][1:])
    with machine(tmp_path), pytest.raises(ArtifactCorruptError) as caught:
        grown(tiny(first[1]), copy)
    assert str(caught.value).startswith(f"{copy}/{name}: checksum sha256:")


def test_wrong_places_are_told_in_a_line(first: tuple[str, Path], s3: str, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny(first[1]).to_yaml())
    with machine(tmp_path / "scratch"):
        for command in (["status"], ["verify"], ["inspect", "x"], ["plan", str(config)], ["train", str(config)]):
            code, out, err = _says(command[0], "s3://there-is-no-such-bucket/x", *command[1:])
            assert (code, out) == (2, "")
            assert err.startswith("stackwise: --artifacts s3://there-is-no-such-bucket/x: there is no such bucket")
            assert err.count("\n") == 1
