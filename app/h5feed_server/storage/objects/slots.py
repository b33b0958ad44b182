"""Which requests to a store may be made at the same time. Used by one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator

from .backend import MOST_AT_ONCE

MOST_AHEAD = 96
"""Of the requests that a process makes at the same time, those for ranges that nobody has asked for yet."""

MOST_HANGING = 8
"""Of them, those for an object that has not answered in time: others would wait behind it."""

_MOST_KEYS = 1024
"""Objects that are remembered not to have answered; those that were found so last."""


class Slots:
    """Requests to one store."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(MOST_AT_ONCE)
        self._ahead = asyncio.Semaphore(MOST_AHEAD)
        self._hanging: OrderedDict[str, asyncio.Semaphore] = OrderedDict()

    @contextlib.asynccontextmanager
    async def one(self, key: str | None, *, ahead: bool = False) -> AsyncIterator[None]:
        """A request about an object may be made within the ``async with`` block; None: about none in particular."""
        while True:
            few = None if key is None else self._hanging.get(key)
            async with few or contextlib.nullcontext(), self._ahead if ahead else contextlib.nullcontext(), self._all:
                # If it was found not to answer while this waited, this waits again, with the others of the object.
                if few is not None or key not in self._hanging:
                    yield
                    return

    def has_hung(self, key: str) -> None:
        """An object has not answered in time."""
        self._hanging.setdefault(key, asyncio.Semaphore(MOST_HANGING))
        self._hanging.move_to_end(key)
        if len(self._hanging) > _MOST_KEYS:
            self._hanging.popitem(last=False)

    def has_answered(self, key: str) -> None:
        """An object has answered."""
        self._hanging.pop(key, None)
