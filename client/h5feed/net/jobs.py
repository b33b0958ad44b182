"""Answers that a server has to work for: it tells how far it is, and is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..answers import JobInfo
from ..errors import ReadTimeout
from ..schema import checked

T = TypeVar("T")

TIMEOUT = 3600.0
"""Seconds that work is waited for: a server may have to read all of a file first."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
"""Seconds between two questions whether the server is done; it waits a while itself before it answers."""

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much; the latter is 0 until it is known."""


class InProgress(Exception):
    """The server is at work on the answer.

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
        """What a ``202`` says.

        Raises
        ------
        BadAnswer
        """
        info = checked(job, JobInfo, "job")
        return cls(info["done"], info["total"])


def wait_for(ask: Callable[[], T], what: str, timeout: float, progress: Progress | None) -> T:
    """Ask until the server is done.

    Parameters
    ----------
    ask : callable
        Gets the answer, or raises `InProgress`.
    what : str
        The answer's name, in the plural.
    timeout : float
        Seconds to wait in all.

    Raises
    ------
    ReadTimeout
        It takes longer; the server goes on working.
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
            how_far = f"{done / total:.0%} is done" if total else "it has just begun"
            raise ReadTimeout(
                f"the {what} are not ready after {timeout:g} s: {how_far}. The server goes on; ask again later."
            )
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 2 * pause)
