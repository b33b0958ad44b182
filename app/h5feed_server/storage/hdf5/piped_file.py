"""Files whose bytes come from the parent process: for children, which have no access to an object store.

Protocol: the child sends a frame of `WANTED` and runs of blocks (`RUN`: number of the file, first block, number of
blocks); the parent sends a frame with their bytes. Blocks are the same for all processes, so that the parent finds
those that it has on its disk. `piping` is the other end.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s, Ranges, Scratch, Source

from ..signatures import HDF5
from . import index_nodes
from .child import LENGTH, MOST_ASKED_BYTES

WANTED = b"R"
"""Kind of the frames that ask for blocks."""

RUN = struct.Struct("<III")

EXACT = b"P"
"""Kind of the frames of an `ExactFile`: offset and size of one range (`RANGE`)."""

RANGE = struct.Struct("<QQ")

BLOCK_BYTES = 16 << 10
"""A node of an index takes 2 KiB or less, and a request for it as long as one for a block."""

MOST_BYTES = 8 << 20
"""Bound on the bytes that are asked for at once."""

_MOST_RUNS = (MOST_ASKED_BYTES - LENGTH.size - len(WANTED)) // RUN.size

_FIRST_RUN, _LONGEST_RUN = 64 << 10, 4 << 20
"""Bytes that are read at once where nothing tells what will be needed. Metadata that is all over a file takes many
reads, and each takes a while: so they become longer the more were needed."""

_RUNS_OF_A_LENGTH = 32

_CACHE_BYTES = 64 << 20

_MOST_NODES = 1 << 16
"""Nodes of one level of an index that are followed; all that there is room for."""


class Pipe:
    """The pipes to the parent, and the blocks that came through them: those that were used last, of all files together.

    Parameters
    ----------
    requests, replies : int
        Descriptors of the pipes to the parent and from it.
    levels : int
        How many levels of an index are read ahead, below the node that is read.
    """

    def __init__(self, requests: int, replies: int, levels: int = 1) -> None:
        self._pipes = requests, replies
        self.levels = levels
        self._runs = 0
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held = 0

    def begin(self) -> None:
        """Another request of the parent begins."""
        self._runs = 0

    def fill(self, file: PipedFile, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file from `offset`."""
        done = 0
        while done < len(target):
            # In steps, so that a step's blocks are in the cache together.
            end = min(offset + len(target), (offset + done) // MOST_BYTES * MOST_BYTES + MOST_BYTES)
            numbers = range((offset + done) // BLOCK_BYTES, -(-end // BLOCK_BYTES))
            if missing := self._missing(file, numbers):
                self._ask(file, [*missing, *self._further(file, numbers)])
            for number in numbers:
                begin = offset + done - number * BLOCK_BYTES
                part = memoryview(self._blocks[file.name, number])[begin : end - number * BLOCK_BYTES]
                target[done : done + len(part)] = part
                done += len(part)

    def fetch(self, file: PipedFile, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Read ranges that will be needed, given as offset and size, as far as there is room for them.

        Returns
        -------
        list of (int, int)
            Those of which something was missing, and is there now.
        """
        read: list[tuple[int, int]] = []
        wanted: dict[int, None] = {}
        # Crafted ones may overlap, and be much more than there is room for.
        left = _CACHE_BYTES
        for offset, nbytes in ranges:
            if not 0 <= offset < offset + nbytes <= file.size:
                continue
            left -= nbytes
            if left < 0:
                break
            missing = self._missing(file, range(offset // BLOCK_BYTES, -(-(offset + nbytes) // BLOCK_BYTES)))
            if (len(wanted) + len(missing)) * BLOCK_BYTES > _CACHE_BYTES // 2:
                break
            if missing:
                wanted |= dict.fromkeys(missing)
                read.append((offset, nbytes))
        self._ask(file, sorted(wanted))
        return read

    def exactly(self, offset: int, nbytes: int) -> bytes:
        """A range of the only file of a request, as it is now."""
        requests, replies = self._pipes
        asked = EXACT + RANGE.pack(offset, nbytes)
        os.write(requests, LENGTH.pack(len(asked)) + asked)
        (length,) = LENGTH.unpack(_read(replies, LENGTH.size))
        if length != nbytes:
            raise EOFError("the parent sent another number of bytes")
        return _read(replies, nbytes)

    def _missing(self, file: PipedFile, numbers: Iterable[int]) -> list[int]:
        missing = []
        for number in numbers:
            if (file.name, number) in self._blocks:
                self._blocks.move_to_end((file.name, number))
            else:
                missing.append(number)
        return missing

    def _further(self, file: PipedFile, numbers: range) -> list[int]:
        """Blocks after those that are read that may be needed too."""
        length = min(_LONGEST_RUN, _FIRST_RUN << self._runs // _RUNS_OF_A_LENGTH)
        self._runs += 1
        stop = min(numbers.start + length // BLOCK_BYTES, -(-file.size // BLOCK_BYTES))
        return self._missing(file, range(numbers.stop, stop))

    def _ask(self, file: PipedFile, numbers: list[int]) -> None:
        """Read blocks, which are ascending."""
        frame: list[tuple[int, int]] = []
        nblocks = 0
        for first, count in _runs_of(numbers):
            if len(frame) == _MOST_RUNS or (nblocks + count) * BLOCK_BYTES > MOST_BYTES:
                self._receive(file, frame)
                frame, nblocks = [], 0
            frame.append((first, count))
            nblocks += count
        if frame:
            self._receive(file, frame)

    def _receive(self, file: PipedFile, runs: list[tuple[int, int]]) -> None:
        requests, replies = self._pipes
        asked = WANTED + b"".join(RUN.pack(file.number, first, count) for first, count in runs)
        # In one call, which writes all or nothing if this process is killed: its parent goes on to listen.
        os.write(requests, LENGTH.pack(len(asked)) + asked)
        numbers = [number for first, count in runs for number in range(first, first + count)]
        sizes = [min(BLOCK_BYTES, file.size - number * BLOCK_BYTES) for number in numbers]
        (length,) = LENGTH.unpack(_read(replies, LENGTH.size))
        if length != sum(sizes):
            raise EOFError("the parent sent another number of bytes")
        content = _read(replies, length)
        begin = 0
        for number, nbytes in zip(numbers, sizes, strict=True):
            self._blocks[file.name, number] = content[begin : begin + nbytes]
            begin += nbytes
        self._held += length
        while self._held > _CACHE_BYTES:
            _, oldest = self._blocks.popitem(last=False)
            self._held -= len(oldest)


class PipedFile(io.RawIOBase):
    """A file that libhdf5 reads through a pipe.

    Parameters
    ----------
    pipe : Pipe
    number : int
        Number of the file in the current request.
    size : int
        Bytes of the file.
    name : str
        Names this version of its content.
    """

    def __init__(self, pipe: Pipe, number: int, size: int, name: str) -> None:
        self.number = number
        self.size = size
        self.name = name
        self.base = 0
        """Where HDF5 begins, after a user block: addresses in indices are relative to that."""
        self._pipe = pipe
        self._place = 0

    def __repr__(self) -> str:
        # libhdf5 takes this for its path.
        return OBJECT

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
        view = view[: max(0, self.size - self._place)]
        self._pipe.fill(self, self._place, view)
        if view[:8] == HDF5:
            self.base = self._place
        self._place += len(view)
        self._follow(view)
        return len(view)

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read ranges that will be needed, given as offset and size."""
        self._pipe.fetch(self, ranges)

    def at(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset`."""
        content = bytearray(nbytes)
        self._pipe.fill(self, offset, memoryview(content))
        return bytes(content)

    def _follow(self, node: memoryview) -> None:
        """If this is a node of an index, read what it leads to: each level in one go, not node by node."""
        found = list(index_nodes.led_to(node))
        for _ in range(self._pipe.levels):
            if not found:
                return
            # A crafted node may lead to the same place, or back, many times.
            ranges = dict.fromkeys((self.base + address, nbytes) for address, nbytes in found)
            found = []
            for offset, nbytes in self._pipe.fetch(self, ranges):
                if len(found) > _MOST_NODES:
                    break
                found += index_nodes.led_to(memoryview(self.at(offset, nbytes)))


class ExactFile(PipedFile):
    """Asks for exactly what libhdf5 reads, whenever it does, instead of blocks."""

    def readinto(self, target: Bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(target).cast("B")
        view = view[: max(0, self.size - self._place)]
        for begin in range(0, len(view), MOST_BYTES):
            part = view[begin : begin + MOST_BYTES]
            part[:] = self._pipe.exactly(self._place + begin, len(part))
        self._place += len(view)
        return len(view)


OBJECT = "the object"
"""What errors call a file without a path."""


class PipedBytes(Source):
    """The same file for readers that do not use libhdf5."""

    answers_late = True

    def __init__(self, file: PipedFile) -> None:
        self._file = file

    @property
    def key(self) -> tuple[str]:
        return ("piped",)

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        yield -1

    def ahead(self, ranges: Callable[[], Ranges]) -> PipedBytes:
        offsets, sizes = ranges()
        self._file.fetch(zip(offsets.tolist(), sizes.tolist(), strict=True))
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


def _runs_of(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First block and number of blocks of each run, none longer than `MOST_BYTES`."""
    first = count = 0
    for number in numbers:
        if count and number == first + count and (count + 1) * BLOCK_BYTES <= MOST_BYTES:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def _read(fd: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    view = memoryview(content)
    while view:
        received = os.readv(fd, [view])
        if not received:
            raise EOFError("the parent is gone")
        view = view[received:]
    return bytes(content)
