"""Crops: samples that are parts of rows, such as 64 × 64 pixels of an image and of its mask.

Servers and clients choose the fields and check the lengths by the same rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from .errors import BadParameter
from .order import uniform
from .suggestions import no_field

CropAt = Literal["random", "center", "grid"]

MAX_AXES = 4
"""Maximum number of axes that are cropped."""

_LENGTHS = re.compile(r"[1-9][0-9]{0,11}(x[1-9][0-9]{0,11})*")

Int64s = npt.NDArray[np.int64]


class RowShape(NamedTuple):
    """The shape of the rows of a field.

    Attributes
    ----------
    shape : tuple of int
    axes : int
        How many of its axes can be cropped: not those of channels, and none of text or lists.
    """

    shape: tuple[int, ...]
    axes: int


def parse_crop(text: str) -> tuple[int, ...]:
    """The lengths in a parameter such as ``64x64``.

    Raises
    ------
    ValueError
    """
    if _LENGTHS.fullmatch(text) is None:
        raise ValueError(f"crop={text:.80} must be lengths of 1 or more with x between them, such as 64x64 or 64x64x64")
    lengths = tuple(int(length) for length in text.split("x"))
    if len(lengths) > MAX_AXES:
        raise ValueError(f"crop={text:.80} has {len(lengths)} lengths, but at most {MAX_AXES} axes can be cropped")
    return lengths


def crop_of(value: str | int | Sequence[int]) -> tuple[int, ...]:
    """The lengths of a crop, given as text or as numbers.

    Raises
    ------
    BadParameter
    """
    if not isinstance(value, str):
        numbers: Sequence[Any] = value if isinstance(value, Sequence) else (value,)
        if not all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in numbers):
            raise BadParameter(f"crop={value!r} must be a tuple of lengths, such as (64, 64), or text such as '64x64'")
        value = crop_text(numbers)
    try:
        return parse_crop(value)
    except ValueError as error:
        raise BadParameter(str(error)) from None


def crop_text(lengths: Sequence[int]) -> str:
    """Lengths as they are in URLs: ``64x64``."""
    return "x".join(map(str, lengths))


def spatial_axes(shape: tuple[int, ...], *, has_channels: bool, is_complex: bool) -> int:
    """How many of the axes of a row can be cropped: all but the last of images with channels, and of complex numbers,
    whose last axis has their parts."""
    is_colour = has_channels and len(shape) == 3 and shape[-1] in (1, 3, 4)
    return len(shape) - is_colour - is_complex


def cropped_fields(
    crop: tuple[int, ...], named: Sequence[str] | None, rows: Mapping[str, RowShape]
) -> tuple[list[str], tuple[int, ...]]:
    """Which fields are cropped, and how long their rows are along the cropped axes.

    Parameters
    ----------
    crop : tuple of int
        The lengths of the crops, along the first axes of the rows.
    named : sequence of str, optional
        The fields to crop. Default: all that have at least so many axes.
    rows : mapping of str to RowShape
        All fields of the samples.

    Raises
    ------
    FieldNotFound
    BadParameter
        The fields cannot be cropped, or not alike.
    """
    text, axes = crop_text(crop), len(crop)
    if named is None:
        names = [name for name, row in rows.items() if row.axes >= axes]
        if not names:
            shapes = ", ".join(f"{name}: {list(row.shape)}" for name, row in rows.items()) or "no fields"
            raise BadParameter(
                f"crop={text}: no field has rows with {axes} axes that can be cropped, which axes of channels, sparse "
                f"rows and lists cannot ({shapes:.300})"
            )
    else:
        names = list(dict.fromkeys(named))
        if not names:
            raise BadParameter("crop_fields= names no field: leave it out to crop all that have the axes")
        for name in names:
            if name not in rows:
                raise no_field(name, rows, "crop_fields: the samples have no field")
            if rows[name].axes < axes:
                raise BadParameter(
                    f"crop={text}: rows of {name!r} have the shape {list(rows[name].shape)}, of which "
                    f"{rows[name].axes} axes can be cropped, not {axes}"
                )
    lengths = {name: rows[name].shape[:axes] for name in names}
    if len(set(lengths.values())) > 1:
        alike = [f"{name}: {list(rows[name].shape)}" for name in names]
        raise BadParameter(
            f"crop={text}: the rows of these fields differ in size, so they have no part in common: "
            f"{', '.join(alike):.300}. Name those to crop, as in crop_fields={names[0]}"
        )
    extents = lengths[names[0]]
    if any(length > extent for length, extent in zip(crop, extents, strict=True)):
        raise BadParameter(
            f"crop={text} is larger than the rows of {names[0]!r}, which have the shape {list(rows[names[0]].shape)}"
        )
    return names, extents


def cells_of(crop: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, ...]:
    """Number of cells of the grid along each axis."""
    return tuple(-(-extent // length) for length, extent in zip(crop, extents, strict=True))


def samples_of_row(crop: tuple[int, ...], extents: tuple[int, ...], at: CropAt) -> int:
    """Number of samples that each row is made into."""
    return math.prod(cells_of(crop, extents)) if at == "grid" else 1


def centre(crop: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, ...]:
    """Where the crop in the middle begins: if the rest is odd, one nearer to 0."""
    return tuple((extent - length) // 2 for length, extent in zip(crop, extents, strict=True))


def grid_starts(cells: Int64s, crop: tuple[int, ...], extents: tuple[int, ...]) -> Int64s:
    """Where cells of the grid begin, (k, axes) int64, by their numbers in C order, (k,) int64.

    Cells lie side by side from 0 on. The last ones of an axis end with the row, so they overlap those before if the
    length of the row is no multiple of theirs.
    """
    places = np.stack(np.unravel_index(cells, cells_of(crop, extents)), axis=-1)
    lengths = np.array(crop, np.int64)
    starts: Int64s = np.minimum(places * lengths, np.array(extents, np.int64) - lengths)
    return starts


def random_starts(positions: Int64s, crop: tuple[int, ...], extents: tuple[int, ...], key: bytes) -> Int64s:
    """Where crops begin, (k, axes) int64: each possible start is equally likely.

    Parameters
    ----------
    positions : (k,) int64
        Of the samples in the epoch.
    key : bytes
        64 bytes from `h5feed.order.order_key`.
    """
    axes = len(crop)
    rooms = np.array(extents, np.int64) - np.array(crop, np.int64) + 1
    # drawn: (k, axes) float64, 0 ≤ drawn < 1
    drawn = uniform((positions[:, None] * axes + np.arange(axes)).reshape(-1), key).reshape(-1, axes)
    starts: Int64s = np.minimum((drawn * rooms).astype(np.int64), rooms - 1)
    return starts


class Crops(NamedTuple):
    """The crops of an order, as far as a client knows them.

    Attributes
    ----------
    lengths : tuple of int
    fields : tuple of str
        Those that are cropped.
    samples_of_row : int
        Number of samples that each row is made into.
    """

    lengths: tuple[int, ...]
    fields: tuple[str, ...]
    samples_of_row: int

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a sample of a field whose rows have this shape."""
        return (*self.lengths, *shape[len(self.lengths) :]) if name in self.fields else shape


def crops_of(options: Mapping[str, Any], rows: Mapping[str, RowShape]) -> Crops | None:
    """What options say about crops; None without them.

    Parameters
    ----------
    options : mapping of str to Any
        See `h5feed.options.EpochOptions`.
    rows : mapping of str to RowShape
        All fields of the samples.

    Raises
    ------
    FieldNotFound, BadParameter
    """
    if options.get("crop") is None:
        return None
    named, at = options.get("crop_fields"), options.get("crop_at")
    if isinstance(named, str):
        named = [unquote(name) for name in named.split(",") if name]
    lengths = crop_of(options["crop"])
    fields, extents = cropped_fields(lengths, named, rows)
    return Crops(lengths, tuple(fields), samples_of_row(lengths, extents, at or "random"))
