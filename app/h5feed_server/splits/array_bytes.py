"""Arrays and what is said of them as one run of bytes, for the cache folder: written with one copy, read with none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


def pack(about: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A line of JSON, padded with spaces so that the arrays begin aligned, and the arrays, back to back.

    Parameters
    ----------
    arrays : mapping of str to array
        Widest items first, or of one dtype: so each of them is aligned too.
    """
    shapes = {name: [array.dtype.str, *array.shape] for name, array in arrays.items()}
    header = json.dumps({"about": about, "arrays": shapes}).encode()
    header += b" " * (-(len(header) + 1) % _ALIGNMENT) + b"\n"
    flat = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values())
    return b"".join([header, *(memoryview(one) for one in flat)])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """What `pack` was given; the arrays are views of `data`."""
    begin = data.index(b"\n") + 1
    header = json.loads(data[:begin])
    arrays = {}
    for name, (dtype, *shape) in header["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, begin).reshape(shape)
        begin += arrays[name].nbytes
    return header["about"], arrays
