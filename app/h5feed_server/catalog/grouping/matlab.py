"""Finds the rows of arrays that MATLAB wrote: it reverses axes, so rows may be along the first or the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from h5feed.stored.column import Segment
from h5feed.stored.layout import ArrayLayout

from .names import is_label
from .pieces import Path

NOTE = "written by MATLAB: its axes are reversed"


def turned(segments: Mapping[Path, Segment]) -> dict[Path, Segment]:
    """The arrays that MATLAB wrote, transposed if the number of rows that they share is that of the last axis."""
    written = {
        path: segment.array
        for path, segment in segments.items()
        if "MATLAB_class" in segment.array.attributes and len(segment.array.shape) > 1
    }
    shared = _shared(written)
    # The rows of a square matrix are along the same axis as in the other arrays with the same rows.
    last = any(array.shape[-1] == shared != array.shape[0] for array in written.values())
    first = any(array.shape[0] == shared != array.shape[-1] for array in written.values())
    turned = {path for path, array in written.items() if array.shape[-1] == shared != array.shape[0]}
    if last and not first:
        turned |= {path for path, array in written.items() if array.shape[-1] == shared}
    return {
        path: replace(segments[path], axis=len(array.shape) - 1 if path in turned else 0)
        for path, array in written.items()
    }


def _shared(written: Mapping[Path, ArrayLayout]) -> int | None:
    """The number of rows: the most common length of a first or last axis; if there are labels, one of theirs."""

    def ends(array: ArrayLayout) -> set[int]:
        return {array.shape[0], array.shape[-1]}

    counts = Counter(length for array in written.values() for length in ends(array))
    said = {length for path, array in written.items() if is_label(path[-1]) for length in ends(array) if length > 1}
    return max(said or counts, key=lambda length: (counts[length], length), default=None)
