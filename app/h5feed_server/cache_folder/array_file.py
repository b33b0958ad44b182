"""Arrays, and what is said of them, as one safetensors body: how results lie in the cache folder.

Written with one copy, read with none. Not by `h5feed.wire.read_body`, which keeps headers in memory, to parse those of
an epoch's batches once; of these, each is another.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.wire import Body, Tensor, dtype_named

_METADATA = "__metadata__"

_PREFIX = "arrays/"
"""Before the name of each array: it may have any."""


def dump_arrays(about: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """What `load_arrays` reads.

    Parameters
    ----------
    about : anything that is JSON
    arrays : mapping of str to array
        Little-endian, of the dtypes that safetensors has.
    """
    # As a body orders them.
    widest_first = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    tensors = [Tensor(_PREFIX + name, array.dtype, array.shape) for name, array in widest_first]
    body = Body(tensors, {"about": json.dumps(about), "batches": "1"})
    flat = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for _, array in widest_first)
    return b"".join([body.header(0), *(memoryview(one) for one in flat)])


def load_arrays(data: bytes) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """What `dump_arrays` was given; the arrays are views of `data`.

    Raises
    ------
    ValueError
        These bytes are nothing that it wrote.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header.pop(_METADATA)["about"])
        arrays = {name.removeprefix(_PREFIX): _array(entry, data, 8 + length) for name, entry in header.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, struct.error) as error:
        raise ValueError(f"these bytes hold no arrays: {error}") from None
    return about, arrays


def _array(entry: Mapping[str, Any], data: bytes, begin: int) -> npt.NDArray[Any]:
    dtype, shape = dtype_named(entry["dtype"]), entry["shape"]
    start, stop = entry["data_offsets"]
    # JSON's true is an int to Python; a count below zero means all to numpy.
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("an array lies nowhere")
    count = math.prod(shape)
    if stop - start != count * dtype.itemsize:
        raise ValueError(f"an array of {count} numbers has {stop - start} bytes")
    return np.frombuffer(data, dtype, count, begin + start).reshape(shape)
