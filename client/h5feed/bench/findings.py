"""The results of a benchmark, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Bound = Literal["server", "batches", "round trips", "sockets", "machine", "link"]
"""What limits the rate: reading and decoding on the server; the fixed cost of each batch; too few concurrent requests
for the round trip; how fast both machines can send and receive; the one machine that both are on; the link."""


@dataclass(frozen=True)
class Rate:
    """The rate of a stream of batches.

    Attributes
    ----------
    what : str
        Description of the options of the stream.
    rows, nbytes : int
        Rows received, and the bytes of their arrays.
    seconds : float
        Time in which they arrived, without the warm-up if enough batches arrived.
    batch_size : int
        Rows per batch.
    connections : int or None
        Number of concurrent requests, if it was fixed.
    server_share : float or None
        Share of the request time in which the server planned and read (0 to 1).
    confirmed : bool
        Whether it was measured repeatedly, alternating with the stream it is compared to.
    """

    what: str
    rows: int
    nbytes: int
    seconds: float
    batch_size: int
    connections: int | None = None
    server_share: float | None = None
    confirmed: bool = False

    def with_more(self, other: Rate) -> Rate:
        """The sum of two measurements of the same stream."""
        return replace(
            self,
            rows=self.rows + other.rows,
            nbytes=self.nbytes + other.nbytes,
            seconds=self.seconds + other.seconds,
            confirmed=True,
        )

    @property
    def is_sure(self) -> bool:
        """Whether enough batches arrived to rule out chance."""
        return self.rows >= _SURE * self.batch_size

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Single:
    """Medians of requests sent one at a time.

    Attributes
    ----------
    rows, nbytes : int
        Of one response.
    seconds : float
        From sending the request to the last byte.
    reading : float
        Part of it in which the server planned and read, from ``Server-Timing``.
    again : float or None
        `reading` when the same rows were requested again.
    """

    rows: int
    nbytes: int
    seconds: float
    reading: float
    again: float | None = None

    @property
    def transfer(self) -> float:
        """Seconds not spent reading on the server."""
        return max(self.seconds - self.reading, 1e-6)


@dataclass(frozen=True)
class Training:
    """A simulated training loop, which sleeps for a fixed time in each step.

    Attributes
    ----------
    step : float
        Seconds per step.
    steps : int
        Number of steps measured: all but the first.
    utilisation : float
        Time in steps divided by total time (0 to 1): the accelerator utilisation (AU) of MLPerf Storage.
    seconds : float
        The total time.
    """

    step: float
    steps: int
    utilisation: float
    seconds: float = 0.0


@dataclass(frozen=True)
class WideField:
    """An input whose dtype is larger than its values need.

    Attributes
    ----------
    name, dtype : str
    enough : str
        A sufficient dtype.
    why : str
        Why it is sufficient.
    factor : float
        Bytes of a whole row now, divided by those with the smaller dtype.
    """

    name: str
    dtype: str
    enough: str
    why: str
    factor: float


@dataclass
class Findings:
    """All results, filled in phase by phase. None means not measured.

    Attributes
    ----------
    url, dataset, split : str
    rows, batch_size : int
        Rows of the split, and rows per batch in the user's training.
    row_bytes : float
        Bytes of one row on the wire.
    measured_batch : int
        Rows per batch in the measurements: fewer than `batch_size` if such a batch takes long.
    readahead : int
        Maximum number of bytes fetched ahead.
    round_trip : float
        Seconds of a nearly empty request.
    amplification : float
        Bytes decoded per byte served, of the worst field.
    filters : list of str
        HDF5 filters of the fields.
    encoded_bytes : float
        Bytes of one row on the wire with ``decode="client"``.
    width : int
        Number of concurrent requests that the read-ahead chose.
    is_local : bool
        Whether the server was reached over its Unix socket, so that no link is in between.
    notes : list of str
        What was not measured, and why.
    interrupted : bool
        Whether the user stopped it.
    """

    url: str
    dataset: str
    split: str
    rows: int
    batch_size: int
    row_bytes: float
    measured_batch: int
    readahead: int
    round_trip: float | None = None
    single: Single | None = None
    default: Rate | None = None
    width: int | None = None
    fixed: list[Rate] = field(default_factory=list)
    again: Rate | None = None
    batch_sizes: list[Rate] = field(default_factory=list)
    decoded_here: Rate | None = None
    encoded_bytes: float | None = None
    cached: Rate | None = None
    cache_folder: str | None = None
    more_readahead: Rate | None = None
    training: Training | None = None
    step: float | None = None
    wide: list[WideField] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    amplification: float = 1.0
    filters: list[str] = field(default_factory=list)
    is_local: bool = False
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    interrupted: bool = False

    def rates(self) -> list[Rate]:
        """All streams, in display order."""
        all_rates = [self.default, *self.fixed, self.again, *self.batch_sizes]
        all_rates += [self.decoded_here, self.more_readahead, self.cached]
        return [rate for rate in all_rates if rate is not None]

    @property
    def batch_seconds(self) -> float | None:
        """Seconds per batch, read with the defaults."""
        if self.default is None or not self.default.rows_per_second:
            return None
        return min(self.batch_size, self.rows) / self.default.rows_per_second

    @property
    def best_fixed(self) -> Rate | None:
        """The smallest number of connections with about the highest rate."""
        if not self.fixed:
            return None
        most = max(rate.rows_per_second for rate in self.fixed)
        return next(rate for rate in self.fixed if rate.rows_per_second >= 0.95 * most)

    @property
    def server_share(self) -> float | None:
        """Share of the request time in which the server read, under load if that was measured."""
        best = self.best_fixed
        if best is not None and best.server_share is not None:
            return best.server_share
        return None if self.single is None else self.single.reading / self.single.seconds

    @property
    def speed_up_again(self) -> float | None:
        """How many times faster rows arrive that are in the server's memory."""
        if self.again is None or self.default is None or not (self.default.is_sure and self.again.is_sure):
            return None
        return self.again.rows_per_second / self.default.rows_per_second

    @property
    def memory_helps(self) -> bool:
        """Whether rows in the server's memory are read faster and arrive faster."""
        single = self.single
        if single is None or single.again is None or single.again > single.reading / _FASTER:
            return False
        return (self.speed_up_again or 0.0) >= _FASTER and (self.server_share or 0.0) >= _SOME

    @property
    def bound(self) -> Bound | None:
        """What limits the rows per second, according to the measurements."""
        if self.default is None or self.single is None or not self.default.rows_per_second:
            return None
        if self.memory_helps:
            return "server"
        rate = max(each.bytes_per_second for each in (self.default, *self.fixed))
        # Without decoding, reading is a copy, about as fast as sending and on the same CPUs.
        copied = rate >= SOCKETS_RATE and not self.images and not self.filters
        if (self.server_share or 0.0) >= _MOSTLY and not copied:
            return "server"
        many = self.default.batch_size / self.default.rows_per_second < _SHORT_SECONDS
        if many and rate < _FAR_BELOW * self.alone_bytes_per_second:
            # One big batch over one connection arrives faster than many small ones over several.
            return "batches"
        if self.is_local:
            return "machine"
        if self._still_grows():
            return "round trips"
        return "sockets" if rate >= SOCKETS_RATE else "link"

    @property
    def alone_bytes_per_second(self) -> float:
        """Rate of one big response over one connection, without the round trip."""
        assert self.single is not None
        transfer = self.single.transfer
        return self.single.nbytes / max(transfer - (self.round_trip or 0.0), transfer / 10)

    def _still_grows(self) -> bool:
        """Whether the largest number of connections is clearly the best, and larger than the read-ahead's choice."""
        if len(self.fixed) < 2 or self.default is None or (self.fixed[-1].connections or 0) <= (self.width or 0):
            return False
        others = max(rate.rows_per_second for rate in (self.default, *self.fixed[:-1]))
        return self.fixed[-1].rows_per_second >= _GROWS * others

    def as_json(self) -> dict[str, Any]:
        """The results as JSON-serialisable values, in seconds, bytes and rows."""
        single, training = self.single, self.training
        return {
            "url": self.url,
            "dataset": self.dataset,
            "split": self.split,
            "rows": self.rows,
            "row_bytes": round(self.row_bytes),
            "batch_size": self.batch_size,
            "measured_batch_size": self.measured_batch,
            "readahead": self.readahead,
            "seconds": round(self.seconds, 3),
            "bytes": self.nbytes,
            "interrupted": self.interrupted,
            "round_trip_seconds": self.round_trip,
            "single_request": single
            and {
                "rows": single.rows,
                "bytes": single.nbytes,
                "seconds": single.seconds,
                "server_seconds": single.reading,
                "server_seconds_again": single.again,
            },
            "rates": {rate.what: _of_rate(rate) for rate in self.rates()},
            "connections_found": self.width,
            "server_share": self.server_share,
            "bound": self.bound,
            "fed_from_step_seconds": self.batch_seconds,
            "training": training
            and {"step_seconds": training.step, "steps": training.steps, "utilisation": training.utilisation},
            "notes": self.notes,
        }


def _of_rate(rate: Rate) -> dict[str, Any]:
    return {
        "rows_per_second": rate.rows_per_second,
        "bytes_per_second": rate.bytes_per_second,
        "batches_per_second": rate.rows_per_second / rate.batch_size,
        "batch_size": rate.batch_size,
        "connections": rate.connections,
        "server_share": rate.server_share,
        "rows": rate.rows,
        "seconds": rate.seconds,
    }


def expected_utilisation(step: float, batch_seconds: float) -> float:
    """Utilisation of an accelerator with steps of `step` seconds if a batch arrives every `batch_seconds`."""
    return step / max(step, batch_seconds)


_SURE = 10
"""Batches: about as many as arrive together over a distant link."""

_FASTER = 1.4
"""Reading is the limit if rows from memory arrive this many times faster."""

_SOME, _MOSTLY = 0.2, 0.5
"""Shares of the request time from which reading on the server matters, and from which it is the limit."""

_FAR_BELOW, _SHORT_SECONDS = 0.6, 3e-3
"""The cost per batch can be the limit below this share of the rate of a big request, if batches are this short."""

_GROWS = 1.15

SOCKETS_RATE = 600e6
"""Bytes per second from which the machines, not the link, are the limit: one worker sends about 1.3 GB/s, and links of
up to 5 Gbit/s carry less than this."""
