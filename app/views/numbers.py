"""How numbers are written: few digits, the same ones everywhere."""

from __future__ import annotations

import math


def short(value: object) -> str:
    """Four significant digits; whole numbers with separators; what is no number as it is.

    >>> short(1234567), short(0.000123456), short(12.3456), short(True), short(None)
    ('1,234,567', '1.235e-04', '12.35', 'yes', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}"


def percent(share: float) -> str:
    """A share with two significant digits or so: densities span five orders of magnitude.

    >>> percent(0.1234), percent(0.000012), percent(0)
    ('12.3%', '0.0012%', '0%')
    """
    if share == 0:
        return "0%"
    digits = max(1, 1 - math.floor(math.log10(abs(share) * 100)))
    return f"{share * 100:.{digits}f}%"


def size(count: int) -> str:
    """Bytes in words.

    >>> size(999), size(1_234_567)
    ('999 B', '1.2 MB')
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """A time to wait, roughly.

    >>> duration(40), duration(600), duration(5400), duration(400_000)
    ('40 s', '10 min', '1.5 h', '4.6 days')
    """
    for unit, length, longest in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds / length < longest:
            return f"{seconds / length:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
