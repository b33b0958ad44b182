"""Scratch memory: buffers that a thread reuses from chunk to chunk instead of allocating them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SCRATCH_BYTES = 16 << 20
"""Maximum bytes of a buffer that a thread keeps for later. Larger buffers are freed when they are no longer in use."""

HEADROOM = 64
"""Free bytes in front of each buffer, for a header. A multiple of the alignment, so that the buffer stays aligned."""


class Scratch(threading.local):
    """One buffer per thread and purpose."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}
        self._great: dict[str, weakref.ref[Bytes]] = {}

    def take(self, use: str, nbytes: int) -> Bytes:
        """(nbytes,) uint8 that this thread may use until it takes scratch memory for the same purpose again."""
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < HEADROOM + nbytes:
            buffer = np.empty(HEADROOM + nbytes, np.uint8)
            if nbytes <= SCRATCH_BYTES:
                self._buffers[use] = buffer
            else:
                self._great[use] = weakref.ref(buffer)
        return buffer[HEADROOM : HEADROOM + nbytes]

    def with_headroom(self, view: Bytes, nbytes: int) -> Bytes | None:
        """Extend `view` by the `nbytes` before it, if it begins where a buffer of `take` begins; else return None.

        `view` may be shorter than the buffer, but must not begin later: that is not checked.
        """
        base = view.base
        if base is None:
            return None
        for kept in self._buffers.values():
            if kept is base:
                return kept[HEADROOM - nbytes : HEADROOM + len(view)]
        if any(great() is base for great in self._great.values()):
            return base[HEADROOM - nbytes : HEADROOM + len(view)]
        return None
