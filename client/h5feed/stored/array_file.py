"""Arrays with JSON metadata as one safetensors body: the format of results in the cache folder.

Writing takes one copy, reading takes none. `h5feed.wire.read_body` is not used because it caches parsed headers for the
many batches of an epoch. Here, every header is different.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..wire import Body, Tensor, dtype_named

_METADATA = "__metadata__"

_PREFIX = "arrays/"
"""Prefix of the name of each array, so that any name is valid."""


def dump_arrays(about: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Serialise arrays and metadata; `load_arrays` reads them.

    Parameters
    ----------
    about : any JSON value
        The metadata.
    arrays : mapping of str to array
        Little-endian arrays of the dtypes that safetensors supports.
    """
    # `Body` places tensors in this order.
    widest_first = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    tensors = [Tensor(_PREFIX + name, array.dtype, array.shape) for name, array in widest_first]
    body = Body(tensors, {"about": json.dumps(about), "batches": "1"})
    flat = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for _, array in widest_first)
    return b"".join([body.header(0), *(memoryview(one) for one in flat)])


def load_arrays(data: bytes) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """Read what `dump_arrays` wrote.

    Returns
    -------
    about : any JSON value
    arrays : dict of str to array
        Views of `data`.

    Raises
    ------
    ValueError
        `dump_arrays` did not write these bytes.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header.pop(_METADATA)["about"])
        arrays = {name.removeprefix(_PREFIX): _array(entry, data, 8 + length) for name, entry in header.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, struct.error) as error:
        raise ValueError(f"these bytes are not an array file: {error}") from None
    return about, arrays


def _array(entry: Mapping[str, Any], data: bytes, begin: int) -> npt.NDArray[Any]:
    dtype, shape = dtype_named(entry["dtype"]), entry["shape"]
    start, stop = entry["data_offsets"]
    # JSON's true would count as an int, and numpy takes a negative count as "everything".
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("an array has an invalid shape or position")
    count = math.prod(shape)
    if stop - start != count * dtype.itemsize:
        raise ValueError(f"an array of {count} numbers has {stop - start} bytes")
    return np.frombuffer(data, dtype, count, begin + start).reshape(shape)
