"""What a bench found out, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Bound = Literal["server", "batches", "round trips", "sockets", "link"]
"""What keeps rows from coming faster: reading and decoding on the server; the work that each batch costs, however
small; too few requests under way for the distance; what both machines can send and receive; the line between."""


@dataclass(frozen=True)
class Rate:
    """How fast a stream of batches came.

    Attributes
    ----------
    what : str
        The options of the stream, readable.
    rows, nbytes : int
        What came, and the bytes of its arrays.
    seconds : float
        In which it came; that in which the stream warmed up is not counted, where much came.
    batch_size : int
        Rows of one batch.
    connections : int or None
        Requests under way, where they were fixed.
    server_share : float or None
        Of the time in which requests were under way, the share in which the server planned and read (0 … 1).
    confirmed : bool
        Whether it was measured more than once, by turns with what it is compared to.
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
        """Both together, of the same stream."""
        return replace(
            self,
            rows=self.rows + other.rows,
            nbytes=self.nbytes + other.nbytes,
            seconds=self.seconds + other.seconds,
            confirmed=True,
        )

    @property
    def is_sure(self) -> bool:
        """Whether enough came that it cannot be by chance alone."""
        return self.rows >= _SURE * self.batch_size

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Single:
    """Requests sent one after the other, each alone: medians.

    Attributes
    ----------
    rows, nbytes : int
        Of one answer.
    seconds : float
        From sending to the last byte.
    reading : float
        Seconds of it in which the server planned and read, as its ``Server-Timing`` says.
    again : float or None
        The same when the same rows were asked for once more.
    """

    rows: int
    nbytes: int
    seconds: float
    reading: float
    again: float | None = None

    @property
    def transfer(self) -> float:
        """Seconds that are not the server's reading."""
        return max(self.seconds - self.reading, 1e-6)


@dataclass(frozen=True)
class Training:
    """A loop that takes a fixed time for each step and computes nothing.

    Attributes
    ----------
    step : float
        Seconds of one step.
    steps : int
        Steps that were counted: all but the first.
    utilisation : float
        Time in steps over time in all (0 … 1), which MLPerf Storage calls accelerator utilisation (AU).
    """

    step: float
    steps: int
    utilisation: float


@dataclass(frozen=True)
class WideField:
    """An input that travels in more bytes than its values need.

    Attributes
    ----------
    name, dtype : str
    enough : str
        dtype that would do.
    why : str
        What its values are.
    factor : float
        Bytes of a row now, over those of a row then, the other fields included.
    """

    name: str
    dtype: str
    enough: str
    why: str
    factor: float


@dataclass
class Findings:
    """All that was found, filled in phase by phase; what is None was not measured.

    Attributes
    ----------
    url, dataset, split : str
    rows, batch_size : int
        Of the split, and of one batch of the training that is asked about.
    row_bytes : float
        Bytes of one row on the line.
    measured_batch : int
        Rows of the batches that were read: fewer than `batch_size` where such a batch takes long.
    readahead : int
        Bytes fetched ahead at most.
    round_trip : float
        Seconds of a request for next to nothing.
    amplification : float
        Bytes decoded for each that is served, of the field with the most.
    filters : list of str
        HDF5 filters of the fields.
    encoded_bytes : float
        Bytes of a row on the line with ``decode="client"``.
    width : int
        Requests under way at the end of the read-ahead's own search.
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
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    interrupted: bool = False

    def rates(self) -> list[Rate]:
        """All streams, in the order in which they are shown."""
        all_rates = [self.default, *self.fixed, self.again, *self.batch_sizes]
        all_rates += [self.decoded_here, self.more_readahead, self.cached]
        return [rate for rate in all_rates if rate is not None]

    @property
    def batch_seconds(self) -> float | None:
        """Seconds from one batch to the next, read as training does."""
        if self.default is None or not self.default.rows_per_second:
            return None
        return min(self.batch_size, self.rows) / self.default.rows_per_second

    @property
    def best_fixed(self) -> Rate | None:
        """The fewest connections that feed about as much as any number of them."""
        if not self.fixed:
            return None
        most = max(rate.rows_per_second for rate in self.fixed)
        return next(rate for rate in self.fixed if rate.rows_per_second >= 0.95 * most)

    @property
    def server_share(self) -> float | None:
        """Of the time in which requests were under way, the share in which the server read; under load where known."""
        best = self.best_fixed
        if best is not None and best.server_share is not None:
            return best.server_share
        return None if self.single is None else self.single.reading / self.single.seconds

    @property
    def speed_up_again(self) -> float | None:
        """How many times as fast rows come that the server has in memory."""
        if self.again is None or self.default is None or not (self.default.is_sure and self.again.is_sure):
            return None
        return self.again.rows_per_second / self.default.rows_per_second

    @property
    def memory_helps(self) -> bool:
        """Whether the server reads rows faster that it has in memory, and they come faster for it."""
        single = self.single
        if single is None or single.again is None or single.again > single.reading / _FASTER:
            return False
        return (self.speed_up_again or 0.0) >= _FASTER and (self.server_share or 0.0) >= _SOME

    @property
    def bound(self) -> Bound | None:
        """What bounds the rows per second, as far as the measurements tell."""
        if self.default is None or self.single is None or not self.default.rows_per_second:
            return None
        if self.memory_helps:
            return "server"
        rate = max(each.bytes_per_second for each in (self.default, *self.fixed))
        # Rows that need no decoding are copied about as fast as they are sent, by the same processors.
        copied = rate >= SOCKETS_RATE and not self.images and not self.filters
        if (self.server_share or 0.0) >= _MOSTLY and not copied:
            return "server"
        many = self.default.batch_size / self.default.rows_per_second < _SHORT_SECONDS
        if many and rate < _FAR_BELOW * self.alone_bytes_per_second:
            # A single big batch comes faster over one connection than many small ones over several.
            return "batches"
        if self._still_grows():
            return "round trips"
        return "sockets" if rate >= SOCKETS_RATE else "link"

    @property
    def alone_bytes_per_second(self) -> float:
        """How fast one big answer comes over one connection, once it is on its way."""
        assert self.single is not None
        transfer = self.single.transfer
        return self.single.nbytes / max(transfer - (self.round_trip or 0.0), transfer / 10)

    def _still_grows(self) -> bool:
        """Whether the most connections that were tried, more than the read-ahead has found, are clearly the best."""
        if len(self.fixed) < 2 or self.default is None or (self.fixed[-1].connections or 0) <= (self.width or 0):
            return False
        others = max(rate.rows_per_second for rate in (self.default, *self.fixed[:-1]))
        return self.fixed[-1].rows_per_second >= _GROWS * others

    def as_json(self) -> dict[str, Any]:
        """Plain values; seconds, bytes and rows as everywhere."""
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
    """What is left of an accelerator that works `step` seconds on each batch, when one comes every `batch_seconds`."""
    return step / max(step, batch_seconds)


_SURE = 10
"""Batches: as many as may come at a time over a far link."""

_FASTER = 1.4
"""How many times as fast rows from memory must come for the reading to be the bound."""

_SOME, _MOSTLY = 0.2, 0.5
"""Shares of the time under way in which the server reads, for that to matter and to be what matters most."""

_FAR_BELOW, _SHORT_SECONDS = 0.6, 3e-3
"""Of the rate of one big request, and from batch to batch: where what each batch costs by itself can be what counts."""

_GROWS = 1.15

SOCKETS_RATE = 600e6
"""Bytes per second from which what both machines do for each byte counts rather than the line: one worker sends some
1.3 GB/s, and lines up to 5 Gbit/s carry less than this."""
