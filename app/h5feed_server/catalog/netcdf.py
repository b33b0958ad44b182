"""Dimensions of netCDF-4 files, which are HDF5 dimension scales: they tell which axis of an array is that of the rows.

Rows are along the unlimited dimension, else along that of time, if most variables have it; in others, along the first
axis. See https://docs.unidata.ucar.edu/netcdf-c/current/file_format_specifications.html#netcdf_4_spec.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from h5feed.stored.column import About, Segment

from .frame_columns import refused

_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
"""The netCDF library gives this name to a scale that has only a length and no values."""

_TIMES = frozenset(("time", "valid_time", "t", "date", "datetime"))
"""Names of the dimension of time."""


def with_coordinates(segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a file with rows along the dimension of records.

    Dimension scales are marked as coordinates, or as unreadable if they have no rows.
    """
    scales = {path for path, segment in segments.items() if segment.array.attributes.get("CLASS") == "DIMENSION_SCALE"}
    if not scales:
        return dict(segments)
    record = _record(segments, scales)
    fields = {path: segment if path in scales else _along(segment, record) for path, segment in segments.items()}
    readable = {path: segment for path, segment in fields.items() if segment.array.unreadable is None}
    variables = {path: segment for path, segment in readable.items() if path not in scales and segment.array.shape}
    lengths = {segment.rows for segment in variables.values()}
    # Another dimension may have the same length by chance.
    records = {segment.rows for segment in variables.values() if record in _names(segment)}
    for path, segment in variables.items():
        if segment.rows in records and _names(segment) and record not in _names(segment):
            about = replace(segment.about or About(), apart=f"it does not have the dimension of the rows, {record!r}")
            fields[path] = replace(segment, about=about)
    for path in scales & readable.keys():
        segment = readable[path]
        name = _name(path)
        problem = None
        if str(segment.array.attributes.get("NAME", "")).startswith(_NO_VARIABLE):
            problem = "it is a dimension without values"
        elif (lengths and segment.rows not in lengths) or (segment.rows in records and name != record):
            problem = f"it holds the coordinates of the axis {name!r}, which is not that of the rows"
        if problem is not None:
            fields[path] = replace(segment, array=refused(segment.array, problem))
        else:
            about = About("other", f"the coordinates of the axis {name!r}")
            fields[path] = replace(segment, about=about)
    return fields


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _names(segment: Segment) -> list[str]:
    """The names of the dimensions of an array; empty if it has none."""
    return [_name(path) for path in segment.array.dimensions]


def _record(segments: Mapping[str, Segment], scales: set[str]) -> str | None:
    """The name of the dimension along which rows are; None if no dimension is known to be that.

    It is the same in all groups, as in those of splits.
    """
    variables = [
        segment.array
        for path, segment in segments.items()
        if path not in scales and segment.array.unreadable is None and segment.array.dimensions
    ]
    shared = Counter(name for array in variables for name in {_name(path) for path in array.dimensions if path})
    first = Counter(_name(array.dimensions[0]) for array in variables)
    unlimited = {_name(path) for path in scales if segments[path].array.extends}
    for names in (unlimited, {_name(path) for path in scales if _is_time(path, segments[path])}):
        # One that only a few variables have is not that of the rows, such as the letters of names.
        often = [name for name in sorted(names) if 2 * shared[name] > len(variables)]
        if often:
            return max(often, key=lambda name: (first[name], shared[name]))
    return None


def _is_time(path: str, scale: Segment) -> bool:
    said = scale.array.attributes
    if said.get("standard_name") == "time" or said.get("axis") == "T" or " since " in str(said.get("units")):
        return True
    return _name(path).lower() in _TIMES


def _along(segment: Segment, record: str | None) -> Segment:
    """The array with rows along a dimension; as it is if it does not have this dimension."""
    array, names = segment.array, _names(segment)
    axis = names.index(record) if record in names else 0
    if not axis or segment.has_lists or array.record is not None or array.member is not None:
        return segment
    note = f"its rows are along axis {axis}, {record!r}"
    return replace(segment, axis=axis, about=replace(segment.about or About(), note=note))
