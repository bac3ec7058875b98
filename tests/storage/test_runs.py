"""Runs: attempts that are only ever added, who is alive, and whose stores may be dropped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, CorpusError, StageInterruptedError
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactCorruptError, RunBusyError, StoreSpaceError
from storage.locks import no_wait
from storage.runs import Attempt, attempts, begin_attempt, find_run, is_live, retire_unless_read, run_names
from support.disk import ROOT, die_everywhere, recorded
from support.records import rewrite

CORPUS, OTHER_CORPUS = "00" * 32, "11" * 32


def configuration(name: str = "one", steps: int = 200, **sections: Any) -> StackWiseConfig:
    return StackWiseConfig.from_dict({"run": {"name": name}, "training": {"steps_per_stack": steps}, **sections})


@contextmanager
def begun(artifacts: Artifacts, config: StackWiseConfig | None = None, corpus: str = CORPUS) -> Generator[Attempt]:
    config = config or configuration()
    with begin_attempt(artifacts, config, plan_run(config, corpus), no_wait) as attempt:
        yield attempt


def run(artifacts: Artifacts, config: StackWiseConfig | None = None, corpus: str = CORPUS) -> Attempt:
    with begun(artifacts, config, corpus) as attempt:
        return attempt


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts").open()


HOLD = """
import sys
from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.plan import plan_run
from storage.artifacts import Artifacts
from storage.runs import begin_attempt

config = StackWiseConfig.from_yaml(sys.argv[2])
with begin_attempt(Artifacts(sys.argv[1]), config, plan_run(config, sys.argv[3]), print) as attempt:
    print(attempt.number, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_elsewhere(artifacts: Artifacts, config: StackWiseConfig) -> Generator[tuple[subprocess.Popen[str], int]]:
    """A live attempt in another process, and its number; it ends well if it is not killed."""
    config.to_yaml(artifacts.root / "held.yaml")
    command = [sys.executable, "-c", HOLD, str(artifacts.root), str(artifacts.root / "held.yaml"), CORPUS]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- attempts


def test_attempts_are_numbered_and_never_changed(artifacts: Artifacts) -> None:
    assert attempts(artifacts, "one") == []
    before: dict[str, bytes] = {}
    for number in (1, 2, 3):
        attempt = run(artifacts, configuration(steps=200 + number))
        assert (attempt.name, attempt.number) == ("one", number)
        assert attempts(artifacts, "one")[-1] == find_run(artifacts, "one") == attempt
        assert (artifacts.root / "runs/one/current").read_text() == f"{number:04d}\n"
        after = content(artifacts.root / "runs/one/attempts")
        assert before.items() <= after.items()
        before = after
    assert [found.number for found in attempts(artifacts, "one")] == [1, 2, 3]
    assert [found.config.training.steps_per_stack for found in attempts(artifacts, "one")] == [201, 202, 203]


def test_an_attempt_says_what_it_is(artifacts: Artifacts) -> None:
    config = configuration()
    with begun(artifacts, config) as attempt:
        assert attempt.config == config
        assert attempt.plan == plan_run(config, CORPUS)
        assert (attempt.start["pid"], attempt.start["host"]) == (os.getpid(), socket.gethostname())
        assert attempt.outcome is None
        assert is_live(artifacts, "one")
    assert attempt.outcome is not None
    assert (attempt.outcome["state"], attempt.outcome["message"]) == ("done", "")
    assert attempt.outcome["ended"] >= attempt.start["started"]
    assert not is_live(artifacts, "one")


def test_the_ranks_of_single_stacks_are_recorded_as_numbers_and_once_were_text(artifacts: Artifacts) -> None:
    sizes = {n: {"rank": 1 + n, "alpha": 2.0} for n in range(3)}
    growth = {"qlora_enabled": True, "qlora_strategy": "variable", "qlora_configs": sizes}
    config = StackWiseConfig.from_dict({"training": {"progressive": growth}})
    attempt = run(artifacts, config)
    assert attempt.config == config
    record = attempt.folder / "config.yaml"
    quoted = re.sub(r"^      (\d):$", r"      '\1':", record.read_text(), flags=re.MULTILINE)
    assert quoted != record.read_text()
    rewrite(record, quoted)
    assert find_run(artifacts, config.run.name).config == config


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (StoreSpaceError("the disk is full"), "failed"),
        (ZeroDivisionError("a fault of ours"), "failed"),
        (CorpusError("a name that is no text: \udce9"), "failed"),
        (StageInterruptedError("stopped on request"), "stopped"),
        (KeyboardInterrupt("^C"), "stopped"),
        (SystemExit(0), "stopped"),
    ],
)
def test_how_it_ended_is_recorded(error: BaseException, state: str, artifacts: Artifacts) -> None:
    with pytest.raises(type(error)), begun(artifacts) as attempt:
        raise error
    assert attempt.outcome is not None
    assert (attempt.outcome["state"], attempt.outcome["message"]) == (state, str(error).replace("\udce9", "\\udce9"))
    assert not is_live(artifacts, "one")
    assert run(artifacts).number == 2


def test_a_full_disk_does_not_hide_the_error(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError), begun(artifacts) as attempt:  # noqa: PT012
        patch.setattr(os, "write", full)
        raise ZeroDivisionError
    assert attempt.outcome is None
    assert not is_live(artifacts, "one")


def test_a_killed_attempt_has_no_outcome_and_holds_nothing(artifacts: Artifacts) -> None:
    with held_elsewhere(artifacts, configuration()) as (process, number):
        assert number == 1
        assert is_live(artifacts, "one")
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not is_live(artifacts, "one")
    (killed,) = attempts(artifacts, "one")
    assert killed.outcome is None
    assert run(artifacts, configuration(steps=99)).number == 2
    assert killed.outcome is None


def test_an_attempt_without_its_last_file_never_was(artifacts: Artifacts) -> None:
    run(artifacts)
    half = artifacts.root / "runs/one/attempts/0002"
    half.mkdir()
    (half / "config.yaml").write_text("half of")
    assert [attempt.number for attempt in attempts(artifacts, "one")] == [1]
    attempt = run(artifacts, configuration(steps=99))
    assert attempt.number == 2
    assert attempt.config.training.steps_per_stack == 99


class Begin:
    """A second attempt, killed at every step of its registration and of its end."""

    @staticmethod
    def prepare(folder: Path) -> None:
        run(Artifacts(folder).open())

    @staticmethod
    def act(folder: Path) -> None:
        run(Artifacts(folder), configuration(steps=99))

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        found = attempts(artifacts, "one")
        assert [attempt.number for attempt in found] in (([1, 2],) if finished else ([1], [1, 2]))
        assert [attempt.plan.stages[0].spec.optim.steps for attempt in found] == [200, 99][: len(found)]
        assert found[-1].config.training.steps_per_stack == found[-1].plan.stages[0].spec.optim.steps
        assert found[0].outcome is not None
        assert found[-1].outcome is not None or not finished
        assert not any(attempt.damage() for attempt in found)
        assert not is_live(artifacts, "one")
        assert run(artifacts, configuration(steps=50)).number == len(found) + 1


def test_killed_at_any_step_an_attempt_is_whole_or_never_was() -> None:
    died = die_everywhere(Begin)
    assert died["rename"] >= 4
    assert died["write"] >= 5


def test_an_attempt_is_on_the_disk_before_it_counts(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as seen, begun(artifacts) as attempt:
        pass
    start = str(attempt.folder / "start.json")
    flushed = {path.removesuffix(".tmp") for what, path in seen[: seen.index(("rename", start))] if what == "fsync"}
    assert {str(attempt.folder / name) for name in ("config.yaml", "plan.json", "start.json")} <= flushed


# ---------------------------------------------------------------- two at once


def test_a_live_run_with_another_configuration_is_busy(artifacts: Artifacts) -> None:
    with held_elsewhere(artifacts, configuration()) as (process, _):
        before = content(artifacts.root / "runs")
        with pytest.raises(RunBusyError) as caught:
            run(artifacts, configuration(steps=99))
        assert caught.value.exit_code == 2
        who = f"process {process.pid} on {socket.gethostname()} is running it with another configuration"
        assert str(caught.value).startswith(f"run.name: got 'one'; {who}")
        assert "choose another run.name" in str(caught.value)
        assert content(artifacts.root / "runs") == before
        assert run(artifacts, configuration("two", steps=99)).number == 1
        process.kill()
        process.wait()
        assert run(artifacts, configuration(steps=99)).number == 2


def test_a_live_run_with_the_same_configuration_is_joined(artifacts: Artifacts) -> None:
    with held_elsewhere(artifacts, configuration()) as (process, _):
        with begun(artifacts) as joined:
            assert joined.number == 1
            assert joined.start["pid"] == process.pid
        assert is_live(artifacts, "one")  # the first goes on
        with pytest.raises(RunBusyError):
            run(artifacts, configuration(steps=99))
    assert len(attempts(artifacts, "one")) == 1
    assert process.returncode == 0
    assert run(artifacts).number == 2


def test_the_last_of_two_lets_go(artifacts: Artifacts) -> None:
    with begun(artifacts):
        with begun(artifacts):
            pass
        assert is_live(artifacts, "one")
        with pytest.raises(RunBusyError):
            run(artifacts, configuration(steps=99))
    assert not is_live(artifacts, "one")


def test_a_live_run_that_keeps_other_stores_is_busy(artifacts: Artifacts) -> None:
    """cache.keep enters no recipe, and decides what the run leaves behind."""
    with begun(artifacts, configuration(cache={"keep": "all"})), pytest.raises(RunBusyError):
        run(artifacts, configuration(cache={"keep": "last"}))


def test_a_dead_run_is_no_obstacle(artifacts: Artifacts) -> None:
    for steps in (200, 99, 200):
        run(artifacts, configuration(steps=steps))
    assert len(attempts(artifacts, "one")) == 3


# ---------------------------------------------------------------- the corpus


def test_a_changed_corpus_under_the_same_data_section_is_refused(artifacts: Artifacts) -> None:
    attempt = run(artifacts)
    with pytest.raises(CorpusError, match="its text is not what run 'one' was started on") as caught:
        run(artifacts, corpus=OTHER_CORPUS)
    assert caught.value.exit_code == 2
    assert attempt.start["started"] in str(caught.value)
    assert "choose another run.name" in str(caught.value)
    assert len(attempts(artifacts, "one")) == 1
    assert not is_live(artifacts, "one")


@pytest.mark.parametrize("data", [{"source": "b.txt"}, {"seq_len": 64}, {"validation_fraction": 0.1}])
def test_another_data_section_may_have_another_corpus(data: dict[str, Any], artifacts: Artifacts) -> None:
    run(artifacts)
    assert run(artifacts, configuration(data=data), OTHER_CORPUS).number == 2


def test_another_run_may_have_another_corpus(artifacts: Artifacts) -> None:
    run(artifacts)
    assert run(artifacts, configuration("two"), OTHER_CORPUS).number == 1
    assert run(artifacts, configuration(steps=99)).number == 2  # the same text, another training


# ---------------------------------------------------------------- stores that others read


def seal_cache(artifacts: Artifacts, plan: RunPlan) -> Any:
    stage = plan.stages[0]
    ref = stage.ref("activations")
    (artifacts.work(ref) / "rows").write_text("rows")
    assert stage.activations is not None
    artifacts.seal(ref, stage.activations, (), {}, {})
    return ref


def test_a_store_is_retired_unless_another_live_run_reads_it(artifacts: Artifacts) -> None:
    config = configuration("mine")
    ref = seal_cache(artifacts, plan_run(config, CORPUS))
    sharing = configuration("theirs", training={"progressive": {"target_stacks": 4}})
    unrelated = configuration("unrelated", steps=99)
    with begun(artifacts, config), begun(artifacts, unrelated), held_elsewhere(artifacts, sharing) as (process, _):
        assert plan_run(sharing, CORPUS).stages[0].ref("activations") == ref
        assert not retire_unless_read(artifacts, ref, "mine")
        assert artifacts.state(ref) is State.SEALED
        process.kill()
        process.wait()
        assert retire_unless_read(artifacts, ref, "mine")  # a dead run reads nothing
        assert artifacts.state(ref) is State.RETIRED


def test_only_the_newest_attempt_of_a_live_run_counts(artifacts: Artifacts) -> None:
    config = configuration("mine")
    ref = seal_cache(artifacts, plan_run(config, CORPUS))
    run(artifacts, configuration("theirs"))
    with begun(artifacts, configuration("theirs", steps=99)):
        assert retire_unless_read(artifacts, ref, "mine")


def test_a_run_without_caches_reads_no_store(artifacts: Artifacts) -> None:
    ref = seal_cache(artifacts, plan_run(configuration(), CORPUS))
    live = configuration("theirs", training={"progressive": {"cache_activations": False}})
    with begun(artifacts, live):
        assert retire_unless_read(artifacts, ref, "mine")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        ".hidden",
        "-x",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "x" * 65,
        "a/../../b",
        "~",
    ],
)
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        configuration(name)
    config = configuration()
    with pytest.raises(ValueError, match="name"):
        config.run.name = name


@pytest.mark.parametrize("name", ["a", "A-1_2.3", "0", "a..b", "x" * 64])
def test_an_ordinary_name_is_a_folder_in_runs(name: str, artifacts: Artifacts) -> None:
    attempt = run(artifacts, configuration(name))
    assert attempt.folder == artifacts.root / "runs" / name / "attempts/0001"
    assert run_names(artifacts) == [name]
    assert {path.name for path in (artifacts.root / "locks").iterdir()} == {"gc", "plans", f"run-{name}"}


def test_runs_are_found_by_name(artifacts: Artifacts) -> None:
    with pytest.raises(ConfigError, match=r"RUN: got 'x'; no such run in .*; there: none yet"):
        find_run(artifacts, "x")
    run(artifacts, configuration("b"))
    run(artifacts, configuration("a"))
    (artifacts.root / "runs/half/attempts/0001").mkdir(parents=True)
    assert run_names(artifacts) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"there: a, b$"):
        find_run(artifacts, "half")


def test_a_misspelt_run_is_not_looked_for_in_a_list(artifacts: Artifacts) -> None:
    for name in ("frozen", "inserted"):
        run(artifacts, configuration(name))
    with pytest.raises(ConfigError, match=r"RUN: got 'frozn'; no such run in .*; did you mean frozen\?$"):
        find_run(artifacts, "frozn")


def test_a_message_does_not_list_a_thousand_runs(artifacts: Artifacts) -> None:
    run(artifacts, configuration("r00"))
    for number in range(1, 15):
        shutil.copytree(artifacts.root / "runs/r00", artifacts.root / f"runs/r{number:02}")
    with pytest.raises(ConfigError, match=r"there: r00, r01, .*, r11 and 3 more, see `stackwise status`"):
        find_run(artifacts, "r")


def test_the_newest_of_ten_thousand_attempts_is_found(artifacts: Artifacts) -> None:
    attempt = run(artifacts)
    attempt.folder.rename(attempt.folder.with_name("9999"))
    assert [run(artifacts).number for _ in range(2)] == [10_000, 10_001]


def test_a_record_of_newer_code_is_neither_damaged_nor_replaced(artifacts: Artifacts) -> None:
    path = run(artifacts).folder / "config.yaml"
    rewrite(path, path.read_text().replace("training:", "training:\n  colour: red"))
    before = path.read_text()
    expected = (
        r"config.yaml: has keys that this version does not know \(training.colour\). Use the version of StackWise"
    )
    with pytest.raises(ArtifactCorruptError, match=expected):
        _ = find_run(artifacts, "one").config
    with pytest.raises(ArtifactCorruptError, match=expected):  # the deployment's older code starts the run again
        run(artifacts)
    assert (path.read_text(), len(attempts(artifacts, "one"))) == (before, 1)
    rewrite(path, before.replace("\n  colour: red", "").replace("seed: 0", "seed: -1"))
    with pytest.raises(ArtifactCorruptError, match="is damaged"):
        _ = find_run(artifacts, "one").config


def test_a_plan_of_newer_code_is_not_damaged_either(artifacts: Artifacts) -> None:
    path = run(artifacts).folder / "plan.json"
    plan = json.loads(path.read_text())
    plan["stages"][0]["stack"]["colour"] = "red"  # a recipe is one of several kinds, of which the others lack keys
    rewrite(path, json.dumps(plan))
    expected = r"plan.json: has keys that this version does not know \(stages\.0\.stack\.\S*colour\)\. Use the version"
    with pytest.raises(ArtifactCorruptError, match=expected):
        _ = find_run(artifacts, "one").plan
