"""Sends blocks of files in a store to the child processes that read them, see `piped_file`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from h5feed.stored.local_file import FileSource

from .child import LENGTH, MOST_ASKED_BYTES, Child
from .piped_file import BLOCK_BYTES, EXACT, MOST_BYTES, RANGE, RUN, WANTED


def ask(
    child: Child,
    request: bytes,
    seconds: float,
    files: Sequence[FileSource],
    allocate: Callable[[int], memoryview] | None = None,
    read: Callable[[int, int], bytes] | None = None,
) -> memoryview:
    """Same as `Child.ask`, while the child reads files through this process.

    Parameters
    ----------
    files : sequence of FileSource
        Those of the request, in its order.
    read : callable, optional
        ``read(offset, nbytes)`` returns a part of an `ExactFile`.

    Raises
    ------
    FeedError
        A block cannot be read. The child waits for it in vain: call `end`.
    TimeoutError, EOFError, OSError
        The child cannot be used any more: call `end`.
    """
    until = time.monotonic() + seconds

    def place(nbytes: int) -> memoryview:
        # A frame that asks for blocks is short.
        return memoryview(bytearray(nbytes)) if allocate is None or nbytes <= MOST_ASKED_BYTES else allocate(nbytes)

    answer = child.ask(request, seconds, place)
    while answer[:1] in (WANTED, EXACT):
        blocks = _blocks(files, answer[1:]) if answer[:1] == WANTED else _part(read, answer[1:])
        answer = child.ask(blocks, max(0.0, until - time.monotonic()), place)
    return answer


def _part(read: Callable[[int, int], bytes] | None, asked: memoryview) -> bytes:
    """A frame with the part that a child asks for."""
    if read is None or len(asked) != RANGE.size:
        raise EOFError
    offset, nbytes = RANGE.unpack(asked)
    if nbytes > MOST_BYTES:
        raise EOFError
    part = read(offset, nbytes)
    return LENGTH.pack(len(part)) + part


def files_for(files: Sequence[FileSource]) -> list[tuple[str, list[int | str], int | None]]:
    """The files of a request, for `h5py_reader.files_of`: path, identity with digest, and size if it is in a store."""
    return [(file.path, [*file.identity, file.digest.hex()], file.remote_bytes) for file in files]


def _blocks(files: Sequence[FileSource], asked: memoryview) -> bytearray:
    """A frame with the blocks that a child asks for."""
    if len(asked) % RUN.size:
        raise EOFError
    runs = list(RUN.iter_unpack(asked))
    if not 0 < sum(count for _, _, count in runs) * BLOCK_BYTES <= MOST_BYTES:
        raise EOFError
    ranges = []
    for number, first, count in runs:
        size = files[number].remote_bytes if number < len(files) else None
        if size is None or not count or (first + count - 1) * BLOCK_BYTES >= size:
            raise EOFError
        blocks = np.arange(first, first + count, dtype=np.int64) * BLOCK_BYTES
        ranges.append((number, blocks, np.minimum(size - blocks, BLOCK_BYTES)))
    total = sum(int(sizes.sum()) for _, _, sizes in ranges)
    frame = bytearray(LENGTH.size + total)
    LENGTH.pack_into(frame, 0, total)
    target = np.frombuffer(frame, np.uint8, offset=LENGTH.size)
    done = 0
    for number in dict.fromkeys(number for number, _, _ in ranges):
        # Runs of a file follow each other.
        offsets = np.concatenate([blocks for of, blocks, _ in ranges if of == number])
        sizes = np.concatenate([sizes for of, _, sizes in ranges if of == number])
        begins = done + np.cumsum(sizes) - sizes
        files[number].read_rows(offsets, sizes, target, begins)
        done += int(sizes.sum())
    return frame
