"""The server's metrics, and how workers count.

Each response with batches appends one record to an array. The records are added up together: once a second, or when
there are many of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Literal

import numpy as np
import numpy.typing as npt

from .scoreboard import SUPERVISOR, Scoreboard

logger = logging.getLogger(__name__)

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[tuple[str, str], ...]

PUBLISH_SECONDS = 1.0
"""Interval at which workers publish their numbers. The worker that answers a request publishes its own at once."""

BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram buckets, in seconds. One more bucket counts everything above."""

PHASES = ("queue", "plan", "read", "send")
STATUSES = ("2xx", "3xx", "4xx", "5xx")
OTHER = "other"
"""The endpoint of requests for unknown paths, and the reason of problems without a more specific one."""

CACHES = ("fields", "chunks", "images", "orders", "plans", "splits", "joins")
READERS = ("rows", "tree")
LACKING = ("memory", "connections", "readers", "threads", "jobs", "files", "stopping", OTHER)
"""The exhausted resource when the server refuses a request with `Overloaded`."""

CLOSED = ("slow", "crowded", "shutdown")
REPLACED = ("ended", "hung")
STORE_OUTCOMES = ("ok", "timeout", "unavailable", "changed", "refused")
DATASETS = ("ok", "preparing", "unavailable", "unreadable")

BATCHES = "/v1/datasets/{name}/batches"
"""Path template of the endpoint for several batches. The endpoint for one batch is below it."""

_RECORD = Struct("10d")

pack_batches = _RECORD.pack
"""Creates a record of a response with batches, from: number of the endpoint, batches, rows, bytes; seconds in the
phases queue, plan, read and send; seconds that the client's loop waited, and the duration that this covers."""

_FOLD_AT = 1000 * _RECORD.size
_BINS = len(BOUNDS) + 2
"""Numbers of a histogram: the buckets, then the sum."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes
    ----------
    series : sequence of labels
        All label sets that it can have.
    sparse : bool
        Show only series that are not 0, and those that share the first two labels with one of them.
    """

    name: str
    kind: Kind
    help: str
    series: Sequence[Labels] = ((),)
    sparse: bool = False

    @property
    def width(self) -> int:
        """How many numbers each series has."""
        return _BINS if self.kind == "histogram" else 1


def _of(label: str, values: Sequence[str]) -> tuple[Labels, ...]:
    return tuple(((label, value),) for value in values)


def _counter(name: str, text: str, series: Sequence[Labels] = ((),), sparse: bool = False) -> Metric:
    return Metric(name, "counter", text, series, sparse)


def _gauge(name: str, text: str, series: Sequence[Labels] = ((),)) -> Metric:
    return Metric(name, "gauge", text, series)


def _histogram(name: str, text: str, series: Sequence[Labels], sparse: bool = False) -> Metric:
    return Metric(name, "histogram", text, series, sparse)


class Catalogue:
    """All metrics of a server, and the positions of their numbers.

    Parameters
    ----------
    endpoints : sequence of (str, str)
        Method and path template of every endpoint, in the same order in all workers.
    problems : sequence of str
        Codes of all errors.
    """

    def __init__(self, endpoints: Sequence[tuple[str, str]], problems: Sequence[str]) -> None:
        self.endpoints = {key: number for number, key in enumerate([*endpoints, (OTHER, OTHER)])}
        batch, several = ("GET", f"{BATCHES}/{{index}}"), ("GET", BATCHES)
        other = self.endpoints[OTHER, OTHER]
        self.batches = self.endpoints.get(batch, other), self.endpoints.get(several, other)
        """Numbers of the endpoints for one batch and for several batches."""
        of = [(("method", method), ("endpoint", path)) for method, path in self.endpoints]
        with_status = [(*labels, ("status", status)) for labels in of for status in STATUSES]
        self.metrics = (
            _counter("http_requests_total", "Requests with a response.", with_status, True),
            _histogram(
                "http_request_duration_seconds", "Time from the head of a request to the end of its response.", of, True
            ),
            _counter("http_response_bytes_total", "Size of response bodies.", of, True),
            _counter("problems_total", "Error responses, by code.", _of("code", problems), True),
            _counter(
                "overloads_total",
                "Requests refused with 503 because a resource was exhausted.",
                _of("lacking", LACKING),
            ),
            _counter("batches_total", "Batches sent."),
            _counter("batch_rows_total", "Rows in these batches."),
            _counter("batch_bytes_total", "Size of these batches."),
            _histogram(
                "batch_phase_seconds", "Time that requests for batches spent in each phase.", _of("phase", PHASES)
            ),
            _counter("responses_cut_total", "Responses with batches that an error cut off."),
            _counter("descriptors_passed_total", "Descriptors of data files passed to clients on the Unix socket."),
            _counter(
                "client_wait_seconds_total", "Time that training loops waited for batches, as reported by clients."
            ),
            _counter(
                "client_read_bytes_total", "Size of the rows that clients read from files, as reported by clients."
            ),
            _counter("client_loop_seconds_total", "Duration of the training loops that these reports cover."),
            _counter("decoded_chunks_total", "Chunks decoded."),
            _counter("decoded_bytes_total", "Size of these chunks after decoding."),
            _counter("cache_hits_total", "Values found in a cache.", _of("cache", CACHES)),
            _counter("cache_misses_total", "Values that were not in a cache.", _of("cache", CACHES)),
            _gauge("cache_bytes", "Size of each cache.", _of("cache", CACHES)),
            _gauge("cache_limit_bytes", "Maximum size of each cache.", _of("cache", CACHES)),
            _gauge("inflight_bytes", "Memory of responses that are being filled or sent."),
            _gauge("inflight_limit_bytes", "Limit on this memory."),
            _gauge("inflight_waiting_requests", "Requests that wait for this memory."),
            _gauge("request_threads_busy", "Threads that are processing a request."),
            _gauge("readers_running", "Processes that read with h5py, by kind.", _of("kind", READERS)),
            _gauge("readers_busy", "Such processes that are reading.", _of("kind", READERS)),
            _counter(
                "reader_failures_total", "Such processes that crashed, hung or were killed.", _of("kind", READERS)
            ),
            _counter("inspections_total", "Finished inspections of files.", _of("result", ("ok", "failed"))),
            _gauge("inspections_pending", "Inspections that run or wait."),
            _counter(
                "store_requests_total", "Requests to the object store, by outcome.", _of("outcome", STORE_OUTCOMES)
            ),
            _histogram(
                "store_request_duration_seconds",
                "Time from a request to the object store to the end of its response.",
                [()],
            ),
            _counter("store_read_bytes_total", "Bytes of the ranges that the object store has sent."),
            _gauge("store_requests_running", "Requests that the object store has not answered yet."),
            _counter("store_cache_hits_total", "Ranges of objects found in the cache on the local disk."),
            _counter("store_cache_read_bytes_total", "Bytes of the ranges found in this cache."),
            _gauge("connections", "Open connections."),
            _gauge("connections_limit", "Maximum number of open connections."),
            _counter("connections_opened_total", "Connections accepted."),
            _counter(
                "connections_closed_total",
                "Connections that the server closed early, by reason.",
                _of("reason", CLOSED),
            ),
            _counter(
                "worker_restarts_total",
                "Workers that crashed or hung and were replaced, by reason.",
                _of("reason", REPLACED),
            ),
            _gauge("server_start_time_seconds", "Start time of the server, in seconds of Unix time."),
        )
        self.offsets: dict[str, int] = {}
        self.count = 0
        for metric in self.metrics:
            self.offsets[metric.name] = self.count
            self.count += metric.width * len(metric.series)
        self._gauges = [
            self.offsets[metric.name] + number
            for metric in self.metrics
            if metric.kind == "gauge" and metric.name != "server_start_time_seconds"
            for number in range(len(metric.series))
        ]

    def place(self, name: str, value: str | None = None) -> int:
        """Index of the number of a counter or gauge, by the value of its only label."""
        metric = next(metric for metric in self.metrics if metric.name == name)
        number = 0 if value is None else [labels[-1][1] for labels in metric.series].index(value)
        return self.offsets[name] + number

    def without_gauges(self, numbers: list[float]) -> list[float]:
        """The numbers that remain of a process that has ended."""
        for index in self._gauges:
            numbers[index] = 0.0
        return numbers


Sample = Callable[[], Mapping[tuple[str, str | None], float | Sequence[float]]]
"""Returns numbers by the name of a metric and the value of its label: of a histogram without labels, the counts of its
buckets and the sum. Counters count from the start of the process."""


class Metrics:
    """Counts for this process, and adds up what all processes have counted.

    Parameters
    ----------
    catalogue : Catalogue
    board : Scoreboard
    place : int
        Place of this process on the scoreboard.
    """

    def __init__(self, catalogue: Catalogue, board: Scoreboard, place: int) -> None:
        self.catalogue = catalogue
        self._board = board
        self._place = place
        self._numbers = catalogue.without_gauges(board.begin(place, catalogue.count))
        self._before = list(self._numbers)
        """Initial values of sampled counters."""
        self._batches = bytearray()
        """Consecutive records. Unlike a list of tuples, they need no conversion before they are added up."""
        self._samples: list[tuple[Sample, dict[tuple[str, str | None], int]]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        offsets = catalogue.offsets
        self._durations, self._phases = offsets["http_request_duration_seconds"], offsets["batch_phase_seconds"]
        self._requests, self._bytes = offsets["http_requests_total"], offsets["http_response_bytes_total"]
        self._cut = offsets["responses_cut_total"]

    def begin(self) -> None:
        """Publish the numbers now, and once a second."""
        self.publish()
        threading.Thread(target=self._run, name="h5feed-metrics", daemon=True).start()

    def close(self) -> None:
        """Publish the last numbers."""
        self._closed.set()
        self.publish()

    def watch(self, sample: Sample) -> None:
        """Call `sample` each time before numbers are published."""
        self._samples.append((sample, {}))

    def note_batches(self, record: bytes) -> None:
        """Count a response with batches, or the part of it that was sent. `record` comes from `pack_batches`.

        Call it only from the event loop.
        """
        batches = self._batches
        batches.extend(record)
        if len(batches) >= _FOLD_AT:
            with self._lock:
                self._fold()

    def note_request(self, endpoint: int, status: int, seconds: float, nbytes: int) -> None:
        """Count any other response. Call it only from the event loop."""
        with self._lock:
            numbers = self._numbers
            numbers[self._requests + endpoint * len(STATUSES) + min(max(status // 100, 2), 5) - 2] += 1
            numbers[self._bytes + endpoint] += nbytes
            begin = self._durations + endpoint * _BINS
            numbers[begin + int(np.searchsorted(_BOUNDS, seconds))] += 1
            numbers[begin + _BINS - 1] += seconds

    def add(self, name: str, label: str | None = None, amount: float = 1.0) -> None:
        """Add to a counter that changes rarely."""
        with self._lock:
            self._numbers[self.catalogue.place(name, label)] += amount

    def publish(self) -> None:
        """Make the numbers of this process visible to the other processes."""
        with self._lock:
            self._fold()
            for sample, places in self._samples:
                for key, value in sample().items():
                    index = places.get(key)
                    if index is None:
                        index = places[key] = self.catalogue.place(*key)
                    # For gauges, the initial value is 0.
                    for number, one in enumerate(value if isinstance(value, Sequence) else (value,), index):
                        self._numbers[number] = self._before[number] + one
            self._board.write(self._place, self._numbers)

    def everywhere(self) -> Everywhere:
        """The numbers of all processes. Those of other workers are up to a second old."""
        self.publish()
        return Everywhere.of(self.catalogue, self._board)

    def _run(self) -> None:
        has_failed = False
        while not self._closed.wait(PUBLISH_SECONDS):
            try:
                self.publish()
            except Exception as error:
                # An error here must not stop the thread. Log only the first one.
                if not has_failed:
                    logger.error("the metrics cannot be published", exc_info=error)
                has_failed = True

    def _fold(self) -> None:
        """Add up the batches; call with the lock held."""
        # Both statements are atomic. Between them, the event loop may append more records.
        records = self._batches[:]
        del self._batches[: len(records)]
        if not records:
            return
        # table: (records, columns) float64
        table = np.frombuffer(bytes(records)).reshape(-1, _RECORD.size // 8)
        numbers, offsets = self._numbers, self.catalogue.offsets
        _, batches, rows, nbytes, *_, waited, told = table.sum(axis=0).tolist()
        for name, amount in (
            ("batches_total", batches),
            ("batch_rows_total", rows),
            ("batch_bytes_total", nbytes),
            ("client_wait_seconds_total", waited),
            ("client_loop_seconds_total", told),
        ):
            numbers[offsets[name]] += amount
        for number in range(len(PHASES)):
            self._observe(self._phases + number * _BINS, table[:, 4 + number])
        for endpoint in np.unique(table[:, 0]).astype(int).tolist():
            own = table[table[:, 0] == endpoint]
            numbers[self._requests + endpoint * len(STATUSES)] += len(own)
            numbers[self._bytes + endpoint] += float(own[:, 3].sum())
            self._observe(self._durations + endpoint * _BINS, own[:, 4:8].sum(axis=1))

    def _observe(self, begin: int, seconds: npt.NDArray[np.float64]) -> None:
        """Add (n,) values to the histogram that begins at index `begin`."""
        counts = np.bincount(np.searchsorted(_BOUNDS, seconds), minlength=_BINS - 1)
        for number, count in enumerate(counts.tolist()):
            self._numbers[begin + number] += count
        self._numbers[begin + _BINS - 1] += float(seconds.sum())


_BOUNDS = np.array(BOUNDS)


@dataclass(frozen=True)
class Everywhere:
    """The numbers of all processes of a server.

    Attributes
    ----------
    workers : dict of int to (int, list of float)
        Process id and numbers of each running worker, by place.
    total : list of float
        Sum over all processes, including the counts of those that have ended.
    """

    catalogue: Catalogue
    workers: dict[int, tuple[int, list[float]]]
    total: list[float]
    supervisor: int

    @classmethod
    def of(cls, catalogue: Catalogue, board: Scoreboard) -> Everywhere:
        workers: dict[int, tuple[int, list[float]]] = {}
        total = np.zeros(catalogue.count)
        supervisor = 0
        for place, pid, numbers in board.read(catalogue.count):
            if place == SUPERVISOR:
                supervisor = pid
            elif pid:
                workers[place] = pid, numbers
            else:
                catalogue.without_gauges(numbers)
            total += numbers
        return cls(catalogue, workers, total.tolist(), supervisor)

    def value(self, name: str, label: str | None = None, numbers: Sequence[float] | None = None) -> float:
        """The number of a counter or gauge: the total, or that of one worker if its `numbers` are given."""
        return (self.total if numbers is None else numbers)[self.catalogue.place(name, label)]

    def requests(self, numbers: Sequence[float]) -> int:
        """Requests that a worker with these numbers has answered."""
        begin = self.catalogue.offsets["http_requests_total"]
        return int(sum(numbers[begin : begin + len(self.catalogue.endpoints) * len(STATUSES)]))

    def series(self, metric: Metric) -> Iterator[tuple[Labels, list[float]]]:
        """Labels and numbers of each series to show."""
        begin, width = self.catalogue.offsets[metric.name], metric.width
        found = [
            (labels, self.total[begin + number * width : begin + (number + 1) * width])
            for number, labels in enumerate(metric.series)
        ]
        if metric.sparse:
            used = {labels[:2] for labels, numbers in found if any(numbers)}
            found = [(labels, numbers) for labels, numbers in found if labels[:2] in used]
        yield from found
