"""Progress of a stage that is not sealed, without torch: the header of its checkpoint, the shards of its store."""

from __future__ import annotations

from stackwise_core.stages.identity import Ref
from stackwise_core.stages.state_header import read_header
from storage.artifacts import SCRATCH, Artifacts

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
