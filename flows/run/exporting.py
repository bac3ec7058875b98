"""A run as a folder for other programs: its rack, its tokenizer, and the record of how it was made."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from flows.run.numbers import percent
from flows.run.summary import STAGE_COLUMNS, summarise
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.mixture import sources_of
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.interop.card import Card, code, grown
from stackwise_core.interop.config_json import describe
from stackwise_core.interop.hf_export import Exported, Format, export_rack
from stackwise_core.interop.parts import Dtype
from stackwise_core.strict import MOST_OF_A_LIST, parse_object, read_bounded
from storage.adopt import NO_TOKENIZER
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
    config, plan, origin = recorded.config, recorded.attempt.plan, _origin(recorded)
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
        seq_len=max(plan.data.seq_len, origin.context if origin else 0),
        family=origin.family if origin else "",
        time_step=time_step,
        force=force,
        card=_card(recorded, config, origin),
        about=_about(recorded, origin),
    )
    return exported, _notes(recorded, depth, tokenizer)


class _Origin(NamedTuple):
    """What was imported, and grown on."""

    family: str
    name: str
    """Of the folder."""
    repository: str
    """owner/name, where its config.json says it."""
    sha256: str
    context: int
    """The longest text [tokens]."""
    stacks: int


def _origin(recorded: OpenedRun) -> _Origin | None:
    """Return what the first stacks of a run were imported from; None if they were not."""
    adopted = recorded.attempt.plan.adopted
    if not recorded.is_imported:
        return None
    ref = adopted[-1].ref(len(adopted) - 1)
    source = recorded.artifacts.manifest(ref).facts["imported"]
    config = parse_object(read_bounded(recorded.artifacts.checked(ref) / "config.json", MOST_OF_A_LIST))
    described, named = describe(config), str(config.get("_name_or_path", ""))
    return _Origin(
        family=source["family"],
        name=Path(source["folder"]).name,
        repository=named if _REPOSITORY.fullmatch(named) else "",
        sha256=source["sha256"],
        context=described.window or described.context,
        stacks=len(adopted),
    )


_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _tokenizer(recorded: OpenedRun) -> Tokenizer | None:
    """Return the tokenizer of a run; None if its corpus, or its model, came without one."""
    data, rows = recorded.config.data, recorded.stages[-1].shape.vocab_size
    sources = sources_of(data.source)
    unknown = data.tokenizer == "byte" and all(holds_tokens(source.name) for source in sources) and rows != _OF_BYTES
    return None if unknown or recorded.attempt.plan.data.tokenizer == NO_TOKENIZER else recorded.tokenizer()


_OF_BYTES = 264
"""Rows of the embedding with the byte tokenizer, by default."""


def _notes(recorded: OpenedRun, depth: int | None, tokenizer: Tokenizer | None) -> list[str]:
    notes, n_stages = list[str](), len(recorded.attempt.plan.stages)
    if depth is None and (left := n_stages - len(recorded.stages)):
        notes.append(f"{left} of the run's {n_stages} stages are not finished; this is the rack before them")
    if tokenizer is None:
        what = "model was imported without one" if recorded.is_imported else "corpus came as tokens"
        notes.append(f"no tokenizer was written: the {what}, and data.tokenizer does not name it")
    return notes


def _about(recorded: OpenedRun, origin: _Origin | None) -> dict[str, Any]:
    """Return what stackwise.json says of the run: ids and digests, by which every artifact can be found again."""
    last, manifest = recorded.stages[-1], recorded.artifacts.manifest
    imported = {"imported": {"family": origin.family, "folder": origin.name, "sha256": origin.sha256}} if origin else {}
    return {
        "stackwise": version("stackwise"),
        "run": recorded.attempt.name,
        **imported,
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


def _card(recorded: OpenedRun, config: StackWiseConfig, origin: _Origin | None) -> Card:
    plan, growth = recorded.attempt.plan, config.training.progressive
    summaries = summarise(recorded.artifacts, plan)[: len(recorded.stages)]
    facts = [f"StackWise {version('stackwise')}, trunk {growth.trunk_strategy}, seed {config.run.seed}."]
    if origin:
        facts.append(f"Imported: {origin.family}, files with sha256 {origin.sha256}.")
    n_added = len(recorded.stages[-1].spec.stacks) - (origin.stacks if origin else 0)
    if n_added:
        # A card is published: a path of this machine says no more than the name of the file.
        sources = sources_of(config.data.source)
        corpus = [each.name if each.name.startswith("hf:") else Path(each.name).name for each in sources]
        mask = plan.stages[0].mask
        ratio = f", {percent(mask.mean_ratio)} masked in stage 0" if mask else ""
        facts.append(f"Objective: {growth.training_objective}{ratio}; sequences of {plan.data.seq_len} tokens.")
        facts.append(f"Corpus: {', '.join(map(code, corpus))}; tokenizer: {code(plan.data.tokenizer)}.")
    return Card(
        name=recorded.attempt.name,
        base_model=origin.repository if origin else "",
        how=grown(n_added, (origin.repository or origin.name) if origin else ""),
        facts=tuple(facts),
        columns=STAGE_COLUMNS[:-1],
        rows=tuple(tuple(summary.cells[:-1]) for summary in summaries),
    )
