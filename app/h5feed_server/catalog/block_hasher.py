"""Hashes blocks of files. Runs as a child process, which has a lower priority than the server.

A thread of the server with a low priority could keep the others from running, because it may be suspended while it
holds the interpreter's lock.

Protocol: each line on standard input is a path, the identity of the file, an offset and a length, as JSON. Each
response is a frame of a kind byte (``D`` digest, ``C`` the file has changed, ``E`` error) and the content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys

from ..storage.hdf5.child import confine, write_frame

_NICE = 15
"""Also of the disk, on Linux: it uses what serving batches leaves."""

_MEMORY_BYTES = 1 << 30
"""Address space of the process."""


def _answer(path: str, identity: list[int], offset: int, length: int) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO would block forever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            block = os.pread(fd, length, offset)
            status = os.fstat(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return b"C"
    except OSError as error:
        return b"E" + str(error.strerror).encode()
    now = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return b"D" + hashlib.blake2b(block).digest() if now == identity else b"C"


def main() -> None:
    """Answer requests until standard input ends."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    answers = confine(_MEMORY_BYTES)
    while line := sys.stdin.buffer.readline():
        write_frame(answers, _answer(*json.loads(line)))


if __name__ == "__main__":
    main()
