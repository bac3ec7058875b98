"""A sealed activation store as a document: its layout, statistics, sample rows, and drift from other boundaries."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from flows.pages.drift import Boundary, drift_of
from flows.pages.samples import sample_rows
from flows.pages.text import listed, rounded
from storage.activations.format import GROUP_FOLDERS, Group
from storage.activations.metadata import GroupMetadata, read_metadata
from storage.activations.statistics import (
    POSITION_QUANTILES,
    TOKEN_QUANTILES,
    Statistics,
    describe_rows,
    evenly_spaced,
)
from storage.artifacts import Artifacts
from storage.manifest import Manifest
from storage.stores import open_at


def describe_store(
    artifacts: Artifacts, folder: Path, manifest: Manifest, against: Boundary | None, n_rows: int
) -> dict[str, Any]:
    """Return the sections `store`, `drift` and `samples` of the document of a sealed store.

    Args:
        artifacts: the artifacts folder.
        folder: folder of the store.
        manifest: manifest of the store.
        against: a sealed store to compare with; None takes the boundary below.
        n_rows: how many rows to read for the statistics and the drift.

    Raises:
        ArtifactCorruptError: a file differs from what was sealed; names the file.
        ConfigError: `against` cannot be compared.
    """
    with open_at(artifacts, folder, manifest) as reader:
        groups = read_metadata(folder)[1]
        spec = reader.train
        places = evenly_spaced(spec.rows, n_rows)
        found = describe_rows(functools.partial(reader.read, "train"), places, spec.seq_len, spec.d_model)
        samples, why_not = sample_rows(artifacts, manifest, reader, groups)
    here = Boundary(artifacts, folder, manifest, groups["train"].rows)
    return {
        "store": {**_layout(folder, groups), **_statistics(found)},
        "drift": drift_of(artifacts, here, against, n_rows),
        "samples": {"rows": samples, "why_no_text": why_not},
    }


def _layout(folder: Path, groups: dict[Group, GroupMetadata]) -> dict[str, Any]:
    spec, rows = groups["train"].spec, groups["train"].rows
    array = json.loads((folder / GROUP_FOLDERS["train"] / "activations" / "zarr.json").read_bytes())
    return {
        "shape": [spec.rows, spec.seq_len, spec.d_model],
        "validation_rows": groups["validation"].spec.rows,
        "views": len(set(rows.view.tolist())),
        "dtype": spec.dtype,
        "codecs": [_codec(codec) for codec in array["codecs"]],
        "row_bytes": spec.row_bytes,
        "rows_per_chunk": spec.rows_per_chunk,
        "rows_per_shard": spec.rows_per_shard,
        "shards": spec.n_shards,
    }


def _codec(codec: dict[str, Any]) -> str:
    """Return a codec of Zarr's metadata in one line, with its settings or inner codecs in parentheses."""
    settings = codec.get("configuration", {})
    if inner := settings.get("codecs"):
        return f"{codec['name']}({', '.join(map(_codec, inner))})"
    shown = ", ".join(str(value) for value in settings.values() if isinstance(value, (str, int, float)))
    return f"{codec['name']}({shown})" if shown else str(codec["name"])


def _statistics(found: Statistics) -> dict[str, Any]:
    channels, spectrum = found.channels, found.spectrum
    varies = channels.std
    return {
        "sampled_rows": found.n_rows,
        "sampled_tokens": found.n_tokens,
        "non_finite": found.n_non_finite,
        "mean": rounded(found.mean),
        "std": rounded(found.std),
        "largest": rounded(float(max(abs(channels.smallest).max(), abs(channels.largest).max()))),
        "channel_std_smallest": rounded(float(varies.min())),
        "channel_std_largest": rounded(float(varies.max())),
        "channels": {
            "outlier_bound": rounded(channels.outlier_bound),
            "outliers": channels.outliers.tolist(),
            "dead_bound": rounded(channels.dead_bound),
            "dead": channels.dead.tolist(),
            **{
                name: listed(getattr(channels, name))
                for name in ("mean", "std", "rms", "smallest", "largest", "kurtosis")
            },
        },
        "tokens": {
            "norm_quantiles": _by_quantile(TOKEN_QUANTILES, listed(found.norm_quantiles)),
            "neighbour_cosine": rounded(found.neighbour_cosine),
            "pair_cosine": rounded(found.pair_cosine),
        },
        "positions": {
            "norm_mean": listed(found.norm_by_position),
            "norm_quantiles": _by_quantile(POSITION_QUANTILES, listed(found.norm_quantiles_by_position)),
        },
        "spectrum": {
            "effective_rank": rounded(spectrum.effective_rank if found.n_tokens else math.nan),
            "stable_rank": rounded(spectrum.stable_rank if found.n_tokens else math.nan),
            "directions_for_90_percent": spectrum.directions_for(0.9),
            "std": listed(spectrum.std),
        },
        "histogram": {
            "edges": listed(found.bin_edges),
            "counts": found.bin_counts.tolist(),
            "beyond": found.n_beyond,
        },
    }


def _by_quantile(at: tuple[float, ...], values: list[Any]) -> dict[str, Any]:
    return {f"{quantile:g}": value for quantile, value in zip(at, values, strict=True)}
