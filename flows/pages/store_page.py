"""The page of an activation store: its plots and sample rows; the text is in store.html.j2."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from flows.pages.page import artifact_page
from flows.pages.plots import Plot, matrix
from flows.pages.scales import Scale, places, scale_of
from flows.pages.text import sequence_name, visible
from storage.activations.statistics import DEAD_FACTOR, OUTLIER_FACTOR

_NAMED_OUTLIERS = 5
_WIDE = 8.0
"""Norms whose range exceeds this factor are drawn on a logarithmic scale."""

Figure = tuple[Markup, str]
"""A plot and its caption."""


def store_page(document: dict[str, Any]) -> str:
    """Return the page of the document of a sealed store."""
    store = document["store"]
    plots = _plots(store, document["drift"]) if store["sampled_tokens"] else {}
    rows = [_row(sample) for sample in document["samples"]["rows"]]
    return artifact_page("store.html.j2", document, plots=plots, rows=rows)


def _plots(store: dict[str, Any], drift: dict[str, Any] | None) -> dict[str, list[Figure]]:
    """Return the figures by section."""
    return {
        "channels": [_by_channel(store), _sorted_std(store)],
        "tokens": [_by_position(store), _histogram(store["histogram"])],
        "directions": [_spectrum(store), *([] if drift is None else [_drift(drift)])],
    }


def _by_channel(store: dict[str, Any]) -> Figure:
    channels, d_model = store["channels"], store["shape"][2]
    rms, bound = channels["rms"], channels["outlier_bound"]
    far = max(value or 0.0 for value in rms) > bound / 2
    scale = scale_of([*rms, bound] if far else rms, log=far, zero=not far)
    plot = Plot(places(0, d_model - 1), scale, "channel", "root mean square")
    marked = {*channels["outliers"], *channels["dead"]}
    for class_, which in (
        ("dot", [channel for channel in range(d_model) if channel not in marked]),
        ("dead", channels["dead"]),
        ("outlier", channels["outliers"]),
    ):
        plot.dots(which, [rms[channel] for channel in which], class_, "channel")
    for channel in channels["outliers"][:_NAMED_OUTLIERS]:
        plot.name(channel, rms[channel], str(channel))
    if far:
        plot.level(bound, f"outliers from {bound:.3g} on")
    caption = (
        f"Size of each channel. One that is {OUTLIER_FACTOR:g} times the median is an outlier"
        + ("." if far else f" (from {bound:.3g} on, beyond this plot).")
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
    if near and bound > 0:
        plot.level(bound, f"dead up to {bound:.2g}")
    caption = f"How much channels vary. One with {DEAD_FACTOR:g} of the median or less is dead."
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
    return plot.svg(), f"All sampled values, counted on a logarithmic scale.{beyond}"


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
    plot = matrix(drift["cka"], [str(depth) for depth in drift["boundaries"]], drift["here"], "CKA between boundaries")
    caption = (
        "Linear CKA between boundaries, numbered by the stacks below them; this one is bold (Kornblith et al. 2019). "
        f"1 is the same up to rotation and scale. Of {drift['rows']:,} rows that all of them hold."
    )
    return plot, caption


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the title of a sample row, and its tokens with the strength of the colour behind each."""
    norms, first, changed = sample["norms"], 0, set(sample["changed"])
    known = [norm for norm in norms if norm is not None] or [0.0]
    low, spread = min(known), max(known) - min(known) or 1.0
    pieces, lengths = sample["pieces"] or ["·"] * len(norms), sample["piece_tokens"] or [1] * len(norms)
    tokens: list[dict[str, Any]] = []
    for place, (text, length) in enumerate(zip(pieces, lengths, strict=True)):
        of_piece = [norm for norm in norms[first : first + length] if norm is not None]
        heat = (max(of_piece) - low) / spread if of_piece else 0.0
        tip = f"position {first}: norm {max(of_piece):.4g}" if of_piece else f"position {first}: not finite"
        tokens.append({"text": visible(text), "heat": f"{heat:.2f}", "tip": tip, "changed": place in changed})
        first += length
    view = f", view {sample['view']}" if sample["group"] == "train" else ""
    title = (
        f"{sample['group']} row {sample['row']:,}, sequence {sequence_name(sample['sequence_id'])}{view}; "
        f"norms {low:.3g} to {low + spread:.3g}"
    )
    return {"title": title, "tokens": tokens}
