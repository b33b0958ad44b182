"""Whether files, or groups, hold one sample each: an image and what is drawn over it, without an axis for rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ...storage.column import Segment
from ...storage.layout import MAX_CELLS, ArrayLayout
from .names import is_image, is_label

FEWEST = 3
"""Files, or groups, that are taken for samples without being declared."""

_LEAST_SIDE = 8
_MOST_COLOURS = 4
_MOST_CHANNELS = 16
"""A shorter axis is that of an image's channels, a longer one is a side of it."""

Answer = Literal["yes", "no", "maybe"]


def is_sample(arrays: Mapping[str, ArrayLayout]) -> Answer:
    """Whether the arrays of a file, or group, are one sample; by their shapes and names.

    ``no`` where there is one value a row beside the rows, ``yes`` where nothing can be rows.
    """
    shapes = {name: one.shape for name, one in arrays.items() if one.shape}
    scalars = [name for name, one in arrays.items() if one.scalar is not None]
    flat = {shape[0] for shape in shapes.values() if math.prod(shape[1:]) == 1}
    solid = {name: shape for name, shape in shapes.items() if math.prod(shape[1:]) > 1}
    if not solid:
        return "no"
    if flat & {shape[0] for shape in solid.values()}:
        return "no"
    if any(is_label(name) for name in scalars):
        return "yes"
    planes = {plane(shape) for shape in solid.values()}
    pictured = any(is_image(name) for name in solid)
    if len(planes) == 1 and None not in planes and pictured:
        # Arrays of one shape may be series of slices as well, unless they end in colours.
        some = next(iter(solid.values()))
        told = len(set(solid.values())) > 1 or len(some) == 2 or some[-1] <= _MOST_COLOURS
        return "yes" if len(solid) > 1 and told else "maybe"
    if len({shape[0] for shape in solid.values()}) > 1:
        return "maybe"
    # A volume, or a series of slices.
    return "maybe" if pictured and len(set(solid.values())) == 1 else "no"


def plane(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width, where an array can be one picture, with its channels first or last."""
    sides = shape
    if len(shape) == 3:
        sides = shape[:2] if shape[2] <= min(_MOST_CHANNELS, *shape[:2]) else shape[1:]
        if min(shape[0], shape[2]) > _MOST_CHANNELS:
            return None
    return (sides[0], sides[1]) if len(sides) == 2 and min(sides) >= _LEAST_SIDE else None


def as_row(segment: Segment) -> Segment | str:
    """The array as one row; or why it cannot be."""
    array = segment.array
    if array.unreadable is not None and array.scalar is None:
        return array.unreadable
    if array.by_h5py or array.record is not None or segment.offsets is not None or segment.transposed:
        return "it cannot be read as one row: it is a list, a member of records, virtual, or written by MATLAB"
    if array.scalar is not None:
        return replace(segment, array=replace(array, shape=(1,), inline=array.scalar, scalar=None, unreadable=None))
    chunk_shape = None if array.chunk_shape is None else (1, *array.chunk_shape)
    row = replace(array, shape=(1, *array.shape), chunk_shape=chunk_shape, text=None)
    if row.cells > MAX_CELLS:
        return f"one row would be cut into {row.cells} chunks, more than the {MAX_CELLS} that are read"
    return replace(segment, array=row)


def are_alike(samples: Sequence[Mapping[str, ArrayLayout]]) -> bool:
    """Whether samples have the same members, dtypes and shapes."""
    kinds = {frozenset((name, one.dtype, one.shape) for name, one in sample.items() if one.shape) for sample in samples}
    return len(kinds) == 1
