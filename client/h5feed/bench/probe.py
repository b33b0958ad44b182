"""Requests sent one at a time: how long each takes, and how much of that the server reads."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from ..batch import Batch
from ..dataset import Dataset
from ..errors import BadAnswer
from .asked import Asked
from .findings import Single
from .observe import Observer, Request
from .streams import Tick

_MOST = 12
"""Maximum number of requests of one kind."""

_FACTOR = 4
"""Growth factor of the request size, until a request takes long."""


class Probe:
    """Single requests of one order.

    Parameters
    ----------
    observed : Dataset
        Has the hooks of `observer`.
    rows : int
        Rows of the split.
    at_once : int
        Maximum number of rows per request.

    Attributes
    ----------
    nbytes : int
        Bytes fetched so far.
    """

    def __init__(self, observed: Dataset, observer: Observer, asked: Asked, rows: int, at_once: int) -> None:
        self._observed, self._observer, self._asked = observed, observer, asked
        self._rows, self._at_once = rows, at_once
        self.nbytes = 0

    def one(self, batch_size: int, epoch: int, number: int, **options: Any) -> tuple[Batch, Request]:
        """Batch `number`, counted from the start of `epoch` across epochs, and its request.

        Raises
        ------
        BadAnswer
            The response has no ``Server-Timing``.
        """
        batches = -(-self._rows // batch_size)
        options = {**self._asked.options, "shuffle": True, "epoch": epoch + number // batches, **options}
        self._observer.taken()
        batch = self._observed.batch(number % batches, split=self._asked.split, batch_size=batch_size, **options)
        seen = self._observer.taken()
        if not seen:
            raise BadAnswer(f"responses of {self._observed._client.url} lack Server-Timing: does a proxy remove it?")
        self.nbytes += seen[-1].nbytes
        return batch, seen[-1]

    def round_trip(self, seconds: float, tick: Tick) -> float:
        """Seconds of a request for one row id, minus the time on the server."""
        end = time.monotonic() + seconds
        # The first request opens a connection, and the server may have to compute splits.
        self.one(1, 0, 0, fields=[])
        took: list[float] = []
        while not took or (time.monotonic() < end and len(took) < 2 * _MOST):
            request = self.one(1, 0, 1 + len(took), fields=[])[1]
            took.append(request.seconds - request.reading)
            tick(len(took) / (2 * _MOST), 0.0)
        return median(took)

    def singles(
        self, epoch: int, trip: float, seconds: float, nbytes: float, longest: float, tick: Tick
    ) -> tuple[Single, Batch]:
        """Time requests for as many rows as arrive within `longest` seconds, then repeat them; also returns one batch.

        Parameters
        ----------
        trip : float
            Round trip in seconds.
        seconds, nbytes : float
            Limits on all requests together.
        """
        end, limit = time.monotonic() + seconds, self.nbytes + nbytes
        # A connection is slow at first.
        self.one(1, epoch, 0)
        rows = 1
        batch, request = self.one(1, epoch, 1)
        while (
            rows < self._at_once
            and trip + _FACTOR * (request.seconds - trip) < longest
            and _FACTOR * request.nbytes < nbytes / 4
        ):
            rows = min(_FACTOR * rows, self._at_once)
            batch, request = self.one(rows, epoch, 0)
        # Later passes, whose rows have not been requested yet.
        epoch += 1 << 10
        first: list[Request] = []
        middle = time.monotonic() + (end - time.monotonic()) / 2
        while not first or (len(first) < _MOST and time.monotonic() < middle and self.nbytes < limit):
            first.append(self.one(rows, epoch, len(first))[1])
            tick(len(first) / _MOST / 2, rows / first[-1].seconds)
        again: list[Request] = []
        for number in range(len(first)):
            if again and (time.monotonic() > end or self.nbytes > limit):
                break
            again.append(self.one(rows, epoch, number)[1])
        single = Single(
            rows,
            round(median(request.nbytes for request in first)),
            median(request.seconds for request in first),
            median(request.reading for request in first),
            median(request.reading for request in again),
        )
        return single, batch
