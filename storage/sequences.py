"""Packed sequences of a sealed artifact: arrays that are mapped into memory. Needs no torch."""

from __future__ import annotations

from stackwise_core.data.sequences import PackedSequences, load_split
from stackwise_core.stages.identity import Ref
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError


def load_sequences(artifacts: Artifacts, ref: Ref) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a sealed data artifact; raises as `Artifacts.checked`."""
    folder = artifacts.checked(ref)
    try:
        return load_split(folder, "train"), load_split(folder, "validation")
    except (EOFError, OSError, TypeError, ValueError):  # sealed so, by a stranger
        remedy = f"Remove {folder} and run the same command again: it will be remade"
        raise ArtifactCorruptError(folder, "holds no sequences that can be read", remedy) from None
