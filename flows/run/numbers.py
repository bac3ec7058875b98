"""Numbers for people, in the terminal and on pages."""

from __future__ import annotations


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


def loss(value: float | None) -> str:
    """Return a loss with four decimals, or - if it is None."""
    return "-" if value is None else f"{value:.4f}"


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
