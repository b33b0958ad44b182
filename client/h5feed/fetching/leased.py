"""Arrays in one recycled buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool
from ..wire import ALIGNMENT

K = TypeVar("K")


def leased(pool: BufferPool, kinds: Mapping[K, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[K, npt.NDArray[Any]]:
    """Uninitialised arrays of these dtypes and shapes, by key, each 64-byte aligned, in one buffer of `pool`."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values()]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    buffer = pool.lease_or_new(sum(rooms))
    arrays, begin = {}, 0
    for (key, (dtype, shape)), size, room in zip(kinds.items(), sizes, rooms, strict=True):
        arrays[key] = buffer[begin : begin + size].view(dtype).reshape(shape)
        begin += room
    return arrays
