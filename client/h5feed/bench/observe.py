"""Requests as they were answered: how long each took, and what of that the server spent on reading."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..net.http import httpx
from ..net.servers import Hooks

_READ_FIRST = 4 << 20
"""Bytes of an answer that the server has read when it sends the first of them, which is when it tells the time."""

_DURATION = re.compile(r";\s*dur=([0-9.]+)")


@dataclass(frozen=True)
class Request:
    """One request for batches.

    Attributes
    ----------
    seconds : float
        From sending to the last byte.
    reading : float
        Seconds of it in which the server planned and read; of a long answer, as long for each part as for the first.
    nbytes : int
        Of the body.
    """

    seconds: float
    reading: float
    nbytes: int


class Observer:
    """Sees all requests of the `Feed` that is given its `hooks`."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._begun = threading.local()

    @property
    def hooks(self) -> Hooks:
        return {"request": [self._begin], "response": [self._end]}

    def taken(self) -> list[Request]:
        """What was seen since this was last called."""
        seen, self._requests = self._requests, []
        return seen

    def _begin(self, request: httpx.Request) -> None:
        self._begun.at = time.perf_counter()

    def _end(self, response: httpx.Response) -> None:
        # The transport has read all of the body by now.
        seconds = time.perf_counter() - self._begun.at
        told = response.headers.get("server-timing")
        if told is None:
            return
        nbytes = int(response.headers.get("content-length", 0))
        reading = sum(map(float, _DURATION.findall(told))) / 1e3 * max(1.0, nbytes / _READ_FIRST)
        self._requests.append(Request(seconds, min(reading, seconds), nbytes))


def server_share(requests: Sequence[Request]) -> float | None:
    """Of the time in which these requests were under way, the share in which the server read; None for none."""
    under_way = sum(request.seconds for request in requests)
    return sum(request.reading for request in requests) / under_way if under_way else None
