"""The tables of a report, of one run or of several side by side, for the terminal and for pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flows.pages.page import in_column, ranges
from flows.pages.run import Document, differences, judged_at
from flows.run.numbers import clock, loss, parameters, percent, signed, size
from flows.run.terminal import TableOf, without_empty_columns


def tables(document: Document) -> list[TableOf]:
    """Return the tables of a report; those that would be empty are left out."""
    stages = document["stages"]
    found = [_stages(document), _cost(stages), _held(stages), _by_mask_ratio(stages), _parts(document)]
    return [table for table in [*map(without_empty_columns, found), _changes(document)] if table.rows]


def _stages(document: Document) -> TableOf:
    stages = document["stages"]
    columns = ("|stage", "how", "|params", "|trained", "|loss", "|masked", "|val. loss", "|gain")
    rows = [
        [
            str(stage["stage"]),
            stage["name"] + _unfinished(stage),
            parameters(stage["rack_parameters"]),
            parameters(stage["trainable_parameters"]),
            loss(stage["train_loss"]),
            percent(stage["mask_ratio"]),
            loss(stage["validation_loss"]),
            signed(stage["gain"]),
        ]
        for stage in stages
    ]
    below, untied = _below(stages), _untied(document)
    note = (
        "How: where the new stack went, what of the trunk trained, how the stack is stored. "
        f"{below and below + ' '}Params: those of the rack. {untied and untied + ' '}"
        "Trained: those that this stage trained. Losses are in nats per loss position: a predicted token, of masked "
        "runs a masked one. Loss: of the last training step. Masked: the mean share of masked tokens. Val. loss: of "
        "withheld sequences. Gain: what the stage took off the validation loss."
    )
    return TableOf("Stages", columns, rows, note, " ".join(filter(None, [below, untied])))


def _below(stages: Sequence[Document]) -> str:
    """Return a sentence that explains the names of stages that insert, if there are any."""
    inserts = any(stage["name"].startswith("insert below") for stage in stages)
    return "Insert below N: the new stack goes under the top N stacks." if inserts else ""


def _untied(document: Document) -> str:
    """Return a sentence if the head gets a matrix of its own, which the parameters of the rack then count."""
    tied = document["config"]["model.tie_embeddings"] and len(document["stages"]) > 1
    return "In stage 0 embedding and head are one matrix; from stage 1 on the head has its own." if tied else ""


def _unfinished(stage: Document) -> str:
    if stage["state"] == "done":
        return ""
    kept = stage["steps_kept"]
    return " (unfinished)" if kept is None else f" (unfinished, {kept:,} of {stage['steps']:,} steps kept)"


def _cost(stages: Sequence[Document]) -> TableOf:
    columns = ("|stage", "|steps", "|tokens", "|TFLOP", "|without cache", "|time", "|tokens/s")
    made = [stage for stage in stages if stage["digest"] and (stage["steps"] or stage["seconds"])]
    # Both columns have the same decimals, so that equal numbers look equal.
    spent = in_column([stage[key] for key in ("tflop", "tflop_recomputed") for stage in made])
    rows = [
        [
            str(stage["stage"]),
            _steps(stage),
            parameters(stage["tokens"]),
            *tflop,
            "-" if stage["seconds"] is None else clock(stage["seconds"]),
            "-" if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,}",
        ]
        for stage, *tflop in zip(made, spent[: len(made)], spent[len(made) :], strict=True)
    ]
    note = (
        "TFLOP: as executed, validation left out. Without cache: if every step passed through the frozen stacks again. "
        "Time: of all tasks of the stage. Tokens/s: of its training."
    )
    return TableOf("What it cost", columns, rows, note)


def _steps(stage: Document) -> str:
    planned, kept = stage.get("steps_planned"), stage.get("kept_step")
    early = f" of {planned:,}" if planned else ""
    return f"{stage['steps']:,}{early}" + (f", kept {kept:,}" if kept else "")


def _held(stages: Sequence[Document]) -> TableOf:
    columns = ("|stage", "|memory planned", "|measured", "|checkpoint", "|cache", "|cache error", "about the cache")
    rows = [
        [
            str(stage["stage"]),
            _bytes(stage["memory_bytes_forecast"] or None),
            _bytes(stage["memory_bytes_measured"]),
            _bytes(stage["stack_bytes"]),
            _bytes(stage["cache_bytes"]),
            signed(stage["cache_error"], "+.1e"),
            stage["cache_note"] or "from tokens",
        ]
        for stage in stages
    ]
    error = "Cache error: the validation loss on cached activations less that on exact ones."
    note = (
        "Memory planned: the peak of training, by the planner's forecast. Measured: that peak as it was. Checkpoint: "
        f"bytes on the disk. Cache: bytes of its activations. {error}"
    )
    return TableOf("Memory and disk", columns, rows, note, error)


def _by_mask_ratio(stages: Sequence[Document]) -> TableOf:
    ratios = list(dict.fromkeys(ratio for stage in stages for ratio in stage["by_mask_ratio"]))
    rows = [
        [str(stage["stage"]), *(loss(stage["by_mask_ratio"].get(ratio)) for ratio in ratios)]
        for stage in stages
        if stage["by_mask_ratio"]
    ]
    columns = ("|stage", *(f"|{percent(float(ratio))}" for ratio in ratios))
    return TableOf("Validation loss by share of masked tokens", columns, rows)


def _parts(document: Document) -> TableOf:
    """Return which stages trained each part of the rack; a row per part, however many stages there are."""
    numbers = [stage["stage"] for stage in document["stages"]]
    rows = [
        [
            row["part"],
            *(
                ranges(at for at, found in zip(numbers, row["trained"], strict=True) if found == what)
                for what in ("everything", "adapters", "nothing", "adopted")
            ),
            _stored(document, row),
        ]
        for row in document["parts"]
    ]
    columns = ("part", "trained in stages", "its adapters in", "frozen in", "adopted in", "stored as")
    note = "From the tokens up; the numbers are those of stages, and of stacks in the order of their creation."
    return TableOf("What trained in which stage", columns, rows, note)


def _stored(document: Document, row: Document) -> str:
    """Return the precision of a stack, and the ranks of its adapters."""
    if not row["part"].startswith("stack "):
        return ""
    stack, last = row["part"].removeprefix("stack "), document["stages"][-1]
    ranks = " and ".join(map(str, sorted(set(last["adapters"].get(stack, {}).values()))))
    return last["precision"][stack] + (f", LoRA of rank {ranks}" if ranks else "")


def _changes(document: Document) -> TableOf:
    rows = [[key["name"], _value(key["value"]), _value(key["default"])] for key in document["changes"]]
    note = "All other keys have their defaults."
    return TableOf("What the configuration changes", ("key", "value", "default"), rows, note)


def side_by_side(documents: Sequence[Document]) -> list[TableOf]:
    """Return the tables of several runs: what came of each, and the keys in which they differ."""
    columns = ("run", "|stages", "|parameters", "|validation", "|masked", "|TFLOP", "|tokens", "|time", "|cache")
    rows = [
        [
            document["run"],
            str(len(document["stages"])),
            parameters(document["parameters"]),
            loss(document["validation_loss"]),
            percent(judged_at(document)),
            tflop,
            parameters(document["tokens"]),
            clock(document["seconds"]),
            size(document["cache_bytes"]),
        ]
        for document, tflop in zip(documents, in_column([each["tflop"] for each in documents]), strict=True)
    ]
    differing = [[each["name"], *map(_value, each["values"])] for each in differences(documents)]
    names = tuple(document["run"] for document in documents)
    note = (
        "Validation: the loss of the last stage, in nats per loss position. Masked: the share of tokens masked for it. "
        "TFLOP: validation left out."
    )
    found = [
        without_empty_columns(TableOf("Runs", columns, rows, note)),
        TableOf("Where their configurations differ", ("key", *names), differing),
    ]
    return [table for table in found if table.rows]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(count: int | None) -> str:
    return "-" if count is None else size(count)
