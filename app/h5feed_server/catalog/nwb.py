"""NWB files (``.nwb``): each group with arrays is a time series or a table, with rows of its own.

Time series of the same clock share their rows: those with equal timestamps, or an equal rate and beginning. So do the
categories of an `AlignedDynamicTable`. See
https://nwb-schema.readthedocs.io/en/stable/format.html.

A column `NAME` of a table with a `VectorIndex` `NAME_index` is stored as the items of all rows, such as the spike times
of units, and the number of the item after the last one of each row. See
https://hdmf-common-schema.readthedocs.io/en/stable/format.html.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.stored.column import About, Segment

from .array_probe import MAX_NAMES_BYTES, are_offsets, is_flat
from .frame_columns import refused
from .pandas_frames import Read

_INDEX = "_index"

_DATA, _TIMESTAMPS, _STARTING_TIME = "/data", "/timestamps", "/starting_time"
"""Members of a time series: the samples; the time of each, or that of the first one, with the rate as an attribute."""

_NOT_OF_SAMPLES = {
    "channel_conversion": "its rows are channels, not samples",
    "control_description": "its rows are values of 'control', not samples",
    "dimension": "its rows are axes of the images, not samples",
    "field_of_view": "its rows are axes of the images, not samples",
    "external_file": "its rows are files, not samples",
}
"""Other members of series, which may have as many rows as there are samples, by chance."""


def with_objects(
    groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
) -> dict[str, Segment]:
    """The arrays of a file, with the objects that their rows describe; columns and their indices become lists."""
    fields = _with_lists(segments, read)
    clocks = _clocks(fields, read)
    aligned = _aligned(groups)
    for path, segment in list(fields.items()):
        group = path.rpartition("/")[0]
        about = replace(segment.about or About(), rows_of=clocks.get(group) or aligned.get(group, group))
        if group in clocks:
            regular = _regular(group, fields)
            if path == group + _DATA and regular is not None:
                start, rate, unit = regular
                about = replace(about, note=f"row n is at {start} + n / {rate} {unit}, by starting_time and its rate")
            elif segment.rows == fields[group + _DATA].rows and (apart := _why_apart(path, segment)) is not None:
                about = replace(about, apart=apart)
        fields[path] = replace(segment, about=about)
    return fields


def _aligned(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Tables that are categories of columns of another table, an `AlignedDynamicTable`, each with that table."""
    listed = {path: about.get("categories") for path, about in groups.items() if "neurodata_type" in about}
    return {f"{path}/{name}": path for path, names in listed.items() if isinstance(names, list) for name in names}


def _why_apart(path: str, segment: Segment) -> str | None:
    """Why rows of a member of a series are not its samples; None if they may be."""
    if segment.array.attributes.get("neurodata_type") == "DynamicTableRegion":
        # Lines of a table, such as that of the electrodes.
        return "it describes the channels, not the samples"
    return _NOT_OF_SAMPLES.get(path.rpartition("/")[2])


def _clocks(fields: Mapping[str, Segment], read: Read) -> dict[str, str]:
    """The time series, each with the first one that has the same number of samples at the same times."""
    series = {
        group: segment.rows
        for path, segment in fields.items()
        if path.endswith(_DATA)
        and {(group := path.removesuffix(_DATA)) + _TIMESTAMPS, group + _STARTING_TIME} & fields.keys()
    }
    of_rows = Counter(series.values())
    first: dict[Hashable, str] = {}
    known: dict[Hashable, Hashable] = {}
    return {
        group: first.setdefault((rows, _clock(group, fields, read, known)), group) if of_rows[rows] > 1 else group
        for group, rows in series.items()
    }


def _clock(group: str, fields: Mapping[str, Segment], read: Read, known: dict[Hashable, Hashable]) -> Hashable:
    """What is equal for series with the same times; the group itself if they are not known.

    Parameters
    ----------
    known : dict
        What was found for timestamps, by where they are stored. Series may have the same array, by links.
    """
    if (regular := _regular(group, fields)) is not None:
        return regular
    times = fields.get(group + _TIMESTAMPS)
    if times is None or not is_flat(times):
        return group
    chunks = times.array.chunks
    offset = times.array.offset if chunks is None else next(iter(chunks.offsets.tolist()), None)
    place = group if offset is None else (times.file.identity, offset)
    if place not in known:
        values = read(times)
        # Too long to compare, unless it is the same array.
        known[place] = _digest(values) if len(values) else place
    return known[place]


def _digest(values: npt.NDArray[Any]) -> Hashable:
    # Of integers, floats would be equal where they are not.
    exact = values if values.dtype.kind in "iu" else values.astype("<f8")
    return exact.dtype.str, hashlib.blake2b(exact.tobytes()).digest()


def _regular(group: str, fields: Mapping[str, Segment]) -> tuple[float, float, str] | None:
    """Time of the first sample of a series, samples per unit of time, and this unit; None if it lacks them."""
    start = fields.get(group + _STARTING_TIME)
    if start is None or start.array.scalar is None or np.dtype(start.array.dtype).kind not in "iuf":
        return None
    if group + _TIMESTAMPS in fields:
        # Of the two, a series should have one.
        return None
    first = float(np.frombuffer(start.array.scalar, start.array.dtype)[0])
    rate = start.array.attributes.get("rate")
    if not isinstance(rate, int | float) or not math.isfinite(rate) or rate <= 0 or not math.isfinite(first):
        return None
    return first, float(rate), str(start.array.attributes.get("unit", "seconds"))


def _with_lists(segments: Mapping[str, Segment], read: Read) -> dict[str, Segment]:
    """The arrays of a file, with columns and their indices replaced by lists, or listed with the reason."""
    fields = dict(segments)
    for path, index in segments.items():
        items = segments.get(path.removesuffix(_INDEX))
        if not path.endswith(_INDEX) or items is None or index.array.attributes.get("neurodata_type") != "VectorIndex":
            continue
        name = path.removesuffix(_INDEX)
        fields.pop(path, None)
        if path + _INDEX in segments:
            fields[name] = replace(items, array=refused(items.array, "its rows are lists of lists"))
        elif not name.endswith(_INDEX):
            fields[name] = _lists(items, index, read)
    return fields


def _lists(items: Segment, index: Segment, read: Read) -> Segment:
    if items.array.unreadable is not None:
        return items
    if not is_flat(items):
        return replace(items, array=refused(items.array, "its rows are lists of text, or of arrays"))
    if not are_offsets(index) or index.array.nbytes > MAX_NAMES_BYTES:
        return replace(items, array=refused(items.array, "its VectorIndex cannot be read, or is too large"))
    ends = read(index).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    if len(ends) != index.rows or (np.diff(offsets) < 0).any() or offsets[-1] != items.rows:
        reason = f"its VectorIndex does not ascend to {items.rows}, its number of items"
        return replace(items, array=refused(items.array, reason))
    return replace(items, offsets=offsets)
