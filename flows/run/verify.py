"""Verifying artifacts: every checksum, and sampled cache rows recomputed from tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flows.run.lookup import find_artifact
from flows.run.numbers import size
from stackwise_core.stages.identity import Kind
from storage.artifacts import Artifacts, State, artifacts_at
from storage.collect import leftovers
from storage.errors import ArtifactError
from storage.manifest import RETIRED
from storage.place import FOLDERS
from storage.runs import Attempt, find_run, run_names


@dataclass
class Verification:
    """Result of a verification."""

    n_artifacts: int = 0
    n_bytes: int = 0
    n_rows: int = 0
    """Cached rows that were recomputed from tokens."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One line for the user."""
        verdict = f"{len(self.problems)} problems" if self.problems else "all as sealed"
        counts = f"{self.n_artifacts} artifacts, {size(self.n_bytes)} read"
        return f"{verdict}: {counts}, {self.n_rows} cached rows derived again from tokens"


def verify(root: str, what: str | None, on_artifact: Callable[[str], None]) -> Verification:
    """Verify one artifact, the artifacts of a run, or everything.

    Args:
        root: the artifacts folder.
        what: an artifact or a run; None verifies everything.
        on_artifact: called with a line for each artifact, as soon as its bytes are read.
    """
    artifacts = artifacts_at(root).existing()
    folders, runs = _chosen(artifacts, what)
    result = Verification(len(folders))
    if what is None and not artifacts.is_remote:
        try:
            result.notes = leftovers(artifacts)
        except ArtifactError as error:
            result.problems.append(str(error))
    for folder in folders:
        found, n_bytes = artifacts.verify(folder)
        result.problems += found
        result.n_bytes += n_bytes
        on_artifact(f"{'BAD ' if found else 'ok  '}{folder.name}{' (retired)' if (folder / RETIRED).exists() else ''}")
    if what is None or what in run_names(artifacts):
        result.problems += _missing(artifacts, runs)
    if not result.problems:  # rows of damaged stores or weights would only repeat the problems
        names = {folder.name for folder in folders}
        for run in runs:
            result.n_rows += _recompute_rows(artifacts, run, names, result.problems)
    return result


def _chosen(artifacts: Artifacts, what: str | None) -> tuple[list[Path], list[Attempt]]:
    """Return the folders to verify, and the runs from which their stores can be recomputed."""
    every_run = [find_run(artifacts, name) for name in run_names(artifacts)]
    if what is None:
        return artifacts.everything(), every_run
    named = [run for run in every_run if run.name == what]
    if not named:
        return [find_artifact(artifacts, what)], every_run
    plan = named[0].plan
    refs = [plan.data_ref]
    for stage in plan.stages:
        refs += [stage.ref(kind) for kind in FOLDERS if kind != "data" and stage.recipe(kind)]
    return [artifacts.folder(ref) for ref in refs if artifacts.is_there(ref)], named


def _missing(artifacts: Artifacts, runs: list[Attempt]) -> list[str]:
    """Return the artifacts of completed runs that are missing or have lost their manifest."""
    problems: list[str] = []
    for run in runs:
        if run.outcome is None or run.outcome["state"] != "done":
            continue
        for stage in run.plan.stages:
            kinds: list[Kind] = ["stack", "validation"]
            if run.config.cache.keep == "all" and stage.activations is not None:
                kinds.append("activations")
            planned = [stage.ref(kind) for kind in FOLDERS if kind != "data" and stage.recipe(kind) is not None]
            absent = [ref for ref in planned if artifacts.state(ref) is State.ABSENT]
            absent = [ref for ref in absent if ref.kind in kinds or artifacts.is_there(ref)]
            remedy = f"run `stackwise train` with the configuration of {run.name} again: it will be made"
            problems += [
                f"{artifacts.where(ref)}: {'has no manifest' if artifacts.is_there(ref) else 'missing'}, "
                f"though run {run.name} was done; {remedy}"
                for ref in absent
            ]
    return problems


def _recompute_rows(artifacts: Artifacts, run: Attempt, chosen: set[str], problems: list[str]) -> int:
    """Recompute sampled rows of a run's stores from tokens, add what differs to the problems, and count the rows."""
    from flows.run.stage import Stage
    from flows.run.steps import compare_store

    n_rows = 0
    plan = run.plan
    for stage in plan.stages:
        if stage.activations is None or stage.ref("activations").name not in chosen:
            continue
        ref = stage.ref("activations")
        if artifacts.state(ref) is not State.SEALED:
            continue
        here = Stage(
            config=run.config,
            root=artifacts.uri,
            corpus=plan.data.corpus,
            corpus_bytes=plan.corpus_bytes,
            index=stage.index,
        )
        checked, differing = compare_store(here, ref)
        n_rows += checked
        if differing:
            what = f"{len(differing)} of {checked} sampled rows differ from tokens: {differing[:5]}"
            problems.append(f"{artifacts.where(ref)}: {what}")
    return n_rows
