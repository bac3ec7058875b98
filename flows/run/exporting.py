"""A run as a folder for other programs: its rack, its tokenizer, and the record of how it was made."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.run.summary import STAGE_COLUMNS, summarise
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.interop.card import Card, code
from stackwise_core.interop.hf_export import Exported, Format, export_rack
from stackwise_core.interop.parts import Dtype
from stackwise_core.stages.plan import RunPlan
from storage.racks import OpenedRun, open_run


def export_run(
    artifacts: str,
    run: str,
    to: str | Path,
    *,
    depth: int | None = None,
    format: Format = "hf",
    dtype: Dtype = "float32",
    time_step: int | None = None,
    force: bool = False,
) -> tuple[Exported, list[str]]:
    """Write the rack of a run into a folder for other programs.

    Args:
        artifacts: what `--artifacts` takes.
        run: its name.
        to: the folder.
        depth: the number of stacks; None is as far as the run is trained.
        format: for transformers (hf) or llama.cpp (gguf).
        dtype: the type of the written tensors.
        time_step: for a run whose time is an input, the step to fix.
        force: replace an earlier export.

    Returns:
        What was written, and notes on what was left out.

    Raises:
        ConfigError: there is no such run or depth, it has no such export, or the folder holds something else.
        ArtifactError: an artifact is missing or damaged.
    """
    recorded = open_run(artifacts, run, depth)
    config, plan = recorded.config, recorded.attempt.plan
    tokenizer = _tokenizer(recorded)
    path = None if config.data.tokenizer == "byte" else Path(config.data.tokenizer)
    exported = export_rack(
        recorded.rack(),
        to,
        tokenizer=tokenizer,
        tokenizer_path=path,
        objective=config.training.progressive.training_objective,
        format=format,
        dtype=dtype,
        seq_len=plan.data.seq_len,
        time_step=time_step,
        force=force,
        card=_card(recorded, config),
        about=_about(recorded),
    )
    return exported, _notes(recorded, plan, depth, tokenizer)


def _tokenizer(recorded: OpenedRun) -> Tokenizer | None:
    """Return the tokenizer of a run; None if its corpus came as tokens and it has none of its own."""
    data, rows = recorded.config.data, recorded.stages[-1].shape.vocab_size
    return (
        None if data.tokenizer == "byte" and holds_tokens(data.source) and rows != _OF_BYTES else recorded.tokenizer()
    )


_OF_BYTES = 264
"""Rows of the embedding with the byte tokenizer, by default."""


def _notes(recorded: OpenedRun, plan: RunPlan, depth: int | None, tokenizer: Tokenizer | None) -> list[str]:
    notes: list[str] = []
    left = len(plan.stages) - len(recorded.stages)
    if depth is None and left:
        notes.append(f"{left} of the run's {len(plan.stages)} stages are not finished; this is the rack before them")
    if tokenizer is None:
        notes.append("the corpus came as tokens, and data.tokenizer does not name what made them: no tokenizer written")
    return notes


def _about(recorded: OpenedRun) -> dict[str, Any]:
    """Return what stackwise.json says of the run: ids and digests, by which every artifact can be found again."""
    last, manifest = recorded.stages[-1], recorded.artifacts.manifest
    return {
        "stackwise": version("stackwise"),
        "run": recorded.attempt.name,
        "depth": len(last.spec.stacks),
        "order": last.spec.anatomy.order,
        "data": recorded.attempt.plan.data_ref.sha256,
        "stacks": [
            {
                "stage": stage.index,
                "how": stage.spec.name,
                "time_step": stage.spec.time_step,
                "id": stage.ref("stack").sha256,
                "digest": manifest(stage.ref("stack")).digest,
            }
            for stage in recorded.stages
        ],
    }


def _card(recorded: OpenedRun, config: StackWiseConfig) -> Card:
    plan = recorded.attempt.plan
    summaries = summarise(recorded.artifacts, plan)[: len(recorded.stages)]
    source = config.data.source
    # A card is published: a path of this machine says no more than the name of the file.
    corpus = source if source.startswith("hf:") else Path(source).name
    growth = config.training.progressive
    ratio = f", {plan.stages[0].mask.mean_ratio:.0%} masked in stage 0" if plan.stages[0].mask else ""
    return Card(
        name=recorded.attempt.name,
        stacks=len(recorded.stages[-1].spec.stacks),
        facts=(
            f"Objective: {growth.training_objective}{ratio}; sequences of {plan.data.seq_len} tokens.",
            f"Corpus: {code(corpus)}; tokenizer: {code(plan.data.tokenizer)}.",
            f"StackWise {version('stackwise')}, trunk {growth.trunk_strategy}, seed {config.run.seed}.",
        ),
        columns=STAGE_COLUMNS[:-1],
        rows=tuple(tuple(summary.cells[:-1]) for summary in summaries),
    )
