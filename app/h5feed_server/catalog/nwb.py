"""NWB files (``.nwb``): columns of tables whose rows are lists, such as the spike times of units.

A column `NAME` with a `VectorIndex` `NAME_index` is stored as the items of all rows, and the number of the item after
the last one of each row. See https://hdmf-common-schema.readthedocs.io/en/stable/format.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from h5feed.stored.column import Segment

from .array_probe import MAX_NAMES_BYTES, are_offsets, is_flat
from .frame_columns import refused
from .pandas_frames import Read

_INDEX = "_index"


def with_lists(segments: Mapping[str, Segment], read: Read) -> dict[str, Segment]:
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
