"""Measure each request: how long it took, and how much of that the server spent reading."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..net.http import httpx
from ..net.servers import Hooks

_READ_FIRST = 4 << 20
"""Bytes of a response that the server reads before it sends the first one, together with ``Server-Timing``."""

_DURATION = re.compile(r";\s*dur=([0-9.]+)")


@dataclass(frozen=True)
class Request:
    """One request for batches.

    Attributes
    ----------
    seconds : float
        From sending the request to the last byte.
    reading : float
        Part of it in which the server planned and read; extrapolated for long responses.
    nbytes : int
        Size of the body.
    """

    seconds: float
    reading: float
    nbytes: int


class Observer:
    """Observes all requests of a `Feed` that is created with its `hooks`."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._begun = threading.local()

    @property
    def hooks(self) -> Hooks:
        return {"request": [self._begin], "response": [self._end]}

    def taken(self) -> list[Request]:
        """The requests since the previous call."""
        seen, self._requests = self._requests, []
        return seen

    def _begin(self, request: httpx.Request) -> None:
        self._begun.at = time.perf_counter()

    def _end(self, response: httpx.Response) -> None:
        # The transport has already read the whole body.
        seconds = time.perf_counter() - self._begun.at
        told = response.headers.get("server-timing")
        if told is None:
            return
        nbytes = int(response.headers.get("content-length", 0))
        reading = sum(map(float, _DURATION.findall(told))) / 1e3 * max(1.0, nbytes / _READ_FIRST)
        self._requests.append(Request(seconds, min(reading, seconds), nbytes))


def server_share(requests: Sequence[Request]) -> float | None:
    """Share of the time of these requests in which the server read; None without requests."""
    under_way = sum(request.seconds for request in requests)
    return sum(request.reading for request in requests) / under_way if under_way else None
