"""Handles fields that are packed according to netCDF's attributes.

They are served as stored, with a note, or unpacked if ``h5feed.toml`` has ``apply = "scale"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .grouping.pieces import TableField


def with_packing(fields: Sequence[TableField], apply: bool) -> list[TableField]:
    """The fields. Packed ones get a note and, if `apply`, are unpacked to floats."""
    return [_with_packing(field, apply) for field in fields]


def _with_packing(field: TableField, apply: bool) -> TableField:
    segments = field.column.segments
    packings = [segment.array.packing for segment in segments]
    if field.unreadable or field.column.has_lists or all(packing is None for packing in packings):
        return field
    said = str(next(packing for packing in packings if packing is not None))
    if not apply:
        note = f'packed as in netCDF ({said}), and served as stored: apply = "scale" in h5feed.toml unpacks it'
        return replace(field, note="; ".join(filter(None, (field.note, note))))
    # Segments may be packed differently, but must be unpacked to the same float type.
    stored = [np.dtype(segment.array.dtype) for segment in segments]
    kinds = [np.dtype(one.dtype) if one else dtype for one, dtype in zip(packings, stored, strict=True)]
    dtype = np.result_type(*kinds, np.float16).newbyteorder("<").str
    unpacked = tuple(replace(segment, served_as=dtype) for segment in segments)
    note = f"unpacked as in netCDF ({said})"
    return replace(
        field, column=replace(field.column, segments=unpacked), note="; ".join(filter(None, (field.note, note)))
    )
