"""Expands the braces of shell and WebDataset: `x-{000..123}.tar`, `{train,val}/*.tar`."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d+))?")


def has_braces(pattern: str) -> bool:
    """Whether there is anything to expand."""
    return _first_group(pattern) is not None


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for, in order; itself where it has no braces.

    Numbers are as wide as the wider end where one begins with 0. Braces with neither a
    comma nor a range in them are themselves.
    """
    group = _first_group(pattern)
    if group is None:
        yield pattern
        return
    start, end, choices = group
    for choice in choices:
        for middle in expand_braces(choice):
            for rest in expand_braces(pattern[end:]):
                yield f"{pattern[:start]}{middle}{rest}"


def _first_group(pattern: str) -> tuple[int, int, list[str] | Iterator[str]] | None:
    """(where it begins, where it ends, what it stands for) of the first braces that expand."""
    for match in re.finditer(r"\{", pattern):
        start = match.start()
        parts, depth, part = [], 0, start + 1
        for place in range(start, len(pattern)):
            mark = pattern[place]
            if mark == "," and depth == 1:
                parts.append(pattern[part:place])
                part = place + 1
            depth += (mark == "{") - (mark == "}")
            if mark == "}" and depth == 0:
                parts.append(pattern[part:place])
                choices = parts if len(parts) > 1 else _range(parts[0])
                if choices is not None:
                    return start, place + 1, choices
                break
    return None


def _range(text: str) -> list[str] | Iterator[str] | None:
    if numbers := _NUMBERS.fullmatch(text):
        first, last, step = numbers.groups()
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return (f"{n:0{width}d}" for n in _steps(int(first), int(last), step))
    if letters := _LETTERS.fullmatch(text):
        first, last, step = letters.groups()
        return (chr(n) for n in _steps(ord(first), ord(last), step))
    return None


def _steps(first: int, last: int, step: str | None) -> range:
    size = abs(int(step or 1)) or 1
    return range(first, last + 1, size) if first <= last else range(first, last - 1, -size)
