"""Removes the padding of fixed-length text, and pads variable-length text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TooLarge
from .layout import Int64s, Padding

_BLOCK_BYTES = 1 << 20
"""Bytes processed at a time, because the temporary arrays are as large as the text."""

_MAX_PADDED_BYTES = 256 << 20
"""Maximum bytes of text after padding."""


def cut_padding(values: npt.NDArray[Any], padding: Padding | None) -> npt.NDArray[Any]:
    """Convert HDF5's padding of text to numpy's, which is zeros.

    The result is the same as that of libhdf5's conversion. With ``nullterm`` (C), text ends at its first zero, whatever
    follows. With ``spacepad`` (Fortran), trailing blanks are padding.

    Parameters
    ----------
    values : (...) of S
        C-contiguous; modified in place.
    padding : "nullterm", "spacepad" or None
        None: `values` are padded with zeros already.

    Returns
    -------
    (...) of S
        `values`.
    """
    if padding is None or not values.size:
        return values
    # characters: (n, length)
    characters = values.reshape(-1).view(np.uint8).reshape(values.size, values.dtype.itemsize)
    step = max(1, _BLOCK_BYTES // values.dtype.itemsize)
    for first in range(0, len(characters), step):
        block = characters[first : first + step]
        if padding == "nullterm":
            block[np.logical_or.accumulate(block == 0, axis=1)] = 0
        else:
            blank = block == ord(" ")
            block[np.logical_and.accumulate(blank[:, ::-1], axis=1)[:, ::-1]] = 0
    return values


def padded(items: npt.NDArray[Any], offsets: Int64s) -> npt.NDArray[Any]:
    """Pad variable-length text to the length of the longest.

    Parameters
    ----------
    items : (n,) uint8
        The bytes of all rows, one row after the other.
    offsets : (rows + 1,) int64
        Where each row begins in `items`.

    Returns
    -------
    (rows,) of S

    Raises
    ------
    TooLarge
        The result would be too large, or rows are lists and not text.
    """
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max(initial=1)))
    if items.dtype != np.uint8 or width * len(lengths) > _MAX_PADDED_BYTES:
        raise TooLarge(f"lists or texts of up to {width} items are too long to be used as single values")
    out = np.zeros((len(lengths), width), np.uint8)
    out[np.arange(width) < lengths[:, None]] = items
    return out.reshape(-1).view(f"S{width}")
