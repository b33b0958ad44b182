"""The phases of a benchmark. Each answers one question and gets a share of the time and of the bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..dataset import Dataset
from ..errors import BadParameter, FeedError
from ..fetching.readahead import DEFAULT_READAHEAD
from ..plan import Plan
from .advice import BETTER
from .asked import Asked
from .findings import Findings, Rate
from .observe import Observer, server_share
from .probe import Probe
from .streams import Tick, drained, fixed_width, nbytes_of, trained, until
from .values import wide_fields

_BIG_BYTES = 4 << 20
"""Maximum size of a single request: about that of one read-ahead request."""

_SINGLE_SHARE = 0.03
"""Share of the total time that a single request may take."""

_BATCH_SHARE = 0.0125
"""Share of the total time that a batch may take over one connection; otherwise smaller batches are read. On a distant
link, eight of them arrive together."""

_WIDTHS = (1, 2, 4, 8, 16, 32)
_FEW_WIDTHS = (1, 4, 16)
_WIDTH_ROUND_TRIPS = 20
"""Minimum time per number of connections, in round trips; with less time, fewer numbers are tried."""

_GROWS = 1.1

_HOT_BYTES = 32 << 20
"""Size of the rows that are read repeatedly: fits into the memory of any server, but is many batches."""

_FACTOR = 4
"""The other batch sizes are smaller and larger by this factor."""

_ROOM = 3
"""Number of batches that should fit into the read-ahead."""

_FIRST_SHARE, _FEW_BATCHES = 0.25, 4
"""If fewer batches arrive in the first part of this phase, the rest uses a smaller read-ahead."""

_MOST_SHARE = 0.8
"""Share of the remaining time for the read-ahead if nothing has arrived yet."""

_TURNS = 2
"""How often a stream that seems faster is measured again."""

_MAX_READAHEAD = 4 * DEFAULT_READAHEAD


Report = Callable[[str, float, float], None]
"""Called with the name of the phase, the overall progress (0 to 1) and the current rows per second."""


class Bench:
    """One benchmark of one dataset; `run` fills in `findings`.

    Parameters
    ----------
    dataset : Dataset
        Read like a training loop does.
    observed : Dataset
        The same dataset over separate connections, with the hooks of `observer`.
    """

    def __init__(self, dataset: Dataset, observed: Dataset, observer: Observer, asked: Asked, report: Report) -> None:
        self._dataset, self._observed, self._observer, self._asked = dataset, observed, observer, asked
        self._report = report
        # Random: the server may still have the rows of the previous benchmark in memory.
        self._epoch = random.SystemRandom().randrange(1 << 20)
        plan = self._plan(asked.batch_size)
        if not plan.rows:
            raise BadParameter(f"split {asked.split!r} of {dataset.name!r} has no rows to measure")
        about = [spec for spec in dataset.info["fields"] if spec["name"] in {tensor.name for tensor in plan.tensors}]
        self.findings = Findings(
            url=dataset._client.url,
            dataset=dataset.name,
            split=asked.split,
            rows=plan.rows,
            batch_size=asked.batch_size,
            row_bytes=plan.batch_bytes / asked.batch_size,
            measured_batch=asked.batch_size,
            readahead=DEFAULT_READAHEAD,
            step=asked.step,
            images=[spec["name"] for spec in about if spec.get("decode")],
            amplification=max((spec["decoded_per_served_byte"] for spec in about), default=1.0),
            filters=sorted({name for spec in about for name in spec["filters"]}),
        )
        at_once = max(1, min(plan.max_rows, int(_BIG_BYTES / max(self.findings.row_bytes, 1)), plan.rows))
        self._probe = Probe(observed, observer, asked, plan.rows, at_once)
        self._phases: list[tuple[str, float, Callable[[float, float], None]]] = [
            ("round trip", 1, self._round_trip),
            ("single requests", 2, self._singles),
            ("read-ahead", 6, self._read_ahead),
            *([("training", 5.0, self._train)] if asked.step else []),
            *([('decode="client"', 3.0, self._decode_here)] if self.findings.images else []),
            ("connections", 5, self._widths),
            ("same rows again", 2, self._again),
            *([("row cache", 4.0, self._cache)] if asked.cache else []),
            ("batch sizes", 3, self._batch_sizes),
            ("more read-ahead", 1.5, self._more_readahead),
            ("once more", 3, self._confirm),
        ]
        self._readahead = DEFAULT_READAHEAD
        # Seconds per row over one connection, without the round trip.
        self._row_seconds = 0.0
        self._name, self._began, self._whole = "", 0.0, (0.0, 1.0)
        self.failure: FeedError | None = None
        """The error that ended the benchmark early."""

    def run(self) -> Findings:
        """Run all phases. A KeyboardInterrupt, or an error after the first streams, stops with the results so far."""
        self._began = time.monotonic()
        left = [weight for _, weight, _ in self._phases]
        try:
            for name, weight, phase in self._phases:
                spent = time.monotonic() - self._began
                share = weight / sum(left)
                left.pop(0)
                seconds = max(self._asked.seconds - spent, 0.01 * self._asked.seconds) * share
                nbytes = max(self._asked.max_bytes - self.findings.nbytes, 1.0) * share
                done = min(spent / self._asked.seconds, 1.0)
                self._name, self._whole = name, (done, seconds / self._asked.seconds)
                self._tick(0.0, 0.0)
                phase(seconds, nbytes)
        except KeyboardInterrupt:
            self.findings.interrupted = True
        except FeedError as error:
            if self.findings.default is None:
                raise
            self.findings.interrupted, self.failure = True, error
        self.findings.seconds = time.monotonic() - self._began
        return self.findings

    def _tick(self, done: float, rows_per_second: float) -> None:
        begun, share = self._whole
        self._report(self._name, min(1.0, begun + share * done), rows_per_second)

    def _plan(self, batch_size: int, **options: Any) -> Plan:
        return self._dataset.plan(
            self._asked.split, batch_size=batch_size, shuffle=True, **{**self._asked.options, **options}
        )

    def _next_epoch(self) -> int:
        # Far from the previous one, because a stream may read many passes.
        self._epoch += 1 << 20
        return self._epoch

    def _round_trip(self, seconds: float, nbytes: float) -> None:
        self.findings.round_trip = self._probe.round_trip(seconds, self._tick)
        self.findings.nbytes = self._probe.nbytes

    def _singles(self, seconds: float, nbytes: float) -> None:
        findings, trip = self.findings, self.findings.round_trip or 0.0
        single, batch = self._probe.singles(
            self._next_epoch(), trip, seconds, nbytes, _SINGLE_SHARE * self._asked.seconds, self._tick
        )
        findings.nbytes = self._probe.nbytes
        findings.single = single
        findings.row_bytes = nbytes_of(batch) / len(batch.rows)
        findings.wide = wide_fields(self._dataset, batch, findings.row_bytes)
        self._row_seconds = max(single.seconds - trip, 0.0) / single.rows
        size = self._asked.batch_size
        while size > 1 and size * self._row_seconds > _BATCH_SHARE * self._asked.seconds:
            size = -(-size // 2)
        findings.measured_batch = size

    def _stream(
        self,
        what: str,
        plan: Plan,
        seconds: float,
        nbytes: float,
        *,
        connections: int | None = None,
        readahead: int | None = None,
        observe: bool = False,
        wire: float = 1.0,
        tick: Tick | None = None,
    ) -> Rate | None:
        """Drain passes of a plan; `wire` is the number of bytes sent per byte received."""
        # Requests in flight at the end also count towards the bytes.
        readahead = max(1, min(readahead or self._readahead, int(nbytes / wire / 2)))
        dataset, epoch = self._observed if observe else self._dataset, self._next_epoch()
        if connections is None:
            reading = dataset.read_passes(plan, epoch, 0, readahead=readahead)
        else:
            reading = fixed_width(dataset, plan, epoch, connections, readahead)
        self._observer.taken()
        most = max(1.0, nbytes / wire - readahead)
        size = plan.batch_size
        rate = drained(
            reading, what, size, seconds=seconds, max_bytes=most, tick=tick or self._tick, connections=connections
        )
        self.findings.nbytes += round((rate.nbytes if rate else 0) * wire)
        return rate

    def _read_ahead(self, seconds: float, nbytes: float) -> None:
        plan, single = self._plan(self.findings.measured_batch), self.findings.single
        assert single is not None
        first = self._stream("", plan, _FIRST_SHARE * seconds, _FIRST_SHARE * nbytes)
        left = 1 - _FIRST_SHARE
        if first is None or first.rows < _FEW_BATCHES * plan.batch_size:
            # The full read-ahead would take all the time to fill. A smaller one shows the steady rate.
            comes = single.nbytes / single.transfer * left * seconds
            self._readahead = max(_ROOM * plan.batch_bytes, min(int(comes / 2), DEFAULT_READAHEAD))
        tick = partial(self._tick_within, _FIRST_SHARE, left)
        self.findings.default = self._stream("read-ahead", plan, left * seconds, left * nbytes, tick=tick)
        if self.findings.default is None:
            # This number matters most: give it the remaining time.
            seconds = max(seconds, _MOST_SHARE * (self._asked.seconds - (time.monotonic() - self._began)))
            self.findings.default = self._stream("read-ahead", plan, seconds, nbytes)
        self.findings.width = self._dataset._client.link.width
        self.findings.is_local = self._dataset._client.is_local
        if self.findings.default is None:
            self.findings.notes.append(
                f"no batch arrived within {seconds:.1f} s: try --seconds {4 * self._asked.seconds:.0f}"
            )

    def _train(self, seconds: float, nbytes: float) -> None:
        assert self._asked.step is not None
        readahead = max(1, min(self._readahead, int(nbytes / 2)))
        plan = self._plan(self.findings.measured_batch)
        reading = self._dataset.read_passes(plan, self._next_epoch(), 0, readahead=readahead)
        rows = min(self._asked.batch_size, self.findings.rows)
        most = max(1.0, nbytes - readahead)
        self.findings.training = trained(
            reading, self._asked.step, rows, seconds=seconds, max_bytes=most, tick=self._tick
        )
        training = self.findings.training
        if training is None:
            self.findings.notes.append("training was not measured: fewer than two steps fit into the time or bytes")
        else:
            self.findings.nbytes += round((training.steps + 1) * rows * self.findings.row_bytes)

    def _decode_here(self, seconds: float, nbytes: float) -> None:
        single = self.findings.single
        assert single is not None
        try:
            plan = self._plan(self.findings.measured_batch, decode="client")
            _, request = self._probe.one(single.rows, self._epoch, 0, decode="client")
        except (ModuleNotFoundError, BadParameter) as error:
            self.findings.notes.append(f'decode="client" was not measured: {error}')
            return
        head = single.nbytes - self.findings.row_bytes * single.rows
        self.findings.nbytes += request.nbytes
        self.findings.encoded_bytes = (request.nbytes - head) / single.rows
        wire = self.findings.encoded_bytes / self.findings.row_bytes
        self.findings.decoded_here = self._stream('decode="client"', plan, seconds, nbytes, wire=wire)

    def _widths(self, seconds: float, nbytes: float) -> None:
        trip = self.findings.round_trip
        assert trip is not None
        end, limit = time.monotonic() + seconds, self.findings.nbytes + nbytes
        enough = seconds / len(_WIDTHS) > _WIDTH_ROUND_TRIPS * trip
        left = list(_WIDTHS if enough else _FEW_WIDTHS)
        plan = self._plan(self.findings.measured_batch)
        # Seconds of one block per connection when the link is saturated.
        each = self._row_seconds * max(plan.batch_size, (256 << 10) / max(self.findings.row_bytes, 1))
        flat = 0
        while left and flat < 2:
            width = left.pop(0)
            share, room = (end - time.monotonic()) / (1 + len(left)), (limit - self.findings.nbytes) / (1 + len(left))
            fixed = self.findings.fixed
            if fixed and (share <= 0 or room <= 0 or 2 * width * each > max(end - time.monotonic(), 0)):
                break
            what = f"{width} connection{'s' if width > 1 else ''}"
            begun = 1 - (end - time.monotonic()) / seconds
            tick = partial(self._tick_within, begun, share / seconds)
            least = min(3 * width * each, end - time.monotonic())
            rate = self._stream(what, plan, max(share, least), room, connections=width, observe=True, tick=tick)
            if rate is None:
                break
            flat = flat + 1 if fixed and rate.rows_per_second < _GROWS * fixed[-1].rows_per_second else 0
            share_of_server = server_share(self._observer.taken())
            fixed.append(Rate(**{**vars(rate), "server_share": share_of_server}))

    def _tick_within(self, begun: float, share: float, done: float, rows_per_second: float) -> None:
        self._tick(begun + share * done, rows_per_second)

    def _again(self, seconds: float, nbytes: float) -> None:
        size = self.findings.measured_batch
        rows = max(size, int(_HOT_BYTES / max(self.findings.row_bytes, 1)))
        if rows >= self.findings.rows:
            # All rows were already in memory before.
            return
        # The part must be small enough to be read more than once.
        if self.findings.default is not None:
            affordable = min(seconds * self.findings.default.rows_per_second, nbytes / self.findings.row_bytes)
            rows = min(rows, max(size, int(affordable / 4)))
        self.findings.again = self._stream("same rows again", self._plan(size, limit=rows), seconds, nbytes)

    def _cache(self, seconds: float, nbytes: float) -> None:
        folder, default = self._asked.cache, self.findings.default
        if folder is None or default is None:
            return
        cache = self._dataset.cache(folder)
        size = self.findings.measured_batch
        wanted = min(default.rows_per_second * seconds / 3, nbytes / self.findings.row_bytes / 2)
        rows = min(self.findings.rows, max(size, int(wanted)))
        plan = self._plan(size, limit=rows)
        began, epoch = time.monotonic(), self._next_epoch()
        filled = 0
        for batch in until(self._dataset.read_passes(plan, epoch, 0, plan.batches, cache=cache), began + 0.7 * seconds):
            filled += len(batch.rows)
            self._tick(0.7 * filled / rows, filled / (time.monotonic() - began))
        self.findings.nbytes += round(filled * self.findings.row_bytes)
        if filled < rows:
            self.findings.notes.append(f"the row cache was not measured: {filled:,} of {rows:,} rows arrived in time")
            return
        if cache.cached_rows < rows:
            self.findings.notes.append(
                f"the row cache was not measured: {folder} holds only {cache.cached_rows:,} of {rows:,} rows"
            )
            return
        reading = self._dataset.read_passes(plan, self._next_epoch(), 0, cache=cache)
        left = max(seconds - (time.monotonic() - began), 0.2 * seconds)
        self.findings.cache_folder = folder
        self.findings.cached = drained(
            reading, "row cache", size, seconds=left, max_bytes=float("inf"), tick=self._tick
        )

    def _batch_sizes(self, seconds: float, nbytes: float) -> None:
        size = self.findings.batch_size
        if self.findings.measured_batch < size:
            self.findings.notes.append(
                f"a batch of {size} rows takes long on this link: batches of {self.findings.measured_batch} were read "
                "instead, and other sizes were not tried"
            )
            return
        sizes = [each for each in (size // _FACTOR, size * _FACTOR) if 1 <= each <= self.findings.rows]
        for number, each in enumerate(sizes):
            if each * self.findings.row_bytes * _ROOM > DEFAULT_READAHEAD:
                self.findings.notes.append(f"batches of {each} rows were not tried: {_ROOM} do not fit the read-ahead")
                continue
            tick = partial(self._tick_within, number / len(sizes), 1 / len(sizes))
            rate = self._stream(
                f"batches of {each}", self._plan(each), seconds / len(sizes), nbytes / len(sizes), tick=tick
            )
            if rate is not None:
                self.findings.batch_sizes.append(rate)

    def _more_readahead(self, seconds: float, nbytes: float) -> None:
        default, trip = self.findings.default, self.findings.round_trip
        if default is None or trip is None:
            return
        readahead = self._needed_readahead()
        if readahead <= DEFAULT_READAHEAD:
            return
        what, plan = f"readahead={readahead >> 20} << 20", self._plan(self.findings.measured_batch)
        self.findings.more_readahead = self._stream(what, plan, seconds, nbytes, readahead=readahead)

    def _confirm(self, seconds: float, nbytes: float) -> None:
        """Measure the streams that seemed faster again, alternating with the default, to rule out chance."""
        findings = self.findings
        default, best, more = findings.default, findings.best_fixed, findings.more_readahead
        if default is None:
            return
        faster = [
            rate
            for rate in (best, more, *findings.batch_sizes)
            if rate is not None and rate.rows_per_second > BETTER * default.rows_per_second
        ]
        # Computed before the loop, which changes the measurements it depends on.
        readahead = self._needed_readahead() if more is not None else None
        turns = 2 * _TURNS * len(faster)
        plan, done = self._plan(findings.measured_batch), 0
        for rate in faster * _TURNS:
            for one in (default, rate):
                tick = partial(self._tick_within, done / turns, 1 / turns)
                options: dict[str, Any] = {"tick": tick}
                if one is best:
                    options |= {"connections": one.connections, "observe": True}
                elif one is more:
                    options["readahead"] = readahead
                of = plan if one.batch_size == plan.batch_size else self._plan(one.batch_size)
                measured = self._stream(one.what, of, seconds / turns, nbytes / turns, **options)
                done += 1
                if measured is not None:
                    self._replace(one.what, measured)
        unsure = {rate.what for rate in faster} - {rate.what for rate in findings.rates() if rate.confirmed}
        if unsure:
            findings.notes.append(
                f"faster, but measured only once: {', '.join(sorted(unsure))}; use more --seconds to confirm"
            )

    def _replace(self, what: str, measured: Rate) -> None:
        """Add a measurement to the previous one of the same stream."""
        findings = self.findings

        def told(rate: Rate) -> Rate:
            return rate.with_more(measured) if rate.what == what else rate

        findings.default = findings.default and told(findings.default)
        findings.more_readahead = findings.more_readahead and told(findings.more_readahead)
        findings.fixed = [*map(told, findings.fixed)]
        findings.batch_sizes = [*map(told, findings.batch_sizes)]

    def _needed_readahead(self) -> int:
        """Bytes: four times what is in flight on the link, and at least a few batches."""
        findings = self.findings
        assert findings.default is not None and findings.round_trip is not None
        on_the_way = 4 * findings.default.bytes_per_second * findings.round_trip
        needed = max(on_the_way, _ROOM * findings.row_bytes * findings.batch_size)
        return min(1 << (int(needed) - 1).bit_length(), _MAX_READAHEAD)
