"""Numbers in words, for progress, plans and messages."""

import math

__all__ = ["count_of", "duration", "percent"]


def count_of(count: int, what: str, plural: str = "") -> str:
    """`1 replica`, `1,000 replicas`; `plural` where it is not `what` with an s."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def duration(seconds: float) -> str:
    """`90 s`, `95 min`, `18 h 21 min` or `4 days 3 h`, rounded up."""
    minutes = math.ceil(seconds / 60)
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days, hours = divmod(math.ceil(seconds / 3600), 24)
    return f"{days:,} days {hours} h"


def percent(share: float, digits: int = 0) -> str:
    """`32 %` of 0.315; `31.5 %` with one digit after the point."""
    return f"{100 * share:.{digits}f} %"
