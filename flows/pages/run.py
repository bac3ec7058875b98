"""What came of a run, as one document, read from its artifacts: nothing is recorded for it while a run trains."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from flows.pages.provenance import trace
from flows.run.live import progress_line, read_live
from flows.run.numbers import percent
from flows.run.summary import StageSummary, comparable_losses, rise, state_of_run, summarise
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.keys import keys_of
from stackwise_core.config.unused import notes
from stackwise_core.errors import shown
from stackwise_core.stages.charges import charge
from stackwise_core.stages.plan import RunPlan, StagePlan
from stackwise_core.stages.stages import Anatomy
from storage.artifacts import Artifacts
from storage.manifest import Manifest
from storage.midstage import METRICS, read_metrics
from storage.runs import Attempt, find_run, is_live, known_attempts

Document = dict[str, Any]
POINTS = 200
"""Most points of the training curve of a stage; each is the mean of the steps around it."""
CURVES = ("loss", "gradient_norm", "learning_rate")


def describe_run(artifacts: Artifacts, name: str) -> Document:
    """Return the document of a run: what it was told, what came of each stage, and what all of it was made from.

    A stage that is not over yet has numbers only where something sealed knows them.

    Raises:
        ConfigError: there is no such run.
        ArtifactError: what the run recorded of itself is damaged.
    """
    attempt, newest = find_run(artifacts, name), known_attempts(artifacts, name)[-1]
    config, plan = attempt.config, attempt.plan
    keys = keys_of(config)
    summaries = summarise(artifacts, plan)
    stages = _stages(artifacts, config, plan, summaries)
    manifests = [found for stage in plan.stages if (found := artifacts.sealed(stage.ref("stack")))]
    judged = [stage for stage in stages if stage["validation_loss"] is not None]
    return {
        "run": name,
        "artifacts": artifacts.uri,
        "attempt": attempt.number,
        "started": attempt.start["started"],
        **_now(artifacts, newest, unfinished=any(summary.unfinished for summary in summaries)),
        "verdict": verdict_of(summaries, _taken(config, plan)),
        "warnings": [line for n in range(1, len(summaries) + 1) if (line := rise(summaries[:n]))],
        "notes": notes(config),
        "objective": config.training.progressive.training_objective,
        "parameters": max((stage["rack_parameters"] or 0 for stage in stages), default=0),
        "validation_loss": judged[-1]["validation_loss"] if judged else None,
        "tflop": _sum(stage["tflop"] for stage in stages),
        "tflop_recomputed": _sum(stage["tflop_recomputed"] for stage in stages),
        "seconds": _sum(stage["seconds"] for stage in stages),
        "tokens": _sum(stage["tokens"] for stage in stages),
        "cache_bytes": _sum(stage["cache_bytes"] for stage in stages),
        "changes": [key._asdict() for key in keys if key.changed],
        "config": {key.name: key.value for key in keys},
        "stages": stages,
        "parts": _parts(plan),
        "machines": _machines(manifests),
        "lineage": trace(artifacts, manifests[-1]) if manifests else [],
        "command": shlex.join(["stackwise", "train", f"{attempt.where}/config.yaml", "--artifacts", artifacts.uri]),
        "samples": [],
        "depths": [],
    }


def _now(artifacts: Artifacts, newest: Attempt, *, unfinished: bool) -> Document:
    """Return how the newest attempt of a run stands: its state, when it ended, and in words what that means."""
    live, outcome = is_live(artifacts, newest.name), newest.outcome
    state = state_of_run(outcome, live=live, all_done=not unfinished)
    said = read_live(newest.folder) if live else None
    message = outcome["message"] if outcome else ""
    standing = {
        "running": f"It is running: {progress_line(said)}." if said else "It is running.",
        "failed": f"It failed: {message}. The same command resumes it.",
        "stopped": f"It was {message}." if message.startswith("stopped") else f"It was stopped: {message}.",
        "killed": "Its process ended without a word, as when it is killed. The same command resumes it.",
    }
    ended = "" if live or outcome is None else outcome["ended"]
    return {"state": state, "ended": ended, "standing": standing.get(state, "")}


def _sum(values: Any) -> float:
    return math.fsum(value for value in values if value is not None)


def judged_at(document: Document) -> float | None:
    """Return the share of masked tokens that the validation loss of a run is at; None if its inputs are as they are."""
    judged = [stage for stage in document["stages"] if stage["validation_loss"] is not None]
    return judged[-1]["mask_ratio"] if judged else None


def _taken(config: StackWiseConfig, plan: RunPlan) -> str:
    """Return a sentence that says where the adopted stacks of a run came from; empty if it has none."""
    n = sum(1 for stage in plan.stages if stage.spec.adopted)
    which = "Its first stack was" if n == 1 else f"Its first {n} stacks were"
    return f" {which} taken from {shown(config.model.from_)}." if n else ""


def verdict_of(stages: Sequence[StageSummary], taken: str = "") -> str:
    """Return some sentences: how far the run is, what `taken` says of adopted stacks, and how its loss moved."""
    over = [stage for stage in stages if not stage.unfinished]
    judged = [stage for stage in stages if stage.validation_loss is not None]
    so_far = f"All {len(stages)} stages are" if len(over) == len(stages) else f"{len(over)} of {len(stages)} stages are"
    if len(stages) == 1:
        so_far = "Its one stage is" if over else "Its one stage is not"
    done = f"{so_far} done.{taken}"
    if not judged:
        return done
    last = judged[-1]
    at = "" if last.mask_ratio is None else f" at {percent(last.mask_ratio)} masked"
    losses = comparable_losses(judged)
    if len(judged) == 1 or not losses:
        return f"{done} Validation loss is {last.validation_loss:.4f} nats{at}, with {_stacks(last)}."
    of = "Validation loss"
    if any(stage.mask_ratio != last.mask_ratio for stage in judged):
        of, at = "Mean validation loss at equal mask ratios", ""
    moved = "fell" if losses[-1] < losses[0] else "rose"
    gain = losses[-2] - losses[-1]
    what = "the joint anneal" if last.stacks == judged[-2].stacks else "the last stack"
    gave = f"{what} lowered it by {gain:.4f}" if gain > 0 else f"{what} raised it by {-gain:.4f}"
    return (
        f"{done} {of} {moved} from {losses[0]:.4f} with {_stacks(judged[0])} to {losses[-1]:.4f} nats{at} with "
        f"{_stacks(last)}; {gave}."
    )


def _stacks(stage: StageSummary) -> str:
    return "one stack" if stage.stacks == 1 else f"{stage.stacks} stacks"


# ---------------------------------------------------------------- stages


def _stages(
    artifacts: Artifacts, config: StackWiseConfig, plan: RunPlan, summaries: Sequence[StageSummary]
) -> list[Document]:
    """Return a document of each stage, with what it added to the one before it."""
    data = artifacts.sealed(plan.data_ref)
    n_rows = data.count("train_sequences") if data else 0
    taken = {summary.stage: summary.steps for summary in summaries if summary.steps_planned}
    charges = charge(config, plan, n_rows, taken) if n_rows else []
    documents: list[Document] = []
    for stage, summary in zip(plan.stages, summaries, strict=True):
        made = _stage(artifacts, config, stage, summary)
        charged = charges[stage.index] if charges and made["digest"] and not stage.spec.adopted else None
        before = next((each for each in reversed(documents) if each["validation_loss"] is not None), None)
        documents.append(
            {
                **made,
                "tflop": charged and charged.total / 1e12,
                "tflop_recomputed": charged and (charged.trained + charged.recomputed) / 1e12,
                "gain": _gain(before, summary),
            }
        )
    return documents


def _stage(artifacts: Artifacts, config: StackWiseConfig, stage: StagePlan, summary: StageSummary) -> Document:
    kinds = summary.artifacts
    found = {
        kind: artifacts.sealed(stage.ref(kind)) for kind in ("stack", "validation", "activations") if kind in kinds
    }
    facts = {kind: manifest.facts if manifest else {} for kind, manifest in found.items()}
    stack = facts["stack"]
    manifest, optim = found["stack"], stage.spec.optim
    judged = facts.get("validation", {}) if stack else {}  # not of a stack that is gone, as in the summary
    rounded, exact = judged.get("validation_loss"), judged.get("validation_loss_exact")
    trained = 0 if stage.spec.adopted else summary.steps * optim.batch_size * config.data.seq_len
    return {
        **summary.model_dump(exclude={"states", "memory_bytes_peak"}),
        "state": "unfinished" if summary.unfinished else "done",
        "tokens": trained if stack else 0,
        "memory_bytes_forecast": stack.get("memory_bytes_forecast", 0),
        "memory_bytes_measured": stack.get("memory_bytes_peak"),
        "stack_bytes": manifest.n_bytes if manifest else None,
        "cache_error": None if rounded is None or exact is None else rounded - exact,
        "precision": {str(each.index): each.precision for each in stage.spec.stacks},
        "adapters": {
            str(each.index): {name: adapter.rank for name, adapter in each.adapters.items()}
            for each in stage.spec.stacks
            if each.adapters
        },
        "digest": manifest.digest if manifest else None,
        "curve": _curve(artifacts, manifest),
    }


def _gain(before: Document | None, stage: StageSummary) -> float | None:
    """Return by how much a stage lowered the validation loss, if its loss is comparable with that before it."""
    if before is None or stage.validation_loss is None or before["mask_ratio"] != stage.mask_ratio:
        return None
    return before["validation_loss"] - stage.validation_loss


def _curve(artifacts: Artifacts, manifest: Manifest | None) -> Document:
    """Return the training curve of a sealed stack: for a number of spans of steps, the mean of what was recorded."""
    if manifest is None or METRICS not in manifest.files:
        return {}
    records = read_metrics(artifacts.checked(manifest.ref) / METRICS)
    n = min(POINTS, len(records))
    edges = [round(at * len(records) / n) for at in range(n + 1)] if n else [0]
    spans = [records[start:end] for start, end in itertools.pairwise(edges)]
    curve: Document = {"steps": [span[-1]["step"] + 1 for span in spans], "of": len(records)}
    if inside := [record for record in records if "validation_loss" in record]:
        losses = [record["validation_loss"] for record in inside]
        curve["validation"] = {"steps": [record["step"] + 1 for record in inside], "loss": losses}
    return curve | {name: [mean(record.get(name) for record in span) for span in spans] for name in CURVES}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None if there is none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _parts(plan: RunPlan) -> list[Document]:
    """Return for each part of the rack, in data-flow order, what of it every stage trained; None before it is there."""
    specs, rows = [stage.spec for stage in plan.stages], list[Document]()
    for part in ("embedding", *specs[-1].anatomy.order, "head"):
        trained = list[str | None]()
        for spec in specs:
            there = _trains(spec.anatomy, part)
            if there is not None and spec.adopted:
                there = "nothing" if any(trained) else "adopted"
            trained.append(there)
        rows.append({"part": f"stack {part}" if isinstance(part, int) else part, "trained": trained})
    return rows


def _trains(anatomy: Anatomy, part: int | str) -> str | None:
    if isinstance(part, int):
        return anatomy.trains_of(part) if part in anatomy.order else None
    return "everything" if (anatomy.embedding_trains if part == "embedding" else anatomy.head_trains) else "nothing"


def _machines(manifests: Sequence[Manifest]) -> list[Document]:
    """Return on what each stage was trained; stages in a row that were trained alike are one entry."""
    found: list[Document] = []
    for manifest in manifests:
        if found and found[-1]["fingerprint"] == manifest.fingerprint:
            found[-1]["stages"].append(manifest.ref.stage)
        else:
            found.append({"stages": [manifest.ref.stage], "fingerprint": dict(manifest.fingerprint)})
    return found


# ---------------------------------------------------------------- several runs


def differences(documents: Sequence[Document]) -> list[Document]:
    """Return the keys whose values are not the same in all runs, without their names."""
    first = documents[0]["config"]
    return [
        {"name": name, "values": [document["config"].get(name) for document in documents]}
        for name in first
        if name != "run.name" and any(document["config"].get(name) != first[name] for document in documents)
    ]
