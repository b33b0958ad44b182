"""How many requests to keep in flight, and how much data to request with each.

A link is saturated when bandwidth × round trip bytes are in flight. Neither is known in advance, and buffers on both
ends impose further limits. So the number of requests is found by trial, as TCP finds its window: while training waits
for data, the number doubles as long as that helps, and goes back if it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_BYTES = 256 << 10
"""Bytes of the first blocks of a stream: small, so that training starts early. The size doubles with each block that
arrives, up to what the link can carry: blocks in flight share the link, so the first arrives only with the others."""

NEAR_WIDTH, FAR_WIDTH = 2, 8
"""Initial number of concurrent requests, per nearby server or for all distant servers together."""

_NEAR_SECONDS = 0.005
"""Servers with a round trip up to this long count as nearby."""

MAX_WIDTH = 32
"""Maximum number of concurrent requests, unless the user sets a limit."""

_BLOCK_SECONDS = 1.0
"""A block should not take longer than this, so that little is lost if its connection breaks."""

_INTERVAL_SECONDS = 0.2
"""Rates are measured over at least this time and over two blocks per concurrent request, because blocks requested
together also arrive together."""

_COLLAPSE, _COLLAPSE_SECONDS = 0.5, 0.5
"""A trial ends early if the rate falls to this fraction for this long."""

_GAIN = 1.15
"""Twice the requests are kept if the rate grows at least by this factor."""

_SURE = 1.4
"""If it grows at least by this factor, they are kept at once. If it grows by less on a near link, the old number is
tried again first: other work on the machine may have ended, and too many requests cost more than they bring where
processors are few."""

_LOSS = 0.95
"""Half the requests are kept if at least this fraction of the rate remains."""

_WAITING = 0.05
"""Nothing is tried while training waits for less than this fraction of the time."""

_FIRST_HOLD, _LONGEST_HOLD = 4, 64
"""Intervals between a failed trial and the next one; they double each time."""


@dataclass
class Link:
    """What one stream has learnt about a link, for the next one.

    Attributes
    ----------
    width : int
        Best number of concurrent requests.
    least : int
        Minimum number of concurrent requests: fewer would save next to nothing.
    hold, holds : int
        Intervals until the next trial, and after the next failed one.
    wider : bool
        Whether the next trial uses more requests rather than fewer.
    near : bool
        Whether going back to an earlier number of requests takes little time.
    """

    width: int = NEAR_WIDTH
    least: int = NEAR_WIDTH
    hold: int = 0
    holds: int = _FIRST_HOLD
    wider: bool = True
    near: bool = True

    @classmethod
    def of(cls, round_trip: float, servers: int) -> Link:
        """The initial state for a `round_trip` in seconds and a number of servers that share the requests."""
        width = NEAR_WIDTH * servers
        near = round_trip <= _NEAR_SECONDS
        if not near:
            width = min(MAX_WIDTH, max(width, FAR_WIDTH))
        return cls(width, width, near=near)


class Pace:
    """The pace of one stream. Its owner reports what arrives and how long training waits.

    Parameters
    ----------
    max_bytes : int
        Byte budget of the stream.
    connections : int, optional
        Maximum number of concurrent requests; default `MAX_WIDTH`.
    link : Link, optional
        The initial state, updated with what the stream learns.

    Attributes
    ----------
    width : int
        Number of requests to keep in flight.
    """

    def __init__(self, max_bytes: int, connections: int | None = None, link: Link | None = None) -> None:
        self._max_bytes = max_bytes
        self._bound = MAX_WIDTH if connections is None else connections
        self._link = link or Link()
        if self._bound < self._link.width:
            # What a stream learns under a tighter limit does not apply to others.
            self._link = replace(self._link, width=self._bound, least=min(self._link.least, self._bound))
        self.width = self._link.width
        self._ramp = FIRST_BYTES
        self._rate = 0.0
        # Bytes and rate since the first request, until training waits and the rate of the link can be measured.
        self._asked_at: float | None = None
        self._so_far, self._rate_so_far = 0, 0.0
        # During a trial: the previous width and its rate.
        self._before: tuple[int, float] | None = None
        # While a trial that has succeeded is confirmed: its width and rate.
        self._better: tuple[int, float] | None = None
        self._settling = 0
        self._since: tuple[float, float] | None = None
        self._count = self._nbytes = 0
        self._full = False

    def block_bytes(self, now: float) -> int:
        """Bytes for the next request, a power of two. Called once per request; `now` is in seconds of any clock."""
        if self._asked_at is None:
            self._asked_at = now
        # Half of the budget for requests in flight, half for blocks waiting for delivery.
        limit = min(self._ramp, self._max_bytes // (2 * self.width))
        if rate := self._rate or self._rate_so_far:
            limit = min(limit, int(rate / self.width * _BLOCK_SECONDS))
        # Smaller blocks would only cost requests. Sizes that recur can reuse buffers.
        least = min(FIRST_BYTES, self._max_bytes // 4)
        return 1 << max(limit, least, 1).bit_length() - 1

    def full(self) -> None:
        """Report that no request could be sent because the byte budget is full: a larger width would not help."""
        self._full = True

    def arrived(self, nbytes: int, now: float, waited: float) -> None:
        """Report a block of `nbytes`; training has `waited` this many seconds since the start of the stream."""
        self._ramp = min(2 * self._ramp, 1 << 40)
        self._so_far += nbytes
        if self._asked_at is not None:
            self._rate_so_far = self._so_far / max(now - self._asked_at, 1e-9)
        if self._since is None:
            self._begin(now, waited)
            return
        self._count += 1
        self._nbytes += nbytes
        began, waited_before = self._since
        elapsed = now - began
        rate = self._nbytes / max(elapsed, 1e-9)
        if self._settling:
            self._settling -= 1
            if self._before is not None and elapsed > _COLLAPSE_SECONDS and rate < _COLLAPSE * self._before[1]:
                # The link is overloaded: end the trial early.
                self._refuse(self._before[0])
            if not self._settling:
                self._begin(now, waited)
            return
        if self._count < max(2 * self.width, 4) or elapsed < _INTERVAL_SECONDS:
            return
        if waited - waited_before > _WAITING * elapsed:
            self._rate = rate
            self._judge(rate)
        elif self._before is not None and self.width > self._before[0]:
            # Training no longer waits.
            self._accept()
        self._begin(now, waited)

    def _begin(self, now: float, waited: float) -> None:
        self._since = now, waited
        self._count = self._nbytes = 0
        self._full = False

    def _judge(self, rate: float) -> None:
        """Training waits at this `rate` in bytes per second: evaluate the current trial, or start one."""
        link = self._link
        if self._better is not None:
            (width, better), self._better = self._better, None
            if better < rate * _GAIN:
                self._refuse(self.width)
                return
            self._set(width)
            self._accept()
            return
        if self._before is not None:
            width, before = self._before
            wider = self.width > width
            if rate < before * (_GAIN if wider else _LOSS):
                self._refuse(width)
                return
            if wider and link.near and rate < before * _SURE:
                self._before, self._better = None, (self.width, rate)
                self._set(width)
                return
            self._accept()
        if link.hold:
            link.hold -= 1
            return
        other = min(2 * self.width, self._bound) if link.wider else max(link.least, self.width // 2)
        if other == self.width or (link.wider and self._full):
            link.wider = not link.wider
            # Where rates vary by themselves, more requests seem to help now and then: do not try them all the time.
            link.hold = link.holds if link.wider else 0
        else:
            self._before = self.width, rate
            self._set(other)

    def _set(self, width: int) -> None:
        self.width = width
        # Requests in flight were sent at the old width, and new connections start slowly.
        self._settling = 2 * width

    def _refuse(self, width: int) -> None:
        """The trial did not help: go back to `width`."""
        self._before = None
        self._set(width)
        link = self._link
        link.wider = not link.wider
        link.hold, link.holds = link.holds, min(2 * link.holds, _LONGEST_HOLD)

    def _accept(self) -> None:
        self._before = None
        link = self._link
        if self.width > link.width:
            link.holds = _FIRST_HOLD
        link.width, link.hold = self.width, 0
