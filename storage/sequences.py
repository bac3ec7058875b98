"""Packed sequences of a sealed artifact: arrays that are mapped into memory. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from stackwise_core.data.mixture import mixed
from stackwise_core.data.sequences import SPLITS, PackedSequences, array_path, load_split, parts_of
from stackwise_core.stages.identity import DataRecipe, Ref
from storage.artifacts import Artifacts
from storage.errors import AGAIN, ArtifactCorruptError


def load_sequences(artifacts: Artifacts, ref: Ref) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a sealed data artifact; raises as `Artifacts.checked`."""
    folder = artifacts.checked(ref)
    try:
        recipe = DataRecipe.model_validate(artifacts.manifest(ref).recipe)
        if recipe.mixture:
            refs = [Ref(kind="data", stage=-1, sha256=part.data) for part in recipe.mixture]
            sources = [load_sequences(artifacts, ref) for ref in refs]
            splits = _mixed(folder, "train", sources), _mixed(folder, "validation", sources)
        else:
            splits = load_split(folder, "train"), load_split(folder, "validation")
        train, validation = (replace(split, end_token=recipe.separated_by) for split in splits)
        return train, validation
    except (EOFError, OSError, TypeError, ValueError):  # sealed so, by a stranger
        remedy = f"Remove {folder} and {AGAIN}"
        raise ArtifactCorruptError(folder, "holds no sequences that can be read", remedy) from None


def _mixed(folder: Path, split: str, sources: list[tuple[PackedSequences, PackedSequences]]) -> PackedSequences:
    """Return a split of a mixture from those of its sources; raises ValueError if its rows are not theirs."""
    parts = [source[list(SPLITS).index(split)] for source in sources]
    rows, ids = (np.load(array_path(folder, split, name), mmap_mode="r") for name in ("rows", "sequence_ids"))
    n_rows = sum(map(len, parts))
    if rows.shape != ids.shape or any(part.min() < 0 or part.max() >= n_rows for part in parts_of(rows)):
        raise ValueError
    return mixed(parts, rows, ids)
