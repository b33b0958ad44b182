"""A file whose bytes come from the parent process: for the child that inspects objects and has no access to a store.

Protocol: the child sends a frame of ``R``, offset and size (`RANGE`); the parent sends a frame with the bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s, Ranges, Scratch, Source

from .child import LENGTH, write_frame

WANTED = b"R"
"""Kind of the frames that ask for bytes."""

RANGE = struct.Struct("<QQ")

_FIRST_BLOCK, _LARGEST_BLOCK = 64 << 10, 4 << 20
"""Bytes that are asked for at once. Metadata that is all over a file takes many requests, and each takes a while: so
blocks become larger the more were needed."""

_BLOCKS_OF_A_SIZE = 32

_CACHE_BYTES = 64 << 20


class PipedFile(io.RawIOBase):
    """A file that libhdf5 reads block by block; the blocks used last are cached.

    Parameters
    ----------
    size : int
        Bytes of the file.
    requests, replies : int
        Descriptors of the pipes to the parent and from it.
    is_exact : bool
        Ask for exactly what libhdf5 reads, whenever it does, instead of blocks.
    """

    def __init__(self, size: int, requests: int, replies: int, *, is_exact: bool = False) -> None:
        self.size = size
        self.is_exact = is_exact
        self._pipes = requests, replies
        self._place = 0
        self._block = _FIRST_BLOCK
        self._asked = 0
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._held = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        return self._place

    def readinto(self, target: Bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(target).cast("B")
        end = min(self.size, self._place + len(view))
        done = 0
        while self._place < end:
            begin, block = self._exactly(self._place, end) if self.is_exact else self._at(self._place)
            part = block[self._place - begin : end - begin]
            view[done : done + len(part)] = part
            done += len(part)
            self._place += len(part)
        return done

    def _exactly(self, place: int, end: int) -> tuple[int, bytes]:
        return place, self._ask(place, min(end - place, _LARGEST_BLOCK))

    def _at(self, place: int) -> tuple[int, bytes]:
        """A block with this byte, and where it begins."""
        size = _FIRST_BLOCK
        while size <= self._block:
            key = (size, place // size)
            if (block := self._blocks.get(key)) is not None:
                self._blocks.move_to_end(key)
                return place // size * size, block
            size *= 2
        self._asked += 1
        if self._asked % _BLOCKS_OF_A_SIZE == 0 and self._block < _LARGEST_BLOCK:
            self._block *= 2
        key = (self._block, place // self._block)
        begin = key[1] * self._block
        block = self._blocks[key] = self._ask(begin, min(self._block, self.size - begin))
        self._held += len(block)
        while self._held > _CACHE_BYTES:
            _, oldest = self._blocks.popitem(last=False)
            self._held -= len(oldest)
        return begin, block

    def _ask(self, offset: int, nbytes: int) -> bytes:
        requests, replies = self._pipes
        write_frame(requests, WANTED, RANGE.pack(offset, nbytes))
        (length,) = LENGTH.unpack(_read(replies, LENGTH.size))
        if length != nbytes:
            raise EOFError("the parent sent another number of bytes")
        return _read(replies, nbytes)


class PipedBytes(Source):
    """The same file for readers that do not use libhdf5."""

    def __init__(self, file: PipedFile) -> None:
        self._file = file

    @property
    def key(self) -> tuple[str]:
        return ("piped",)

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        yield -1

    def ahead(self, ranges: Callable[[], Ranges]) -> PipedBytes:
        return self

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        for offset, nbytes, begin in zip(offsets.tolist(), sizes.tolist(), begins.tolist(), strict=True):
            self.fill(-1, offset, memoryview(target[begin : begin + nbytes]))

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        self._file.seek(offset)
        if self._file.readinto(target) != len(target):
            raise EOFError("the file ends before an array does")

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        target = np.empty(nbytes, np.uint8)
        self.fill(handle, offset, memoryview(target))
        return target


def _read(fd: int, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = os.read(fd, min(nbytes, 1 << 20))
        if not part:
            raise EOFError("the parent is gone")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
