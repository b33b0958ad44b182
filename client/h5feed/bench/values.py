"""Find inputs whose dtype is larger than their values need."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..dataset import Dataset
from .findings import WideField

_LOOKED_AT = 1 << 20
"""Maximum number of values to check per field."""

_FEW = 64
"""With fewer values per row, the dtype does not matter."""


def wide_fields(dataset: Dataset, batch: Batch, row_bytes: float) -> list[WideField]:
    """Float fields whose values in `batch` fit into a smaller dtype.

    Parameters
    ----------
    row_bytes : float
        Bytes of a row on the wire, all fields together.
    """
    wide = []
    for name, array in batch.items():
        field = dataset.fields.get(name)
        if field is None or field.role == "label" or field.ragged or array.dtype.kind != "f":
            continue
        values = array[: max(1, _LOOKED_AT // max(1, array[:1].size))]
        if not len(array) or array[0].size < _FEW:
            continue
        told = _enough(values.astype(np.float64, copy=False))
        if told is None and array.dtype.itemsize == 8:
            told = "float32", "networks compute in float32 or less"
        if told is None or np.dtype(told[0]).itemsize >= array.dtype.itemsize:
            continue
        bytes_now = array[0].nbytes
        bytes_then = bytes_now * np.dtype(told[0]).itemsize // array.dtype.itemsize
        factor = row_bytes / max(row_bytes - bytes_now + bytes_then, 1.0)
        wide.append(WideField(name, array.dtype.name, *told, factor))
    return wide


def _enough(values: npt.NDArray[Any]) -> tuple[str, str] | None:
    """A smaller sufficient dtype, and why it is sufficient."""
    if not np.isfinite(values).all() or values.min() < 0:
        return None
    if values.max() <= 1 and values.max() > 0:
        levels = values * 255
        if np.abs(levels - np.rint(levels)).max() < 1e-3:
            return "uint8", "all values are multiples of 1/255"
    elif values.max() <= 255 and (values == np.rint(values)).all():
        return "uint8", "all values are whole numbers from 0 to 255"
    return None
