"""Arrays in one recycled buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool, aligned
from ..wire import ALIGNMENT

_LEAST_LEASED_BYTES = 64 << 10
"""For fewer bytes, new memory takes less time than a recycled buffer."""

K = TypeVar("K")


def leased(pool: BufferPool, kinds: Mapping[K, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[K, npt.NDArray[Any]]:
    """Uninitialised arrays of these dtypes and shapes, by key, each 64-byte aligned. They share one buffer, which comes
    from `pool` if it is large."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values()]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    total = sum(rooms)
    if total >= _LEAST_LEASED_BYTES:
        buffer = pool.lease_or_new(total)
    else:
        buffer = aligned(np.empty(total + ALIGNMENT, np.uint8), total, ALIGNMENT)
    arrays, begin = {}, 0
    for (key, (dtype, shape)), size, room in zip(kinds.items(), sizes, rooms, strict=True):
        arrays[key] = buffer[begin : begin + size].view(dtype).reshape(shape)
        begin += room
    return arrays
