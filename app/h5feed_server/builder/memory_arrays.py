"""Arrays in memory as a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class MemoryArray:
    """An array in memory, or a memory-mapped one."""

    attributes: Mapping[str, Any] = {}
    step = 1

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return np.ascontiguousarray(self._values[start:stop])

    def close(self) -> None:
        """Nothing to close."""


class MemoryArrays:
    """Opens arrays by name."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._arrays = arrays

    def open(self, name: str) -> MemoryArray:
        return MemoryArray(self._arrays[name])

    def close(self) -> None:
        """Nothing to close."""
