"""Curves in trackers: sent from threads of their own, continued by a resumed run, and never in the way of training."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.run.events import StepTaken, subscribed
from flows.run.trackers import TensorBoard, tracker_faults
from flows.run.tracking import replay
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from storage.artifacts import artifacts_at
from support.metrics import metrics_of
from support.modes import G
from support.runs import digests, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

TO: dict[str, Any] = {"tracking.to": ["tensorboard"], f"{G}target_stacks": 2}
STEPS = 8


class Fake:
    """Records what it is told, and in which threads; `has` are the runs that it knows, with their last steps."""

    look = "look here"
    has: dict[str, int]

    def __init__(self, has: dict[str, int]) -> None:
        self.has, self.logged, self.threads = has, list[tuple[int, dict[str, float]]](), set[int]()
        self.started: list[Any] = []
        self.files, self.outcome, self.fails_at = list[str](), "", 0

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        self.threads.add(threading.get_ident())
        self.started.append((run, dict(config), dict(ids)))
        return self.has.setdefault(ids["run"], 0)

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        self.threads.add(threading.get_ident())
        if step == self.fails_at:
            raise OSError("the line is cut")
        self.logged.append((step, dict(metrics)))
        self.has[self.started[0][2]["run"]] = step

    def artifact(self, path: Path) -> None:
        self.files.append(path.name)

    def finish(self, outcome: str) -> None:
        self.threads.add(threading.get_ident())
        self.outcome = outcome


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Put a fake in the place of each tracker that starts; all know the same runs."""
    made, has = list[Fake](), dict[str, int]()

    def fake(*_: Any) -> Fake:
        made.append(Fake(has))
        return made[-1]

    monkeypatch.setattr("flows.run.tracking.tracker_of", fake)
    for place in ("flows.run.devices", "flows.run.tracking"):
        monkeypatch.setattr(f"{place}.tracker_faults", lambda *_: [])
    return made


def test_a_run_is_told_as_it_is_recorded(tmp_path: Path, fakes: list[Fake]) -> None:
    config = tiny(tmp_path, {**TO, "validation.every": 3, "training.steps_per_stack": STEPS})
    grown(config, tmp_path / "a")
    (fake,) = fakes
    ((run, keys, ids),) = fake.started
    assert (run, keys["data.seq_len"], fake.files, fake.outcome) == (
        "tiny",
        config.data.seq_len,
        ["config.yaml"],
        "done",
    )
    assert {name for name in digests(tmp_path / "a") if name.startswith("stack")} == {ids["stage-0"], ids["stage-1"]}
    told = [(step, metrics) for step, metrics in fake.logged if "train/loss" in metrics]
    assert [step for step, _ in told] == list(range(1, 2 * STEPS + 1))
    for step, metrics in told:
        record = metrics_of(tmp_path / "a", (step - 1) // STEPS)[(step - 1) % STEPS]
        names = {"train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens_per_second"}
        expected = {name: record[name.partition("/")[2]] for name in {*names, "train/memory_bytes"}}
        if "validation_loss" in record:
            expected["validation/loss"] = record["validation_loss"]
        assert metrics == {**expected, "stage": (step - 1) // STEPS}
    ends = [step for step, metrics in fake.logged if "train/loss" not in metrics]
    assert ends == [STEPS, 2 * STEPS]
    assert len(fake.threads) == 1
    assert threading.get_ident() not in fake.threads
    config.tracking.to = []
    grown(config, tmp_path / "b")
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    # Sent afterwards, it is the same curve; what is there is not sent again.
    later = Fake({})
    fakes_later = iter([later, Fake(later.has)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.run.tracking.tracker_of", lambda *_: next(fakes_later))
        said = [replay(artifacts_at(str(tmp_path / "a")), "tiny", "mlflow", "stackwise") for _ in range(2)]
    assert later.logged == fake.logged
    assert later.started[0][2] == ids
    assert said[0] == f"tiny: {2 * STEPS} steps sent to mlflow; look: look here"
    assert said[1].startswith(f"tiny: 1 steps sent to mlflow, which had steps up to {2 * STEPS}")


def test_a_resumed_run_goes_on_with_its_curve(tmp_path: Path, fakes: list[Fake]) -> None:
    config = tiny(tmp_path, {**TO, "training.steps_per_stack": STEPS, "training.checkpoint_every": 2})

    def killing(event: Any) -> None:
        if isinstance(event, StepTaken) and (event.stage, event.step) == (1, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), subscribed(killing):
        grown(config, tmp_path / "a")
    config.training.progressive.target_stacks = 3
    grown(config, tmp_path / "a")
    first, second = fakes
    assert first.outcome == "stopped"
    assert first.started[0][2]["run"] == second.started[0][2]["run"]
    assert first.logged[-1][0] in (STEPS + 4, STEPS + 5)
    steps = [step for step, metrics in [*first.logged, *second.logged] if "train/loss" in metrics]
    assert sorted(set(steps)) == list(range(1, 3 * STEPS + 1))
    assert len(steps) <= 3 * STEPS + 1  # the last one may come again


@pytest.mark.parametrize("what", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_stops_nothing(
    what: str, tmp_path: Path, fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("the line is cut\nand more")

    monkeypatch.setattr(Fake, what, fail)
    heard = grown(tiny(tmp_path, {**TO, f"{G}target_stacks": 1}), tmp_path / "a")
    said = [message for message in heard.messages if "tensorboard" in message]
    assert said == [
        "tensorboard gets no more curves of this run (OSError: the line is cut); training goes on; later: stackwise "
        "track RUN --to tensorboard"
    ]
    assert digests(tmp_path / "a")


def test_a_tracker_that_does_not_end_is_left_behind(
    tmp_path: Path, fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr("flows.run.tracking._SECONDS_AT_THE_END", 0.0)
    monkeypatch.setattr(Fake, "finish", lambda *_: free.wait(60))
    heard = grown(tiny(tmp_path, {**TO, f"{G}target_stacks": 1}), tmp_path / "a")
    free.set()
    assert any("did not end within 0 s" in message for message in heard.messages)


def test_a_missing_package_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"got 'wandb'; it is not installed: pip install 'stackwise\[wandb\]'"):
        grown(tiny(tmp_path, {"tracking.to": ["wandb"]}), tmp_path / "a")
    assert not (tmp_path / "a" / "runs").exists()
    assert [str(fault) for fault in tracker_faults(["mlflow"], "--to")] == [
        "--to: got 'mlflow'; it is not installed: pip install 'stackwise[mlflow]'"
    ]


@pytest.mark.parametrize(
    ("said", "to"),
    [
        ("wandb", ["wandb"]),
        (["wandb", "mlflow"], ["wandb", "mlflow"]),
        ({"to": "tensorboard", "project": "p"}, ["tensorboard"]),
        ({"project": "p"}, []),
    ],
)
def test_short_ways_to_name_it(said: Any, to: list[str]) -> None:
    assert StackWiseConfig.from_dict({"tracking": said}).tracking.to == to


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.to"):
        StackWiseConfig.from_dict({"tracking": "wandbb"})


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tmp_path / "config.yaml"
    config.write_text("run: {name: a}")
    for first, last in ((1, 5), (4, 8)):  # killed after step 5, resumed after step 3
        tracker = TensorBoard(tmp_path, "p")
        tracker.start("run", {}, {"run": "run-1"})
        tracker.artifact(config)
        for step in range(first, last + 1):
            tracker.log({"train/loss": 8.0 / step}, step, 1e9 + step)
        tracker.finish("done")
    read = EventAccumulator(str(tmp_path / "tensorboard" / "p" / "run-1"))
    read.Reload()
    found = [(event.step, event.value, event.wall_time) for event in read.Scalars("train/loss")]
    assert found == [(step, pytest.approx(8.0 / step), 1e9 + step) for step in range(1, 9)]
    (text,) = {event.tensor_proto.string_val[0] for event in read.Tensors("config.yaml/text_summary")}
    assert b"run: {name: a}" in text
