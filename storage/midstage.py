"""Progress of what is not sealed, without torch: the header of a checkpoint, the shards of a store, packed tokens."""

from __future__ import annotations

import json
from pathlib import Path

from stackwise_core.data.packing import Progress
from stackwise_core.data.sequences import SPLITS, array_path
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.state_header import read_header
from stackwise_core.strict import parse_object, read_bounded
from storage.artifacts import SCRATCH, Artifacts
from storage.files import write_text

STATE_FOLDER = f"{SCRATCH}/checkpoint"


def step_reached(artifacts: Artifacts, ref: Ref) -> int | None:
    """Return the step at which a stage would resume, or None if it has no checkpoint. Writes nothing."""
    header = read_header(artifacts.root / "work" / ref.name / STATE_FOLDER)
    step = None if header is None else header.get("step")
    return step if isinstance(step, int) else None


def bytes_written(artifacts: Artifacts, ref: Ref) -> int:
    """Return the bytes of a store's shards that are written already."""
    shards = (artifacts.root / "work" / ref.name / "store.zarr").rglob("c.*")
    return sum(path.stat().st_size for path in shards if path.is_file())


class PackingNotes:
    """How far packing has come, beside the files that it writes; a killed one goes on from there."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Name the file of the notes, and the folder with the tokens."""
        self._path, self._files = path, [array_path(folder, split, "tokens") for split in SPLITS]

    def write(self, progress: Progress) -> None:
        """Note that everything before some document is on the disk."""
        sizes = [path.stat().st_size for path in self._files]
        write_text(self._path, json.dumps({"documents": progress.documents, "sizes": sizes, "tokens": progress.tokens}))

    def read(self) -> Progress:
        """Return what was noted last, if the files still hold as much; else the beginning."""
        try:
            found = parse_object(read_bounded(self._path))
            documents, sizes, tokens = int(found["documents"]), list(found["sizes"]), list(found["tokens"])
            held = [path.stat().st_size for path in self._files]
            whole = all(now >= size for now, size in zip(held, sizes, strict=True))
            train, validation = map(int, tokens)
        except (OSError, KeyError, TypeError, ValueError):
            return Progress()
        is_sane = whole and documents > 0 <= min(train, validation)
        return Progress(documents, train, validation) if is_sane else Progress()
