"""Runs checks of the server itself in threads of their own, so that they answer when all others are stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from h5feed.errors import Overloaded

T = TypeVar("T")


class StillRunning(Exception):
    """The work has not ended in time.

    Attributes
    ----------
    seconds : float
        How long it has been running.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it has been running for {seconds:.1f} s")
        self.seconds = seconds


class OneAtATime(Generic[T]):
    """One thread at most. Those who ask while it works share its result, so a thread that hangs is the only one.

    Parameters
    ----------
    name : str
        Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._result: asyncio.Future[T] | None = None
        self._began = 0.0

    async def run(self, work: Callable[[], T], seconds: float) -> T:
        """The result of `work`, or of the run in progress. Call it from one event loop only.

        Raises
        ------
        Overloaded
            The system starts no thread.
        StillRunning
            It took more than this many seconds, or the run in progress has been stuck for longer than that.
        Exception
            Whatever `work` has raised.
        """
        loop = asyncio.get_running_loop()
        result = self._result
        if result is None or result.done():
            result = self._result = loop.create_future()
            self._began = time.monotonic()
            # Not an executor: at exit, the interpreter would wait for a thread that hangs.
            thread = threading.Thread(target=self._work, args=(loop, result, work), name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # Nobody works, so the next who asks begins again.
                self._result = None
                raise Overloaded("no thread can be started; try again in a moment", retry_after=5).because_of(
                    "threads"
                ) from None
        began = self._began
        left = max(0.0, began + seconds - time.monotonic())
        try:
            async with asyncio.timeout(left):
                return await asyncio.shield(result)
        except TimeoutError:
            if result.done() and not result.cancelled() and isinstance(result.exception(), TimeoutError):
                raise
            raise StillRunning(time.monotonic() - began) from None

    def _work(self, loop: asyncio.AbstractEventLoop, result: asyncio.Future[T], work: Callable[[], T]) -> None:
        value: T | None = None
        failure: BaseException | None = None
        try:
            value = work()
        except BaseException as error:
            failure = error

        def tell() -> None:
            if result.cancelled():
                return
            if failure is not None:
                result.set_exception(failure)
                # All who waited may have given up.
                result.exception()
            else:
                result.set_result(value)  # type: ignore[arg-type]

        try:
            loop.call_soon_threadsafe(tell)
        except RuntimeError:
            # The loop is closed: the process ends.
            return
