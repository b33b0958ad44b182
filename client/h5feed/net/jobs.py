"""Long-running requests: the server reports its progress and is polled until it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..answers import JobInfo
from ..errors import ReadTimeout
from ..schema import checked

T = TypeVar("T")

TIMEOUT = 3600.0
"""Default timeout in seconds: the server may have to read a whole file first."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
"""Seconds between two polls; the server also delays its response while it works."""

Progress = Callable[[int, int], None]
"""Called with the amount done and the total; the total is 0 until it is known."""


class InProgress(Exception):
    """The server is still working on the response.

    Attributes
    ----------
    done, total : int
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done} of {total} are done")
        self.done = done
        self.total = total

    @classmethod
    def of(cls, job: Any) -> InProgress:
        """The progress in a ``202`` response.

        Raises
        ------
        BadAnswer
        """
        info = checked(job, JobInfo, "job")
        return cls(info["done"], info["total"])


def wait_for(ask: Callable[[], T], what: str, timeout: float, progress: Progress | None) -> T:
    """Poll until the server is done.

    Parameters
    ----------
    ask : callable
        Returns the result, or raises `InProgress`.
    what : str
        Name of the result, in the plural.
    timeout : float
        Total seconds to wait.

    Raises
    ------
    ReadTimeout
        The timeout has passed. The server keeps working.
    """
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            return ask()
        except InProgress as state:
            done, total = state.done, state.total
        if progress is not None:
            progress(done, total)
        if time.monotonic() + pause > deadline:
            how_far = f"{done / total:.0%} done" if total else "just started"
            raise ReadTimeout(
                f"the {what} are not ready after {timeout:g} s ({how_far}). The server keeps working; try again later."
            )
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 2 * pause)
