"""Runs: their names, their attempts, and which of them are live."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, CorpusError, Fault, StageInterruptedError
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan
from stackwise_core.strict import MOST_OF_A_LIST, read_bounded, told
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactCorruptError, RunBusyError
from storage.files import write_text
from storage.links import check_no_link
from storage.locks import Holder, OnWait, no_wait, this_process
from storage.place import OUTCOME, PLANS_LOCK, RUNS
from storage.records import CHANGED, as_sealed, hash_of, sealed, unsealed
from storage.retirement import RETIRABLE

START = "start.json"
"""Written last when an attempt begins: without it the attempt does not exist, and it vouches for the others."""
_MOST_NAMES = 12
"""Of runs that a message lists."""
_asked_by: ContextVar[str] = ContextVar("asked_by", default="")
_Parsed = TypeVar("_Parsed")


class Start(BaseModel, strict=True):
    """When, where and by which process an attempt was started, as start.json says it."""

    started: str
    """ISO 8601, UTC."""
    pid: int = Field(ge=0, lt=2**31)
    host: str
    asked_by: str = ""
    files: dict[str, str] = {}
    """Name -> sha256 of the other files that an attempt begins with; empty in those of version 0.1."""


class Outcome(BaseModel, strict=True):
    """How an attempt ended, as outcome.json says it."""

    state: Literal["done", "stopped", "failed"]
    message: str
    ended: str
    """ISO 8601, UTC."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    name: str
    number: int
    folder: Path
    where: str
    """What messages call its folder: for a bucket a URI, not the copy on this machine."""

    @property
    def plan(self) -> RunPlan:
        """What it planned."""
        return self._parsed("plan.json", RunPlan.model_validate_json)

    @property
    def n_bytes(self) -> int:
        """Size of its plan; 0 if it is missing."""
        try:
            return (self.folder / "plan.json").lstat().st_size
        except FileNotFoundError:
            return 0

    @property
    def config(self) -> StackWiseConfig:
        """The configuration as it was written, not checked against today's rules and files."""
        path = self.folder / "config.yaml"
        return self._parsed(path.name, lambda data: StackWiseConfig.read_unchecked(path, data))

    @property
    def start(self) -> dict[str, Any]:
        """When, where and by which process it was started."""
        return self._start.model_dump(exclude={"files"})

    @functools.cached_property
    def _start(self) -> Start:  # written once
        return self._parsed(START, lambda data: Start.model_validate(unsealed(data)))

    @functools.cached_property
    def _real_folder(self) -> Path:
        check_no_link(self.folder.parents[3], self.folder)
        return self.folder

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How it ended; None while it lives, or if it was killed."""
        if not os.path.lexists(self.folder / OUTCOME):
            return None
        return self._parsed(OUTCOME, lambda data: Outcome.model_validate(unsealed(data)).model_dump())

    def damage(self) -> list[str]:
        """Return a line for each of its files that is not what was written."""
        found: list[str] = []
        for read in (lambda: self._start, lambda: self.config, lambda: self.plan, lambda: self.outcome):
            try:
                read()
            except ArtifactCorruptError as error:
                found.append(str(error))
        return list(dict.fromkeys(found))  # without its start, none of the others can be checked

    def read(self, file: str) -> bytes:
        """Return the bytes of one of its files, which are those that were written."""
        return self._parsed(file, as_sealed if file in (START, OUTCOME) else bytes)

    def _parsed(self, file: str, parse: Callable[[bytes], _Parsed]) -> _Parsed:
        """Return what a file holds, as `parse` reads it.

        Raises:
            ArtifactCorruptError: it is missing, or is not what was written.
        """
        path, folder = f"{self.where}/{file}", self._real_folder
        expected = None if file in (START, OUTCOME) else self._start.files.get(file)
        try:
            data = read_bounded(folder / file, MOST_OF_A_LIST)
            if expected not in (None, hash_of(data)):
                raise ValueError(CHANGED)
            return parse(data)
        except PermissionError:
            raise ArtifactCorruptError(path, "may not be read by this user", "Let this user read it") from None
        except (ValueError, FileNotFoundError) as error:  # a ConfigError is a ValueError
            if unknown := _unknown_keys(error):
                problem = f"has keys that this version does not know ({unknown})"
                raise ArtifactCorruptError(path, problem, "Use the version of StackWise that wrote it") from None
            problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({told(error)})"
            raise ArtifactCorruptError(path, problem, self._remedy(file)) from None

    def _remedy(self, file: str) -> str:
        if self.where != str(self.folder):  # a bucket: the copy on this machine may be what is damaged
            return f"Remove {self.folder}, a copy; if that does not help, remove {self.where}: artifacts stay"
        if file == OUTCOME:
            return "Remove it: artifacts stay, and `stackwise train` completes the run"
        return f"Remove {self.where}: artifacts stay, and `stackwise train` registers the run anew"


def _unknown_keys(error: Exception) -> str:
    """Return the unknown keys of a record, if there are any because newer code wrote it.

    Of alternatives, such as the kinds of a recipe, all but the right one lack keys too and are left out.
    """
    faults = error.errors() if isinstance(error, ValidationError) else []
    otherwise = {fault["loc"][:-1] for fault in faults if fault["type"] != "extra_forbidden"}
    unknown = [fault["loc"] for fault in faults if fault["loc"][:-1] not in otherwise]
    return ", ".join(".".join(map(str, place)) for place in unknown)


def attempts(artifacts: Artifacts, name: str) -> list[Attempt]:
    """Return the attempts of a run, oldest first."""
    if "/" in name:  # not a name: it would lead out of the folder of runs
        return []
    found = (artifacts.root / RUNS / name / "attempts").glob("*")
    folders = sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))
    return [
        Attempt(name, int(folder.name), folder, artifacts.location(folder))
        for folder in folders
        if (folder / START).exists()
    ]


def run_names(artifacts: Artifacts) -> list[str]:
    """Return the names of all runs, sorted."""
    return list(all_attempts(artifacts))


def all_attempts(artifacts: Artifacts) -> dict[str, list[Attempt]]:
    """Return the attempts of every run, oldest first, by its name; the names are sorted."""
    names = sorted(path.name for path in (artifacts.root / RUNS).glob("*"))
    return {name: found for name in names if (found := attempts(artifacts, name))}


def find_run(artifacts: Artifacts, name: str) -> Attempt:
    """Return the attempt that says what a run is, or raise ConfigError with the names of the runs that exist.

    It is the newest, or the one with the most stacks if the newest only repeats the first of them: a run that was grown
    does not shrink because the file it began with is started again.
    """
    return counting(artifacts, known_attempts(artifacts, name))[-1]


def known_attempts(artifacts: Artifacts, name: str) -> list[Attempt]:
    """Return the attempts of a run, oldest first, or raise ConfigError with the runs that may be meant."""
    if found := attempts(artifacts, name):
        return found
    names = run_names(artifacts)
    hint = meant(name, names) or f"there: {listed(names) or 'none yet'}"
    raise ConfigError([Fault("RUN", repr(name), f"no such run in {artifacts.uri}; {hint}")])


def meant(name: str, names: Sequence[str]) -> str:
    """Return 'did you mean NAME?' of the name that is most like a wrong one; empty if none is."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else ""


def listed(names: Sequence[str]) -> str:
    """Return the names of runs for a message: of many the first, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more, see `stackwise status`" if more > 0 else "")


def counting(artifacts: Artifacts, found: Sequence[Attempt]) -> list[Attempt]:
    """Return which attempts of a run, given oldest first, still count: the newest, then each that made more stacks.

    The stacks of each are the first of the next.
    """
    chain = [found[-1]]
    for before in reversed(found[:-1]):
        if before.n_bytes > chain[-1].n_bytes:  # a plan of more stages has more bytes
            more = _stacks(before.plan)[len(ours := _stacks(chain[-1].plan)) :]
            if more and _stacks(before.plan)[: len(ours)] == ours and artifacts.state(more[0]) is State.SEALED:
                chain.append(before)
    return chain


def _stacks(plan: RunPlan) -> list[Ref]:
    """Return the stacks that a plan adds, without a joint anneal."""
    return [stage.ref("stack") for stage in plan.stages if stage.build or stage.spec.adopted]


def is_live(artifacts: Artifacts, name: str) -> bool:
    """Say whether any process holds the run now. Writes nothing, so it works on read-only media."""
    return artifacts.place.is_held(f"run-{name}")


def live_runs(artifacts: Artifacts) -> dict[str, Holder]:
    """Return the live runs, and the process that started each."""
    runs = all_attempts(artifacts)
    return {name: holder_of_run(found[-1]) for name, found in runs.items() if is_live(artifacts, name)}


def holder_of_run(attempt: Attempt) -> Holder:
    """Return the process that started an attempt."""
    start = attempt.start
    return Holder(pid=start["pid"], host=start["host"], since=start["started"])


@contextlib.contextmanager
def asking(who: str) -> Generator[None]:
    """Record who asked for the attempts that begin while the block lasts, such as a flow run."""
    token = _asked_by.set(who)
    try:
        yield
    finally:
        _asked_by.reset(token)


def asked_before(artifacts: Artifacts, name: str, who: str) -> Attempt | None:
    """Return the newest attempt of a run that `who` asked for, if there is one."""
    return next((found for found in reversed(attempts(artifacts, name)) if found.start.get("asked_by") == who), None)


@contextlib.contextmanager
def begin_attempt(
    artifacts: Artifacts, config: StackWiseConfig, plan: RunPlan, on_wait: OnWait = no_wait
) -> Generator[Attempt]:
    """Register a run for as long as the block lasts, before its first task.

    Live processes may share a run if their configurations are equal: each artifact is then made by the first to
    begin it. Stores that a live run plans to read are not retired, and gc removes nothing that it planned.

    Raises:
        RunBusyError: the run is live with another configuration.
        CorpusError: the run's name was used with another text.
    """
    name = config.run.name
    alive = artifacts.lock(f"run-{name}", shared=True)
    with artifacts.lock("gc", shared=True, on_wait=on_wait):
        with artifacts.lock(PLANS_LOCK, on_wait=on_wait):
            artifacts.place.refresh_records()
            others_live = is_live(artifacts, name)
            _check_previous(artifacts, config, plan, others_live)
            attempt = attempts(artifacts, name)[-1] if others_live else _write_attempt(artifacts, config, plan)
            while not alive.try_acquire():  # a process that tests the lock holds it for an instant
                time.sleep(0.01)
        try:
            yield attempt
            _write_outcome(artifacts, attempt, "done", "")
        except BaseException as error:
            stopped = isinstance(error, StageInterruptedError) or not isinstance(error, Exception)
            _write_outcome(artifacts, attempt, "stopped" if stopped else "failed", str(error))
            raise
        finally:
            alive.release()


def _check_previous(artifacts: Artifacts, config: StackWiseConfig, plan: RunPlan, others_live: bool) -> None:
    name = config.run.name
    before = attempts(artifacts, name)
    if not before:
        return
    last = before[-1]
    if others_live and (last.plan != plan or last.config.cache.keep != config.cache.keep):
        who = last.start
        raise RunBusyError(
            f"run.name: got {name!r}; process {who['pid']} on {who['host']} is running it with another configuration "
            f"({last.folder / 'config.yaml'}); wait for it, stop it, or choose another run.name"
        )
    _check_sample(config, plan, last.plan)
    if last.config.data == config.data and last.plan.data.corpus != plan.data.corpus:
        raise CorpusError(
            f"data.source: got {config.data.source!r}; its text is not what run {name!r} was started on "
            f"({last.start['started']}); restore the text, or choose another run.name to train on the new one"
        )


def _check_sample(config: StackWiseConfig, plan: RunPlan, last: RunPlan) -> None:
    """Reject the default sample for a run that older code began with another: its stages would be trained again."""
    as_before = plan.data.model_copy(update={"sample": last.data.sample})
    if "sample" not in config.data.model_fields_set and plan.data != last.data == as_before:
        before = f"run {config.run.name!r} was started with {last.data.sample!r}"
        allowed = f"{before}: set it to that to go on with its stages, or choose another run.name"
        raise ConfigError([Fault("data.sample", f"nothing, so {plan.data.sample!r} is taken", allowed)])


def _write_attempt(artifacts: Artifacts, config: StackWiseConfig, plan: RunPlan) -> Attempt:
    before = attempts(artifacts, config.run.name)
    number = before[-1].number + 1 if before else 1
    base = artifacts.root / RUNS / config.run.name
    folder = base / "attempts" / f"{number:04d}"
    check_no_link(artifacts.root, folder)
    folder.mkdir(parents=True, exist_ok=True)
    me = this_process()
    start: dict[str, Any] = {"started": me.since, "pid": me.pid, "host": me.host}
    if who := _asked_by.get():
        start["asked_by"] = who
    files = {"config.yaml": config.to_yaml(), "plan.json": plan.model_dump_json(indent=1)}
    start["files"] = {name: hash_of(text.encode()) for name, text in files.items()}
    texts = {folder / name: text for name, text in files.items()}
    texts |= {folder / START: sealed(start), base / "current": f"{number:04d}\n"}
    for path, text in texts.items():
        write_text(path, text)
    for path in texts:
        artifacts.place.share(path)
    return Attempt(config.run.name, number, folder, artifacts.location(folder))


def _write_outcome(artifacts: Artifacts, attempt: Attempt, state: str, message: str) -> None:
    with contextlib.suppress(ArtifactCorruptError):  # it is replaced
        if attempt.outcome and attempt.outcome["state"] == "done":
            return  # another process of the same run finished it
    now = datetime.now(UTC).isoformat(timespec="seconds")
    message = message.encode(errors="backslashreplace").decode()  # a name of a file may be no text
    with contextlib.suppress(OSError):  # a full disk or a lost connection must not hide the error that ended the run
        write_text(attempt.folder / OUTCOME, sealed({"state": state, "message": message, "ended": now}))
        artifacts.place.share(attempt.folder / OUTCOME)


def retire_superseded(artifacts: Artifacts, plan: RunPlan, index: int, run_name: str) -> list[Ref]:
    """Retire the store and the optimizer state of the stage below once those of stage `index` are sealed and validated.

    Returns which of them stay because another live run plans to read them.
    """
    stage, kept = plan.stages[index], list[Ref]()
    below = plan.stages[index - 1] if index else None
    for kind in sorted(RETIRABLE):
        if below is None or stage.recipe(kind) is None or below.recipe(kind) is None:
            continue
        ref, above = below.ref(kind), artifacts.state(stage.ref(kind))
        state = artifacts.state(ref)
        superseded = above in (State.SEALED, State.RETIRED) and artifacts.state(stage.ref("validation")) is State.SEALED
        if state is State.RETIRED:
            artifacts.retire(ref)  # again: a kill may have left some of its data
        elif superseded and state is State.SEALED and not retire_unless_read(artifacts, ref, run_name):
            kept.append(ref)
    return kept


def retire_unless_read(artifacts: Artifacts, ref: Ref, own_run: str) -> bool:
    """Retire an artifact unless another live run plans to read it; say whether it was retired."""
    with artifacts.lock(PLANS_LOCK):
        artifacts.place.refresh_records()
        for name, found in all_attempts(artifacts).items():
            if name != own_run and is_live(artifacts, name) and ref in found[-1].plan.recipes:
                return False
        artifacts.mark_retired(ref)
    artifacts.retire(ref)  # without the lock, because deleting takes long
    return True


def retire_stores(artifacts: Artifacts, plan: RunPlan, run_name: str) -> None:
    """Retire stores and optimizer states of a run that is done and will not be grown, unless another plans them too."""
    others = [found[-1].plan for name, found in all_attempts(artifacts).items() if name != run_name]
    planned = set[Ref]().union(*(other.recipes for other in others))
    for ref in plan.recipes.keys() - planned:
        if ref.kind in RETIRABLE and artifacts.state(ref) is State.SEALED:
            retire_unless_read(artifacts, ref, run_name)


def register_complete(artifacts: Artifacts, config: StackWiseConfig, plan: RunPlan) -> None:
    """Register a run whose artifacts all exist, unless its newest attempt is the same; retire what it does not keep."""
    before = attempts(artifacts, config.run.name)
    if not before or before[-1].plan != plan or before[-1].config != config:
        with begin_attempt(artifacts, config, plan):
            pass
    if config.cache.keep == "last":
        for index in range(len(plan.stages)):
            retire_superseded(artifacts, plan, index, config.run.name)
