"""Bytes, seconds and counts as a person reads them."""

from __future__ import annotations


def amount(size_bytes: float, rows: int) -> str:
    """How much of input there is: its bytes, and the rows of manifests, whose audio lies elsewhere."""
    of_rows = f"{rows:,} row{'s' * (rows != 1)} of manifests"
    if not rows:
        return size(size_bytes)
    return f"{of_rows}, {size(size_bytes)} beside" if size_bytes else of_rows


def size(size_bytes: float) -> str:
    """Bytes in the unit that suits them, such as `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them, such as `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6_000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3_600:.1f} h"


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as `1 clip` or `1,200 clips`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
