"""The drift of a store: how similar its activations are to those at other boundaries."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.pages.page import listed
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Ref
from storage.activations.drift import measure_drift, shared_places
from storage.activations.metadata import RowIndex, read_metadata
from storage.artifacts import Artifacts
from storage.errors import ArtifactError
from storage.manifest import Manifest
from storage.runs import find_run, run_names
from storage.stores import fetch_metadata, open_at


@dataclass(frozen=True, eq=False)
class Boundary:
    """A sealed store and the index of its rows."""

    artifacts: Artifacts
    folder: Path
    manifest: Manifest
    rows: RowIndex

    @classmethod
    def of(cls, artifacts: Artifacts, folder: Path, manifest: Manifest) -> Boundary:
        """Read the row index of a store."""
        fetch_metadata(artifacts, folder, manifest)
        return cls(artifacts, folder, manifest, read_metadata(folder)[1]["train"].rows)

    @property
    def ref(self) -> Ref:
        """Reference of the store."""
        return self.manifest.ref

    @property
    def depth(self) -> int:
        """Number of stacks below it."""
        return int(self.manifest.recipe["boundary"])


def drift_of(artifacts: Artifacts, here: Boundary, against: Boundary | None, n_rows: int) -> dict[str, Any] | None:
    """Compare a store with the given one and with all sealed boundaries of its run.

    Returns:
        names and depths of the stores, `cka` and `cosine` between all of them, and the indices `here` and `against`,
        which is the given store or the boundary below. None if there is no other boundary.

    Raises:
        ConfigError: the given store is of other data, or has no row in common.
    """
    if against is not None:
        _check_comparable(here, against)
    chosen = [here] if against is None else [here, against]
    for other in _boundaries_of_run(artifacts, here.ref):
        known = any(other.ref == boundary.ref for boundary in chosen)
        if not known and _share_rows([*chosen, other]):
            chosen.append(other)
    if len(chosen) == 1:
        return None
    chosen.sort(key=lambda boundary: (boundary.depth, boundary.ref.stage))
    at = chosen.index(here)
    base = chosen.index(against) if against is not None else at - 1
    return {
        "stores": [boundary.ref.name for boundary in chosen],
        "boundaries": [boundary.depth for boundary in chosen],
        "here": at,
        "against": base if base >= 0 else None,
        **_measure(chosen, n_rows),
    }


def _share_rows(boundaries: list[Boundary]) -> bool:
    return len(shared_places([boundary.rows for boundary in boundaries], 1)[0]) > 0


def _measure(chosen: list[Boundary], n_rows: int) -> dict[str, Any]:
    places = shared_places([boundary.rows for boundary in chosen], n_rows)
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(open_at(boundary.artifacts, boundary.folder, boundary.manifest)) for boundary in chosen
        ]
        found = measure_drift([functools.partial(reader.read, "train") for reader in readers], places)
    measured = {"cka": listed(found.cka), "cosine": listed(found.cosine)}
    return {"rows": found.n_rows, "tokens": found.n_tokens, **measured}


def _check_comparable(here: Boundary, against: Boundary) -> None:
    fault = ""
    if against.ref == here.ref:
        fault = "it is the store itself; name another"
    elif against.manifest.recipe["data"] != here.manifest.recipe["data"]:
        fault = f"it holds other sequences than {here.ref.name}: name a store of the same data"
    elif not _share_rows([here, against]):
        fault = f"it has no row (sequence, view) in common with {here.ref.name}"
    if fault:
        raise ConfigError([Fault("--against", repr(against.ref.name), fault)])


def _boundaries_of_run(artifacts: Artifacts, ref: Ref) -> list[Boundary]:
    """Return the sealed stores of the newest run that plans a store."""
    planned: list[tuple[str, list[Ref]]] = []
    for name in run_names(artifacts):
        with contextlib.suppress(ArtifactError):  # skip damaged runs
            run = find_run(artifacts, name)
            stores = [stage.ref("activations") for stage in run.plan.stages if stage.activations is not None]
            planned += [(run.start["started"], stores)] if ref in stores else []
    newest = max(planned, key=lambda run: run[0], default=("", []))[1]
    sealed = [(store, artifacts.sealed(store)) for store in newest]
    return [
        Boundary.of(artifacts, artifacts.folder(store), manifest) for store, manifest in sealed if manifest is not None
    ]
