"""`stackwise plan`: what would run, what it costs, which artifacts exist."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from rich.text import Text

from flows.cli.arguments import add_common, add_config, load_config
from flows.run.devices import ADVICE, device_memory, settings_of
from flows.run.estimate import estimate_sequences
from flows.run.numbers import clock, parameters, percent, size
from flows.run.prepare import alone, pack_corpus, sampled
from flows.run.reading import Reading
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, reading_shown, say_hanging
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.data.mixture import mixture_counts, shares_of, sources_of
from stackwise_core.data.packing import read_corpus
from stackwise_core.errors import shown
from stackwise_core.stages.charges import Charge, charge, judging_flops
from stackwise_core.stages.costs import (
    fill_flops,
    rack_parameters,
    store_bytes,
    trainable_parameters,
)
from stackwise_core.stages.identity import AdoptedRecipe, Ref
from stackwise_core.stages.memory import Memory, Setting, memory
from stackwise_core.stages.plan import RunPlan, StagePlan, cooldown_flops, rows_read_again
from stackwise_core.stages.remedies import Saving, does_not_fit, savings, table
from stackwise_core.stages.resolve import reads_examples, resolve_order
from storage.adopt import plan_in
from storage.artifacts import Artifacts, State, artifacts_at
from storage.demand import TASK_KINDS, Demand, compute_demand, made_by

_PACKED_TO_COUNT = 1 << 26
"""Bytes of the largest corpus that is packed only to count its sequences."""


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    add_common(parser, show_plan, json=True)
    add_config(parser)
    help_text = (
        "say how long it takes, from two steps of the dearest stage (default: unless they take long or --json is given)"
    )
    parser.add_argument("--probe", action=argparse.BooleanOptionalAction, help=help_text)


def show_plan(options: argparse.Namespace) -> None:
    """Print the plan of a configuration; nothing is written but, in an artifacts folder, what the corpus is."""
    config = load_config(options)
    artifacts = artifacts_at(options.artifacts).reachable()
    with reading_shown():
        config, plan = plan_in(artifacts, config, Reading("read"))
    demand = compute_demand(plan, artifacts, config.cache.keep)
    (n_train, n_validation, exact), parts = _count_sequences(config, artifacts, plan)
    cuda, there = device_memory(config.hardware)
    settings = list(settings_of(config, plan, cuda=cuda, there=there))
    too_large = [line for setting in settings if (line := does_not_fit(setting, there))]
    charges = charge(config, plan, n_train)
    document = {
        "run": config.run.name,
        "artifacts": artifacts.uri,
        "data": {"state": artifacts.state(plan.data_ref).value, "artifact": plan.data_ref.name},
        "train_sequences": n_train,
        "validation_sequences": n_validation,
        **({} if exact else {"sequences_estimated": True}),
        **({"sources": parts} if parts else {}),
        "complete": demand.complete,
        "notes": [*notes(config), *_advice(plan, cuda=cuda), *too_large],
        "stages": [
            _stage(config, plan, at, demand, artifacts, n_train, n_validation, setting, charges[at])
            for at, setting in enumerate(settings)
        ],
    }
    if options.probe or (options.probe is None and not options.json):
        _add_times(config, plan, document, _Device(cuda, there), asked=bool(options.probe))
    if options.json:
        say_json(document)
    else:
        _print_plan(document, config.data.seq_len)


class _Device(NamedTuple):
    """What the probe has to go by."""

    cuda: bool
    n_bytes: int
    """Of its memory; 0 if it is not known."""


_QUICK_FLOPS = {False: 2e11, True: 2e14}
"""Of a step that the plan takes without being asked: seconds on a CPU, and on a CUDA device."""


def _add_times(
    config: StackWiseConfig, plan: RunPlan, document: dict[str, Any], device: _Device, *, asked: bool
) -> None:
    """Add to the document how long the stages still to be trained take, or why that is not known."""
    charges = charge(config, plan, document["train_sequences"])
    left: list[int] = [
        row["stage"] for row in document["stages"] if "train" in row["to_run"] and not row["adopted_from"]
    ]
    if not left:
        return
    dearest = max(left, key=lambda at: charges[at].trained)
    row, steps = document["stages"][dearest], document["stages"][dearest]["steps"]
    if config.training.progressive.training_objective == "custom":
        document["no_probe"] = "the batches of a custom objective are yours"
    elif device.n_bytes and row["memory_bytes"] > device.n_bytes * (1.0 if asked else 0.5):
        document["no_probe"] = f"a step needs {size(row['memory_bytes'])} of the {size(device.n_bytes)} there are"
    elif not asked and charges[dearest].trained / steps > _QUICK_FLOPS[device.cuda]:
        document["no_probe"] = "a step takes long here; --probe takes two of them to say"
    if "no_probe" in document:
        return
    try:
        from flows.run.probe import probe

        a_step = probe(config, plan.stages[dearest])
    except Exception as error:  # the plan stands without it
        document["no_probe"] = f"the probe failed: {str(error) or type(error).__name__}".splitlines()[0]
        return
    a_flop = a_step * steps / charges[dearest].trained
    for at in left:
        judged = _n_validations(config, plan.stages[at]) * judging_flops(
            config, plan.stages[at], document["validation_sequences"]
        )
        document["stages"][at]["seconds"] = round((charges[at].total + judged) * a_flop, 1)
    document["probe"] = {"stage": dearest, "seconds_per_step": a_step}
    document["seconds"] = round(sum(document["stages"][at]["seconds"] for at in left), 1)


def _n_validations(config: StackWiseConfig, stage: StagePlan) -> int:
    """Return how many validations a stage has inside and at its end."""
    every = config.validation.every
    return (stage.validation is not None) + ((stage.spec.optim.steps - 1) // every if every else 0)


def _advice(plan: RunPlan, *, cuda: bool) -> list[str]:
    """Return what would be faster on the device of a configuration."""
    stacks = plan.stages[-1].spec.stacks
    return [ADVICE] if cuda and any(stack.precision == "full" for stack in stacks) else []


class _Count(NamedTuple):
    train: int
    validation: int
    exact: bool


def _count_sequences(
    config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan
) -> tuple[_Count, list[dict[str, Any]]]:
    """Return the number of sequences, and of a mixture what each source gives to an epoch."""
    if not plan.sources:
        return _count_of(config, artifacts, plan.data_ref, plan.corpus_bytes), []
    data, sources = config.data, sources_of(config.data.source)
    found = [
        _count_of(alone(config, source.name), artifacts, planned.data.ref(-1), planned.n_bytes)
        for source, planned in zip(sources, plan.sources, strict=True)
    ]
    train, validation = mixture_counts(
        [each.train for each in found],
        [each.validation for each in found],
        shares_of(sources),
        data.max_sequences,
        spread=data.sample == "spread",
    )
    parts = [
        {"source": source.name, "share": n / sum(train), "train_sequences": n, "of": each.train}
        for source, each, n in zip(sources, found, train, strict=True)
    ]
    return _Count(sum(train), sum(validation), all(each.exact for each in found)), parts


def _count_of(config: StackWiseConfig, artifacts: Artifacts, ref: Ref, n_bytes: int) -> _Count:
    """Return the number of training and validation sequences of one source, and whether it is exact.

    It is that of the sealed data, or of the packed corpus; until a large one is packed, it is estimated.
    """
    if artifacts.state(ref) is State.SEALED:
        data = artifacts.manifest(ref)
        return _Count(data.count("train_sequences"), data.count("validation_sequences"), True)
    if n_bytes > _PACKED_TO_COUNT:
        return _Count(*estimate_sequences(config, n_bytes), False)
    given = config.data
    corpus = read_corpus(given.source, examples=reads_examples(config), token_type=given.token_type)
    train, validation = sampled(config, *pack_corpus(config, corpus))
    return _Count(len(train), len(validation), True)


def _stage(
    config: StackWiseConfig,
    plan: RunPlan,
    index: int,
    demand: Demand,
    artifacts: Artifacts,
    n_train: int,
    n_validation: int,
    setting: Setting,
    charged: Charge,
) -> dict[str, Any]:
    stage = plan.stages[index]
    spec, shape, seq_len = stage.spec, stage.shape, config.data.seq_len
    ratio = stage.mask.mean_ratio if stage.mask else None
    return {
        "stage": index,
        "name": spec.name,
        "mode": spec.mode,
        "trunk": spec.strategy,
        "adopted_from": _source(config, stage),
        "order": list(spec.anatomy.order),
        "trains": dict(zip(map(str, spec.anatomy.order), spec.anatomy.trains, strict=True)),
        "operator": spec.operator,
        "time_step": spec.time_step,
        "mask_ratio": ratio,
        **({"mask_ratios": [span.low, span.high]} if stage.mask and (span := stage.mask.span) else {}),
        "draws_depth": bool(stage.stack.joint_times),
        "precision": spec.new.precision,
        "adapters": [
            {"stack": stack.index, "name": name, "rank": adapter.rank, "alpha": adapter.alpha}
            for stack in spec.stacks
            for name, adapter in stack.adapters.items()
        ],
        "blocks": spec.n_blocks,
        "steps": spec.optim.steps,
        **({"patience": spec.optim.watch.patience} if spec.optim.watch and spec.optim.watch.patience else {}),
        "trainable_parameters": trainable_parameters(shape, spec),
        "rack_parameters": rack_parameters(shape, spec),
        "flops": charged.total,
        "flops_saved_by_cache": charged.recomputed - charged.frozen,
        **({"cooldown_flops": cooldown_flops(stage, seq_len)} if stage.cooldown else {}),
        "memory_bytes": (forecast := memory(setting)).peak,
        "memory": forecast._asdict(),
        "savings": [saving._asdict() for saving in savings(setting)],
        **_cache(config, plan, stage, n_train, n_validation),
        "cache_note": stage.no_cache_reason,
        "measured": _measured(stage, artifacts),
        **_tasks(stage, demand, artifacts),
    }


def _cache(config: StackWiseConfig, plan: RunPlan, stage: StagePlan, n_train: int, n_validation: int) -> dict[str, Any]:
    """Return the size of the store of a stage, and with fresh rows what filling it takes."""
    if stage.activations is None:
        return {"cache_bytes": None}
    rows = resolve_order(config, n_train).count_visited(stage.activations.steps)
    validation = min(stage.activations.validation_sequences, n_validation)
    n_bytes = store_bytes(rows + validation, config.data.seq_len, stage.shape.d_model, stage.activations.dtype)
    if config.data.rows != "fresh":
        return {"cache_bytes": n_bytes}
    return {"cache_bytes": n_bytes, "cache_fill": _fill(config, plan, stage, n_train, rows, validation)}


def _tasks(stage: StagePlan, demand: Demand, artifacts: Artifacts) -> dict[str, Any]:
    """Return the artifacts of a stage with their states, and the tasks that are to run for them."""
    makes = {task: made_by(task, stage) for task in TASK_KINDS}
    refs = [stage.ref(kind) for kinds in makes.values() for kind in kinds]
    return {
        "states": {ref.kind: artifacts.state(ref).value for ref in refs},
        "artifacts": {ref.kind: ref.name for ref in refs},
        "to_run": [task for task, kinds in makes.items() if any(stage.ref(kind) in demand.needed for kind in kinds)],
    }


def _fill(
    config: StackWiseConfig, plan: RunPlan, stage: StagePlan, n_train: int, n_rows: int, n_validation: int
) -> dict[str, float]:
    """Return how a store is filled where each stage reads on, and the FLOPs of that."""
    reader, advanced = plan.stages[stage.index + 1].spec, 0
    if plan.store_below(stage):
        advanced = n_validation + min(n_rows, rows_read_again(config, stage.spec, reader, n_train))
    from_tokens = n_rows + n_validation - advanced
    below = [reader.stacks[index] for index in reader.anatomy.below]
    flops = fill_flops(stage.shape, below, config.data.seq_len, from_tokens, advanced)
    return {"rows_from_tokens": from_tokens, "rows_advanced": advanced, "flops": flops}


def _source(config: StackWiseConfig, stage: StagePlan) -> str | None:
    """Return where an adopted stack comes from: a folder, or 'run NAME'."""
    if not isinstance(stage.stack, AdoptedRecipe):
        return None
    return f"run {config.model.from_}" if stage.stack.family else config.model.from_


def _measured(stage: StagePlan, artifacts: Artifacts) -> dict[str, float]:
    """Return the speeds of finished work: trained tokens and cached bytes per second."""
    speeds: dict[str, float] = {}
    if stack := artifacts.sealed(stage.ref("stack")):
        speeds |= {key: stack.facts[key] for key in ("tokens_per_second",) if key in stack.facts}  # not if adopted
    store = artifacts.sealed(stage.ref("activations")) if stage.activations else None
    if store and store.facts.get("seconds"):
        speeds["cache_bytes_per_second"] = round(store.n_bytes / store.facts["seconds"])
    return speeds


def _print_plan(document: dict[str, Any], seq_len: int) -> None:
    console = plain_console()
    n_train, n_validation = document["train_sequences"], document["validation_sequences"]
    about = "about " if "sequences_estimated" in document else ""
    sequences = f"{about}{n_train:,} training and {n_validation:,} validation sequences of {seq_len} tokens"
    console.print(Text.assemble((document["run"], "bold"), f" in {shown(document['artifacts'])}"), soft_wrap=True)
    say(sequences, *map(_source_line, document.get("sources", ())))
    for note in document["notes"]:
        say_hanging("", note)
    for row in document["stages"]:
        say("", f"stage {row['stage']}: {row['name']}")
        for what, text in _lines(row).items():
            if text:
                say_hanging(f"  {what:<8}", text)
    if "seconds" in document:
        stage = document["probe"]["stage"]
        how = f"by a probe: two steps of stage {stage} with random weights, while the machine is as busy as now"
        say("")
        say_hanging("", f"about {clock(max(1, document['seconds']))} in all, {how}; the corpus comes on top")
    elif "no_probe" in document:
        say("")
        say_hanging("", f"how long it takes is not known: {document['no_probe']}")


def _source_line(part: dict[str, Any]) -> str:
    """Return what a source gives to an epoch of a mixture."""
    n, there = part["train_sequences"], part["of"]
    part_of = f"{n / there:.3g} times its" if n > there else f"{percent(n / there, '.1f')} of its"
    how = "all of its" if n == there else part_of
    return f"  {percent(part['share'], '.1f')} {shown(part['source'])}: {n:,} sequences, {how} {there:,}"


def _filled(row: dict[str, Any]) -> str:
    """Return what filling the store of a stage costs, where that is shown."""
    if (fill := row.get("cache_fill")) is None:
        return ""
    advanced = f" and {fill['rows_advanced']:,} through one stack" if fill["rows_advanced"] else ""
    how = f"{fill['rows_from_tokens']:,} rows from tokens{advanced}"
    return f", filled by {fill['flops'] / 1e12:.3g} TFLOP: {how}"


def _lines(row: dict[str, Any]) -> dict[str, str]:
    """Return what is said of one stage of the plan; '' where there is nothing to say."""
    ratio = row["mask_ratio"]
    masks = "inputs as they are" if ratio is None else f"{percent(ratio)} of the positions masked"
    if between := row.get("mask_ratios"):
        masks = f"{percent(between[0])} to {percent(between[1])} of the positions masked, {percent(ratio)} on average"
    masks = "each step at the mask ratio of one stack" if row["draws_depth"] else masks
    time = "" if row["time_step"] is None else f" (time step {row['time_step']})"
    saved = row["flops_saved_by_cache"]
    saving = f", {saved / 1e12:.3g} saved by the cache below" if saved > 0 else ""
    saving += f", {row['cooldown_flops'] / 1e12:.3g} more to cool down" if "cooldown_flops" in row else ""
    most = "at most " if "patience" in row else ""
    plural = "block" if row["blocks"] == 1 else "blocks"
    how = "all stacks together" if row["mode"] == "joint" else f"{row['blocks']} {plural}, {row['operator']}"
    ways = [Saving(**each) for each in row["savings"]]
    ranks: dict[int, list[str]] = {}
    for adapter in row["adapters"]:
        ranks.setdefault(adapter["stack"], []).append(f"{adapter['name']} {adapter['rank']}")
    measured = row["measured"]
    speeds = [f"trained at {measured['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in measured else []
    if "cache_bytes_per_second" in measured:
        speeds.append(f"cached at {size(measured['cache_bytes_per_second'])}/s")
    lines = {
        "stack": f"{how}; {most}{row['steps']} steps, {masks}{time}",
        "LoRA": "; ".join(f"stack {stack}: {', '.join(names)}" for stack, names in ranks.items()),
        "trains": f"{parameters(row['trainable_parameters'])} of {parameters(row['rack_parameters'])} parameters",
        "costs": f"{most}{row['flops'] / 1e12:.3g} TFLOP{saving}",
        "takes": f"{most or 'about '}{clock(max(1, row['seconds']))} on this machine" if "seconds" in row else "",
        "memory": table(Memory(**row["memory"])),
        "less by": ", ".join(f"{way.key.rpartition('.')[2]}: {way.shown} (-{size(way.n_bytes)})" for way in ways),
        "cache": row["cache_note"] if row["cache_bytes"] is None else size(row["cache_bytes"]) + _filled(row),
        "was": ", ".join(speeds),
        "to run": ", ".join(row["to_run"]) or "nothing, all is there",
    }
    if folder := row["adopted_from"]:
        lines |= dict.fromkeys(("trains", "costs", "memory", "less by"), "")
        lines["stack"] = f"{row['blocks']} {plural}, adopted from {folder}"
        lines["to run"] = lines["to run"].replace("train", "adopt")
    return lines
