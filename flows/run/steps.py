"""The five steps of a stage: open references, call the core, seal, return a reference.

Plain functions, without Prefect: `tasks.py` turns them into tasks, tests and benchmarks call them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flows.run.boundaries import boundary_above, boundary_below, rows_to_store, store_below
from flows.run.events import Message, RowsCached, emit, stop_requested
from flows.run.fill import Workers, by_workers, plain_workers
from flows.run.judging import compare_cache, judge
from flows.run.launch import train_by_ranks
from flows.run.live_part import channels_of_output, digest_of_new, parameter_facts
from flows.run.stage import Facts, Made, Stage, make
from flows.run.training import train_live_part
from stackwise_core.model.growth_operators import settle
from stackwise_core.stages.identity import Ref
from stackwise_core.training.stream_error import stored_error
from storage.activations.fill import fill_store_by, write_shards
from storage.activations.reader import StoreReader
from storage.checkpoints import METRICS, save_channels, save_trained
from storage.durable import write_text

_ROWS_OF_ERROR = 64
"""By which the error of the stored type is measured."""


def build_stack(stage: Stage) -> Ref | None:
    """Describe the new stack: operator, source, seed, and the digest of its initial tensors; the anneal adds none."""
    recipe = stage.plan.build
    if recipe is None:
        return None

    def work(folder: Path) -> Made:
        description = {**recipe.dump(), "initial_tensors": digest_of_new(stage)}
        write_text(folder / "build.json", json.dumps(description, indent=1))
        return Made({"operator": recipe.operator, "blocks": recipe.n_blocks})

    return make(stage, "build", [below.ref("stack") for below in stage.below[-1:]], work)


def configure_trunk(stage: Stage) -> Ref:
    """Describe the rack as this stage finds it: stacks in order, precision, adapters, what trains.

    Nothing is in it that the recipe does not decide: stages of other modes share it by its id.
    """
    spec, recipe = stage.plan.spec, stage.plan.trunk
    trains = recipe.trains or ("nothing",) * len(spec.trunk)

    def work(folder: Path) -> Made:
        entries = [
            {
                "stack": stack,
                "state": state,
                "precision": spec.stacks[stack].precision,
                "adapters": [name for name in spec.stacks[stack].adapters if name == "stack" or recipe.progressive],
                "trains": part,
            }
            for stack, state, part in zip(spec.trunk, recipe.stacks, trains, strict=True)
        ]
        write_text(folder / "trunk.json", json.dumps({"strategy": recipe.strategy, "stacks": entries}, indent=1))
        return Made({"strategy": recipe.strategy, "stacks": len(entries)})

    return make(stage, "trunk", [below.ref("stack") for below in stage.below], work)


def train(stage: Stage, build: Ref | None, trunk: Ref) -> Ref:
    """Train the live part of the rack on its boundary, cached or live, from the last checkpoint if there is one."""
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.below)]
    inputs += [*([build] if build else []), trunk, *store_below(stage)]

    def work(folder: Path) -> Made:
        by_ranks = train_by_ranks(stage, build, folder) if stage.config.hardware.processes > 1 else None
        trained = train_live_part(stage, build, folder)  # what ranks have trained is only taken up here
        attempt = by_ranks or trained.attempt
        spec, model = stage.plan.spec, trained.model
        counts = parameter_facts(stage, model)
        for stack in spec.anatomy.trained:
            settle(model.stack(stack))
        save_trained(folder, spec, model, trained.records)
        if stage.plan.stack.statistics_rows:
            with boundary_below(stage) as boundary:
                save_channels(folder, channels_of_output(stage, model, boundary))
        n_tokens = (spec.optim.steps - attempt.first_step) * spec.optim.batch_size * stage.config.data.seq_len
        facts = {
            **counts,
            "frozen_unchanged": attempt.frozen,
            "steps": spec.optim.steps,
            "first_step": attempt.first_step,
            "train_loss": trained.records[-1]["loss"],
            "tokens_per_second": round(n_tokens / attempt.seconds),
        }
        return Made(facts, records=(METRICS,))

    return make(stage, "train", inputs, work)


def cache_activations(stage: Stage, stack: Ref, workers: Workers = plain_workers) -> Ref | None:
    """Write the boundary that the next stage reads; None where no stage reads it, or none may.

    The boundary below, if it is there, moves up by one stack; otherwise all is derived from tokens.

    Args:
        stage: of which run.
        stack: what the stage trained.
        workers: start those that fill the store, where `cache.fill_workers` asks for more than one.
    """
    if stage.plan.activations is None:
        if stage.index + 1 < len(stage.run_plan.stages):  # of the last stage everyone expects it
            emit(Message(f"stage {stage.index} caches nothing: {stage.plan.no_cache_reason}"))
        return None
    stacks = [*(below.ref("stack") for below in stage.below), stack]
    recipe = stage.plan.activations

    def work(folder: Path) -> Made:
        rows = rows_to_store(stage)
        with boundary_above(stage) as (source, origin):
            several = stage.config.cache.fill_workers > 1
            write = by_workers(stage, workers) if several else partial(write_shards, rows, source)
            counts, checksums = fill_store_by(write, folder, rows, _on_cached(stage), stop_requested)
            with StoreReader(folder, checksums) as stored:
                error = stored_error(stored, source, rows.sample(_ROWS_OF_ERROR))
        return Made({"from": origin, "boundary": recipe.boundary, **counts, "error": error}, checksums)

    return make(stage, "cache", [stage.run_plan.data_ref, *stacks], work)


def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the losses of the rack so far, and compare cached rows with what tokens give.

    Raises:
        CacheMismatchError: they differ; the store is in quarantine/ and will be remade.
    """
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.below), stack]
    inputs += [activations] if activations else []

    def work(folder: Path) -> Made:
        compared = compare_cache(stage, activations) if activations else {"cache": "none"}
        facts: Facts = {**judge(stage), **compared}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    return make(stage, "validate", inputs, work)


def _on_cached(stage: Stage) -> Callable[[int, int], None]:
    def on_cached(n_bytes: int, of_bytes: int) -> None:
        emit(RowsCached(stage.index, n_bytes, of_bytes))

    return on_cached
