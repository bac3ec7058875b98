"""Looking after artifacts: find one, verify checksums and cached rows, collect garbage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from flows.run.numbers import size
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Kind, Ref
from storage.artifacts import Artifacts, State, artifacts_at
from storage.collect import Collection, collect, in_use_by, leftovers, plan_collection
from storage.demand import TASK_KINDS, made_by
from storage.errors import ArtifactError, ArtifactMissingError
from storage.manifest import read_manifest
from storage.reachability import pins
from storage.retirement import RETIRED
from storage.runs import Attempt, all_attempts, attempts, find_run, listed, meant, run_names


def find_artifact(artifacts: Artifacts, uri: str) -> Path:
    """Return the folder of an artifact given by path, by name or a unique prefix of it, or by RUN/STAGE[/KIND]."""
    if (Path(uri) / "manifest.json").exists():
        path = Path(uri).absolute()
        return path.resolve() if path.is_symlink() else path  # the user's own link
    if ref := planned_by_run(artifacts, uri):
        if artifacts.state(ref) is State.ABSENT:
            artifacts.sealed_folder(ref)  # raises, and says that it is not made yet
        return artifacts.folder(ref)
    name = Path(uri).name
    found = [folder for folder in artifacts.everything() if folder.name.startswith(name)]
    exact = [folder for folder in found if folder.name == name]
    if not found:
        if Path(uri).is_dir():
            read_manifest(Path(uri))  # raises, because it has no manifest
        runs = run_names(artifacts)
        hint = meant(uri.split("/")[0], runs) or f"runs: {listed(runs) or 'none'}"
        remedy = f"See `stackwise status RUN`; {hint}"
        raise ArtifactMissingError(uri, f"is no artifact or run in {artifacts.uri}", remedy)
    if len(exact or found) != 1:
        names = ", ".join(folder.name for folder in found[:5])
        raise ConfigError([Fault("artifact", repr(uri), f"{len(found)} begin so in {artifacts.uri}: {names}")])
    return (exact or found)[0]


def planned_by_run(artifacts: Artifacts, uri: str) -> Ref | None:
    """Return the artifact that RUN/STAGE[/KIND] names, made or not; None if `uri` is no such address.

    Raises:
        ConfigError: the run has no such stage, or the stage makes nothing of this kind.
    """
    parts = uri.split("/")
    if len(parts) > 1 and parts[1].isdecimal() and attempts(artifacts, parts[0]):
        return _of_run(artifacts, *parts)
    return None


def _of_run(artifacts: Artifacts, run: str, number: str, kind: str = "stack", *more: str) -> Ref:
    """Return what a run makes in a stage, or raise ConfigError with what there is."""
    plan = find_run(artifacts, run).plan
    stage = plan.stages[int(number)] if int(number) < len(plan.stages) else None
    kinds = [] if stage is None else [made for task in TASK_KINDS for made in made_by(task, stage)]
    if stage is None or kind not in kinds or more:
        there = f"stage {number} made {', '.join(kinds)}" if stage else f"it has stages 0 to {len(plan.stages) - 1}"
        raise ConfigError([Fault("artifact", repr("/".join((run, number, kind, *more))), f"RUN/STAGE/KIND: {there}")])
    return stage.ref(cast("Kind", kind))


# ---------------------------------------------------------------- verify


@dataclass
class Verification:
    """Result of a verification."""

    n_artifacts: int
    n_bytes: int = 0
    n_rows: int = 0
    """Cached rows that were recomputed from tokens."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One line for the user."""
        n = len(self.problems)
        verdict = f"{n} problem{'s' if n > 1 else ''}" if n else "all as sealed"
        artifacts = f"{self.n_artifacts} artifact{'s' if self.n_artifacts != 1 else ''}"
        counts = f"{artifacts}, {size(self.n_bytes)} read"
        return f"{verdict}: {counts}, {self.n_rows} cached rows derived again from tokens"


def verify(root: str, what: str | None, on_artifact: Callable[[str], None]) -> Verification:
    """Verify checksums, and sampled cache rows from tokens, of an artifact, of a run or (None) of everything.

    `on_artifact` is called with a line for each artifact, as soon as its bytes are read.
    """
    artifacts = artifacts_at(root).existing()
    folders, runs, damage = _chosen(artifacts, what)
    result = Verification(len(folders))
    if what is None and not artifacts.is_remote:
        try:
            result.notes = leftovers(artifacts)
        except ArtifactError as error:  # which a damaged record is too
            result.problems += [str(error)] if str(error) not in damage else []
    for folder in folders:
        found, n_bytes = artifacts.verify(folder)
        result.problems += found
        result.n_bytes += n_bytes
        retired = " (retired)" if not found and (folder / RETIRED).exists() else ""
        on_artifact(f"{'BAD ' if found else 'ok  '}{folder.name}{retired}")
    if what is None or what in run_names(artifacts):
        result.problems += [problem for run in runs for problem in _missing(artifacts, run)]
    if not result.problems:  # rows of damaged stores or weights would only repeat the problems
        names = {folder.name for folder in folders}
        for run in runs:
            try:
                result.n_rows += _recompute_rows(artifacts, run, names, result.problems)
            except ArtifactError as error:  # such as sealed tokens of a stranger that are none
                result.problems.append(str(error))
    result.problems = damage + result.problems
    return result


def _chosen(artifacts: Artifacts, what: str | None) -> tuple[list[Path], list[Attempt], list[str]]:
    """Return the folders to verify, the runs from which their stores can be recomputed, and what is damaged of runs."""
    runs = all_attempts(artifacts)
    damage = {name: [line for attempt in found for line in attempt.damage()] for name, found in runs.items()}
    intact = [find_run(artifacts, name) for name in runs if not damage[name]]
    if what is None:
        lines = [line for found in damage.values() for line in found]
        pins(artifacts, on_damage=lines.append)
        return artifacts.everything(), intact, lines
    if what not in runs:
        return [find_artifact(artifacts, what)], intact, []
    named = [run for run in intact if run.name == what]
    readable = named or [attempt for attempt in runs[what] if not attempt.damage()]
    refs = dict.fromkeys(ref for attempt in readable for ref in attempt.plan.recipes)
    return [artifacts.folder(ref) for ref in refs if artifacts.is_there(ref)], named, damage[what]


def _missing(artifacts: Artifacts, run: Attempt) -> list[str]:
    """Return which artifacts of a completed run are missing or have lost their manifest."""
    if run.outcome is None or run.outcome["state"] != "done":
        return []
    kept = {"stack", "cooldown", "validation"} | ({"activations"} if run.config.cache.keep == "all" else set())
    remedy = f"run `stackwise train` with the configuration of {run.name} again: it will be made"
    if run.plan.is_import:
        remedy = f"import the checkpoint again as {run.name}: what is missing will be made"
    problems: list[str] = []
    for ref in run.plan.recipes:
        if ref.kind == "data" or artifacts.state(ref) is not State.ABSENT:
            continue
        if ref.kind in kept or artifacts.is_there(ref):
            found = "has no manifest" if artifacts.is_there(ref) else "missing"
            problems.append(f"{artifacts.where(ref)}: {found}, though run {run.name} was done; {remedy}")
    return problems


def _recompute_rows(artifacts: Artifacts, run: Attempt, chosen: set[str], problems: list[str]) -> int:
    """Recompute sampled rows of a run's stores from tokens, add what differs to the problems, and count the rows."""
    from flows.run.stage import Stage  # these import torch
    from flows.run.validating import compare_store

    n_rows = 0
    plan = run.plan
    for ref in plan.recipes:
        if ref.kind != "activations" or ref.name not in chosen or artifacts.state(ref) is not State.SEALED:
            continue
        stage = Stage(
            adopted=plan.adopted,
            config=run.config,
            root=artifacts.uri,
            corpus=plan.data.corpus,
            corpus_bytes=plan.corpus_bytes,
            sources=plan.source_facts,
            index=ref.stage,
            recorded=plan,
        )
        checked, differing = compare_store(stage, ref)
        n_rows += checked
        if differing:
            what = f"{len(differing)} of {checked} sampled rows differ from tokens: {differing[:5]}"
            problems.append(f"{artifacts.where(ref)}: {what}")
    return n_rows


# ---------------------------------------------------------------- garbage


def collect_garbage(artifacts: Artifacts, keep_last: int | None, *, superseded: bool, dry_run: bool) -> Collection:
    """Remove what no run reaches, or with `dry_run` only list it.

    With `keep_last` only that many runs count, the newest, and the records of the others are removed too; with
    `superseded` only the newest attempt of each run counts. Raises `RunBusyError` if a run or another gc is active.
    """
    if keep_last is not None and keep_last < 0:
        raise ConfigError([Fault("--keep-last", str(keep_last), "a number of runs, 0 or more")])
    run = plan_collection if dry_run else collect
    collection = run(artifacts, keep_last, newest_only=superseded)
    if dry_run and not artifacts.is_remote and (others := in_use_by(artifacts)):
        collection.notes.append(f"now it would be refused: {artifacts.uri} is in use by {others}")
    return collection


def removal_lines(artifacts: Artifacts, collection: Collection) -> list[str]:
    """Return a line for each removal: its size, its path and the reason."""
    paths = [str(removal.path.relative_to(artifacts.root)) for removal in collection.removals]
    width = max(map(len, paths), default=0)
    return [
        f"{size(removal.n_bytes):>10}  {path:<{width}}  {removal.why}"
        for path, removal in zip(paths, collection.removals, strict=True)
    ]


def bytes_freed(collection: Collection, *, dry_run: bool) -> str:
    """Return a sentence that says how much was, or would be, freed."""
    verb = "would be freed; nothing was removed" if dry_run else "freed"
    return f"{size(collection.n_bytes)} ({collection.n_bytes:,} bytes) {verb}"
