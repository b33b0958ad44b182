"""Rows of what MATLAB wrote: axes are in reverse there, so they may be the first or the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ...storage.column import Segment
from .pieces import Path

NOTE = "written by MATLAB: axes are in reverse"


def turned(segments: Mapping[Path, Segment]) -> dict[Path, Segment]:
    """The arrays that MATLAB wrote, with their rows along the axis that they share."""
    written = {
        path: segment.array
        for path, segment in segments.items()
        if "MATLAB_class" in segment.array.attributes and len(segment.array.shape) > 1
    }
    ends = Counter(length for array in written.values() for length in {array.shape[0], array.shape[-1]})
    if not ends:
        return {}
    shared = max(ends, key=lambda length: (ends[length], length))
    return {
        path: replace(segments[path], transposed=array.shape[-1] == shared != array.shape[0])
        for path, array in written.items()
    }
