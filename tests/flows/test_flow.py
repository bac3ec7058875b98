"""The stages as a Prefect flow: same bytes, records that are used only where the artifact is there, readable pages.

All on the one server of the session (conftest.py). A subflow takes a second to end, so few runs serve many tests.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from flows.run.events import StepTaken, TaskStarted, subscribed
from flows.run.numbers import parameters, size
from stackwise_core.config.schema import StackOverride
from stackwise_core.errors import NonFiniteLossError
from stackwise_core.training import training
from storage.errors import ArtifactCorruptError
from support.adopting import library_rack, run_batches
from support.flow_runs import FlowRun, run_flow
from support.runs import Recorder, digests, files_below, folder_of, grown, manifests, tiny

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("quick_disk", "prefect_api")]

Reference = Callable[..., Path]
TWO = {"training.progressive.target_stacks": 2}
TASKS = ["build stack", "configure trunk of stack", "train stack", "cache activations of stack", "validate stack"]


@contextlib.contextmanager
def logged() -> Generator[list[str]]:
    """Give the lines that Prefect's engine logs of flow runs, as they are formatted for its pages."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def artifacts_named(key: str) -> list[Any]:
    """Return every version of an artifact, oldest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return sorted(found, key=lambda artifact: artifact.created)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, prefect_api: str, quick_disk: None) -> tuple[Path, FlowRun]:
    """A run of two stacks on an empty folder."""
    folder = tmp_path_factory.mktemp("flow")
    run = run_flow(tiny(folder, {**TWO, "run.name": "First_Run"}), folder / "a")
    assert run.state.is_completed(), run.state
    return folder / "a", run


def _copy(root: Path, to: Path) -> Path:
    """Copy artifacts, and the corpus beside them: a run of that name knows its text."""
    shutil.copy(root.parent / "corpus.txt", to)
    return Path(shutil.copytree(root, to / "artifacts"))


def _config(folder: Path, changes: dict[str, Any] | None = None) -> Any:
    return tiny(folder, {**TWO, "run.name": "First_Run", **(changes or {})})


# ---------------------------------------------------------------- one run


def test_the_server_of_these_versions_can_be_imported() -> None:
    import prefect.server.api.server

    assert callable(prefect.server.api.server.create_app)


def test_the_flow_makes_what_plain_calls_make(first: tuple[Path, FlowRun], reference: Reference) -> None:
    root, _ = first
    assert digests(root) == digests(reference(TWO))


def test_names_are_sentences(first: tuple[Path, FlowRun]) -> None:
    _, run = first
    assert run.name == "grow First_Run to 2 stacks"
    assert [stage.name for stage in run.stages()] == [
        "First_Run: add stack 0 (from scratch, full)",
        "First_Run: add stack 1 (append, frozen, full)",
    ]
    tasks = run.tasks(count=10)
    assert set(tasks) == {f"{sentence} {stage}" for sentence in TASKS for stage in range(2)}
    assert set(tasks.values()) == {"Completed"}


def test_a_run_and_its_stages_are_found_by_their_tags(first: tuple[Path, FlowRun]) -> None:
    """Tasks have none: for a tag of a task Prefect would ask the server."""
    from prefect.client.orchestration import get_client

    _, run = first
    with get_client(sync_client=True) as client:
        assert set(client.read_flow_run(run.id).tags) == {"stackwise", "run:First_Run"}
        subflows = {stage.id for stage in run.stages()}
        assert {tag for task in client.read_task_runs() if task.flow_run_id in subflows for tag in task.tags} == set()
    stages = [{"stackwise", "run:First_Run", f"stage:{n}"} for n in range(2)]
    assert [set(stage.tags) for stage in run.stages()] == stages


def test_the_table_has_a_row_per_stage_with_its_numbers(first: tuple[Path, FlowRun]) -> None:
    root, run = first
    versions = [json.loads(artifact.data) for artifact in artifacts_named("first-run-stages")]
    assert [len(rows) for rows in versions] == [2]  # renewed in place: a run's page lists every version
    known = manifests(root)
    how = ("from scratch, full", "append, frozen, full")
    for stage, row in enumerate(versions[-1]):
        stack = folder_of(root, "stack", stage).name
        validation = known[folder_of(root, "validation", stage).name]["facts"]
        assert (row["stage"], row["stack"], row["how"]) == (str(stage), stack, how[stage])
        assert row["val. loss"] == f"{validation['validation_loss']:.4f}"
        assert row["loss"] == f"{known[stack]['facts']['train_loss']:.4f}"
        assert row["trained"] == known[stack]["facts"]["trainable_parameters"]
        assert row["params"] == parameters(known[stack]["facts"]["rack_parameters"])
    cache = known[folder_of(root, "activations", 0).name]
    assert [row["cache"] for row in versions[-1]] == [size(sum(f["size"] for f in cache["files"].values())), "none"]
    assert artifacts_named("first-run-stages")[-1].flow_run_id == run.id


def test_the_report_tells_every_stage_and_artifact(first: tuple[Path, FlowRun]) -> None:
    root, _ = first
    text = artifacts_named("first-run-report")[-1].data
    assert text.startswith(f"# First_Run\n\n2 of 2 stages are done. Artifacts are in `{root}`.")
    for name, manifest in manifests(root).items():
        assert f"`{name}` (sealed)" in text or name.startswith("data-")
        if manifest["ref"]["kind"] == "validation":
            assert f"validation loss {manifest['facts']['validation_loss']:.4f}, in " in text
    assert "- activations: none, last stage" in text


def test_records_lie_beside_the_artifacts(first: tuple[Path, FlowRun]) -> None:
    root, _ = first
    records = [path for path in (root / "prefect").iterdir() if path.is_file()]
    assert len(records) >= 9  # one per artifact; what the cache task of the last stage gives has no key
    assert not any("tensor" in path.read_text() for path in records)
    for name in digests(root):
        if not name.startswith("data-"):
            (found,) = [path for path in records if manifests(root)[name]["ref"]["sha256"] in path.name]
            # A reference: kind, stage and id, nothing of where it lies.
            assert json.loads(json.loads(found.read_text())["result"])["data"] == manifests(root)[name]["ref"]
            assert str(root) not in json.loads(found.read_text())["result"]
    assert not [path for path in (Path(os.environ["PREFECT_HOME"]) / "storage").glob("*") if path.is_file()]


# ---------------------------------------------------------------- again


def test_a_rerun_is_cached_also_after_a_move_and_believes_no_record(
    first: tuple[Path, FlowRun], tmp_path: Path
) -> None:
    """Prefect would unpickle a record that says so, and import the class that a record names."""
    root = _copy(first[0], tmp_path)
    before, intact = digests(root), _damage_records(root, tmp_path)
    run = run_flow(_config(tmp_path), root)
    assert run.state.is_completed()
    tasks = run.tasks(count=10)
    assert tasks.pop("cache activations of stack 1") == "Completed"  # it makes nothing, so there is nothing to keep
    assert len(tasks) == 9
    assert set(tasks.values()) == {"Cached"}
    assert digests(root) == before
    assert not (tmp_path / "ran").exists()
    assert {path: path.read_bytes() for path in intact} == intact


def _ref(root: Path, kind: str, stage: int) -> dict[str, Any]:
    return manifests(root)[folder_of(root, kind, stage).name]["ref"]


def _damage_records(root: Path, outside: Path) -> dict[Path, bytes]:
    """Let records run code, name another artifact, be cut off, and lead out; return what must not change."""
    code = f"import pathlib; pathlib.Path({str(outside / 'ran')!r}).touch()"
    (outside / "of_a_stranger.py").write_text(code)
    pickled = base64.b64encode(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.").decode()

    def record(task: str, stage: int) -> Path:
        kind = {"train": "stack", "validate": "validation", "cache": "activations"}.get(task, task)
        return root / "prefect" / f"{task}-{_ref(root, kind, stage)['sha256']}"

    whole = json.loads(record("train", 0).read_text())
    for path, serializer, result in (
        (record("build", 0), {"type": "pickle", "picklelib": "pickle"}, pickled),
        (record("trunk", 0), {"type": "json"}, json.dumps({"__class__": "of_a_stranger.Code", "data": {}})),
        (record("train", 1), {"type": "json"}, whole["result"]),
    ):
        metadata = {**whole["metadata"], "serializer": serializer, "storage_key": str(path)}
        path.write_text(json.dumps({"metadata": metadata, "result": result}))
    record("build", 1).write_bytes(record("train", 0).read_bytes()[:50])
    mine = outside / "mine.txt"
    mine.write_text("mine")
    record("validate", 0).unlink()
    record("validate", 0).symlink_to(mine)
    return {mine: mine.read_bytes()}


def test_only_what_is_gone_runs_again(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    """Prefect's record of the task is still there; the disk says that its artifact is not."""
    root = _copy(first[0], tmp_path)
    before = digests(root)
    shutil.rmtree(folder_of(root, "stack", 1))
    shutil.rmtree(folder_of(root, "activations", 0))
    tasks = run_flow(_config(tmp_path), root).tasks(count=10)
    completed = {name for name, state in tasks.items() if state == "Completed"}
    assert completed == {"train stack 1", "cache activations of stack 0", "cache activations of stack 1"}
    assert {state for name, state in tasks.items() if name not in completed} == {"Cached"}
    assert digests(root) == before


def test_redone_on_purpose_through_the_flow(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    root = _copy(first[0], tmp_path)
    before = digests(root)
    read = manifests(root)[folder_of(root, "validation", 1).name]["inputs"]
    _damage_records(root, tmp_path)  # one of them says that the stack of this stage is another
    tasks = run_flow(_config(tmp_path), root, from_stack=1, force="validate").tasks(count=10)
    assert {name for name, state in tasks.items() if state == "Completed"} == {
        "validate stack 1",
        "cache activations of stack 1",
    }
    assert digests(root) == before
    assert manifests(root)[folder_of(root, "validation", 1).name]["inputs"] == read


# ---------------------------------------------------------------- failures


def test_a_failure_reaches_the_caller_as_it_is_and_the_next_run_goes_on(
    first: tuple[Path, FlowRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.train_rack import run_to_the_end

    root = _copy(first[0], tmp_path)
    before = digests(root)
    shutil.rmtree(folder_of(root, "stack", 1))
    real, raised = training.train_step, NonFiniteLossError("step 6: made up")

    def failing(model: Any, batch: Any, optimizer: Any, spec: Any, step: int, scale: Any, ranks: Any) -> Any:
        if step == 6:
            raise raised
        return real(model, batch, optimizer, spec, step, scale, ranks)

    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(NonFiniteLossError) as error:
        run_to_the_end(_config(tmp_path), str(root), -1, "")
    assert error.value is raised
    assert json.loads((root / "runs/First_Run/attempts/0002/outcome.json").read_text())["state"] == "failed"
    monkeypatch.undo()

    heard: list[Any] = []
    with subscribed(heard.append):
        run = run_flow(_config(tmp_path), root)
    assert "stage 1 goes on from its checkpoint at step 4" in {getattr(event, "text", "") for event in heard}
    tasks = run.tasks(count=10)
    assert tasks["train stack 1"] == "Completed"
    assert tasks["train stack 0"] == "Cached"
    assert digests(root) == before


@pytest.mark.parametrize("asked", ["in a step", "while the data is prepared"])
def test_a_stop_on_request_is_shown_as_one(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the run, its stage nor its task is red, and no log has a traceback; nothing was recorded as made."""

    def ask(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 6 and asked == "in a step":
            signal.raise_signal(signal.SIGTERM)
        if isinstance(event, TaskStarted) and event.task == "prepare data" and asked != "in a step":
            raise KeyboardInterrupt

    with subscribed(ask), logged() as lines:
        run = run_flow(tiny(tmp_path, TWO), tmp_path / "a")
    assert run.state.is_cancelled()
    where = " after step 6 of 12" if asked == "in a step" else ""
    expected = f"stopped on request{where}; run the same command to go on"
    assert run.state.message == expected
    if asked == "in a step":
        (stage,) = run.stages()
        assert (stage.state_name, stage.state.message) == ("Cancelled", expected)
        assert run.tasks(count=3)["train stack 0"] == "Cancelled"
        assert not list((tmp_path / "a/prefect").glob("train-*"))
    assert not [line for line in lines if "Traceback" in line]
    outcome = json.loads((tmp_path / "a/runs/tiny/attempts/0001/outcome.json").read_text())
    assert outcome["state"] == "stopped"


def test_errors_that_are_explained_and_stops_are_no_traceback_in_a_log() -> None:
    from prefect.exceptions import CancelledRun

    from flows.errors import one_line_errors

    with one_line_errors():
        pass

    def told(name: str, error: Exception, text: str = "exited with unexpected exception") -> list[str]:
        logger = logging.getLogger(name)
        record = logger.makeRecord(name, logging.ERROR, __file__, 1, text, (), (type(error), error, None))
        return [f"{record.levelname} {logging.Formatter().format(record)}"] if logger.filter(record) else []

    for name in ("prefect.engine", "prefect.flow_runs", "prefect.task_runs"):  # the first is a worker's
        assert told(name, CancelledRun("stopped on request")) == []
        assert told(name, NonFiniteLossError("step 6: made up")) == ["ERROR step 6: made up"]
    (line,) = told("prefect.task_runs", ValueError(), "Finished in state Cancelled('stopped on request')")
    assert line.startswith("INFO Finished")


def test_wrong_parameters_are_refused_by_path(tmp_path: Path) -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.errors import RefusedError
    from flows.train_rack import train_rack

    wrong: Any = {"training": {"batch_size": "many", "colour": 1}}
    with pytest.raises(ParameterTypeError, match=r"(?s)training.batch_size.*training.colour"):
        train_rack(wrong, str(tmp_path / "a"))
    with pytest.raises(ParameterTypeError, match="force"):
        train_rack(tiny(tmp_path), str(tmp_path / "a"), force="everything")  # type: ignore[arg-type]
    broken = tiny(tmp_path)
    broken.model.n_heads = 3  # right in type and range, wrong beside d_model: our own rules say so
    with pytest.raises(RefusedError, match=r"model\.n_heads: got 3; must divide") as refused, logged() as lines:
        train_rack(broken, str(tmp_path / "a"))
    assert next(line for line in lines if "n_heads" in line) == str(refused.value)
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / "a").exists()


def test_parameters_may_come_as_plain_json(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    """As a deployment sends them."""
    root = _copy(first[0], tmp_path)
    before = digests(root)
    plain = json.loads(_config(tmp_path).model_dump_json())
    run = run_flow(plain, root)
    assert run.state.is_completed()
    assert run.name == "grow First_Run to 2 stacks"
    assert digests(root) == before


def test_an_adopted_rack_is_validated_by_the_flow(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    config = _config(first[0].parent, {"training.progressive.target_stacks": 1})
    library_rack(config, run_batches(config, first[0]), 1).save(tmp_path / "rack")
    config.model.from_ = str(tmp_path / "rack")
    run = run_flow(config.model_dump(), tmp_path / "a")
    assert run.state.is_completed(), run.state
    grown(config, tmp_path / "plain")
    assert digests(tmp_path / "a") == digests(tmp_path / "plain")


def test_add_stack_says_who_asked(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    """By that a retry finds the stack that it asked for, however far the run has grown since."""
    from flows.add_stack import add_stack

    root = _copy(first[0], tmp_path)
    state = add_stack("First_Run", str(root), StackOverride(steps=4), return_state=True)
    assert state.is_completed(), state
    start = json.loads((root / "runs/First_Run/attempts/0002/start.json").read_text())
    assert start["asked_by"] == f"flow run {state.state_details.flow_run_id}"
    assert folder_of(root, "stack", 2)


@pytest.mark.parametrize(("run", "title"), [("First_Run", "verify First_Run"), ("", "verify everything")])
def test_a_validation_is_named_by_what_it_verifies(run: str, title: str, first: tuple[Path, FlowRun]) -> None:
    from flows.operations import validate_run

    state = validate_run(run, str(first[0]), return_state=True)
    assert state.is_completed(), state
    assert FlowRun(state).name == title


def test_a_damaged_cache_fails_the_flow_by_name(first: tuple[Path, FlowRun], tmp_path: Path) -> None:
    root = _copy(first[0], tmp_path)
    shutil.rmtree(folder_of(root, "stack", 1))
    shard = folder_of(root, "activations", 0) / "store.zarr/activations/c.0.0.0"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    before = files_below(root / "activations")
    run = run_flow(_config(tmp_path), root)
    assert run.state.is_failed()
    with pytest.raises(ArtifactCorruptError, match=r"c\.0\.0\.0"):
        run.state.result()
    assert run.tasks(count=6)["train stack 1"] == "Failed"
    assert files_below(root / "activations") == before


def test_a_prepended_and_annealed_run_reads_as_sentences_too(
    prefect_api: str, tmp_path: Path, quick_disk: None
) -> None:
    """Names say what is worked on; the stage table has the losses that compare; an absent cache says why."""
    growth = "training.progressive."
    changes = {
        **TWO,
        "run.name": "depth",
        "training.joint_steps": 4,
        f"{growth}training_objective": "mlm",
        f"{growth}time_interpretation": "depth",
        f"{growth}building_mode": "prepend",
    }
    recorder = Recorder()
    with subscribed(recorder):
        run = run_flow(tiny(tmp_path, changes), tmp_path / "a")
    assert run.state.is_completed(), run.state
    names = [stage.name for stage in run.stages()]
    assert names == [
        "depth: add stack 0 (from scratch, full)",
        "depth: add stack 1 (prepend, frozen, full)",
        "depth: train all stacks together",
    ]
    tasks = run.tasks(count=14)
    assert "build all stacks" not in tasks
    assert tasks["train all stacks"] == tasks["validate all stacks"] == "Completed"
    table = json.loads(artifacts_named("depth-stages")[-1].data)
    assert [row["how"] for row in table] == ["from scratch, full", "prepend, frozen, full", "joint"]
    assert all(float(row["at 50\u00a0% masked"]) > 0 for row in table)
    reasons = [text for text in recorder.messages if "caches nothing" in text]
    assert [text.split(":")[1].strip() for text in reasons] == [
        "stage 1 streams from tokens",
        "stage 2 streams from tokens",
    ]
