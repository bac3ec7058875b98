"""Numbers for people, in the terminal and on pages."""

from __future__ import annotations

from stackwise_core.errors import size as size


def clock(seconds: float) -> str:
    """Return a duration for people: 42 s, 3:07, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def loss(value: float | None) -> str:
    """Return a loss with four decimals, or - if it is None."""
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None, form: str = "+.4f") -> str:
    """Return a difference with its sign, a true minus; - if it is None."""
    return "-" if value is None else f"{value:{form}}".replace("-", "\u2212") if value else "0"


def percent(share: float | None, form: str = ".0f") -> str:
    """Return a share in percent, with a true minus sign: 6 %; - if it is None."""
    return "-" if share is None else f"{100 * share:{form}}\u00a0%".replace("-", "\u2212")


def parameters(count: int | None) -> str:
    """Return a number of parameters for people, in three digits from a thousand on: 912, 43.0 k, 1.27 M."""
    if count is None:
        return "-"
    if count < 1000:
        return f"{count:.0f}"
    value, units = float(f"{count:.3g}") / 1000, ["k", "M", "B"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:#.3g}".rstrip(".") + f" {units[0]}"
