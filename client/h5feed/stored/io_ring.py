"""Reads many ranges of a file with one system call: Linux's io_uring, through ctypes.

`os.preadv` in a loop acquires the GIL after each row. If several threads read, they often have to wait for it: on two
cores, two threads read large rows about half as fast as two processes. One system call for a whole batch avoids this.
If the rows are not in the page cache, the disk also gets all reads at once.

If the kernel or the container does not allow io_uring, `this_thread` returns None, and callers use `preadv`.
Docker's default seccomp profile does not allow it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..environment import is_set

MIN_RANGES = 4
"""Fewer ranges are read faster with `preadv`."""

_ENTRIES = 256
"""Size of the submission queue: ranges that are read at the same time; a power of two."""

_POLL_SECONDS = 0.001
"""Polling interval in seconds, if the system call to wait fails."""

# System call numbers, the same on all architectures that Python runs on but Alpha; then constants of linux/io_uring.h.
_SETUP, _ENTER = 425, 426
_OP_READ, _GETEVENTS = 22, 1
_OFFSET_OF_SQES = 0x10000000
_PARAMS = np.dtype((np.uint32, 30))
_SQE = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "address", "nbytes", "slot"],
        "formats": ["u1", "<i4", "<u8", "<u8", "<u4", "<u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
_CQE = np.dtype([("slot", "<u8"), ("result", "<i4"), ("flags", "<u4")])

MAX_RANGE_BYTES = 1 << 30
"""Larger ranges are not read with a ring, whose lengths and results have 32 bits."""

Int64s = npt.NDArray[np.int64]


class Unusable(Exception):
    """The kernel does not allow io_uring, or has no memory or descriptors for it."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.is_lasting = number not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
        """Whether it will be the same the next time: because of a system call filter, a sysctl, or an old kernel."""


class ReadRing:
    """One ring, used by one thread.

    Attributes
    ----------
    is_idle : bool
        Whether `read` can be called: False within it, as in a signal handler that interrupts it.
    is_closed : bool

    Raises
    ------
    Unusable
    """

    def __init__(self) -> None:
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        params = np.zeros((), _PARAMS)
        self._fd = self._call(_SETUP, _ENTRIES, params.ctypes.data)
        if self._fd < 0:
            raise Unusable(-self._fd)
        entries, completions = params[:2].tolist()
        # Positions in the first mapping: see struct io_sqring_offsets and io_cqring_offsets.
        of_sq, of_cq = params[10:20].tolist(), params[20:30].tolist()
        nbytes = max(of_sq[6] + entries * 4, of_cq[5] + completions * _CQE.itemsize)
        try:
            rings = mmap.mmap(self._fd, nbytes, offset=0)
            sqes = mmap.mmap(self._fd, entries * _SQE.itemsize, offset=_OFFSET_OF_SQES)
        except OSError as error:
            self.close()
            raise Unusable(error.errno or errno.EIO) from None

        def word(position: int) -> Any:
            return np.frombuffer(rings, np.uint32, 1, position).reshape(())

        self._taken, self._tail = word(of_sq[0]), word(of_sq[1])
        self._completed_head, self._completed_tail = word(of_cq[0]), word(of_cq[1])
        self._requests = np.frombuffer(sqes, _SQE, entries)
        self._completions = np.frombuffer(rings, _CQE, completions, of_cq[5])
        # Entry number n of the queue is always request number n.
        np.frombuffer(rings, np.uint32, entries, of_sq[6])[:] = np.arange(entries)
        self._requests["opcode"] = _OP_READ
        self._requests["slot"] = np.arange(entries)
        self._mask, self._completed_mask = entries - 1, completions - 1
        self._sent = 0
        self.is_idle = True

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close its descriptor. No read may be under way."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def read(self, fd: int, offsets: Int64s, addresses: Int64s, sizes: Int64s) -> Int64s:
        """Read ranges of a file into memory; returns when all reads are over.

        Parameters
        ----------
        fd : int
        offsets, addresses, sizes : (k,) int64
            Bytes from ``offsets[i]`` of the file go to ``addresses[i]``. The caller keeps the memory alive.

        Returns
        -------
        (k,) int64
            Bytes read; fewer than requested at the end of the file, negative after an error.

        Raises
        ------
        Unusable
            The kernel takes no more requests.

        After any exception, nothing is under way any more, and the ring is closed.
        """
        # A signal handler can raise after any system call, and an allocation can fail.
        try:
            self.is_idle = False
            counts = np.full(len(offsets), -1, np.int64)
            for first in range(0, len(offsets), _ENTRIES):
                part = slice(first, first + _ENTRIES)
                self._read(fd, offsets[part], addresses[part], sizes[part], counts[part])
            self.is_idle = True
            return counts
        except BaseException:
            # Its queues may hold requests of this read, which the next one would send, and results of them.
            self._settle()
            self.close()
            raise

    def _read(self, fd: int, offsets: Int64s, addresses: Int64s, sizes: Int64s, counts: Int64s) -> None:
        count, first = len(offsets), self._sent & self._mask
        slots: Any = slice(first, first + count)
        if first + count > len(self._requests):
            slots = (first + np.arange(count)) & self._mask
        requests = self._requests
        requests["fd"][slots] = fd
        requests["offset"][slots] = offsets
        requests["address"][slots] = addresses
        requests["nbytes"][slots] = sizes
        self._sent = (self._sent + count) & 0xFFFFFFFF
        # The kernel reads the tail, and this thread the completions, on the same thread's side of a system call, which
        # orders these accesses on every architecture.
        self._tail[()] = self._sent
        while (more := _difference(self._sent, self._taken)) or self._under_way:
            result = self._call(_ENTER, self._fd, more, count, _GETEVENTS, 0, 0)
            if result < 0 and result != -errno.EINTR:
                raise Unusable(-result)
        self._collect(first, counts)

    @property
    def _under_way(self) -> int:
        """Reads that the kernel has taken and not completed. The kernel counts them, so this is right wherever an
        exception interrupted this thread."""
        return _difference(self._taken, self._completed_tail)

    def _settle(self) -> None:
        """Wait for what the kernel has taken, whatever else is raised: it writes to the caller's memory."""
        while True:
            try:
                while self._under_way:
                    # The kernel counts completions that were not collected, too.
                    least = _difference(self._taken, self._completed_head)
                    result = self._call(_ENTER, self._fd, 0, least, _GETEVENTS, 0, 0)
                    if result < 0 and result != -errno.EINTR:
                        time.sleep(_POLL_SECONDS)
                return
            except BaseException:
                # The first exception is on its way to the caller.
                continue

    def _collect(self, first: int, counts: Int64s) -> None:
        """Note the results of completed reads, of which number 0 has the slot `first`."""
        head, tail = int(self._completed_head), int(self._completed_tail)
        number = _difference(tail, head)
        begin = head & self._completed_mask
        found = self._completions[begin : begin + number]
        if len(found) < number:
            found = self._completions[(head + np.arange(number)) & self._completed_mask]
        # As signed numbers: numpy would turn a mixture of both kinds into floats.
        counts[(found["slot"].view(np.int64) - first) & self._mask] = found["result"]
        self._completed_head[()] = tail

    def _call(self, number: int, *arguments: int) -> int:
        """A system call, made without the GIL; returns its result, or minus the error number."""
        result = self._syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
        return -ctypes.get_errno() if result < 0 else int(result)


def _difference(later: Any, earlier: Any) -> int:
    """Of two 32-bit positions, of which the later one may have wrapped around."""
    return (int(later) - int(earlier)) & 0xFFFFFFFF


class _Rings(threading.local):
    """The ring of each thread. A forked child must not use those of its parent, so the process is part of the key."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.ring: ReadRing | None = None


_rings = _Rings()
_allowed: bool | None = None


def allow(allowed: bool) -> None:
    """Use rings in this process, or do not; the default is ``$H5FEED_IO_URING``, else True."""
    global _allowed
    _allowed = allowed and sys.platform == "linux"


def _is_allowed() -> bool:
    if _allowed is None:
        allow(is_set("H5FEED_IO_URING", True))
    return bool(_allowed)


def this_thread() -> ReadRing | None:
    """The ring of this thread; None where there can be none, or where it is in use."""
    if not _is_allowed():
        return None
    ring = _rings.ring
    if _rings.pid != os.getpid() or (ring is not None and ring.is_closed):
        _rings.pid, _rings.ring = os.getpid(), None
        try:
            ring = _rings.ring = ReadRing()
        except Unusable as error:
            if error.is_lasting:
                allow(False)
            return None
    return ring if ring is None or ring.is_idle else None


def drop() -> None:
    """Give up the ring of this thread, after `Unusable`."""
    _rings.ring = None


def is_direct(fd: int) -> bool:
    """Whether the file system copies cached bytes in the calling thread. Where it does not, as on NFS and FUSE, each
    read of a ring would be handed to another thread of the kernel, and take longer than a `preadv`."""
    # musl, the C library of Alpine Linux, has had it since version 1.2.5.
    nowait: int | None = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return False
    try:
        os.preadv(fd, (bytearray(1),), 0, nowait)
    except NotImplementedError:
        return False
    except OSError as error:
        # EAGAIN: the byte is not in the cache, and that is all that is missing.
        return error.errno == errno.EAGAIN
    return True
