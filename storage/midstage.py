"""Progress of what is not sealed, without torch: the header of a checkpoint, the shards of a store, packed tokens."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from stackwise_core.data.packing import Progress
from stackwise_core.data.sequences import SPLITS, array_path
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.state_header import read_header
from stackwise_core.strict import parse_object, read_bounded
from storage.artifacts import SCRATCH, Artifacts
from storage.errors import ArtifactCorruptError
from storage.files import write_text

_READ = 1 << 22
_HEADER = 128
"""Bytes of an .npy before its numbers: those are written last."""
STATE_FOLDER, RANKS = f"{SCRATCH}/checkpoint", f"{SCRATCH}/ranks"
"""Below a work folder: the last checkpoint of a stage, and what the processes that train it together leave."""
METRICS = "metrics.jsonl"
"""In a stack: the record of each of its steps."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return what every step of a sealed stage measured; raises ArtifactCorruptError if a line is no such record."""
    try:
        return [parse_object(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise ArtifactCorruptError(path, f"has a line that is no record of a step ({error})", "Do not use it") from None


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
        self._sums = [(_HEADER, 0) for _ in self._files]
        """Of each file: how many bytes were noted, and their CRC-32."""

    def write(self, progress: Progress) -> None:
        """Note that everything before some document is on the disk."""
        known = zip(self._files, self._sums, strict=True)
        self._sums = [(size := path.stat().st_size, _crc(path, *summed, size)) for path, summed in known]
        noted = {"documents": progress.documents, "sums": self._sums, "tokens": progress.tokens}
        write_text(self._path, json.dumps(noted))

    def read(self) -> Progress:
        """Return what was noted last, if the files still hold the same bytes; else the beginning."""
        try:
            found = parse_object(read_bounded(self._path))
            documents, (train, validation) = int(found["documents"]), map(int, found["tokens"])
            sums = [(int(size), int(crc)) for size, crc in found["sums"]]
            whole = all(
                size <= path.stat().st_size and crc == _crc(path, _HEADER, 0, size)
                for path, (size, crc) in zip(self._files, sums, strict=True)
            )
        except (OSError, KeyError, TypeError, ValueError):
            return Progress()
        if not whole or not documents > 0 <= min(train, validation):
            return Progress()
        self._sums = sums
        return Progress(documents, train, validation)


def _crc(path: Path, start: int, crc: int, stop: int) -> int:
    """Return the CRC-32 of a file up to byte `stop`, from that up to byte `start`."""
    with path.open("rb") as file:
        file.seek(start)
        for at in range(start, stop, _READ):
            crc = zlib.crc32(file.read(min(_READ, stop - at)), crc)
    return crc
