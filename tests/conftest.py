"""What the tests of flows share: a corpus, a configuration that grows in half a second, digests, events.

Prefect is never imported here: the tests that need it are marked `flow` and share one server.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long a draw takes says how busy the machine is, nothing of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_PREFECT_HOME = tempfile.mkdtemp(prefix="stackwise-prefect-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME  # read when prefect is first imported: the user's own stays untouched
os.environ.pop("PREFECT_API_URL", None)
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported: a test asks no hub

_WORDS = "the of stack trunk frozen layer boundary token grows each one then keeps rack under noise"


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, a run killed ten times among them: another process does the rest."""
    items.sort(key=lambda item: "site" not in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with the table of what was killed, how it was recovered, and what came of it."""
    properties = [entry for report in terminalreporter.getreports("passed") for entry in report.user_properties]
    if rows := [row for name, row in properties if name == "kill"]:
        terminalreporter.section("kills and recoveries")
        head = ["killed", "recovered by", "Prefect showed", "reused", "until further", "same bits"]
        for row in (head, ["---"] * len(head), *rows):
            terminalreporter.line(f"| {' | '.join(row)} |")


def write_corpus(path: Path, *, words: int = 400, seed: int = 0) -> Path:
    """Write some kilobytes of text that a model can learn something of."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(_WORDS.split()) for _ in range(words)))
    return path


def tiny_values(corpus: Path) -> dict[str, Any]:
    """Three stacks of one block; 16 sequences in batches of 4, so that 12 steps are three epochs."""
    return {
        "run": {"name": "tiny"},
        "data": {"source": str(corpus), "seq_len": 16, "max_sequences": 16, "validation_fraction": 0.1},
        "model": {"d_model": 16, "n_heads": 2, "d_ff": 32, "blocks_per_stack": 1},
        "training": {
            "batch_size": 4,
            "steps_per_stack": 12,
            "warmup_steps": 2,
            "checkpoint_every": 4,
            "progressive": {"training_objective": "clm", "target_stacks": 3},
        },
        "hardware": {"threads": 1, "device": "cpu"},
        "validation": {"max_sequences": 8, "sampled_rows": 64},
    }


def tiny(folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """Return the tiny configuration, its corpus written into `folder`; changes are dotted keys."""
    from stackwise_core.config.schema import StackWiseConfig
    from stackwise_core.config.yaml import apply_overrides

    corpus = folder / "corpus.txt"
    values = tiny_values(corpus if corpus.exists() else write_corpus(corpus))
    apply_overrides(values, changes or {})
    return StackWiseConfig.from_dict(values)


def manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Return every manifest below an artifacts folder, by the artifact's name."""
    found = [path for room in _ROOMS for path in (root / room).glob("*/manifest.json")]
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def digests(root: Path) -> dict[str, str]:
    """Return the digest of every artifact: equal digests are equal bytes. `verify` says that they are true."""
    sealed = {name: manifest["digest"] for name, manifest in manifests(root).items()}
    assert sealed, f"nothing sealed in {root}"
    return sealed


_ROOMS = ("data", "builds", "trunks", "stacks", "activations", "validations")


def folder_of(root: Path, kind: str, stage: int) -> Path:
    """Return the one folder of a kind and stage."""
    (found,) = (root / f"{kind.removesuffix('s')}s").glob(f"{kind}-{stage}-*")
    return found


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Recorder:
    """A subscriber that keeps the events of a run."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)

    @property
    def made(self) -> list[str]:
        """Tasks that did work, as 'train 1', in order."""
        from flows.run.events import TaskStarted

        return [f"{event.task} {event.stage}" for event in self.events if isinstance(event, TaskStarted)]

    @property
    def messages(self) -> list[str]:
        from flows.run.events import Message

        return [event.text for event in self.events if isinstance(event, Message)]


def grown(config: Any, root: Path, **how: Any) -> Recorder:
    """Grow by plain calls and return the recorded events."""
    from flows.run.events import subscribed
    from flows.run.run import grow

    recorder = Recorder()
    with subscribed(recorder):
        grow(config, str(root), **how)
    return recorder


ALL_OF = {stage: [f"{task} {stage}" for task in ("build", "trunk", "train", "cache", "validate")] for stage in range(9)}


def made_by_stages(n_stages: int, first: int = 0) -> list[str]:
    """What a run from stage `first` on makes; the last stage caches nothing."""
    tasks = [task for stage in range(first, n_stages) for task in ALL_OF[stage]]
    tasks.remove(f"cache {n_stages - 1}")
    return tasks


@pytest.fixture
def one_thread() -> Generator[None]:
    """Let torch use one thread: tensors this small gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_disk() -> Generator[None]:
    """Leave out fsync, which only a power cut would tell from doing it: a run is three times as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Callable[..., Path]:
    """Give the artifacts of an undisturbed run of a configuration: made once, to be compared with, not changed."""
    made: dict[str, Path] = {}

    def of(changes: dict[str, Any] | None = None) -> Path:
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            grown(tiny(folder, changes), folder / "artifacts")
            made[key] = folder / "artifacts"
        return made[key]

    return of


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Start the one Prefect server of the session and return its API."""
    from flows.server import embedded_server, quiet_prefect

    before = dict(os.environ)
    quiet_prefect()
    try:
        with embedded_server(tmp_path_factory.mktemp("server") / "server.log") as server:
            import prefect  # noqa: F401  # while the server starts

            server.wait_until_ready()
            yield server.url
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """Start the session's one site: a server and a worker as an operator runs them, the deployments applied."""
    from operating import operating

    with operating(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="session")
def s3_server() -> Generator[Any]:
    """Start the one S3-speaking server of the session."""
    from s3_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give an empty place in an object store, with the environment that leads there."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket()


def stage_model(rack: Any, index: int) -> Any:
    """Return what stage `index` trains of a rack that grows by appending on a frozen trunk."""
    from stackwise_core.config.schema import StackWiseConfig
    from stackwise_core.stages.anatomy import stage_anatomy
    from stackwise_core.training.stage_model import StageModel

    embedding = None if index else rack.embedding
    return StageModel(stage_anatomy(StackWiseConfig(), index), [rack.stacks[index]], rack.head, embedding)


def subset(names: Iterable[str], *kinds: str) -> set[str]:
    """Return the artifact names of some kinds, such as 'stack' or 'stack-1'."""
    return {name for name in names if name.startswith(tuple(f"{kind}-" for kind in kinds))}


# ---------------------------------------------------------------- the command line


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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        from flows.cli.main import main

        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run
