"""Text of a fixed length, without what only fills it up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import Padding

_BLOCK_BYTES = 1 << 20
"""Bytes looked at by one call: what is found out about each of them is as large as they are."""


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
