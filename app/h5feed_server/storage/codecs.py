"""Filters of HDF5 chunks, undone outside libhdf5 by codec libraries that release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt

from .layout import Filter

Bytes = npt.NDArray[np.uint8]
Decode = Callable[[Any, Bytes, int], None]
"""``decode(stored, out, itemsize)`` fills `out`, whose length is that of the decoded chunk."""


def _gzip(stored: Any, out: Bytes, itemsize: int) -> None:
    decoded = imagecodecs.deflate_decode(stored, out=memoryview(out))
    if len(decoded) != len(out):
        raise ValueError(f"{len(decoded)} bytes instead of {len(out)}")


def _unshuffle(stored: Any, out: Bytes, itemsize: int) -> None:
    source = np.frombuffer(stored, np.uint8)
    if len(source) != len(out):
        raise ValueError(f"{len(source)} bytes instead of {len(out)}")
    # HDF5 leaves the bytes of a last, partial element where they are.
    elements = len(source) // itemsize
    whole = elements * itemsize
    out[:whole].reshape(elements, itemsize)[...] = source[:whole].reshape(itemsize, elements).T
    out[whole:] = source[whole:]


DECODERS: dict[int, Decode] = {1: _gzip, 2: _unshuffle}
"""Decoder of each HDF5 filter number."""


def unsupported(filters: Sequence[Filter]) -> str | None:
    """Why a pipeline cannot be undone here; None where it can."""
    for item in filters:
        if item.id not in DECODERS:
            return (
                f"its chunks are compressed with the filter {item.name!r} ({item.id}), which this version does not read"
            )
    return None


def decode_chunk(stored: Any, filters: Sequence[Filter], mask: int, itemsize: int, out: Bytes) -> None:
    """Undo a chunk's filter pipeline into `out`.

    Parameters
    ----------
    stored : bytes-like
        The chunk as it lies in the file.
    filters : sequence of Filter
        In the order in which they were applied.
    mask : int
        Bit i set: filter i was skipped for this chunk.
    out : (chunk bytes,) uint8

    Raises
    ------
    DatasetCorrupt
        The bytes do not decode to a chunk.
    """
    # A shuffle of single bytes changes nothing; HDF5 writes one when asked to.
    steps = [item for i, item in enumerate(filters) if not mask >> i & 1 and not (item.id == 2 and itemsize == 1)]
    current = stored
    try:
        for position, item in reversed(list(enumerate(steps))):
            # Both filters here keep the length, so that every step but the last fills a chunk-sized scratch.
            target = out if position == 0 else np.empty_like(out)
            DECODERS[item.id](current, target, itemsize)
            current = target
    except (ValueError, RuntimeError) as error:
        raise DatasetCorrupt(f"a chunk does not decode with the filter {item.name!r}: {error}") from None
    if not steps:
        source = np.frombuffer(current, np.uint8)
        if len(source) != len(out):
            raise DatasetCorrupt(f"a chunk has {len(source)} bytes instead of {len(out)}")
        out[...] = source
