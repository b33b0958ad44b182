"""Handles fields that are packed according to netCDF's attributes.

They are served as stored, with a note, or unpacked if ``h5feed.toml`` has ``apply = "scale"``. Like in xarray, numbers
outside of a range of valid ones are numbers like others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .grouping.pieces import TableField

_RANGES = ("valid_min", "valid_max", "valid_range")


def with_packing(fields: Sequence[TableField], apply: bool) -> list[TableField]:
    """The fields. Packed ones get a note and, if `apply`, are unpacked to floats."""
    return [_with_packing(field, apply) for field in fields]


def _with_packing(field: TableField, apply: bool) -> TableField:
    segments = field.column.segments
    packings = [segment.array.packing for segment in segments]
    if field.unreadable or field.column.has_lists or all(packing is None for packing in packings):
        return field
    said = str(next(packing for packing in packings if packing is not None))
    kept = [name for name in _RANGES if any(name in segment.array.attributes for segment in segments)]
    kept = [f"{', '.join(kept)}: numbers outside of them are served like others"] if kept else []
    problem = next((packing.problem for packing in packings if packing is not None and packing.problem), None)
    if problem is not None:
        note = f"served as stored, because {problem}"
        return _noted(field, note) if not apply else replace(field, unreadable=f'apply = "scale": {problem}')
    if not apply:
        note = (
            f"packed as in netCDF ({said}), and served as stored: decode_cf=True in a loop unpacks it, or "
            'apply = "scale" in h5feed.toml for everybody'
        )
        return _noted(field, note, *kept)
    # Segments may be packed differently, but must be unpacked to the same type.
    stored = [np.dtype(segment.array.dtype) for segment in segments]
    kinds = [np.dtype(one.dtype) if one else dtype for one, dtype in zip(packings, stored, strict=True)]
    dtype = (kinds[0] if len({*kinds}) == 1 else np.result_type(*kinds, np.float16)).newbyteorder("<").str
    unpacked = tuple(replace(segment, served_as=dtype) for segment in segments)
    return _noted(
        replace(field, column=replace(field.column, segments=unpacked)), f"unpacked as in netCDF ({said})", *kept
    )


def _noted(field: TableField, *notes: str) -> TableField:
    return replace(field, note="; ".join(filter(None, (field.note, *notes))))
