"""Small charts of statistics, drawn by the pages' templates: only their geometry is computed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .web import counted, number, share

MAX_BARS = 24
"""Bars of a small chart."""

_FEWEST_BARS = 8

MAX_CLASSES = 40
"""Classes that are listed; of more, the most frequent ones."""


@dataclass(frozen=True)
class Bar:
    """One bar: its height from 0 to 1, what it says, and where it leads."""

    height: float
    title: str
    url: str | None = None


@dataclass(frozen=True)
class Chart:
    """A small histogram.

    Attributes
    ----------
    alt : str
        The same in words.
    low, high : str
        What is written below its ends.
    """

    bars: Sequence[Bar]
    alt: str
    low: str = ""
    high: str = ""


@dataclass(frozen=True)
class ClassLine:
    """Rows of a class."""

    name: str
    rows: int
    share: float
    url: str | None = None


def histogram(
    name: str,
    report: Mapping[str, Any],
    bars: int = MAX_BARS,
    url: Callable[[float, float, bool], str | None] | None = None,
) -> Chart | None:
    """The distribution of a field's numbers; None where it has none.

    Parameters
    ----------
    report : mapping
        Numbers as the API says them.
    url : callable, optional
        Where a bar leads: of its least value, its greatest, and whether that belongs to it.
    """
    found = report["histogram"]
    if not found:
        return None
    edges, counts = _merged(found["edges"], found["counts"], bars)
    highest, total = max(counts), sum(counts)
    drawn = []
    for place, count in enumerate(counts):
        low, high, is_last = edges[place], edges[place + 1], place == len(counts) - 1
        title = f"{number(low)} to {number(high)}: {count:,} ({share(count / max(1, total))})"
        drawn.append(Bar(count / max(1, highest), title, url(low, high, is_last) if url and count else None))
    said = (
        f"Histogram of {name}: {number(report['min'])} to {number(report['max'])}, mean {number(report['mean'])}, "
        f"standard deviation {number(report['std'])}"
    )
    return Chart(drawn, said, number(report["min"]), number(report["max"]))


def class_lines(
    classes: Sequence[Mapping[str, Any]], url: Callable[[Any], str | None] | None = None
) -> list[ClassLine]:
    """Classes as the API says them, the most frequent first where they are many."""
    if len(classes) > MAX_CLASSES:
        classes = sorted(classes, key=lambda one: -one["rows"])[:MAX_CLASSES]
    return [ClassLine(label_of(one), one["rows"], one["share"], url(one["value"]) if url else None) for one in classes]


def class_chart(
    name: str, classes: Sequence[Mapping[str, Any]], url: Callable[[Any], str | None] | None = None
) -> Chart:
    """Classes as the bars of a small chart; of many, the most frequent ones."""
    shown = classes if len(classes) <= MAX_BARS else sorted(classes, key=lambda one: -one["rows"])[:MAX_BARS]
    highest = max((one["rows"] for one in shown), default=1)
    bars = [
        Bar(
            one["rows"] / max(1, highest),
            f"{label_of(one)}: {one['rows']:,} ({share(one['share'])})",
            url(one["value"]) if url else None,
        )
        for one in shown
    ]
    said = ", ".join(f"{label_of(one)} {share(one['share'])}" for one in shown[:12])
    total = counted(len(classes), "class", "classes")
    return Chart(bars, f"{total} of {name}: {said}", total)


def label_of(entry: Mapping[str, Any]) -> str:
    """Name of a class, else its value."""
    return str(entry["value"]) if entry.get("name") is None else str(entry["name"])


def _merged(edges: Sequence[float], counts: Sequence[int], most: int) -> tuple[list[float], list[int]]:
    """At most so many bins, each of as many of the given ones; fewer where few values make them uneven by chance."""
    most = min(most, max(_FEWEST_BARS, math.isqrt(sum(counts))))
    least = -(-len(counts) // most)
    # One that leaves no rest, or else little: the last bar would be lower for nothing.
    step = min(range(least, 2 * least), key=lambda step: -len(counts) % step / step) if least > 1 else 1
    starts = range(0, len(counts), step)
    merged = [sum(counts[start : start + step]) for start in starts]
    return [*(float(edges[start]) for start in starts), float(edges[-1])], merged
