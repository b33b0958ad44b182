"""Text of a fixed length: without what only fills it up, and filled up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge

from .layout import Int64s, Padding

_BLOCK_BYTES = 1 << 20
"""Bytes looked at by one call: what is found out about each of them is as large as they are."""

_MAX_PADDED_BYTES = 256 << 20
"""Bytes of text that is padded to one length."""


def cut_padding(values: npt.NDArray[Any], padding: Padding | None) -> npt.NDArray[Any]:
    """Text padded with zeros, as numpy has it, from text as HDF5 stores it.

    What libhdf5's own conversion does: of ``nullterm``, as C writes it, the first zero ends the text, whatever lies
    behind it; of ``spacepad``, as Fortran does, blanks at its end are none of it.

    Parameters
    ----------
    values : (...) of S
        C-contiguous; changed in place.
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
    """Text as strings of one length, (rows,) of S.

    Raises
    ------
    TooLarge
    """
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max(initial=1)))
    if items.dtype != np.uint8 or width * len(lengths) > _MAX_PADDED_BYTES:
        raise TooLarge(f"lists or texts of up to {width} items are too long to be taken as one value each")
    out = np.zeros((len(lengths), width), np.uint8)
    out[np.arange(width) < lengths[:, None]] = items
    return out.reshape(-1).view(f"S{width}")
