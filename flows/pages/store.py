"""A sealed activation store: its layout, statistics, sample rows and drift, as a document and as a page."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from flows.pages.drift import Boundary, drift_of
from flows.pages.page import artifact_page, listed, number, rounded, visible
from flows.pages.plots import Plot, Scale, matrix, places, scale_of
from flows.pages.samples import norms_by_piece, sample_rows, title_of
from flows.pages.tables import OF_CHANNELS, channel_cells
from stackwise_core.strict import parse_object
from storage.activations import statistics
from storage.activations.format import GROUP_FOLDERS, Group
from storage.activations.metadata import GroupMetadata, read_metadata
from storage.artifacts import Artifacts
from storage.manifest import Manifest
from storage.stores import open_at

_NAMED_OUTLIERS, _OUTLIERS = 5, 20
"""Outlier channels that are named in a plot, and that are listed."""
_WIDE = 8.0
"""Norms whose range exceeds this factor are drawn on a logarithmic scale."""

_DARKEST = 0.95
"""Quantile of a row's norms from which on tokens have the full colour: a first token may be ten times as long."""

Figure = tuple[Markup, str]
"""A plot and its caption."""


def describe_store(
    artifacts: Artifacts, folder: Path, manifest: Manifest, against: Boundary | None, n_rows: int
) -> dict[str, Any]:
    """Return the sections `store`, `drift` and `samples` of the document of a sealed store.

    The drift is measured from the boundary below, or from the store `against`; `n_rows` rows are read for it and for
    the statistics.

    Raises:
        ArtifactCorruptError: a file differs from what was sealed; names the file.
        ConfigError: `against` cannot be compared.
    """
    with open_at(artifacts, folder, manifest) as reader:
        groups = read_metadata(folder)[1]
        spec = reader.train
        rows = statistics.evenly_spaced(spec.rows, n_rows)
        found = statistics.describe_rows(functools.partial(reader.read, "train"), rows, spec.seq_len, spec.d_model)
        samples, why_not = sample_rows(artifacts, manifest, reader, groups)
    here = Boundary(artifacts, folder, manifest, groups["train"].rows)
    return {
        "store": {**_layout(folder, groups), **statistics_of(found)},
        "drift": drift_of(artifacts, here, against, n_rows),
        "samples": {"rows": samples, "why_no_text": why_not},
    }


def _layout(folder: Path, groups: dict[Group, GroupMetadata]) -> dict[str, Any]:
    spec, rows = groups["train"].spec, groups["train"].rows
    array = parse_object((folder / GROUP_FOLDERS["train"] / "activations" / "zarr.json").read_bytes())
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
    """Return a codec in Zarr's metadata as one line, with its settings or inner codecs in parentheses."""
    settings = codec.get("configuration", {})
    if inner := settings.get("codecs"):
        return f"{codec['name']}({', '.join(map(_codec, inner))})"
    shown = ", ".join(str(value) for value in settings.values() if isinstance(value, (str, int, float)))
    return f"{codec['name']}({shown})" if shown else str(codec["name"])


def statistics_of(found: statistics.Statistics) -> dict[str, Any]:
    """Return statistics as they stand in the section `store` of a document."""
    channels, spectrum = found.channels, found.spectrum
    names = ("mean", "std", "rms", "smallest", "largest", "kurtosis")
    return {
        "sampled_rows": found.n_rows,
        "sampled_tokens": found.n_tokens,
        "non_finite": found.n_non_finite,
        "mean": rounded(found.mean),
        "std": rounded(found.std),
        "largest": rounded(float(max(abs(channels.smallest).max(), abs(channels.largest).max()))),
        "channel_std_smallest": rounded(float(channels.std.min())),
        "channel_std_largest": rounded(float(channels.std.max())),
        "channels": {
            "outlier_bound": rounded(channels.outlier_bound),
            "outliers": channels.outliers.tolist(),
            "dead_bound": rounded(channels.dead_bound),
            "dead": channels.dead.tolist(),
            **{name: listed(getattr(channels, name)) for name in names},
        },
        "tokens": {
            "norm_quantiles": _by_quantile(statistics.TOKEN_QUANTILES, listed(found.norm_quantiles)),
            "neighbour_cosine": rounded(found.neighbour_cosine),
            "pair_cosine": rounded(found.pair_cosine),
        },
        "positions": {
            "norm_mean": listed(found.norm_by_position),
            "norm_quantiles": _by_quantile(statistics.POSITION_QUANTILES, listed(found.norm_quantiles_by_position)),
        },
        "spectrum": {
            "effective_rank": rounded(spectrum.effective_rank if found.n_tokens else math.nan),
            "stable_rank": rounded(spectrum.stable_rank if found.n_tokens else math.nan),
            "directions_for_90_percent": spectrum.directions_for(0.9),
            "std": listed(spectrum.std),
        },
        "histogram": {"edges": listed(found.bin_edges), "counts": found.bin_counts.tolist(), "beyond": found.n_beyond},
    }


def _by_quantile(at: tuple[float, ...], values: list[Any]) -> dict[str, Any]:
    return {f"{quantile:g}": value for quantile, value in zip(at, values, strict=True)}


def store_page(document: dict[str, Any]) -> str:
    """Return the page of the document of a sealed store."""
    store = document["store"]
    plots: dict[str, list[Figure]] = {}
    if store["sampled_tokens"]:
        plots["channels"] = [_by_channel(store), _sorted_std(store)]
        plots["tokens"] = [_by_position(store), _histogram(store["histogram"])]
        plots["directions"] = [_spectrum(store), *([] if document["drift"] is None else [_drift(document["drift"])])]
    rows = [_row(sample) for sample in document["samples"]["rows"]]
    listed = store["channels"]["outliers"][:_OUTLIERS]
    outliers = list(zip(listed, channel_cells(store["channels"], listed), strict=True))
    values = {"plots": plots, "rows": rows, "outliers": outliers, "of_channels": OF_CHANNELS}
    return artifact_page("store.html.j2", document, **values)


def _by_channel(store: dict[str, Any]) -> Figure:
    channels, d_model = store["channels"], store["shape"][2]
    rms, bound = channels["rms"], channels["outlier_bound"]
    far = max(value or 0.0 for value in rms) > bound / 2
    scale = scale_of([*rms, bound] if far else rms, log=far, zero=not far)
    named = channels["outliers"][:_NAMED_OUTLIERS]
    plot = Plot(places(0, d_model - 1), scale, "channel", "root mean square", list(map(str, named)))
    plot.ends((channel, rms[channel], str(channel), {"class": "line thin"}) for channel in named)
    marked = {*channels["outliers"], *channels["dead"]}
    for class_, which in (
        ("dot", [channel for channel in range(d_model) if channel not in marked]),
        ("dead", channels["dead"]),
        ("outlier", channels["outliers"]),
    ):
        plot.dots(which, [rms[channel] for channel in which], class_, "channel")
    if far:
        plot.level(bound)
    caption = (
        f"Size of each channel. One that is {statistics.OUTLIER_FACTOR:g} times the median is an outlier: "
        + f"from {number(bound)} on, {'the dashed line' if far else 'beyond this plot'}."
        + (" Rings are dead channels." if channels["dead"] else "")
    )
    return plot.svg(), caption


def _sorted_std(store: dict[str, Any]) -> Figure:
    channels = store["channels"]
    values = sorted((value for value in channels["std"] if value is not None), reverse=True)
    bound, low = channels["dead_bound"], min(value for value in [*values, 1.0])
    near = low <= 10 * bound
    log = near or low < values[0] / 30
    scale = scale_of([*values, bound] if near else values, log=log, zero=not log)
    plot = Plot(places(1, len(values)), scale, "channels, the widest first", "standard deviation")
    plot.line(range(1, len(values) + 1), [value if value > 0 or not log else scale.low for value in values])
    marked = near and bound > 0
    if marked:
        plot.level(bound)
    caption = f"How much channels vary. One with {statistics.DEAD_FACTOR:g} of the median or less is dead"
    caption += f": below {number(bound)}, the dashed line." if marked else "."
    return plot.svg(), caption


def _by_position(store: dict[str, Any]) -> Figure:
    positions = store["positions"]
    low, middle, high = (positions["norm_quantiles"][quantile] for quantile in ("0.1", "0.5", "0.9"))
    known = [norm for norm in [*low, *high] if norm]
    wide = bool(known) and max(known) > _WIDE * min(known)  # such as a first token that all attention sinks into
    norms = scale_of([*low, *high], log=wide, zero=not wide)
    plot, at = Plot(places(0, len(low) - 1), norms, "position", "norm of a token"), range(len(low))
    plot.band(at, low, high)
    plot.line(at, middle)
    return plot.svg(), "Euclidean norm by position: the median token, and the range of the middle 80\u00a0%."


def _histogram(histogram: dict[str, Any]) -> Figure:
    edges, counts = histogram["edges"], histogram["counts"]
    heights = Scale(0.8, 1.15 * max(counts), log=True)
    plot = Plot(scale_of(edges), heights, "value", "values in a bin")
    plot.bars(edges, counts, heights.low)
    beyond = f" {histogram['beyond']:,} values lie beyond these bins." if histogram["beyond"] else ""
    return plot.svg(), f"All sampled values, counted.{beyond}"


def _spectrum(store: dict[str, Any]) -> Figure:
    spectrum = store["spectrum"]
    std, rank = spectrum["std"], spectrum["effective_rank"]
    plot = Plot(places(1, len(std)), scale_of(std, log=True), "direction, the widest first", "standard deviation")
    plot.line(range(1, len(std) + 1), [value if value > 0 else None for value in std])
    plot.place(rank, f"effective rank {rank:.1f}")
    caption = (
        "Along each principal direction of the centred tokens. The effective rank is the exponential of the entropy of "
        f"these values (Roy and Vetterli 2007). Stable rank {spectrum['stable_rank']:.1f}; "
        f"{spectrum['directions_for_90_percent']:,} directions hold 90\u00a0% of the variance."
    )
    return plot.svg(), caption


def _drift(drift: dict[str, Any]) -> Figure:
    names = [str(depth) for depth in drift["boundaries"]]
    plot = matrix(drift["cka"], names, drift["here"], "CKA between boundaries", "stacks below")
    caption = (
        "Linear CKA between boundaries, numbered by the stacks below them; this one is bold (Kornblith et al. 2019). "
        f"1 is the same up to rotation and scale. Of {drift['rows']:,} rows that all of them hold."
    )
    return plot, caption


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the title of a sample row, and its tokens with the strength of the colour behind each."""
    norms, changed = sample["norms"], set(sample["changed"])
    known = [norm for norm in norms if norm is not None] or [0.0]
    low, high = min(known), float(np.quantile(known, _DARKEST))
    if not sample["pieces"]:
        sample = {**sample, "pieces": ["·"] * len(norms), "piece_tokens": [1] * len(norms)}
    tokens: list[dict[str, Any]] = []
    for place, (text, first, of_piece) in enumerate(norms_by_piece(sample)):
        heat = min((max(of_piece) - low) / (high - low or 1.0), 1.0) if of_piece else 0.0
        tip = f"position {first}: {f'norm {max(of_piece):.4g}' if of_piece else 'not finite'}"
        tokens.append({"text": visible(text), "heat": f"{heat:.2f}", "tip": tip, "changed": place in changed})
    return {"title": title_of(sample), "tokens": tokens}
