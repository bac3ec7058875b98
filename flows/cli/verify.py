"""`stackwise verify`: every byte against its seal, sampled rows against what tokens give."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.cli.inspect import find_artifact
from flows.run.numbers import size
from stackwise_core.stages.identity import Kind
from storage.artifacts import Artifacts, State, artifacts_at
from storage.collect import leftovers
from storage.errors import ArtifactError
from storage.manifest import KINDS, RETIRED
from storage.runs import Attempt, find_run, run_names


def verify(root: str, what: str | None) -> int:
    """Verify one artifact, the artifacts of a run, or everything; print what is wrong.

    Returns:
        0 if all is as it was sealed, 3 otherwise.
    """
    artifacts = artifacts_at(root).existing()
    folders, runs = _chosen(artifacts, what)
    problems, notes = list[str](), list[str]()
    if what is None and not artifacts.is_remote:
        try:
            notes = leftovers(artifacts)
        except ArtifactError as error:
            problems.append(str(error))
    total = 0
    for folder in folders:
        found, n_bytes = artifacts.verify(folder)
        problems += found
        total += n_bytes
        print(f"{'BAD ' if found else 'ok  '}{folder.name}{' (retired)' if (folder / RETIRED).exists() else ''}")
    problems += _missing(artifacts, runs) if what is None or what in run_names(artifacts) else []
    n_rows = 0
    if not problems:  # rows of damaged stores or weights would only say the same again
        for run in runs:
            found, checked = _derive_rows(artifacts, run, {folder.name for folder in folders})
            problems += found
            n_rows += checked
    for line in (*problems, *notes):
        print(line, file=sys.stderr)
    verdict = f"{len(problems)} problems" if problems else "all as sealed"
    print(f"{verdict}: {len(folders)} artifacts, {size(total)} read, {n_rows} cached rows derived again from tokens")
    return 3 if problems else 0


def _chosen(artifacts: Artifacts, what: str | None) -> tuple[list[Path], list[Attempt]]:
    """Return the folders to verify, and the runs by which their stores can be derived again."""
    every_run = [find_run(artifacts, name) for name in run_names(artifacts)]
    if what is None:
        return artifacts.everything(), every_run
    named = [run for run in every_run if run.name == what]
    if not named:
        return [find_artifact(artifacts, what)], every_run
    plan = named[0].plan
    refs = [plan.data_ref]
    for stage in plan.stages:
        refs += [stage.ref(kind) for kind in KINDS if kind != "data" and stage.recipe(kind)]
    return [artifacts.folder(ref) for ref in refs if artifacts.is_there(ref)], named


def _missing(artifacts: Artifacts, runs: list[Attempt]) -> list[str]:
    """Return what runs that were brought to their end have no longer, or only without its seal."""
    problems: list[str] = []
    for run in runs:
        if run.outcome is None or run.outcome["state"] != "done":
            continue
        for stage in run.plan.stages:
            kinds: list[Kind] = ["stack", "validation"]
            if run.config.cache.keep == "all" and stage.activations is not None:
                kinds.append("activations")
            planned = [stage.ref(kind) for kind in KINDS if kind != "data" and stage.recipe(kind) is not None]
            absent = [ref for ref in planned if artifacts.state(ref) is State.ABSENT]
            absent = [ref for ref in absent if ref.kind in kinds or artifacts.is_there(ref)]
            remedy = f"run `stackwise train` with the configuration of {run.name} again: it will be made"
            problems += [
                f"{artifacts.where(ref)}: {'has no manifest' if artifacts.is_there(ref) else 'missing'}, "
                f"though run {run.name} was done; {remedy}"
                for ref in absent
            ]
    return problems


def _derive_rows(artifacts: Artifacts, run: Attempt, chosen: set[str]) -> tuple[list[str], int]:
    """Derive sampled rows of a run's stores again from tokens."""
    from flows.run.boundaries import compare_store
    from flows.run.stage import Stage

    problems: list[str] = []
    n_rows = 0
    plan = run.plan
    for stage in plan.stages:
        if stage.activations is None or stage.ref("activations").name not in chosen:
            continue
        if artifacts.state(stage.ref("activations")) is not State.SEALED:
            continue
        here = Stage(
            config=run.config,
            root=artifacts.uri,
            corpus=plan.data.corpus,
            corpus_bytes=plan.corpus_bytes,
            index=stage.index,
        )
        checked, differing = compare_store(here, stage.ref("activations"))
        n_rows += checked
        if differing:
            folder = artifacts.where(stage.ref("activations"))
            problems.append(f"{folder}: {len(differing)} of {checked} sampled rows differ from tokens: {differing[:5]}")
    return problems, n_rows
