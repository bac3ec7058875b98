"""A builder in a folder: its rack, its configuration, what it was told, and what it can undo or go on with."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.said import keep_said, said_keys
from stackwise_core.errors import ConfigError, Fault, SavedRackError
from stackwise_core.model.agreement import Told
from stackwise_core.model.grown_rack import GrownRack
from stackwise_core.model.rack import load_rack, rack_files
from stackwise_core.model.saving import serialised, tensors_of
from stackwise_core.model.snapshot import Annealed, Interrupted, Snapshot
from stackwise_core.stages.resolve import named_functions
from stackwise_core.stages.saved_rack import (
    BEFORE_JOINT,
    BEFORE_STOP,
    BUILDER,
    CONFIG,
    MOMENTS,
    STOPPED,
    SavedAnneal,
    SavedBuilder,
    SavedRack,
    SavedStop,
)


def builder_files(
    grown: GrownRack, told: Told, config: StackWiseConfig, more: Iterable[tuple[str, bytes]] = ()
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a builder, path and bytes, one at a time, and `more` of them.

    Args:
        grown: the rack and its record.
        told: what the builder was told.
        config: its own configuration.
        more: files that others keep beside it.
    """
    others, no_config = [(BUILDER, _record_of(grown, told, config).model_dump_json(indent=1).encode())], ""
    try:
        others.append((CONFIG, config.to_yaml().encode()))
    except ConfigError as error:  # it holds function objects
        no_config = str(error)
    annealed, stopped = grown.annealed, grown.interrupted
    if stopped:
        others.append((STOPPED, serialised(stopped.tensors)))
    if grown.moments:
        others.append((MOMENTS, serialised(grown.moments)))
    before = [(annealed and annealed.before, BEFORE_JOINT), (stopped and stopped.before, BEFORE_STOP)]
    yield from rack_files(
        grown.rack,
        seed=grown.seed,
        trained=grown.trained,
        channels=grown.channels,
        modes=grown.modes,
        no_config=no_config,
        others=itertools.chain(others, more, *(_files_before(grown, *pair) for pair in before)),
    )


def _files_before(grown: GrownRack, before: Snapshot | None, folder: str) -> Iterator[tuple[str, bytes]]:
    if before:
        whole, channels = before.as_rack(grown.rack), before.channels
        for name, data in rack_files(whole, seed=grown.seed, trained=grown.trained, channels=channels):
            yield f"{folder}/{name}", data


def _record_of(grown: GrownRack, told: Told, config: StackWiseConfig) -> SavedBuilder:
    annealed, stopped = grown.annealed, grown.interrupted
    return SavedBuilder(
        given=told.given is not None,
        dimensions={name: getattr(told.model, name) for name in sorted(told.dimensions)},
        building_mode=told.building_mode,
        default_precision=told.default_precision,
        model=told.model,
        said=tuple(said_keys(config)),
        created=grown.created,
        created_ends=grown.created_ends,
        annealed=SavedAnneal(settings=annealed.settings, after=annealed.after) if annealed else None,
        stopped=SavedStop(
            settings=stopped.settings,
            step=stopped.step,
            records=stopped.records,
            after=stopped.after,
            undone=stopped.before is None,
        )
        if stopped
        else None,
    )


def record_in(saved: SavedRack) -> SavedBuilder | None:
    """Return what the builder of a saved rack knew; None if the rack was saved without it."""
    if BUILDER not in saved.files:
        return None
    try:
        return SavedBuilder.model_validate_json(saved.read(BUILDER))
    except ValidationError as error:
        problem = f"cannot be read by this version ({str(error).splitlines()[0]})"
        remedy = "Open it with the version of StackWise that wrote it"
        raise SavedRackError(saved.folder / BUILDER, problem, remedy) from None


def config_in(saved: SavedRack, said: Collection[str]) -> StackWiseConfig:
    """Return the configuration that was saved with a rack, and of which somebody set the keys `said`."""
    saved.read(CONFIG)  # checks it
    try:
        config = StackWiseConfig.read_unchecked(saved.folder / CONFIG)
    except ValueError as error:
        problem = f"cannot be read by this version ({str(error).splitlines()[0]})"
        raise SavedRackError(saved.folder / CONFIG, problem, "Give load() a configuration") from None
    keep_said(config, said)
    return config


def take_record(grown: GrownRack, record: SavedBuilder, saved: SavedRack) -> None:
    """Have a rack that was loaded go on from its record: what is as created, its anneal, its stop."""
    grown.created, grown.created_ends = record.created, record.created_ends
    grown.seed = grown.seed if saved.seed is None else saved.seed
    grown.moments = tensors_of(saved, MOMENTS) if MOMENTS in saved.files else {}
    if kept := record.annealed:
        grown.annealed = Annealed(kept.settings, _snapshot_in(saved.folder / BEFORE_JOINT), kept.after)
    if stop := record.stopped:
        tensors = tensors_of(saved, STOPPED)
        before = None if stop.undone else _snapshot_in(saved.folder / BEFORE_STOP)
        grown.interrupted = Interrupted(stop.settings, stop.step, tensors, stop.records, before, stop.after)


def _snapshot_in(folder: Path) -> Snapshot:
    rack, _, channels = load_rack(folder)
    return Snapshot.all_of(rack, channels)


def check_no_code(config: StackWiseConfig, where: str, *, trusted: bool) -> None:
    """Check that a configuration which came with a rack names no function that would be imported, unless trusted."""
    if not trusted and (named := named_functions(config)):
        allowed = f"the configuration in {where} names {', '.join(named.values())}: set it if you trust who wrote that"
        raise ConfigError([Fault("trust_functions", "False", allowed)])
