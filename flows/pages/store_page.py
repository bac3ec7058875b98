"""The page of an activation store."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element

from flows.pages import parts
from flows.pages.markup import Child, element, page
from flows.pages.plots import Plot, matrix
from flows.pages.scales import Scale, places, scale_of
from flows.pages.style import STYLE
from flows.pages.text import number, sequence_name, visible
from flows.run.numbers import size
from storage.activations.statistics import DEAD_FACTOR, OUTLIER_FACTOR

_NAMED_OUTLIERS = 5
_WIDE = 8.0
"""Norms that differ by so much are drawn on a logarithmic scale."""


def store_page(document: dict[str, Any]) -> str:
    """Return the page of the document of a sealed store."""
    store = document["store"]
    n_rows, seq_len, d_model = store["shape"]
    boundary = document["recipe"]["boundary"]
    stacks = "1 stack" if boundary == 1 else f"{boundary} stacks"
    summary = (
        f"The stream after {stacks}: {n_rows:,} training rows of {seq_len:,} positions and {d_model:,} channels in "
        f"{store['dtype']}, and {store['validation_rows']:,} validation rows. Numbers are of "
        f"{store['sampled_rows']:,} evenly spaced training rows, {store['sampled_tokens']:,} tokens."
    )
    children: list[Child] = [parts.heading(document, "Activation store", summary)]
    if store["non_finite"]:
        warning = f"NaN or infinite among the sampled values: {store['non_finite']:,}. Their tokens are left out below."
        children.append(element("p", warning, class_="warning"))
    if store["sampled_tokens"]:
        children += [_tiles(document), *_plots(document)]
    children += [_rows(document["samples"]), parts.provenance(document), _disk(store), parts.recipe(document)]
    return page(parts.name_of(document), STYLE, *children)


def _tiles(document: dict[str, Any]) -> Element:
    store, drift = document["store"], document["drift"]
    outliers, dead = (len(store["channels"][name]) for name in ("outliers", "dead"))
    shown = [
        (f"{store['spectrum']['effective_rank']:.1f}", f"effective rank, of {store['shape'][2]:,}", False),
        (f"{outliers:,}", "outlier channels", outliers > 0),
        (f"{dead:,}", "dead channels", dead > 0),
        (f"{store['tokens']['norm_quantiles']['0.5']:.3g}", "median norm of a token", False),
        (f"{store['tokens']['pair_cosine'] or 0:.2f}", "mean cosine of two tokens", False),
    ]
    if drift and drift["against"] is not None:
        value, below = drift["cka"][drift["here"]][drift["against"]], drift["boundaries"][drift["against"]]
        shown.append(("-" if value is None else f"{value:.3f}", f"CKA to boundary {below}", False))
    return parts.tiles(*shown)


def _plots(document: dict[str, Any]) -> list[Element]:
    store = document["store"]
    shape = [_by_position(store), _histogram(store["histogram"])]
    return [
        parts.section("Channels", parts.figures(_by_channel(store), _sorted_std(store)), *_outlier_table(store)),
        parts.section("Tokens", parts.figures(*shape)),
        parts.section("Directions", parts.figures(_spectrum(store), *_drift(document))),
    ]


def _by_channel(store: dict[str, Any]) -> tuple[Element, str]:
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


def _sorted_std(store: dict[str, Any]) -> tuple[Element, str]:
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


def _outlier_table(store: dict[str, Any]) -> list[Element]:
    channels = store["channels"]
    if not channels["outliers"]:
        return []
    names = ("rms", "mean", "std", "smallest", "largest", "kurtosis")
    rows = [
        [str(channel), *(number(channels[name][channel]) for name in names)] for channel in channels["outliers"][:20]
    ]
    return [parts.table(["outlier channel", *(f"|{name}" for name in names)], rows)]


def _by_position(store: dict[str, Any]) -> tuple[Element, str]:
    positions = store["positions"]
    low, middle, high = (positions["norm_quantiles"][quantile] for quantile in ("0.1", "0.5", "0.9"))
    known = [norm for norm in [*low, *high] if norm]
    wide = bool(known) and max(known) > _WIDE * min(known)  # such as a first token that all attention sinks into
    norms = scale_of([*low, *high], log=wide, zero=not wide)
    plot, at = Plot(places(0, len(low) - 1), norms, "position", "norm of a token"), range(len(low))
    plot.band(at, low, high)
    plot.line(at, middle)
    return plot.svg(), "Euclidean norm by position: the median token, and the range of the middle 80\u00a0%."


def _histogram(histogram: dict[str, Any]) -> tuple[Element, str]:
    edges, counts = histogram["edges"], histogram["counts"]
    heights = Scale(0.8, 1.15 * max(counts), log=True)
    plot = Plot(scale_of(edges), heights, "value", "values in a bin")
    plot.bars(edges, counts, heights.low)
    beyond = f" {histogram['beyond']:,} values lie beyond these bins." if histogram["beyond"] else ""
    return plot.svg(), f"All sampled values, counted on a logarithmic scale.{beyond}"


def _spectrum(store: dict[str, Any]) -> tuple[Element, str]:
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


def _drift(document: dict[str, Any]) -> list[tuple[Element, str]]:
    drift = document["drift"]
    if drift is None:
        return []
    plot = matrix(drift["cka"], [str(depth) for depth in drift["boundaries"]], drift["here"], "CKA between boundaries")
    caption = (
        "Linear CKA between boundaries, numbered by the stacks below them; this one is bold (Kornblith et al. 2019). "
        f"1 is the same up to rotation and scale. Of {drift['rows']:,} rows that all of them hold."
    )
    return [(plot, caption)]


def _rows(samples: dict[str, Any]) -> Element:
    intro = (
        "The input that some rows were computed from. The stronger the colour behind a token, the larger the norm of "
        "its activation, from the smallest to the largest of the row. Underlined tokens stand where masking put them."
    )
    if samples["why_no_text"]:
        intro = f"There is no text to show: {samples['why_no_text']}. A dot is a token."
    rows = [_row(sample) for sample in samples["rows"]]
    return parts.section("Rows beside their text", element("p", intro, class_="soft"), *rows)


def _row(sample: dict[str, Any]) -> Element:
    norms, first, changed = sample["norms"], 0, set(sample["changed"])
    known = [norm for norm in norms if norm is not None] or [0.0]
    low, reach = min(known), max(known) - min(known) or 1.0
    pieces, lengths = sample["pieces"] or ["·"] * len(norms), sample["piece_tokens"] or [1] * len(norms)
    tokens: list[Element] = []
    for place, (text, length) in enumerate(zip(pieces, lengths, strict=True)):
        of_piece = [norm for norm in norms[first : first + length] if norm is not None]
        heat = (max(of_piece) - low) / reach if of_piece else 0.0
        tip = f"position {first}: norm {max(of_piece):.4g}" if of_piece else f"position {first}: not finite"
        class_ = {"class_": "changed"} if place in changed else {}
        tokens.append(element("span", visible(text), style=f"--heat:{heat:.2f}", title=tip, **class_))
        first += length
    view = f", view {sample['view']}" if sample["group"] == "train" else ""
    title = (
        f"{sample['group']} row {sample['row']:,}, sequence {sequence_name(sample['sequence_id'])}{view}; "
        f"norms {low:.3g} to {low + reach:.3g}"
    )
    return element("div", element("h3", title), element("p", *tokens, class_="text"), class_="row")


def _disk(store: dict[str, Any]) -> Element:
    chunk, shard = (store[f"rows_per_{unit}"] for unit in ("chunk", "shard"))
    facts: dict[str, Child] = {
        "array": f"{parts.shape(store['shape'])} (row, position, channel), {store['dtype']}",
        "validation": f"{store['validation_rows']:,} rows",
        "views": f"{store['views']:,} of each sequence at most",
        "codecs": element("code", " → ".join(store["codecs"])),
        "row": size(store["row_bytes"]),
        "chunk": f"{chunk:,} rows, {size(chunk * store['row_bytes'])}: what is read and checked at once",
        "shard": f"{shard:,} rows, {size(shard * store['row_bytes'])}: one file, {store['shards']:,} of them",
    }
    return parts.section("On disk", parts.definitions(facts))
