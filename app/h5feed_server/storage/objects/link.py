"""Bandwidth and latency of a store, measured by the ranges that were fetched recently."""

from __future__ import annotations

_BUCKET_SECONDS = 0.1
"""The rate is measured over this time."""

_PERIOD_SECONDS = 10.0
"""What was measured two periods ago is forgotten."""

_AHEAD = 2
"""How many bandwidth-delay products are kept in flight: more than one, so that a higher rate is noticed."""


class Link:
    """The network path to a store. To use it fully, bandwidth times latency (the bandwidth-delay product) must be in
    flight.

    The bandwidth is the highest rate of the last periods, because the rate is lower whenever less is requested. The
    latency is the lowest, because it rises when more is in flight than the path can carry.
    """

    def __init__(self) -> None:
        self._begin = 0.0
        self._bucket_begin = 0.0
        self._bucket_bytes = 0
        # Of this period and of the one before.
        self._rates = [0.0, 0.0]
        self._latencies = [float("inf"), float("inf")]

    def note(self, now: float, seconds: float, nbytes: int) -> None:
        """A range of this size has come, so many seconds after it was requested. Called by one thread."""
        if now - self._begin > _PERIOD_SECONDS:
            self._begin = now
            self._rates = [0.0, self._rates[0]]
            self._latencies = [float("inf"), self._latencies[0]]
        self._latencies[0] = min(self._latencies[0], seconds)
        if now - self._bucket_begin > _BUCKET_SECONDS:
            # After a break, the rate is low, and does not count.
            self._rates[0] = max(self._rates[0], self._bucket_bytes / (now - self._bucket_begin))
            self._bucket_begin, self._bucket_bytes = now, 0
        self._bucket_bytes += nbytes

    @property
    def latency(self) -> float:
        """Seconds; 0 if it is not known."""
        lowest = min(self._latencies)
        return lowest if lowest < float("inf") else 0.0

    @property
    def rate(self) -> float:
        """Bytes per second; 0 if it is not known."""
        return max(self._rates)

    @property
    def window_bytes(self) -> int:
        """How many bytes should be in flight."""
        return int(_AHEAD * self.rate * self.latency)
