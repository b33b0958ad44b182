"""Statistics of a training loop: how long it waited for data, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..net.balancing import ReplicaStats
from ..tables import html_table, text_lines

BINS_PER_OCTAVE = 8
LEAST_WAIT = 1e-6
"""Seconds; shorter waits fall into the first bin of the histogram."""

BINS = 32 * BINS_PER_OCTAVE
"""The last bin starts beyond one hour; each bin is 9% wider than the previous one."""

MUCH = 0.05
"""Share of the time that an accelerator may idle before `advice` suggests a change."""

ENOUGH_SECONDS = 0.5
"""Time of a loop before `advice` says anything: the first batches say little of those that follow."""


@dataclass(frozen=True, eq=False)
class LoopStats(Mapping[str, float]):
    """Statistics of one loop; returned by ``stats()`` of a `Sequence`, a `Loader` or `TorchBatches`.

    A mapping of the names below to numbers, which are also attributes. All times are in seconds. Prints as a table.

    Attributes
    ----------
    passes : int
        Passes over the data, or Keras epochs, including the current one.
    steps, rows : int
        Batches handed out, and their rows.
    bytes : int
        Bytes of the response bodies, row ids included. Rows from a local cache are not counted.
    seconds : float
        From the request of the first batch to the end of the last step, summed over all passes. Excludes the time
        between passes (validation, saving the model) and the last step of a pass that was left early.
    waited : float
        How long the loop waited for batches: exactly the sum of the next three.
    waiting : float
        Waited for the server: before the request was sent, for the first byte of the response, before a retry.
    transfer : float
        Waited while data arrived. A response starts before all its rows are read, so a slow disk shows here too.
    decode : float
        Waited while this process read the server's files or its local cache, decoded chunks or images, or prepared the
        batch.
    preparing : float
        The part of `decode` spent on the thread that requests batches: scaling, one-hot labels, ``transform``.
    compute : float
        ``seconds - waited``: everything else the loop did.
    utilisation : float
        Accelerator utilisation (AU) as defined by MLPerf Storage, ``total_compute_time /
        total_benchmark_running_time``, from 0 to 1; NaN before the second step. As there, the first step of each pass
        is excluded, and with it the compilation of the model. Here compute time is all the time the loop does not wait,
        so work on the host between two steps counts as compute.
    median, p95, longest : float
        Wait of a single step; the first two within 5%.
    bytes_per_second : float
    retries : int
        Requests that were retried.
    cached : int
        Rows read from a local cache.
    from_files : int
        Rows read from the server's files, on the same machine.
    from_chunks : int
        Rows decoded here from compressed chunks.
    from_images : int
        Rows whose images were decoded here. If other fields of them came as chunks, they are in `from_chunks`, too.
    filled, places : int
        Items of lists or text that were padded or packed, and the places of the arrays that hold them.
    fill : float
        ``filled / places``, from 0 to 1; NaN if nothing was padded or packed.
    why : str
        Why the server sent the other rows as arrays; empty if there is no reason.
    unplaced : str
        Why rows did not come from their owners, although ``placement="cache"`` was given; empty if all did.

    These are times of the thread that requests batches. JAX and torch run ahead of the device, which still computes
    while this thread waits. So the device idles at most as long as shown here, and its utilisation is at least
    `utilisation`. Work that remains on the device after the last step was dispatched is not part of `seconds`.

    See ``metric.exclude_start_steps`` of the DLIO benchmark, and "Performance Metrics" in the submission guidelines of
    MLPerf Storage, https://github.com/mlcommons/storage.
    """

    passes: int = 0
    steps: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0
    preparing: float = 0.0
    longest: float = 0.0
    retries: int = 0
    cached: int = 0
    from_files: int = 0
    from_chunks: int = 0
    from_images: int = 0
    file_bytes: int = 0
    """Bytes of the rows that were read from files; part of `bytes`."""
    filled: int = 0
    places: int = 0
    why: str = ""
    unplaced: str = ""
    steady_seconds: float = 0.0
    steady_waited: float = 0.0
    """Both exclude the first step of each pass."""
    waits: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64), repr=False)
    """Histogram of the waits of single steps, see `bins_of`."""
    last: LoopStats | None = None
    """Statistics of the last pass only."""
    via: str = ""
    """How the servers are reached now: over a Unix socket, or over TCP and why. See `h5feed.Feed.via`."""
    replicas: tuple[ReplicaStats, ...] = ()
    """What each server has done for all loops of this process with this connection. See `h5feed.Feed.replicas`."""

    _NAMES: ClassVar = (
        *("passes", "steps", "rows", "bytes", "seconds", "waited", "waiting", "transfer", "decode", "preparing"),
        *("compute", "utilisation", "median", "p95", "longest", "bytes_per_second", "retries", "cached"),
        *("from_files", "from_chunks", "from_images", "filled", "places", "fill"),
    )

    def __getitem__(self, name: str) -> float:
        if name not in self._NAMES:
            raise KeyError(name)
        value: float = getattr(self, name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)

    @property
    def waited(self) -> float:
        return self.waiting + self.transfer + self.decode

    @property
    def compute(self) -> float:
        return max(0.0, self.seconds - self.waited)

    @property
    def utilisation(self) -> float:
        if not self.steady_seconds:
            return math.nan
        return min(1.0, max(0.0, 1 - self.steady_waited / self.steady_seconds))

    @property
    def fill(self) -> float:
        return self.filled / self.places if self.places else math.nan

    @property
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def p95(self) -> float:
        return self._quantile(0.95)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def share(self, name: str) -> float:
        """A time as a fraction of `seconds`: ``share("waited")``."""
        seconds: float = getattr(self, name)
        return seconds / self.seconds if self.seconds else 0.0

    def then(self, following: LoopStats) -> LoopStats:
        """The sum of both; `last` is the second."""
        sums = {
            one.name: getattr(self, one.name) + getattr(following, one.name)
            for one in fields(self)
            if one.name not in ("longest", "last", "why", "unplaced", "via", "replicas")
        }
        longest, why = max(self.longest, following.longest), following.why or self.why
        unplaced = following.unplaced or self.unplaced
        return LoopStats(**sums, longest=longest, why=why, unplaced=unplaced, last=following)

    def advice(self) -> str:
        """The change that would help most.

        Returns
        -------
        str
            Empty in the first half second, and if `utilisation`, or that of the last pass, is 0.95 or more.
        """
        is_over = self.last is not None and self.last.utilisation >= 1 - MUCH
        if self.seconds < ENOUGH_SECONDS or is_over or not self.utilisation < 1 - MUCH:
            return ""
        most = max(("waiting", "transfer", "decode"), key=lambda name: float(getattr(self, name)))
        is_decoded_here = bool(self.from_chunks or self.from_images)
        # Over a Unix socket, data arrive as fast as the server reads them.
        is_local = self.via.startswith("Unix socket")
        if most == "transfer" and not is_local:
            fewer = "" if is_decoded_here else "compress='zstd', smaller dtypes or "
            return (
                "batches arrive too slowly: the link, or the server's disk, is the limit (`h5feed bench` tells which); "
                f"for fewer bytes, use {fewer}cache="
            )
        if most == "decode" and 2 * self.preparing > self.decode:
            return "preparing batches is too slow: use a cheaper transform=, or move it into layers of the model"
        if most == "decode":
            there = ", or decode='server'" if is_decoded_here else ""
            return f"reading or decoding on this machine is too slow: use more connections= or CPU cores{there}"
        if self.retries > self.steps // 10:
            return f"{self.retries:,} requests were retried: check the server's log, or add another server"
        far = "" if is_local else "; if it is far away, use a higher readahead="
        return (
            "the server is slow to respond: check the file with `h5feed-server inspect`, or use more workers "
            f"(--workers, H5FEED_WORKERS){far}"
        )

    def summary(self) -> str:
        """The time waited, as ``3.1% of the time (waiting 2.0%, transfer 0.9%, decode 0.2%)``."""
        parts = ", ".join(f"{name} {_percent(self.share(name))}" for name in ("waiting", "transfer", "decode"))
        return f"{_percent(self.share('waited'))} of the time ({parts})"

    def table(self) -> list[tuple[str, ...]]:
        """A header and rows of text: for all passes, and for the last one if there are several."""
        columns = [("all", self)]
        if self.last is not None and self.passes > 1:
            columns.append(("last pass", self.last))
        lines = [("", *(name for name, _ in columns))]
        for name, tell in _LINES.items():
            if name != "fill" or self.places:
                lines.append((name, *(tell(stats) for _, stats in columns)))
        return lines

    def __repr__(self) -> str:
        return "\n".join(filter(None, [*text_lines(self.table()), *self._remarks()]))

    def _remarks(self) -> list[str]:
        """How the server was reached, how many rows it sent as arrays and why, and advice."""
        others = self.rows - self.cached - self.from_files - max(self.from_chunks, self.from_images)
        why = f"{others:,} rows came as arrays from the server ({self.why})" if self.why and others > 0 else self.why
        replicas = "; ".join(map(str, self.replicas)) if len(self.replicas) > 1 else ""
        unplaced = self.unplaced and f"placement='cache' was not used: {self.unplaced}"
        return [
            remark for remark in (self.via and f"over {self.via}", replicas, unplaced, why, self.advice()) if remark
        ]

    def _repr_html_(self) -> str:
        head, *lines = self.table()
        return html_table(head, lines, "right") + "".join(f"<p>{escape(remark)}</p>" for remark in self._remarks())

    def _quantile(self, share: float) -> float:
        """The middle of the bin in the histogram, at most the longest wait."""
        if not self.steps:
            return 0.0
        counts = np.cumsum(self.waits)
        place = int(np.searchsorted(counts, share * counts[-1]))
        return min(LEAST_WAIT * 2.0 ** ((place + 0.5) / BINS_PER_OCTAVE), self.longest) if place else 0.0


def bins_of(waits: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bin of each wait, (n,) int64; `waits` is (n,) seconds."""
    octaves = np.log2(np.maximum(waits, LEAST_WAIT) / LEAST_WAIT)
    bins: npt.NDArray[np.int64] = np.minimum(BINS - 1, BINS_PER_OCTAVE * octaves).astype(np.int64)
    return bins


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _seconds(name: str) -> Callable[[LoopStats], str]:
    """Format a time in seconds and as a share of the total."""
    return lambda stats: f"{getattr(stats, name):,.2f} s {_percent(stats.share(name)):>6}"


def _milliseconds(name: str) -> Callable[[LoopStats], str]:
    return lambda stats: f"{1000 * getattr(stats, name):,.2f} ms"


def _count(name: str) -> Callable[[LoopStats], str]:
    return lambda stats: f"{getattr(stats, name):,}"


_LINES: Mapping[str, Callable[[LoopStats], str]] = {
    "passes": _count("passes"),
    "steps": _count("steps"),
    "rows": _count("rows"),
    "MB": lambda stats: f"{stats.bytes / 1e6:,.1f}",
    "MB/s": lambda stats: f"{stats.bytes_per_second / 1e6:,.1f}",
    "time": _seconds("seconds"),
    "compute": _seconds("compute"),
    "waited": _seconds("waited"),
    "  waiting": _seconds("waiting"),
    "  transfer": _seconds("transfer"),
    "  decode": _seconds("decode"),
    "wait of a step: median": _milliseconds("median"),
    "95th percentile": _milliseconds("p95"),
    "longest": _milliseconds("longest"),
    "utilisation": lambda stats: "–" if math.isnan(stats.utilisation) else f"{stats.utilisation:.3f}",
    "retries": _count("retries"),
    "rows from the cache": _count("cached"),
    "rows from files": _count("from_files"),
    "rows from chunks": _count("from_chunks"),
    "rows from image files": _count("from_images"),
    "fill": lambda stats: "–" if math.isnan(stats.fill) else f"{stats.fill:.3f}",
}
