"""Numbers as people read them, in the terminal and on Prefect's pages alike."""

from __future__ import annotations

from flows.run.summary import StageSummary


def clock(seconds: float) -> str:
    """Return a duration for people: 42 s, 3:07, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def size(n_bytes: float) -> str:
    """Return a number of bytes for people: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def stage_line(summary: StageSummary) -> str:
    """Return what a stage came to, in one line."""
    parts = [f"validation loss {summary.validation_loss:.4f}" if summary.validation_loss is not None else "unfinished"]
    if summary.by_mask_ratio and summary.mask_ratio is not None:  # stages differ in it: their losses do not compare
        parts[0] += f" at {summary.mask_ratio:.0%} masked"
    if summary.seconds is not None:
        parts.append(f"in {clock(summary.seconds)}")
    if summary.cache_bytes is not None:
        parts.append(f"cache {size(summary.cache_bytes)}")
    return ", ".join(parts)


def parameters(count: int | None) -> str:
    """Return a number of parameters for people: 912, 43.2 k, 1.27 M."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} B"
