"""`stackwise inspect`: one artifact, as its manifest and its bytes tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.numbers import size
from stackwise_core.errors import ConfigError, Fault
from storage.errors import ArtifactMissingError
from storage.layout import Artifacts, State
from storage.manifest import Manifest, read_manifest
from storage.runs import run_names

_SAMPLED_ROWS = 64


def find_artifact(artifacts: Artifacts, uri: str) -> Path:
    """Return the folder of an artifact given by path, by name, or by a unique start of its name.

    Raises:
        ArtifactError: nothing answers to it, or it was never sealed.
        ConfigError: several do.
    """
    if (Path(uri) / "manifest.json").exists():
        return Path(uri).absolute()
    found = [folder for folder in artifacts.everything() if folder.name.startswith(Path(uri).name)]
    exact = [folder for folder in found if folder.name == Path(uri).name]
    if not found:
        if Path(uri).is_dir():
            read_manifest(Path(uri))  # raises: it has none
        runs = ", ".join(run_names(artifacts)) or "none"
        raise ArtifactMissingError(
            uri, f"is no artifact in {artifacts.root}", f"See `stackwise status RUN`; runs: {runs}"
        )
    if len(exact or found) != 1:
        names = ", ".join(folder.name for folder in found[:5])
        raise ConfigError([Fault("URI", repr(uri), f"{len(found)} artifacts begin so in {artifacts.root}: {names}")])
    return (exact or found)[0]


def show_artifact(root: str, uri: str, *, as_json: bool) -> int:
    """Print one artifact: what it is, what it was made from, its files, and for a store its statistics.

    Returns:
        3 if it is damaged, else 0.
    """
    artifacts = Artifacts(root).existing()
    folder = find_artifact(artifacts, uri)
    manifest = read_manifest(folder)
    state = artifacts.state(manifest.ref) if artifacts.folder(manifest.ref) == folder else State.SEALED
    document: dict[str, Any] = {"folder": str(folder), "state": state.value, **manifest.model_dump(mode="json")}
    if manifest.ref.kind == "activations" and state is State.SEALED:
        document["store"] = _describe_store(folder, manifest)
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        _print_artifact(document, manifest)
    return 3 if state is State.CORRUPT else 0


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
    """Print a line per fact, unwrapped, so that ids and folders can be copied."""
    lines: list[tuple[str, object]] = [
        ("artifact", manifest.ref.name),
        ("folder", document["folder"]),
        ("state", document["state"]),
        ("id", manifest.ref.sha256),
        ("digest", manifest.digest),
        ("created", manifest.created),
        ("bytes", f"{size(manifest.n_bytes)} in {len(manifest.files)} files"),
    ]
    lines += [("made from", f"{entry.ref.name} (digest {entry.digest[:12]})") for entry in manifest.inputs]
    for section in ("facts", "store", "recipe", "fingerprint"):
        for key, value in document.get(section, {}).items():
            lines.append((f"{section}.{key}", json.dumps(value) if isinstance(value, (dict, list)) else value))
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        print(f"{key:<{width}}{value}")
