"""The arguments of one call of the trainer, and where its first stage goes on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from stackwise_core.config.arguments import check_type
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.objectives.dataloader import RowSource, check_loader
from stackwise_core.stages.stages import StageSpec
from stackwise_core.training.progress import Progress
from stackwise_core.training.saved_state import StateWriter
from stackwise_core.training.settings import digest_of
from stackwise_core.training.training import Hooks, TrainingState

_log = logging.getLogger("stackwise")


@dataclass
class Call:
    """The arguments that all stages of one call share."""

    builder: ProgressiveRackBuilder
    dataloader: Iterable[Any]
    hooks: Hooks
    state: TrainingState | None
    validation: Iterable[Any] | None
    cache: Mapping[int, RowSource] = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_type("rack_builder", self.builder, ProgressiveRackBuilder, "a ProgressiveRackBuilder is expected")
        check_loader("dataloader", self.dataloader)
        check_type("hooks", self.hooks, Hooks, "a Hooks or None is expected")
        folder = self.hooks.checkpoint_folder
        check_type("hooks.checkpoint_folder", folder, (str, Path, NoneType), "the path of a folder is expected")
        check_type("state", self.state, (TrainingState, NoneType), "a TrainingState or None is expected")
        if self.validation is not None:
            check_loader("validation", self.validation)
        check_type("cache", self.cache, Mapping, "a mapping {boundary: object with rows()} is expected")
        for boundary, rows in self.cache.items():
            check_type(f"cache[{boundary!r}]", rows, RowSource, "an object with rows(sequence_ids, view) is expected")

    def take_state(self, spec: StageSpec, settings: dict[str, Any]) -> TrainingState | None:
        """Return where a stage goes on: the state of the call, of the builder, or of the folder; used up by this."""
        given, stopped = self.state, self.builder.interrupted
        self.state = self.builder.interrupted = None
        if given is not None:
            return given
        if stopped is not None and stopped.settings == digest_of(settings):
            _log.info("stage %d goes on after step %d, where it was stopped", spec.index, stopped.step)
            return TrainingState(stopped.step, stopped.tensors, stopped.records)
        if stopped is not None:
            _log.info("stage %d starts anew: its settings are not those that it was stopped with", spec.index)
        found = self.progress.state_of(settings) if self.progress else None
        if found is not None:
            _log.info("stage %d goes on after step %d, from its checkpoint", spec.index, found.step)
        return found

    def hooks_of(self, settings: dict[str, Any]) -> Hooks:
        """Return the hooks of a stage, with the folder's."""
        hooks, progress = self.hooks, self.progress
        if progress is None:
            return hooks

        writer = StateWriter(functools.partial(progress.keep_state, settings))

        def on_checkpoint(state: TrainingState) -> None:
            hooks.on_checkpoint(state)
            writer.put(state)

        def settle() -> None:
            hooks.settle()
            writer.settle()

        go_on = "the same call goes on there, also in another process"
        return replace(hooks, on_checkpoint=on_checkpoint, settle=settle, go_on=go_on)
