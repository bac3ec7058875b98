"""The terminal output of `stackwise inspect` for a store: tables of at most 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.pages.page import in_column, minute, number, shape, visible
from flows.pages.provenance import phrase
from flows.pages.samples import norms_by_piece, title_of
from flows.run.numbers import size
from flows.run.say import say
from flows.run.terminal import plain_console, plain_table
from storage.activations.statistics import OUTLIER_FACTOR

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 80
_CHANNELS = 6
OF_CHANNELS = ("rms", "mean", "std", "smallest", "largest", "kurtosis")
"""What is told of a channel."""


def print_store(document: dict[str, Any]) -> None:
    """Print layout, statistics, drift, sample rows and provenance of a sealed store."""
    console = plain_console()
    store = document["store"]
    for title, table in (
        ("Layout", _layout(store)),
        ("Statistics", _statistics(store)),
        (f"Channels, of {store['shape'][2]:,}", _channels(store["channels"])),
        ("Drift: linear CKA between boundaries; * is this one", _drift(document["drift"])),
        ("Rows: their text, and a bar for the norm of each token", _rows(document["samples"])),
        ("Provenance", _provenance(document["provenance"])),
    ):
        if table is not None:
            console.print(f"\n{title}", style="bold")
            console.print(table)
    if document["samples"]["why_no_text"]:
        say(f"No text: {document['samples']['why_no_text']}")


def strip(values: list[float | None], cells: int) -> str:
    """Return values as a line of bars, scaled from the smallest to the largest; a bar is the mean of its values."""
    if not values:
        return ""
    cells = min(cells, len(values))
    edges = [round(cell * len(values) / cells) for cell in range(cells + 1)]
    groups = [values[first:last] for first, last in itertools.pairwise(edges)]
    means = [_mean([value for value in group if value is not None]) for group in groups]
    known = [mean for mean in means if mean is not None] or [0.0]
    low, span = min(known), max(known) - min(known) or 1.0
    return "".join("?" if mean is None else _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _pairs(pairs: list[tuple[str, str]]) -> Table:
    table = plain_table("", "")
    for name, value in pairs:
        table.add_row(name, value)
    return table


def _layout(store: dict[str, Any]) -> Table:
    chunk, shard, row = store["rows_per_chunk"], store["rows_per_shard"], store["row_bytes"]
    return _pairs(
        [
            ("array", f"{shape(store['shape'], 'x')} (row, position, channel), {store['dtype']}, {size(row)} a row"),
            ("views", f"{store['views']:,} a sequence at most"),
            ("validation", f"{store['validation_rows']:,} rows"),
            ("codecs", " -> ".join(store["codecs"])),
            ("chunk", f"{chunk:,} rows, {size(chunk * row)}"),
            ("shard", f"{shard:,} rows, {size(shard * row)}; {store['shards']:,} of them"),
        ]
    )


def _statistics(store: dict[str, Any]) -> Table:
    tokens, spectrum, positions = store["tokens"], store["spectrum"], store["positions"]
    quantiles = [number(tokens["norm_quantiles"][at]) for at in ("0", "0.5", "1")]
    rank = f"{number(spectrum['effective_rank'])} of {store['shape'][2]:,}; stable {number(spectrum['stable_rank'])}"
    directions = f"{spectrum['directions_for_90_percent']:,} directions hold 90 % of the variance"
    means = [mean for mean in positions["norm_mean"] if mean is not None]
    along = f"{min(means):.3g} to {max(means):.3g}" if means else "-"
    values = f"mean {number(store['mean'])}, std {number(store['std'])}, largest {number(store['largest'])}"
    cosines = f"{number(tokens['neighbour_cosine'])} of neighbours, {number(tokens['pair_cosine'])} of any two"
    return _pairs(
        [
            ("sample", f"{store['sampled_rows']:,} rows, {store['sampled_tokens']:,} finite tokens"),
            ("values", f"{values}; {store['non_finite']:,} not finite"),
            ("token norm", f"smallest {quantiles[0]}, median {quantiles[1]}, largest {quantiles[2]}"),
            ("by position", f"{strip(positions['norm_mean'], 40)}  mean {along}"),
            ("cosine", cosines),
            ("eff. rank", f"{rank}; {directions}"),
        ]
    )


def _channels(channels: dict[str, Any]) -> Group:
    """Return the outliers, or the largest channels if there are none, and list the dead ones."""
    rms, outliers, dead = channels["rms"], channels["outliers"], channels["dead"]
    by_size = sorted(range(len(rms)), key=lambda channel: -(rms[channel] or 0.0))
    table = plain_table("|channel", *(f"|{name}" for name in OF_CHANNELS), "")
    listed = (outliers or by_size)[:_CHANNELS]
    for channel, cells in zip(listed, channel_cells(channels, listed), strict=True):
        table.add_row(str(channel), *cells, "outlier" if channel in outliers else "")
    shown = ", ".join(map(str, dead[:12])) + (" ..." if len(dead) > 12 else "")
    count = (
        f"{len(outliers):,} outliers (rms from {number(channels['outlier_bound'])}, {OUTLIER_FACTOR:g} x the median); "
        f"{len(dead):,} dead{f': {shown}' if dead else ''}"
    )
    return Group(table, Text(count))


def channel_cells(channels: dict[str, Any], listed: Sequence[int]) -> list[tuple[str, ...]]:
    """Return a row of `OF_CHANNELS` for each of some channels."""
    columns = [in_column([channels[name][channel] for channel in listed]) for name in OF_CHANNELS]
    return list(zip(*columns, strict=True))


def _drift(drift: dict[str, Any] | None) -> Table | None:
    if drift is None:
        return None
    depths = [str(depth) for depth in drift["boundaries"]]
    depths[drift["here"]] += " *"
    table = plain_table("boundary", *(f"|{depth}" for depth in depths), "store")
    for depth, name, row in zip(depths, drift["stores"], drift["cka"], strict=True):
        table.add_row(depth, *("-" if value is None else f"{value:.3f}" for value in row), name)
    return table


def _rows(samples: dict[str, Any]) -> Group:
    lines: list[Text] = []
    for sample in samples["rows"]:
        lines.append(Text(title_of(sample), style="dim"))
        lines += [Text(line, no_wrap=True, overflow="crop") for line in _text_over_strip(sample)]
    return Group(*lines)


def _text_over_strip(sample: dict[str, Any]) -> list[str]:
    """Return the beginning of a row's text over a bar for the norm of each token, or only the bars without text."""
    if not sample["pieces"]:
        return [strip(sample["norms"], _COLUMNS)]
    text, bars = "", list[float | None]()
    for piece, _, norms in norms_by_piece(sample):
        shown = visible(piece, one_line=True)
        if len(bars) + cell_len(shown) > _COLUMNS:
            break
        text += shown
        bars += [_mean(norms)] * cell_len(shown)
    return [text, strip(bars, len(bars))]


def _provenance(entries: list[dict[str, Any]]) -> Table:
    table = plain_table("artifact", "state", "made (UTC)", "result")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for entry in entries:
        table.add_row(entry["name"], entry["state"], minute(entry["created"]), phrase(entry))
    return table
