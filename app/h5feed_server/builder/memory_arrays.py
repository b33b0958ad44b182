"""Arrays that are held in memory as a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class MemoryArray:
    """An array whose rows may be asked for in any order; one of a mapped file is read as it is asked for."""

    attributes: Mapping[str, Any] = {}
    step = 1

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return np.ascontiguousarray(self._values[start:stop])

    def close(self) -> None:
        """It goes with its source."""


class MemoryArrays:
    """Opens arrays by their names."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._arrays = arrays

    def open(self, name: str) -> MemoryArray:
        return MemoryArray(self._arrays[name])

    def close(self) -> None:
        """Nothing is held open."""
