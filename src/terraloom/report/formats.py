"""Numbers as a reader should see them: intervals, shares, areas, dates; and nothing invented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MISSING", "Interval", "day", "hectares", "interval", "number", "percent", "whole"]

#: What stands where a quantity is undefined (for example the recall of a class never seen).
MISSING = "\u2013"
_MONTHS = (
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
)  # fmt: skip
_THIN = "\u202f"  # narrow no-break space: groups digits without looking like a decimal mark


@dataclass(frozen=True)
class Interval:
    """A value and, where known, the ends of its interval; NaN where undefined.

    Attributes:
        value: Point value, in any unit.
        low: Lower end, same unit; NaN without an interval.
        high: Upper end, same unit; NaN without an interval.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is a value at all."""
        return math.isfinite(self.value)

    @property
    def has_range(self) -> bool:
        """Whether both ends are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def percent_text(self) -> str:
        """For example ``87.4% (84.1 to 90.2)``."""
        if not self.known:
            return MISSING
        text = percent(self.value)
        if self.has_range:
            text += f" ({100 * self.low:.1f} to {100 * self.high:.1f})"
        return text

    def range_text(self) -> str:
        """Only the interval, in percent; empty without one."""
        return f"{100 * self.low:.1f} to {100 * self.high:.1f}" if self.has_range else ""


def interval(raw: Any) -> Interval:
    """Read a number, or a mapping with value and low/high (or lower/upper); anything else is NaN.

    Args:
        raw: ``0.87``, ``{"value", "low", "high"}``, ``{"value", "lower", "upper"}`` or None.
    """
    if isinstance(raw, Mapping):
        low = raw.get("low", raw.get("lower"))
        high = raw.get("high", raw.get("upper"))
        return Interval(_float(raw.get("value")), _float(low), _float(high))
    return Interval(_float(raw))


def _float(raw: Any) -> float:
    if isinstance(raw, bool) or raw is None:
        return math.nan
    try:
        return float(raw)
    except (TypeError, ValueError):
        return math.nan


def percent(share: Any, digits: int = 1) -> str:
    """A share 0-1 as percent; ``<0.1%`` rather than a false zero."""
    value = 100 * _float(share)
    if not math.isfinite(value):
        return MISSING
    least = 10.0**-digits
    if 0 < value < least / 2:
        return f"<{least:g}%"
    return f"{round(value, digits) + 0.0:.{digits}f}%"  # + 0.0 turns -0.0 into 0.0


def hectares(value: Any) -> str:
    """Area in hectares with about three significant digits and grouped thousands."""
    ha = _float(value)
    if not math.isfinite(ha):
        return MISSING
    size = abs(ha)
    return _grouped(ha, 0 if size >= 100 else 1 if size >= 1 else 2)


def number(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits; text and yes/no are passed through."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    x = _float(value)
    if not math.isfinite(x):
        return MISSING
    if x == int(x) and abs(x) < 1e12:
        return whole(x)
    text = f"{x:.{digits}g}" if 1e-3 <= abs(x) < 1000 else _grouped(x, 1 if abs(x) >= 1 else 4)
    return text.replace("-", "\u2212")


def whole(value: Any) -> str:
    """A count with grouped thousands."""
    x = _float(value)
    return _grouped(x, 0) if math.isfinite(x) else MISSING


def _grouped(x: float, digits: int) -> str:
    return f"{x:,.{digits}f}".replace(",", _THIN).replace("-", "\u2212")


def day(text: Any) -> str:
    """An ISO date or time as ``4 May 2023``; unreadable text is passed through."""
    raw = str(text or "")
    parts = raw[:10].split("-")
    if len(parts) != 3 or not all(p.isdigit() for p in parts) or not 1 <= int(parts[1]) <= 12:
        return raw
    return f"{int(parts[2])} {_MONTHS[int(parts[1]) - 1]} {parts[0]}"
