"""Buffers for response bodies, shared among callers.

A single caller may use all of them. When requests have to wait, those of the caller that holds the least come first,
and callers that hold more than their share have their slowest responses aborted. `serve.worker` does the latter, as it
knows the connections.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from h5feed.buffers import BufferPool, PoolExhausted

from .caller import CALLER, KEEPS_UP

T = TypeVar("T")

LOOK_SECONDS = 0.02
"""Interval between checks for free memory: there is no event when a buffer is released."""

_SHORT_SECONDS = 0.5
"""After a request has waited so long for memory, buffers that nobody uses any more are searched for."""

_COLLECT_SECONDS = 5.0
"""Minimum interval between these searches, each of which holds up all requests for a moment."""

_CALLED: ContextVar[bool] = ContextVar("called", default=False)
"""Whether it is this request's turn, so that it may lease a buffer while others wait."""


@dataclass
class _Waiting:
    """A request that waits for memory."""

    nbytes: int
    since: float
    keeps_up: bool = field(default_factory=KEEPS_UP.get)
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def place(self) -> tuple[bool, float]:
        """Position in the queue; lower comes first."""
        return not self.keeps_up, self.since


class BodyPool:
    """The pool of body buffers, with one queue per caller."""

    def __init__(self, max_bytes: int) -> None:
        self._pool = BufferPool(max_bytes)
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._leased = time.monotonic()
        self._collected = float("-inf")

    def lease(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """A buffer for `CALLER`; may be called from any thread.

        Raises
        ------
        PoolExhausted
            There is no room, or other requests are waiting for it. Try again after `turn`.
        """
        if self._waiting and not _CALLED.get():
            raise PoolExhausted(nbytes, self._pool.max_bytes)
        self._leased = time.monotonic()
        return self._pool.lease(nbytes, owner=CALLER.get())

    def idle_seconds(self) -> float:
        """Seconds since the last request for a buffer."""
        return time.monotonic() - self._leased

    def drop_idle(self) -> None:
        """Free unused buffers."""
        self._pool.drop_idle()

    async def turn(self, nbytes: int, since: float, deadline: float) -> bool:
        """Wait until there may be room for this many bytes; False if the deadline passes first.

        Parameters
        ----------
        since, deadline : float
            When this request first needed memory, and until when it waits, by the event loop's clock.
        """
        loop = asyncio.get_running_loop()
        caller, waiting = CALLER.get(), _Waiting(nbytes, since)
        row = self._waiting.setdefault(caller, deque())
        # A request that had its turn, but found the memory taken, returns to its old place in the queue.
        bisect.insort(row, waiting, key=lambda one: one.place)
        if self._watching is None:
            self._watching = loop.create_task(self._watch())
        try:
            async with asyncio.timeout_at(deadline):
                await waiting.turn
                return True
        except TimeoutError:
            return False
        finally:
            with contextlib.suppress(ValueError):
                row.remove(waiting)
            if not row and self._waiting.get(caller) is row:
                del self._waiting[caller]

    @staticmethod
    def called(work: Callable[[], T]) -> Callable[[], T]:
        """Wrap `work` so that it may pass the queue. Run the result in a context of its own."""

        def pass_by() -> T:
            _CALLED.set(True)
            return work()

        return pass_by

    def held(self) -> dict[str, int]:
        """Bytes in use, by caller."""
        return self._pool.bytes_by_owner()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for memory."""
        return sum(map(len, list(self._waiting.values())))

    def wanted(self, since: float) -> dict[str, int]:
        """Bytes that requests have been waiting for since at least this time, by caller."""
        return {
            caller: nbytes
            for caller, row in self._waiting.items()
            if (nbytes := sum(one.nbytes for one in row if one.since <= since))
        }

    async def _watch(self) -> None:
        while self._waiting:
            held = self.held()
            free = self._pool.max_bytes - sum(held.values())
            rows = {caller: deque(row) for caller, row in self._waiting.items()}
            while rows:
                caller = min(rows, key=lambda name: held.get(name, 0))
                row = rows[caller]
                first = row.popleft()
                # A request above the limit is let through if nothing is in use.
                if first.nbytes <= free or not held:
                    free -= first.nbytes
                    held[caller] = held.get(caller, 0) + first.nbytes
                    if not first.turn.done():
                        first.turn.set_result(None)
                else:
                    row.clear()
                if not row:
                    del rows[caller]
            self._collect(asyncio.get_running_loop().time())
            await asyncio.sleep(LOOK_SECONDS)
        self._watching = None

    def _collect(self, now: float) -> None:
        """If requests have been waiting, free the buffers that only reference cycles hold.

        The errors of requests that were given up are in such cycles. A server that refuses requests for lack of memory
        creates so few objects that the collector would rarely run by itself.
        """
        oldest = min((one.since for row in self._waiting.values() for one in row), default=now)
        if now - oldest > _SHORT_SECONDS and now - self._collected > _COLLECT_SECONDS:
            self._collected = now
            gc.collect()
