"""Dimensions of netCDF-4 files, which are HDF5 dimension scales: coordinates of the rows, or of another axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from h5feed.stored.column import About, Segment

from .frame_columns import refused

_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
"""The netCDF library gives this name to a scale that has only a length and no values."""


def with_coordinates(segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a file, with dimension scales marked as coordinates, or as unreadable if they have no rows."""
    scales = {path for path, segment in segments.items() if segment.array.attributes.get("CLASS") == "DIMENSION_SCALE"}
    if not scales:
        return dict(segments)
    readable = {path: segment for path, segment in segments.items() if segment.array.unreadable is None}
    lengths = {segment.rows for path, segment in readable.items() if path not in scales and segment.array.shape}
    fields = dict(segments)
    for path in scales & readable.keys():
        segment = readable[path]
        name = path.rpartition("/")[2]
        problem = None
        if str(segment.array.attributes.get("NAME", "")).startswith(_NO_VARIABLE):
            problem = "it is a dimension without values"
        elif lengths and segment.rows not in lengths:
            problem = f"it holds the coordinates of the axis {name!r}, which is not that of the rows"
        if problem is not None:
            fields[path] = replace(segment, array=refused(segment.array, problem))
        else:
            about = About("other", f"the coordinates of the axis {name!r}")
            fields[path] = replace(segment, about=about)
    return fields
