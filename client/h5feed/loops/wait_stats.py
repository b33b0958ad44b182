"""How long a training loop has waited for data, and what for: a mapping that prints itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..tables import html_table, text_lines

BINS_PER_OCTAVE = 8
LEAST_WAIT = 1e-6
"""Seconds: the first bin of the histogram of waits holds all that are shorter."""

BINS = 32 * BINS_PER_OCTAVE
"""The last bin begins at more than an hour; each is 9 % wider than the one before."""

MUCH = 0.05
"""Share of the time that an accelerator may idle before anything is to be done about it."""


@dataclass(frozen=True, eq=False)
class LoopStats(Mapping[str, float]):
    """What one loop over batches has done; made by ``stats()`` of a `Sequence`, a `Loader` or `TorchBatches`.

    A mapping of the names below to numbers; each is an attribute as well. All times are seconds.

    Attributes
    ----------
    passes : int
        Passes over the data, or epochs of Keras, with the one under way.
    steps, rows : int
        Batches that were handed out, and their rows.
    bytes : int
        Of the bodies that came from the server, row ids included. What a local cache held is not among them.
    seconds : float
        From the first batch that was asked for to the end of the last step, of all passes. What lies between passes
        (validation, saving the model) is not in it, nor is the last step of a pass that was left early.
    waited : float
        How long the loop was held up by asking for batches: the sum of the next three, exactly.
    waiting : float
        Waited for the server: until it was asked, until the first byte of its answer, until a request was tried again.
    transfer : float
        Waited while bytes came in. An answer begins before all its rows are read: a slow disk shows here too.
    decode : float
        Waited while this process decoded images, read its local cache, or prepared the batch.
    preparing : float
        Of `decode`, what was spent on the thread that asks for the batch: scaling, one-hot labels, ``transform``.
    compute : float
        ``seconds - waited``: all that the loop did itself.
    utilisation : float
        Accelerator utilisation (AU) as MLPerf Storage has it, ``total_compute_time / total_benchmark_running_time``, of
        1; not a number before there are two steps. As there, the first step of each pass is left out of both, and with
        it the compilation of the model. There the compute time is given; here it is all the time in which the loop does
        not wait, so that work of the host between two steps counts as compute.
    median, p95, longest : float
        Of the waits of single steps; the first two within 5 %.
    bytes_per_second : float
    retries : int
        Requests that were sent once more.
    cached : int
        Rows that a local cache held.

    What is measured is the thread that asks for batches. JAX and torch dispatch work and run ahead of the device, which
    still computes while this thread waits: the device idles at most as long as is told here, and `utilisation` is at
    least as high. What is left of the device's work when the last step was dispatched is not in `seconds`.

    See ``metric.exclude_start_steps`` of the DLIO benchmark, and "Performance Metrics" of the submission guidelines of
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
    steady_seconds: float = 0.0
    steady_waited: float = 0.0
    """Both without the first step of each pass."""
    waits: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64), repr=False)
    """Histogram of the waits of single steps, see `bins_of`."""
    last: LoopStats | None = None
    """The same of the last pass alone."""

    _NAMES: ClassVar = (
        *("passes", "steps", "rows", "bytes", "seconds", "waited", "waiting", "transfer", "decode", "preparing"),
        *("compute", "utilisation", "median", "p95", "longest", "bytes_per_second", "retries", "cached"),
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
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def p95(self) -> float:
        return self._quantile(0.95)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def share(self, name: str) -> float:
        """What part of `seconds` a time is: ``share("waited")``."""
        seconds: float = getattr(self, name)
        return seconds / self.seconds if self.seconds else 0.0

    def then(self, following: LoopStats) -> LoopStats:
        """Both together; `last` is the second."""
        sums = {
            one.name: getattr(self, one.name) + getattr(following, one.name)
            for one in fields(self)
            if one.name not in ("longest", "last")
        }
        return LoopStats(**sums, longest=max(self.longest, following.longest), last=following)

    def advice(self) -> str:
        """The one thing to do where the accelerator idles much, else nothing.

        Returns
        -------
        str
            Empty where `utilisation` is 0.95 or more, or not known yet.
        """
        if not self.utilisation < 1 - MUCH:
            return ""
        most = max(("waiting", "transfer", "decode"), key=lambda name: float(getattr(self, name)))
        if most == "transfer":
            return "the link is full: send less, by decode='client' for stored JPEG or PNG or smaller dtypes, or cache="
        if most == "decode" and 2 * self.preparing > self.decode:
            return "batches are prepared too slowly: a cheaper transform=, or layers of the model in its place"
        if most == "decode":
            return "batches are decoded too slowly: more connections= or CPU cores, or decode='server'"
        if self.retries > self.steps // 10:
            return f"{self.retries:,} requests had to be sent again: see what the server logs, or add another server"
        return "the server is slow to answer: serve with more --workers, or see what `h5feed-server inspect` says"

    def summary(self) -> str:
        """How much was waited, as ``3.1 % of the time (waiting 2.0 %, transfer 0.9 %, decode 0.2 %)``."""
        parts = ", ".join(f"{name} {_percent(self.share(name))}" for name in ("waiting", "transfer", "decode"))
        return f"{_percent(self.share('waited'))} of the time ({parts})"

    def table(self) -> list[tuple[str, ...]]:
        """A header, and what there is to tell, as text: of all passes, and of the last where there are several."""
        columns = [("all", self)]
        if self.last is not None and self.passes > 1:
            columns.append(("last pass", self.last))
        lines = [("", *(name for name, _ in columns))]
        for name, tell in _LINES.items():
            lines.append((name, *(tell(stats) for _, stats in columns)))
        return lines

    def __repr__(self) -> str:
        return "\n".join(filter(None, [*text_lines(self.table()), self.advice()]))

    def _repr_html_(self) -> str:
        head, *lines = self.table()
        advice = self.advice()
        return html_table(head, lines, "right") + (f"<p>{escape(advice)}</p>" if advice else "")

    def _quantile(self, share: float) -> float:
        """From the histogram: the middle of the bin, but no more than the longest wait."""
        if not self.steps:
            return 0.0
        counts = np.cumsum(self.waits)
        place = int(np.searchsorted(counts, share * counts[-1]))
        return min(LEAST_WAIT * 2.0 ** ((place + 0.5) / BINS_PER_OCTAVE), self.longest) if place else 0.0


def bins_of(waits: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bin of each wait, (n,) seconds."""
    octaves = np.log2(np.maximum(waits, LEAST_WAIT) / LEAST_WAIT)
    bins: npt.NDArray[np.int64] = np.minimum(BINS - 1, BINS_PER_OCTAVE * octaves).astype(np.int64)
    return bins


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(name: str) -> Callable[[LoopStats], str]:
    """How a time is told: in seconds, and as a share of all time."""
    return lambda stats: f"{getattr(stats, name):,.2f} s {_percent(stats.share(name)):>7}"


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
}
