"""The trackers that curves can be sent to: each imports its package when it starts, and is told from one thread."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stackwise_core.config.schema import TrackerName
from stackwise_core.errors import Fault


class Tracker(Protocol):
    """What is told to a tracker. Values are those of `metrics.jsonl`; steps count over all stages, from 1."""

    look: str
    """What to do to see the curves; known once it has started."""

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        """Begin the run `ids["run"]`, or go on with it, and return its last step; 0 if none has to be left out."""
        ...

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Add values of a step, measured at a time [s since 1970]."""
        ...

    def artifact(self, path: Path) -> None:
        """Add a small file."""
        ...

    def finish(self, outcome: str) -> None:
        """End it: done, stopped or failed."""
        ...


def tracker_faults(names: Sequence[str], option: str = "tracking.to") -> list[Fault]:
    """Return what to install, for each tracker whose package is missing."""
    missing = [
        name for name in names if importlib.util.find_spec(name) is None
    ]  # each package is called as its tracker
    return [Fault(option, repr(name), f"it is not installed: pip install 'stackwise[{name}]'") for name in missing]


def tracker_of(name: TrackerName, folder: Path, project: str) -> Tracker:
    """Return a tracker that has not started; what it keeps on this machine goes to a folder."""
    made: dict[TrackerName, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
    return made.get(name, Trackio)(folder.absolute(), project)


class TensorBoard:
    """Event files. Steps that come again hide those of before, as TensorBoard does for a run that was restarted."""

    def __init__(self, folder: Path, project: str) -> None:
        """Write to a folder of the project."""
        self._folder, self._writer, self._texts = folder / "tensorboard" / project, None, dict[str, str]()
        self.look = f"tensorboard --logdir {self._folder}"

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        """Open the folder when the first step is known: from it on earlier events are hidden."""
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]

        def opened(step: int) -> SummaryWriter:
            return SummaryWriter(str(self._folder / ids["run"]), purge_step=step)

        self._open = opened
        return 0

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Add scalars."""
        if self._writer is None:
            self._writer = self._open(step)
            for name, text in self._texts.items():
                self._writer.add_text(name, f"```\n{text}\n```")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, walltime=at)

    def artifact(self, path: Path) -> None:
        """Keep a text until the first step opens the folder: event files hold no files."""
        self._texts[path.name] = path.read_text()

    def finish(self, outcome: str) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """W&B, offline without a key or with WANDB_MODE=offline. It drops steps below its last, so they are left out."""

    def __init__(self, folder: Path, project: str) -> None:
        """Keep its files in a folder."""
        self._folder, self._project, self.look = folder, project, "wandb sync"

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        """Begin or resume the run of this id; without a key it would ask for one at the terminal."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True)
        wandb.setup(settings)
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        self._run = wandb.init(
            project=self._project,
            name=run,
            id=ids["run"],
            resume="allow",
            mode=mode,
            dir=str(self._folder),
            config={**config, "artifacts": dict(ids)},
            settings=settings,
        )
        self.look = f"wandb sync {Path(self._run.dir).parent}" if mode == "offline" else self._run.url or "wandb.ai"
        return self._run.step

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Add a row of its history."""
        self._run.log({**metrics, "time": at}, step=step)

    def artifact(self, path: Path) -> None:
        """Add a file of the run."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self, outcome: str) -> None:
        """End the process beside ours."""
        self._run.finish(exit_code=0 if outcome == "done" else 1)


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI, or a SQLite file. Steps that the run has already are left out."""

    def __init__(self, folder: Path, project: str) -> None:
        """Name the experiment after the project."""
        self._project, self._given = project, os.environ.get("MLFLOW_TRACKING_URI")
        self._folder, self._uri = folder, self._given or f"sqlite:///{folder}/mlflow.db"
        self.look = f"mlflow ui --backend-store-uri {self._uri}"

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        """Find the run that has our id as a tag, or create it."""
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param, RunTag  # pyright: ignore[reportMissingImports]

        self._folder.mkdir(parents=True, exist_ok=True)
        self._client = client = MlflowClient(self._uri)
        experiment = client.get_experiment_by_name(self._project)
        where = None if self._given else (self._folder / "mlflow").as_uri()
        known = experiment.experiment_id if experiment else client.create_experiment(self._project, where)
        found = client.search_runs([known], f"tags.`stackwise.run` = '{ids['run']}'", max_results=1)
        created = not found
        self._run = (found[0] if found else client.create_run(known, run_name=run)).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in config.items()] if created else []
        for at in range(0, len(params), 100):  # as many as a call takes
            client.log_batch(self._run, params=params[at : at + 100])
        client.log_batch(self._run, tags=[RunTag(f"stackwise.{key}", value) for key, value in ids.items()][:100])
        client.update_run(self._run, status="RUNNING")
        return max((metric.step for metric in client.get_metric_history(self._run, "train/loss")), default=0)

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Add one batch of values."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = round(1000 * at)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def artifact(self, path: Path) -> None:
        """Add a file of the run."""
        self._client.log_artifact(self._run, str(path))

    def finish(self, outcome: str) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, {"done": "FINISHED", "stopped": "KILLED"}.get(outcome, "FAILED"))


class Trackio:
    """trackio, in its own folder of this machine. Steps that the run has already are left out."""

    def __init__(self, folder: Path, project: str) -> None:
        """Name the project."""
        self._project, self.look = project, f"trackio show --project {project}"

    def start(self, run: str, config: Mapping[str, Any], ids: Mapping[str, str]) -> int:
        """Begin or resume the run of this name."""
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=self._project,
            name=ids["run"],
            resume="allow",
            config={**config, "artifacts": dict(ids)},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return max(0, getattr(self._run, "_next_step", 0) - 1)  # it has no public name for its last step

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Add a row."""
        self._run.log({**metrics}, step=step)

    def artifact(self, path: Path) -> None:
        """Its runs have their configuration already."""

    def finish(self, outcome: str) -> None:
        """Write what is left."""
        self._run.finish()
