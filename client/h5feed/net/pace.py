"""How many requests to keep under way, and how much to ask for with each.

A link is full when bandwidth × round trip bytes are under way. Neither is known beforehand, and buffers on both ends
set limits of their own, so the number of requests is found by trying, as TCP finds its window: while training waits
for data it doubles as long as that pays, and goes back where it has not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_BYTES = 256 << 10
"""Bytes of the first blocks of a stream: little, so that training can begin. They double with each that arrives, up to
what the link carries: those under way share it, and the first is not here before most of the others are."""

NEAR_WIDTH, FAR_WIDTH = 2, 8
"""Requests under way in the beginning, to each server near by or to all servers far away."""

_NEAR_SECONDS = 0.005
"""Round trip up to which servers count as near by."""

MAX_WIDTH = 32
"""Requests under way at most, where the user sets no bound."""

_BLOCK_SECONDS = 1.0
"""A block should not take longer on its connection: what is lost with a connection should be little."""

_INTERVAL_SECONDS = 0.2
"""Rates are measured over at least this long, and over two blocks for each request that is under way: those that were
asked for together also come together."""

_COLLAPSE, _COLLAPSE_SECONDS = 0.5, 0.5
"""A try ends early when the rate falls to this share, over this long."""

_GAIN = 1.15
"""By how much the rate must grow for twice the requests to have paid."""

_LOSS = 0.95
"""What must be left of the rate for half the requests to be enough."""

_WAITING = 0.05
"""Share of the time that training may wait without that anything is tried."""

_FIRST_HOLD, _LONGEST_HOLD = 4, 64
"""Intervals from a try that has failed to the next; they double each time."""


@dataclass
class Link:
    """What was found out about a link by one stream, for the next one.

    Attributes
    ----------
    width : int
        Requests under way at a time that serve it best.
    least : int
        Never fewer: they cost nothing where training does not wait, and little where it does.
    hold, holds : int
        Intervals until the next try, and after the next failure.
    wider : bool
        Whether the next try is with more requests, not with fewer.
    """

    width: int = NEAR_WIDTH
    least: int = NEAR_WIDTH
    hold: int = 0
    holds: int = _FIRST_HOLD
    wider: bool = True

    @classmethod
    def of(cls, round_trip: float, servers: int) -> Link:
        """What is known at first: the `round_trip` in seconds, and how many servers share the requests."""
        width = NEAR_WIDTH * servers
        if round_trip > _NEAR_SECONDS:
            width = min(MAX_WIDTH, max(width, FAR_WIDTH))
        return cls(width, width)


class Pace:
    """The pace of one stream; its owner tells what arrives and how long training waits.

    Parameters
    ----------
    max_bytes : int
        Budget of the stream.
    connections : int, optional
        Requests under way at most; default `MAX_WIDTH`.
    link : Link, optional
        Where the stream begins, and what it learns.

    Attributes
    ----------
    width : int
        Requests to keep under way.
    """

    def __init__(self, max_bytes: int, connections: int | None = None, link: Link | None = None) -> None:
        self._max_bytes = max_bytes
        self._bound = MAX_WIDTH if connections is None else connections
        self._link = link or Link()
        if self._bound < self._link.width:
            # What a stream learns within narrower bounds is of no use to others.
            self._link = replace(self._link, width=self._bound, least=min(self._link.least, self._bound))
        self.width = self._link.width
        self._ramp = FIRST_BYTES
        self._rate = 0.0
        # Until training waits, and the rate of the link shows: what came so far, since the first was asked for.
        self._asked_at: float | None = None
        self._so_far, self._rate_so_far = 0, 0.0
        # While another width is on trial: the one before, and the rate there.
        self._before: tuple[int, float] | None = None
        self._settling = 0
        self._since: tuple[float, float] | None = None
        self._count = self._nbytes = 0
        self._full = False

    def block_bytes(self, now: float) -> int:
        """Bytes to ask for with the next request, a power of two; called once for each, in seconds of any clock."""
        if self._asked_at is None:
            self._asked_at = now
        # Half of the budget under way leaves the other half for what waits its turn.
        limit = min(self._ramp, self._max_bytes // (2 * self.width))
        if rate := self._rate or self._rate_so_far:
            limit = min(limit, int(rate / self.width * _BLOCK_SECONDS))
        # Less would only cost requests; sizes that recur find buffers that were used before.
        least = min(FIRST_BYTES, self._max_bytes // 4)
        return 1 << max(limit, least, 1).bit_length() - 1

    def full(self) -> None:
        """No request could be sent, for want of room in the budget: more of them are not what is missing."""
        self._full = True

    def arrived(self, nbytes: int, now: float, waited: float) -> None:
        """A block of `nbytes` is here; training has `waited` so many seconds since the stream began."""
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
                # The link is choked: the sooner that ends, the better.
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
            # Training has all it wants.
            self._accept()
        self._begin(now, waited)

    def _begin(self, now: float, waited: float) -> None:
        self._since = now, waited
        self._count = self._nbytes = 0
        self._full = False

    def _judge(self, rate: float) -> None:
        """Training waits, at this `rate` in bytes per second: see whether what was tried pays, or try something."""
        link = self._link
        if self._before is not None:
            width, before = self._before
            if rate < before * (_GAIN if self.width > width else _LOSS):
                self._refuse(width)
                return
            self._accept()
        if link.hold:
            link.hold -= 1
            return
        other = min(2 * self.width, self._bound) if link.wider else max(link.least, self.width // 2)
        if other == self.width or (link.wider and self._full):
            link.wider = not link.wider
        else:
            self._before = self.width, rate
            self._set(other)

    def _set(self, width: int) -> None:
        self.width = width
        # What is under way was asked for at another pace, and new connections are slow at first.
        self._settling = 2 * width

    def _refuse(self, width: int) -> None:
        """What was tried does not pay: back to `width`."""
        self._before = None
        self._set(width)
        link = self._link
        link.wider = not link.wider
        link.hold, link.holds = link.holds, min(2 * link.holds, _LONGEST_HOLD)

    def _accept(self) -> None:
        self._before = None
        self._link.width = self.width
        self._link.hold, self._link.holds = 0, _FIRST_HOLD
