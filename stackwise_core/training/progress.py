"""How far a call of the trainer is, in a folder, so that the same script goes on there in another process.

FOLDER/rack    the builder as the last finished stage left it, with `stages.json`: what the rack was before the
first stage, and the settings and the result of every stage that is over
FOLDER/state   the last checkpoint of the stage that follows
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.files import standing_folder
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.saving import write_whole
from stackwise_core.stages.saved_rack import SavedRack
from stackwise_core.training.saved_state import read_state, write_state
from stackwise_core.training.training import TrainingState

_STAGES = "stages.json"
_log = logging.getLogger("stackwise")


class Progress:
    """What a folder holds of the stages that a rack goes through."""

    def __init__(self, folder: Path, start: dict[str, Any], finished: list[dict[str, Any]]) -> None:
        """Take the rack before the first stage, and the settings and results of the stages that are over."""
        self.folder, self.start, self.finished = folder, start, finished
        self.ahead = list(finished)
        """Of these, what the calls of this process have not come to yet."""
        self._left: dict[str, str] = start["weights"]

    @classmethod
    def open(cls, folder: str | Path, builder: ProgressiveRackBuilder) -> Progress:
        """Return what a folder holds, and have the builder be as the last finished stage left it.

        Raises:
            ConfigError: the folder began with another rack, or the rack was edited since.
            SavedRackError: its rack is damaged, or another version wrote it.
        """
        folder = Path(folder).expanduser().resolve()
        known = builder.progress
        if isinstance(known, Progress) and known.folder == folder:
            known._check_unedited(builder)
            return known
        found = cls(folder, builder.description(), [])
        if standing_folder(folder / "rack").exists():
            kept = json.loads(SavedRack.at(folder / "rack").read(_STAGES))
            found._check_start(kept["start"])
            builder.go_on_from(folder / "rack")
            found = cls(folder, kept["start"], kept["stages"])
            found._left = builder.digests(trained_only=True)
            _log.info("%s: %d stages are over", folder, len(found.finished))
        elif state := read_state(folder / "state"):
            found._check_start(state[1]["start"])
        builder.progress = found
        return found

    def replayed(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result of a stage that was over before this process began; None if it is still to be trained.

        Raises:
            ConfigError: it was trained with other settings.
        """
        for entry in self.ahead:
            if _stage_of(entry["settings"]) == _stage_of(settings):
                self._check_settings(entry["settings"], settings)
                self.ahead.remove(entry)
                return entry["result"]
        return None

    def first_ahead(self, index: int) -> int:
        """Return the first growth stage that the calls of this process have not come to yet, at most `index`."""
        stages = (entry["settings"]["stage"] for entry in self.ahead)
        return min([index, *(stage["index"] for stage in stages if stage["mode"] != "joint")])

    def state_of(self, settings: dict[str, Any]) -> TrainingState | None:
        """Return the checkpoint of a stage, if the folder holds one.

        Raises:
            ConfigError: it was made with other settings.
        """
        found = read_state(self.folder / "state")
        if found is None or found[1]["after"] != len(self.finished):  # of a stage that is over
            return None
        self._check_settings(found[1]["settings"], settings)
        return found[0]

    def keep_state(self, settings: dict[str, Any], state: TrainingState) -> None:
        """Replace the checkpoint, durably."""
        made_by = {"start": self.start, "settings": settings, "after": len(self.finished)}
        write_state(self.folder / "state", state, made_by)

    def finish(self, builder: ProgressiveRackBuilder, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Replace the rack, durably; the checkpoint of the stage is not needed any more."""
        self.finished.append({"settings": settings, "result": result})
        stages = json.dumps({"start": self.start, "stages": self.finished}).encode()
        write_whole(self.folder / "rack", builder.files([(_STAGES, stages)]))
        self._left = builder.digests(trained_only=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def _check_start(self, then: dict[str, Any]) -> None:
        """Raise unless the folder began with the rack that the builder has now."""
        remedy = "make the two equal, or give another folder"
        differ = list(_differences(then, self.start))
        weights = [path.removeprefix("weights.") for path, _, _ in differ if path.startswith("weights.")]
        if len(differ) > len(weights):
            self._refuse([item for item in differ if not item[0].startswith("weights.")], "began with", remedy)
        if weights:
            allowed = f"{self.folder} began with others: {remedy}"
            raise ConfigError([Fault("rack_builder", f"weights of {', '.join(weights)}", allowed)])

    def _check_unedited(self, builder: ProgressiveRackBuilder) -> None:
        now = builder.digests()
        if changed := [part for part, digest in self._left.items() if now.get(part) != digest]:
            allowed = f"edited since {self.folder} was written: give this call a checkpoint_folder of its own"
            raise ConfigError([Fault("rack_builder", ", ".join(changed), allowed)])

    def _check_settings(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        if differ := list(_differences(then, now)):
            trained = f"trained stage {now['stage']['index']} with"
            self._refuse(differ, trained, "set it back, or give another folder")

    def _refuse(self, differ: list[tuple[str, Any, Any]], what: str, remedy: str) -> NoReturn:
        faults = [Fault(path, repr(now), f"{self.folder} {what} {then!r}: {remedy}") for path, then, now in differ]
        raise ConfigError(faults)


def _stage_of(settings: dict[str, Any]) -> tuple[int, bool]:
    return settings["stage"]["index"], settings["stage"]["mode"] == "joint"


def _differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted path of every value of two JSON documents that differs, and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for n, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _differences(one, other, f"{path}.{n}")
    elif then != now:
        yield path, then, now
