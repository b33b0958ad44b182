"""Where stored bytes come from: a file, or a response that contains them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DatasetCorrupt
from .scratch import Bytes

Int64s = npt.NDArray[np.int64]

Scratch = Callable[[str, int], Bytes]
"""``scratch(use, nbytes)`` returns memory that the calling thread may write to, see `scratch.Scratch.take`."""


class Source(Protocol):
    """Stored bytes, addressed by their offset."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Identifies the content, for caches."""

    def reading(self) -> AbstractContextManager[int]:
        """A handle for several reads. At the end of the ``with`` block, the source is checked for changes."""

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """Fill ``target[begins[i]:]`` with the ``sizes[i]`` bytes from ``offsets[i]``, for all i, as fast as possible.

        Parameters
        ----------
        offsets, sizes, begins : (k,) int64
        target : (n,) uint8
        """

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset`. `handle` is from `reading`."""

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """(nbytes,) uint8 from `offset`, valid until this thread reads again. `handle` is from `reading`."""


class ReceivedBytes:
    """Stored bytes that are in memory.

    Parameters
    ----------
    content : (n,) uint8
    """

    _numbers = count()

    def __init__(self, content: Bytes) -> None:
        self._content = content
        # Not id(self): caches outlive this object, and the next one may have the same address.
        self._number = next(self._numbers)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Unique: received bytes are used once, so no other source has the same content."""
        return ("received", self._number)

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """There is no handle."""
        yield -1

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """Copy all ranges.

        Raises
        ------
        DatasetCorrupt
            A range ends beyond the content.
        """
        for offset, nbytes, begin in zip(offsets.tolist(), sizes.tolist(), begins.tolist(), strict=True):
            target[begin : begin + nbytes] = self._view(offset, nbytes)

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `read_rows`."""
        np.frombuffer(target, np.uint8)[...] = self._view(offset, len(target))

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """A view, without a copy."""
        return self._view(offset, nbytes)

    def _view(self, offset: int, nbytes: int) -> Bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._content):
            raise DatasetCorrupt(
                f"bytes {offset} … {offset + nbytes - 1} of the {len(self._content)} bytes that were received"
            )
        return self._content[offset : offset + nbytes]
