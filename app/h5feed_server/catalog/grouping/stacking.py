"""Decides whether files or groups hold one sample each, such as an image and its mask, without an axis for rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from h5feed.stored.column import Segment
from h5feed.stored.layout import MAX_CELLS, ArrayLayout

from .names import is_image, is_label
from .pieces import InDoubt

FEWEST = 3
"""Minimum number of files or groups that are recognised as samples without a declaration."""

_LEAST_SIDE = 8
_MOST_COLOURS = 4
_MOST_CHANNELS = 16
"""An axis up to this length may hold the channels of an image; a longer one is its height or width."""

Answer = Literal["yes", "no", "maybe"]


def is_sample(arrays: Mapping[str, ArrayLayout]) -> Answer:
    """Whether the arrays of a file or group are one sample, judged by their shapes and names.

    ``no`` if an array has one value for each row of another one; ``yes`` if no axis can be that of rows.
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
        # Arrays of the same shape may also be stacks of slices, unless their last axis is short enough to hold colours.
        some = next(iter(solid.values()))
        told = len(set(solid.values())) > 1 or len(some) == 2 or some[-1] <= _MOST_COLOURS
        return "yes" if len(solid) > 1 and told else "maybe"
    if len({shape[0] for shape in solid.values()}) > 1:
        return "maybe"
    # A volume, or a stack of slices.
    return "maybe" if pictured and len(set(solid.values())) == 1 else "no"


def plane(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width if an array can be one image, with channels first or last; else None."""
    sides = shape
    if len(shape) == 3:
        sides = shape[:2] if shape[2] <= min(_MOST_CHANNELS, *shape[:2]) else shape[1:]
        if min(shape[0], shape[2]) > _MOST_CHANNELS:
            return None
    return (sides[0], sides[1]) if len(sides) == 2 and min(sides) >= _LEAST_SIDE else None


def as_row(segment: Segment) -> Segment | str:
    """The array as a single row, or the reason why that is not possible."""
    array = segment.array
    if array.unreadable is not None and array.scalar is None:
        return array.unreadable
    several = segment.offsets is not None or len(segment.parts) > 0
    if array.by_h5py or array.record is not None or several or segment.transposed:
        return "it cannot be read as one row: it is a list, a member of records, virtual, or written by MATLAB"
    if array.scalar is not None:
        return replace(segment, array=replace(array, shape=(1,), inline=array.scalar, scalar=None, unreadable=None))
    chunk_shape = None if array.chunk_shape is None else (1, *array.chunk_shape)
    row = replace(array, shape=(1, *array.shape), chunk_shape=chunk_shape, text=None)
    if row.cells > MAX_CELLS:
        return f"one row would be divided into {row.cells} chunks, more than the limit of {MAX_CELLS}"
    return replace(segment, array=row)


Member = tuple[str, str, tuple[int, ...]]
"""Name, type and shape of an array."""


def members_of(sample: Mapping[str, ArrayLayout]) -> frozenset[Member]:
    """The arrays of a file or group. Of scalars, only labels count."""
    return frozenset((name, type_of(one), one.shape) for name, one in sample.items() if one.shape or is_label(name))


def type_of(array: ArrayLayout) -> str:
    """Name of an array's element type, without the width of text and the byte order, for messages."""
    dtype = np.dtype(array.dtype)
    return "bfloat16" if array.is_bfloat16 else "text" if dtype.kind == "S" else dtype.newbyteorder("=").name


def shapes_of(sample: Mapping[str, ArrayLayout]) -> str:
    """Some of the shapes, for messages."""
    return _listed({f"{name} {[*one.shape]}" for name, one in sample.items() if one.shape})


def seem_samples(samples: Collection[Mapping[str, ArrayLayout]]) -> bool:
    """Whether most of the files look like one sample each, and there are enough of them."""
    return len(samples) >= FEWEST and 2 * [is_sample(sample) for sample in samples].count("yes") > len(samples)


def are_samples(samples: Mapping[str, Mapping[str, ArrayLayout]], what: str, beside: int = 0) -> bool:
    """Whether files or groups with similar names are one sample each: most of them are, and the others may be.

    Arrays that only a few of them hold are ignored.

    Parameters
    ----------
    samples : mapping
        Their arrays, by the names of the files or groups.
    what : str
        ``file`` or ``group``, for messages.
    beside : int
        Total number of files or groups, if `samples` are not all.

    Raises
    ------
    InDoubt
        They seem to be samples, but do not fit together or are few.
    """
    if 2 * [is_sample(sample) for sample in samples.values()].count("yes") <= len(samples):
        return False
    problem = _misfit(samples)
    if problem is None and max(len(samples), beside) < FEWEST:
        problem = "there are only few of them"
    if problem is not None:
        raise InDoubt(f"{len(samples)} {what}s seem to hold one sample each, but {problem}")
    return True


def _misfit(samples: Mapping[str, Mapping[str, ArrayLayout]]) -> str | None:
    """Why samples do not fit together; None if they do."""
    by_name: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for sample, arrays in samples.items():
        for name, kind, shape in members_of(arrays):
            by_name.setdefault(name, {})[sample] = (kind, shape)
    # Every sample must have the arrays that at least half of them have.
    common = {name: members for name, members in by_name.items() if 2 * len(members) >= len(samples)}
    for what, place in (("shapes", 1), ("types", 0)):
        values = {name: {member[place] for member in members.values()} for name, members in common.items()}
        differing = {f"{name} {_shown(one)}" for name, several in values.items() if len(several) > 1 for one in several}
        if differing:
            return f"their {what} differ: {_listed(differing)}"
    for name, members in common.items():
        if without := {sample for sample in samples if sample not in members}:
            return f"there is no {name!r} in {_listed(without)}"
    arrays = {name: next(sample[name] for sample in samples.values() if name in sample) for name in common}
    return None if is_sample(arrays) == "yes" else "the arrays in most of them may also hold rows"


def _shown(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else str([*value])


def _listed(words: Collection[str]) -> str:
    return ", ".join(sorted(words)[:4]) + (" …" if len(words) > 4 else "")
