"""`stackwise inspect`: one artifact, as its manifest and its bytes tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.numbers import size
from stackwise_core.errors import ConfigError, Fault
from storage.layout import Artifacts, State
from storage.manifest import Manifest, read_manifest

_SAMPLED_ROWS = 64


def find_artifact(artifacts: Artifacts, uri: str) -> Path:
    """Return the folder of an artifact given by path, by name, or by a unique start of its name.

    Raises:
        ConfigError: none, or several, answer to it.
    """
    if (Path(uri) / "manifest.json").exists():
        return Path(uri).absolute()
    found = [folder for folder in artifacts.everything() if folder.name.startswith(Path(uri).name)]
    exact = [folder for folder in found if folder.name == Path(uri).name]
    if len(exact or found) != 1:
        names = ", ".join(folder.name for folder in found[:5]) or "`stackwise status RUN` lists what there is"
        what = "no artifact of that name" if not found else f"{len(found)} artifacts begin so"
        raise ConfigError([Fault("URI", repr(uri), f"{what} in {artifacts.root}: {names}")])
    return (exact or found)[0]


def show_artifact(root: str, uri: str, *, as_json: bool) -> None:
    """Print one artifact: what it is, what it was made from, its files, and for a store its statistics."""
    artifacts = Artifacts(root).existing()
    folder = find_artifact(artifacts, uri)
    manifest = read_manifest(folder)
    state = artifacts.state(manifest.ref) if artifacts.folder(manifest.ref) == folder else State.SEALED
    document: dict[str, Any] = {"folder": str(folder), "state": state.value, **manifest.model_dump(mode="json")}
    if manifest.ref.kind == "activations" and state is State.SEALED:
        document["store"] = _describe_store(folder, manifest)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    _print_artifact(document, manifest)


def _describe_store(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return layout and statistics of a store, the latter over evenly spaced rows."""
    import numpy as np

    from storage.activations.reader import StoreReader

    with StoreReader(folder, manifest.checksums()) as reader:
        spec = reader.train
        places = np.unique(np.linspace(0, spec.rows - 1, _SAMPLED_ROWS).round().astype(np.int64))
        rows = reader.read("train", places).float()
        return {
            "shape": [spec.rows, spec.seq_len, spec.d_model],
            "validation_rows": reader.validation.rows,
            "dtype": spec.dtype,
            "rows_per_chunk": spec.rows_per_chunk,
            "rows_per_shard": spec.rows_per_shard,
            "shards": spec.n_shards,
            "sampled_rows": len(places),
            "mean": rows.mean().item(),
            "std": rows.std().item(),
            "largest": rows.abs().max().item(),
            "non_finite": int((~rows.isfinite()).sum()),
            "channel_std_smallest": rows.flatten(0, 1).std(0).min().item(),
            "channel_std_largest": rows.flatten(0, 1).std(0).max().item(),
        }


def _print_artifact(document: dict[str, Any], manifest: Manifest) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("artifact", manifest.ref.name)
    table.add_row("folder", document["folder"])
    table.add_row("state", document["state"])
    table.add_row("id", manifest.ref.sha256)
    table.add_row("digest", manifest.digest)
    table.add_row("created", manifest.created)
    table.add_row("bytes", f"{size(manifest.n_bytes)} in {len(manifest.files)} files")
    for entry in manifest.inputs:
        table.add_row("made from", f"{entry.ref.name}  (digest {entry.digest[:12]})")
    for section in ("facts", "store", "recipe", "fingerprint"):
        for key, value in document.get(section, {}).items():
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            table.add_row(f"{section}.{key}", text)
    console.print(table, highlight=False)
