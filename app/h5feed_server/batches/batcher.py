"""Plans batches and fills their bodies.

A plan holds everything that is known about an order before any data is read. A body is then filled in three steps: rows
of the split → their order → rows of every field, in a recycled buffer.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.offsets import MASK
from h5feed.order import BatchGrid
from h5feed.stored.byte_cache import ENTRY_BYTES, ByteCache, CacheUsage
from h5feed.stored.crop_reader import can_be_sliced, is_cut, pieces_of_box
from h5feed.wire import CROP, OFFSETS, ROWS, WEIGHT, Body, Tensor

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field
from ..jobs.registry import Jobs
from ..keys.partners import Partners
from ..row_bits import RowSet
from ..settings import Settings
from ..sharing.slots import Slots
from ..splits.bucketing import Bucketed
from ..splits.on_request import SplitJobs
from ..splits.order_spec import OrderSpec
from ..splits.packing import Packed, PackedRows
from ..splits.row_lengths import RowLengths
from ..splits.splitter import Splitter, balanced_by
from ..storage.objects.object_file import ObjectFile
from ..storage.objects.store import ObjectStore
from ..storage.reader import Reader
from .crops import Crops, with_crops
from .cutting import Cut, Spans
from .joins import Joined
from .order import Order
from .ragged import RaggedRows
from .sampled import SampledField, each_row
from .upcoming import Looked, Upcoming
from .windows import windows_of

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_PLAN_BYTES = 4096
"""Rough size of a plan, in bytes. The rows of its split are cached, and counted, elsewhere."""


MAX_PIECES = 1 << 20
"""Maximum number of parts of chunks per response: each part takes time, however small it is."""

_TINY_ROW_BYTES = 64
"""Rows up to this size in bytes, such as labels, are taken for several batches by one call. One more copy of them is
cheaper than a call for each batch."""


NO_CUTS: Mapping[str, Cut] = {}

_SEQUENCES = Slots(1, 60.0, "the threads that order blocks of rows")
"""Only one sequence is computed at a time: the computation takes twice the memory of the result."""


class _Pace:
    """Predicts which batch of an order is requested next, if batches are requested at a constant step.

    The step need not be 1: one of two workers may receive every other batch. There may also be no constant step, as a
    worker receives only the requests of its own connections.
    """

    def __init__(self) -> None:
        self._last, self._step = 0, 0

    def after(self, index: int) -> int | None:
        """The predicted batch after `index`; None if the last two steps differ."""
        step, self._last = index - self._last, index
        steady, self._step = step == self._step, step
        return index + step if steady and step > 0 else None


@dataclass(frozen=True)
class BatchPlan:
    """One order of one dataset, cut into batches."""

    dataset: Dataset
    fields: tuple[SampledField, ...]
    order: Order
    padded: bool
    orders: ByteCache[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]
    reader: Reader
    max_bytes: int
    """Maximum size of a body."""
    max_rows: int
    """Maximum number of rows of a body."""
    part_rows: int
    """Rows that probably fit into a body, if `ragged`; else the same."""
    refusal: str = ""
    """Why a body may not have more than `max_rows` rows."""
    is_stored: bool | None = None
    """Whether the split is as stored in the files; None for the split ``all``."""
    note: str | None = None
    """Anything unexpected about the split, see `Splits`."""
    replaces: Mapping[str, Mapping[str, int]] | None = None
    """See `Splits`."""
    cuts: Mapping[str, Cut] = dataclass_field(default_factory=dict)
    """Fields whose longer rows are cut."""
    joined: Joined | None = None
    """The datasets that are joined; None if none are."""
    crops: Crops | None = None
    """Which parts of rows are sent; None: whole rows."""
    key: object = dataclass_field(default_factory=object)
    """Identifies this plan in the cache of orders. Comparing the whole spec for every batch would be slower."""
    pace: _Pace = dataclass_field(default_factory=lambda: _Pace())
    upcoming: Upcoming = dataclass_field(default_factory=Upcoming)

    one_block = False
    """Whether many batches are filled at once, however large they are."""

    @property
    def grid(self) -> BatchGrid:
        return self.order.grid

    @cached_property
    def full(self) -> Body:
        """Body of every batch except the last, which may be smaller."""
        return self._body(self.grid.batch_size)

    @cached_property
    def tail(self) -> Body:
        """Body of the last batch."""
        batches = self.grid.batches
        return self._body(self.grid.size(batches - 1)) if batches else self.full

    def body(self, index: int) -> Body:
        """Body of batch `index`.

        Raises
        ------
        BatchOutOfRange
        """
        self.grid.size(index)
        return self.tail if index == self.grid.batches - 1 else self.full

    def nbytes(self, start: int, stop: int) -> int:
        """Total size of batches start … stop-1, in bytes; an estimate if `ragged`.

        Raises
        ------
        BatchOutOfRange
        """
        if stop == start + 1:
            return self.body(start).nbytes
        self.grid.check_range(start, stop)
        return (stop - start - 1) * self.full.nbytes + self.body(stop - 1).nbytes

    @cached_property
    def ragged(self) -> bool:
        """Whether a field is ragged, or rows are packed. The size of a body then depends on its rows, and `nbytes` is
        an estimate."""
        return self.order.packed is not None or any(field.is_ragged for field in self.fields)

    def filled(
        self, start: int, stop: int, lease: Callable[[int], Bytes], part: tuple[int, int] | None = None
    ) -> Bytes:
        """Read batches start … stop-1, back to back, into a leased buffer.

        Parameters
        ----------
        lease : callable
            Takes a number of bytes and returns a uint8 buffer of this size.
        part : (int, int), optional
            Of one batch, only these rows: the first, and one past the last.

        Raises
        ------
        BatchOutOfRange, BadParameter, TooLarge
        """
        if part is not None:
            return self._filled_part(start, *part, lease)
        if self.refusal and self.grid.size(start) > self.max_rows:
            raise TooLarge(f"{self.refusal}. Or request parts of the batch, with from_row and to_row")
        self.fetch_ahead(start, stop)
        if not self.ragged:
            buffer = lease(self.nbytes(start, stop))
            self.fill(start, stop, buffer)
            self._read_ahead(start)
            return buffer
        return self._gathered([self._wanted(index) for index in range(start, stop)], lease)

    def _gathered(self, wanted: Sequence[_Wanted], lease: Callable[[int], Bytes]) -> Bytes:
        return _gathered(self.reader, self.dataset, self.fields, wanted, self.about, self.max_bytes, lease, self.cuts)

    def _wanted(self, index: int, part: slice = slice(None)) -> _Wanted:
        """What batch `index` has, or a part of its rows."""
        together, are_real = self._rows(index, 1)
        rows, real = together[0, part], are_real[0, part]
        weight = real.astype("<f4") if self.padded else None
        if self.order.packed is None:
            starts = self._starts(index, 1)
            return _Wanted(index, rows, weight, starts=None if starts is None else starts[0, part])
        packed = self.order.unpacked(rows)
        if weight is not None:
            weight = np.repeat(weight, np.diff(packed.offsets))
        return _Wanted(index, packed.rows, weight, packed)

    def fetch_ahead(self, start: int, stop: int) -> None:
        """Begin to fetch what batches start … stop-1 need, and those that will probably be requested next, if the rows
        are in an object store.

        Raises
        ------
        BatchOutOfRange
        """
        if (store := self._store) is not None and store.ahead.max_bytes:
            self.upcoming.requested(store, self._fetch, start, stop, self.grid.batches)

    @cached_property
    def _store(self) -> ObjectStore | None:
        """The store that has some of the rows; None if they are in files."""
        sources = (segment.source for field in self.fields for segment in field.column.segments)
        return next((source.store for source in sources if isinstance(source, ObjectFile)), None)

    def _fetch(self, start: int, stop: int, urgent: bool) -> Looked:
        """See `upcoming.Fetch`."""
        rows, _, starts = self.all_rows(start, stop)
        spans: Spans | None = None
        if self.order.packed is not None:
            packed = self.order.unpacked(rows)
            rows, spans = packed.rows, Spans(packed.begins, packed.lengths)
        nbytes, has_room, was_needed = 0, True, False
        for field in self.fields:
            own, row_ids = spans, field.flat_rows(rows)
            if (cut := self.cuts.get(field.name)) and (
                known := self.reader.list_offsets(field.column, row_ids)
            ) is not None:
                own = cut.spans(np.diff(known))
            if field.crop is None or starts is None:
                found = self.reader.late_ranges(field.column, row_ids, own)
            else:
                found = self.reader.late_crop_ranges(field.column, field.boxes(rows, starts))
            for source, offsets, sizes in found:
                assert isinstance(source, ObjectFile)
                nbytes += int(sizes.sum())
                begun = source.store.ahead.fetch(self.key, stop - 1, source, offsets, sizes, urgent=urgent)
                has_room, was_needed = has_room and begun.has_room, was_needed or begun.was_needed
        return Looked(nbytes, has_room, was_needed)

    def check_part(self, index: int, first: int, stop: int) -> None:
        """Check that batch `index` has rows first … stop-1.

        Raises
        ------
        BatchOutOfRange, BadParameter
        """
        rows = self.grid.size(index)
        if not 0 <= first < stop <= rows:
            raise BadParameter(
                f"from_row={first} and to_row={stop} are out of range for batch {index} of {rows} rows (valid: "
                f"0 ≤ from_row < to_row ≤ {rows})"
            )

    def _filled_part(self, index: int, first: int, stop: int, lease: Callable[[int], Bytes]) -> Bytes:
        self.check_part(index, first, stop)
        if stop - first > self.max_rows:
            raise TooLarge(f"{self.refusal}. Rows {first} … {stop - 1} of batch {index} are too many as well")
        return self._gathered([self._wanted(index, slice(first, stop))], lease)

    def fill(self, start: int, stop: int, buffer: Bytes) -> None:
        """Read batches start … stop-1, back to back, into `buffer`, (nbytes(start, stop),) uint8. Not if `ragged`."""
        asked = self.count_rows(start, stop)
        kept = [
            (field, self.reader.whole(field.column, asked * field.rows_per_sample) if field.crop is None else None)
            for field in self.fields
        ]
        begin = 0
        for first, rows, real in self._runs(start, stop):
            body, count = self.body(first), len(rows)
            end = begin + count * body.nbytes
            tensors = body.place_many(buffer[begin:end], first, count)
            tensors[ROWS][...] = rows
            if self.padded:
                tensors[WEIGHT][...] = real
            starts = self._starts(first, count)
            if starts is not None:
                tensors[CROP][...] = starts
            for field, array in kept:
                outs, own = tensors[field.name], field.rows(rows)
                if field.has_mask:
                    field.put_mask(rows, tensors[field.name + MASK])
                if field.crop is not None:
                    assert starts is not None
                    for samples, begins, out in zip(rows, starts, outs, strict=True):
                        field.read(self.reader, samples, out, begins)
                    continue
                if array is not None:
                    _take(array, own, outs)
                    continue
                for wanted, out in zip(own, outs, strict=True):
                    field.read_rows(self.reader, wanted, out)
            begin = end

    def all_rows(self, start: int, stop: int) -> tuple[Int64s, npt.NDArray[np.bool_], Int64s | None]:
        """Row ids of batches start … stop-1, (n,) int64, which of them are no padding, (n,) bool, and where their parts
        begin, (n, cropped axes) int64; None without crops.

        Raises
        ------
        BatchOutOfRange
        """
        self.grid.check_range(start, stop)
        firsts, rows, real = zip(*self._runs(start, stop), strict=True)
        starts = None
        if self.crops is not None:
            found = [self._starts(first, len(part)) for first, part in zip(firsts, rows, strict=True)]
            starts = np.concatenate([part.reshape(-1, part.shape[-1]) for part in found if part is not None])
        return (
            np.concatenate([part.reshape(-1) for part in rows]),
            np.concatenate([part.reshape(-1) for part in real]),
            starts,
        )

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, Int64s, npt.NDArray[np.bool_]]]:
        """Divide batches start … stop-1 into runs with equal bodies, whose rows come from one call of the order.

        Yields
        ------
        first : int
            Index of the first batch of the run.
        rows, real
            See `_rows`.
        """
        together, final = self.order.batches_at_once, self.grid.batches - 1
        while start < stop:
            after = min(stop, start - start % together + together)
            if start != final:
                # The last batch may be smaller.
                after = min(after, final)
            yield start, *self._rows(start, after - start)
            start = after

    def count_rows(self, start: int, stop: int) -> int:
        """Rows of batches start … stop-1, which are known to be there."""
        grid = self.grid
        return (stop - start) * grid.batch_size - (self._missing[1] if stop == self._missing[0] else 0)

    @cached_property
    def _missing(self) -> tuple[int, int]:
        """Number of batches, and by how many rows the last of them is shorter than the others."""
        batches = self.grid.batches
        return batches, self.grid.batch_size - self.grid.size(batches - 1) if batches else 0

    def _read_ahead(self, start: int) -> None:
        """Start decoding the chunks of the batch that will probably be requested next."""
        # Of cropped rows, only some chunks are needed.
        in_chunks = [field for field in self.fields if field.field.block_rows > 1 and field.crop is None]
        upcoming = self.pace.after(start) if in_chunks else None
        if upcoming is not None and upcoming < self.grid.batches:
            rows, _ = self._rows(upcoming, 1)
            for field in in_chunks:
                self.reader.read_ahead(field.column, field.flat_rows(rows[0]))

    def _rows(self, index: int, count: int) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Row ids, (count, size) int64, of what `_samples` returns."""
        samples, real = self._samples(index, count)
        several = self.order.samples_of_row
        return samples if several == 1 else samples // several, real

    def _starts(self, index: int, count: int) -> Int64s | None:
        """Where the parts of the rows of `count` batches begin, (count, size, axes) int64; None without crops."""
        if self.crops is None:
            return None
        samples, _ = self._samples(index, count)
        positions, _ = self.grid.positions(index, index + count)
        starts = self.crops.starts(samples.reshape(-1), positions, self.order.crop_key)
        return starts.reshape(*samples.shape, -1)

    def _samples(self, index: int, count: int) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Samples of `count` batches of equal size, all from one call of the order.

        Returns
        -------
        samples : (count, size) int64
            See `Order.rows`.
        real : (count, size) bool
            False for padding.
        """
        together = self.order.batches_at_once
        first = index - index % together
        rows, real = self.orders.get(
            (self.key, first),
            lambda: self.order.rows(first, min(first + together, self.grid.batches), self._sequence()),
            lambda value: value[0].nbytes + value[1].nbytes,
        )
        start = (index - first) * self.grid.batch_size
        size = self.grid.size(index)
        stop = start + count * size
        return rows[start:stop].reshape(count, size), real[start:stop].reshape(count, size)

    def _sequence(self) -> npt.NDArray[Any] | None:
        """`Order.sequence`, from the cache or computed; None without a window."""
        if self.order.spec.window is None:
            return None

        def compute() -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
            with _SEQUENCES.acquire():
                return self.order.sequence(), np.zeros(0, np.bool_)

        return self.orders.get((self.key, "sequence"), compute, lambda value: value[0].nbytes)[0]

    @property
    def about(self) -> dict[str, str]:
        """Metadata of the bodies."""
        about = {"epoch": str(self.order.spec.epoch), "batches": str(self.grid.batches)}
        return about if self.joined is None else {**about, "joined": json.dumps(self.joined.about)}

    @property
    def revisions(self) -> str:
        """The revisions of all datasets that the bodies depend on."""
        return self.dataset.revision if self.joined is None else self.joined.revisions

    @property
    def is_pinned(self) -> bool:
        """Whether the request names the revisions of the datasets that are joined."""
        return self.joined is None or self.joined.is_pinned

    def _body(self, rows: int) -> Body:
        extra = [] if self.order.packed is not None else self.extra(rows)
        items = _expected(self.reader, self.fields, rows)
        for name, cut in self.cuts.items():
            if name in items:
                items[name] = min(items[name], rows * cut.most)
        if self.order.packed is not None:
            packed = self.order.packed()
            items = dict.fromkeys(items, -(-rows * packed.items // max(1, packed.count)))
            together = -(-rows * len(packed.rows) // max(1, packed.count))
            extra = [Tensor(ROWS + OFFSETS, np.dtype("<i8"), (rows + 1,)), *self.extra(together)]
            rows = together
        return body_of(self.dataset, self.fields, rows, self.about, extra, items)

    def extra(self, rows: int) -> list[Tensor]:
        """The tensors of weights and of starts of crops, of a body of so many rows."""
        weight = [Tensor(WEIGHT, np.dtype("<f4"), (rows,))] if self.padded else []
        if self.crops is None:
            return weight
        return [*weight, Tensor(CROP, np.dtype("<i8"), (rows, len(self.crops.lengths)))]


class Batcher:
    """Makes plans and reads bodies; one per process.

    Parameters
    ----------
    reader : Reader
    folder : CacheFolder
        Stores splits.
    jobs : Jobs
        Runs long computations of splits.
    partners : Partners
        Joins datasets by key.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        reader: Reader,
        folder: CacheFolder,
        jobs: Jobs,
        partners: Partners,
    ) -> None:
        self._settings = settings
        self._partners = partners
        self._catalog = catalog
        self.reader = reader
        self.splitter = Splitter(settings, reader, folder)
        self.split_jobs = SplitJobs(catalog, self.splitter, jobs)
        self._ragged = RaggedRows(settings, self.splitter, RowLengths(settings, catalog, reader, folder, jobs))
        self._orders: ByteCache[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]] = ByteCache(
            settings.order_cache_bytes, settings.read_timeout
        )
        self._plans: ByteCache[BatchPlan] = ByteCache(_PLAN_BYTES * 256, settings.read_timeout)

    def drop_old(self, seconds: float) -> None:
        """Drop all cached data that was not used for this many seconds. It can be read or computed again."""
        self._orders.drop_old(seconds)
        self._plans.drop_old(seconds)
        self.splitter.drop_old(seconds)
        self._ragged.drop_old(seconds)
        self._partners.drop_old(seconds)
        self.reader.drop_old(seconds)

    def cache_usage(self) -> dict[str, CacheUsage]:
        """Of all caches of this worker that are bounded by a setting, by name."""
        splits = CacheUsage(*map(sum, zip(self.splitter.cache_usage(), self._ragged.cache_usage(), strict=True)))
        own = {"orders": self._orders.usage, "plans": self._plans.usage, "splits": splits}
        return {**self.reader.cache_usage(), **own, "joins": self._partners.usage}

    def plan(self, name: str, spec: OrderSpec, batch_size: int, revision: str | None) -> BatchPlan:
        """The plan of an order, from the cache or new.

        Raises
        ------
        FeedError
            The request is invalid. This is raised before any batch is read.
        InProgress
            A job computes the rows of the split, or reads the classes to balance.
        """
        dataset = self._catalog.dataset(name, revision)
        # Looked up for each request: this caller may not see them, and they may have changed.
        joined = Joined.of(self._catalog, self._partners, dataset, spec)
        key = (dataset.name, dataset.revision, dataset.identity, spec, batch_size, joined.key)
        return self._plans.get(key, lambda: self._plan(joined, spec, batch_size), lambda _: _PLAN_BYTES)

    def _plan(self, joined: Joined, spec: OrderSpec, batch_size: int) -> BatchPlan:
        dataset = joined.dataset
        if spec.has_windows:
            fields = windows_of(dataset, spec, partial(self.splitter.windows, dataset, spec))
        else:
            fields = joined.fields(spec.fields, spec.encoded)
        fields, crops = with_crops(spec, fields)

        def split_rows() -> RowSet | None:
            return joined.select(spec, self.splitter.samples(dataset, spec))

        about: dict[str, Any] = {}
        if spec.split != "all":
            splits = self.split_jobs.splits(dataset, spec.split_spec)
            about = {"is_stored": spec.split in splits.stored, "note": splits.note, "replaces": splits.replaces}
        if spec.balance:
            by, bins = balanced_by(dataset, spec)
            self.split_jobs.strata(dataset, by, bins=bins)
        joined.check()
        listed = joined.select(spec, self.split_jobs.samples(dataset, spec))
        joined.check_complete(listed, spec.limit)
        rows = dataset.rows if listed is None else len(listed)
        if spec.limit is not None:
            rows = min(rows, spec.limit)
        resampled = None
        if spec.draws:
            resampled = partial(
                self.splitter.resampled,
                dataset,
                spec,
                partial(joined.select, spec) if joined.inner else None,
                (spec.join, joined.key) if joined.inner else None,
            )
            # Report errors now, not in the middle of an epoch.
            resampled()
            if spec.epoch_rows is not None and not rows:
                raise BadParameter(f"epoch_rows={spec.epoch_rows}: the split has no rows to draw from")
            rows = spec.epoch_rows or rows
        if spec.window is not None and 4 * rows + ENTRY_BYTES > self._settings.order_cache_bytes:
            raise TooLarge(
                f"window={spec.window}: a list of {rows} rows takes {4 * rows} bytes, more than "
                f"H5FEED_ORDER_CACHE_BYTES = {self._settings.order_cache_bytes}"
            )
        several = 1 if crops is None else crops.samples_of_row
        if rows * several >= 1 << 62:
            raise BadParameter(f"crop={spec.crop} makes {rows * several} samples of {rows} rows: use larger crops")
        rows *= several
        bucketed: Callable[[], Bucketed] | None = None
        packed: Callable[[], Packed] | None = None
        if spec.bucket is not None:
            bucketed = self._ragged.bucketed(dataset, spec, batch_size * (spec.bucket_group or spec.shards))
        if spec.pack is not None:
            packed = self._ragged.packed(dataset, spec, fields)
            rows = packed().count
        last = spec.last or ("keep" if spec.shards == 1 else "pad")
        grid = BatchGrid(rows, batch_size, spec.shard, spec.shards, last)
        # Packed rows are numbered from 0.
        order_of = split_rows if packed is None else lambda: None
        order = Order(spec, order_of, grid, dataset.block_rows, resampled, bucketed, packed, several)
        limit = self._settings.max_body_bytes
        about |= {"joined": joined if joined.others else None, "crops": crops}
        plan = BatchPlan(
            dataset, fields, order, last == "pad", self._orders, self.reader, limit, batch_size, batch_size, **about
        )
        plan = replace(plan, cuts=self._ragged.cuts(dataset, spec))
        return self._limited(plan, batch_size)

    def _limited(self, plan: BatchPlan, batch_size: int) -> BatchPlan:
        """The plan with the limits on the rows of a body.

        Raises
        ------
        TooLarge
            Not even a single row may be sent, or the order of so many rows would take too much memory.
        """
        self.check_count(batch_size)

        def refusal(rows: int, estimated: bool = False) -> TooLarge | None:
            try:
                if estimated or not plan.ragged:
                    self._check_bytes(rows, plan._body(rows))
                self._check_pieces(rows, plan.fields)
            except TooLarge as error:
                return error
            return None

        def most(estimated: bool) -> int:
            return bisect_left(range(1, batch_size + 1), True, key=lambda rows: refusal(rows, estimated) is not None)

        whole, guessed = refusal(batch_size), refusal(batch_size, estimated=True)
        if guessed is not None and plan.order.packed is not None:
            # Parts of a packed batch are not sent.
            raise guessed
        if guessed is None:
            return plan
        if (single := refusal(1)) is not None:
            raise single
        return replace(
            plan,
            max_rows=most(estimated=False),
            part_rows=max(1, most(estimated=True)),
            refusal=whole.detail if whole else "",
        )

    def rows(self, dataset: Dataset, chosen: Sequence[Field], rows: Int64s, lease: Callable[[int], Bytes]) -> Bytes:
        """Read the given rows into one body, in a leased buffer.

        Parameters
        ----------
        rows : (n,) int64
            Row ids, in any order.
        lease : callable
            Takes a number of bytes and returns a uint8 buffer of this size.

        Raises
        ------
        TooLarge
        """
        about, fields = {"epoch": "0", "batches": "1"}, each_row(chosen)
        expected = _expected(self.reader, fields, len(rows))
        self._check_bytes(len(rows), body_of(dataset, fields, len(rows), about, [], expected))
        self._check_pieces(len(rows), fields)
        limit = self._settings.max_body_bytes
        return _gathered(self.reader, dataset, fields, [_Wanted(0, rows)], about, limit, lease)

    def check_count(self, rows: int) -> None:
        """Refuse more rows than one response may have.

        Raises
        ------
        TooLarge
        """
        if rows > self._settings.max_rows:
            raise TooLarge(
                f"{rows} rows are more than the limit of {self._settings.max_rows} per response (H5FEED_MAX_ROWS)"
            )

    def _check_bytes(self, rows: int, body: Body) -> None:
        limit = self._settings.max_body_bytes
        if body.nbytes > limit:
            raise _too_many_bytes(rows, body.nbytes, limit)

    def _check_pieces(self, samples: int, fields: Sequence[SampledField]) -> None:
        """Check what so many samples cost beside their bytes."""
        limit = self._settings.max_body_bytes
        self.check_count(samples)
        for field in fields:
            rows = samples * field.rows_per_sample
            self.check_count(rows)
            if field.crop is not None and self._check_crop_pieces(rows, field):
                continue
            for segment in field.column.segments:
                array = segment.array
                if segment.transposed and can_be_sliced(segment):
                    self._check_box_pieces(rows, field.name, pieces_of_box(segment.as_row, segment.row_lengths))
                    continue
                if rows * array.cells > MAX_PIECES:
                    raise TooLarge(
                        f"{rows} rows of {field.name!r} lie in {rows * array.cells} parts of chunks, more than the "
                        f"limit of {MAX_PIECES} per response: request at most "
                        f"{max(1, MAX_PIECES // array.cells)} rows at once"
                    )
                if rows * array.stored_row_bytes > 2 * limit:
                    raise TooLarge(
                        f"{rows} records that contain {field.name!r} have {rows * array.stored_row_bytes} bytes, more "
                        f"than the limit of {2 * limit} read per response (twice H5FEED_MAX_BODY_BYTES): request "
                        "fewer rows at once"
                    )
                table = array.shape[:1] if array.record else array.shape
                if array.chunk_shape is None or (not array.filters and array.chunk_shape[1:] == table[1:]):
                    continue
                itemsize = array.record[0] if array.record else np.dtype(array.dtype).itemsize
                chunk = math.prod(array.chunk_shape) * itemsize
                if chunk > limit:
                    raise TooLarge(
                        f"the chunks of {field.name!r} have {chunk} bytes, more than the limit of {limit} "
                        "(H5FEED_MAX_BODY_BYTES)"
                    )

    def _check_crop_pieces(self, rows: int, field: SampledField) -> bool:
        """Check what parts of so many rows of a field cost; returns False if whole rows are read for them."""
        assert field.crop is not None
        if field.column.images is not None or not all(map(is_cut, field.column.segments)):
            return False
        each = max(pieces_of_box(segment.array, field.crop) for segment in field.column.segments)
        self._check_box_pieces(rows, field.name, each)
        return True

    def _check_box_pieces(self, rows: int, name: str, each: int) -> None:
        """Check that so many rows, which lie in at most `each` pieces, are not too many."""
        if rows * each > MAX_PIECES:
            raise TooLarge(
                f"{rows} rows of {name!r} lie in {rows * each} parts of chunks or ranges, more than the limit "
                f"of {MAX_PIECES} per response: request at most {max(1, MAX_PIECES // each)} at once"
            )


def _too_many_bytes(rows: int, nbytes: int, limit: int) -> TooLarge:
    if rows == 1:
        return TooLarge(
            f"a single row has {nbytes} bytes, more than the limit of {limit} per response: start the server with a "
            "larger H5FEED_MAX_BODY_BYTES, or request fewer fields"
        )
    return TooLarge(
        f"{rows} rows have {nbytes} bytes, more than the limit of {limit} per response (H5FEED_MAX_BODY_BYTES): "
        f"request at most {max(1, limit // max(1, nbytes // max(1, rows)))} rows at once, or fewer fields"
    )


def _take(array: npt.NDArray[Any], rows: Int64s, out: npt.NDArray[Any]) -> None:
    """Copy rows of an array in memory into a tensor of several bodies: ``out[i] = array[rows[i]]``."""
    if array[:1].nbytes <= _TINY_ROW_BYTES:
        out[...] = array[rows]
        return
    take = array.take
    for wanted, place in zip(rows, out, strict=True):
        # The rows are known to exist. "clip" avoids the buffer that "raise" needs to leave `out` intact on errors.
        take(wanted, 0, place, "clip")


class _Wanted(NamedTuple):
    """A batch to read: its index, its row ids, (n,) int64, and the weights of its rows, (n,) float32. If it has packed
    rows, also these; if rows are cropped, where their parts begin, (n, cropped axes) int64."""

    number: int
    rows: Int64s
    weight: npt.NDArray[np.float32] | None = None
    packed: PackedRows | None = None
    starts: Int64s | None = None

    @property
    def extra(self) -> list[Tensor]:
        """The tensors beside row ids and fields."""
        offsets = None if self.packed is None else self.packed.offsets
        named = ((WEIGHT, self.weight), (ROWS + OFFSETS, offsets), (CROP, self.starts))
        return [Tensor(name, array.dtype, array.shape) for name, array in named if array is not None]


def _gathered(
    reader: Reader,
    dataset: Dataset,
    fields: Sequence[SampledField],
    wanted: Sequence[_Wanted],
    about: Mapping[str, str],
    max_bytes: int,
    lease: Callable[[int], Bytes],
    cuts: Mapping[str, Cut] = NO_CUTS,
) -> Bytes:
    """Read bodies with ragged fields, back to back, into a leased buffer.

    The size of a body depends on the lengths of its ragged rows. If the lengths are not known in advance, these rows
    are read first.

    Raises
    ------
    TooLarge
        One of the bodies exceeds `max_bytes`.
    """
    lists = [lists_of(reader, fields, one.rows, cuts, one.packed) for one in wanted]
    bodies = []
    for one, own_lists in zip(wanted, lists, strict=True):
        bodies.append(body_of(dataset, fields, len(one.rows), about, one.extra, lengths_of(own_lists)))
        if bodies[-1].nbytes > max_bytes:
            raise _too_many_bytes(len(one.rows), bodies[-1].nbytes, max_bytes)
    buffer = lease(sum(body.nbytes for body in bodies))
    begin = 0
    for one, own_lists, body in zip(wanted, lists, bodies, strict=True):
        tensors = body.place(buffer[begin : begin + body.nbytes], one.number)
        begin += body.nbytes
        tensors[ROWS][...] = one.rows
        if one.weight is not None:
            tensors[WEIGHT][...] = one.weight
        if one.packed is not None:
            tensors[ROWS + OFFSETS][...] = one.packed.offsets
        if one.starts is not None:
            tensors[CROP][...] = one.starts
        read_fields(reader, fields, one.rows, own_lists, tensors, one.starts)
    return buffer


class _List(NamedTuple):
    """A ragged field of some rows.

    Attributes
    ----------
    items : (n,) array or None
        None: they are not read yet.
    offsets : (k + 1,) int64
        Where those of each row begin.
    skipped : (k,) int64 or None
        How many items before those are left out; None: all items of the rows are there.
    """

    items: npt.NDArray[Any] | None
    offsets: Int64s
    skipped: Int64s | None = None


Lists = Mapping[str, _List]


def lists_of(
    reader: Reader,
    fields: Sequence[SampledField],
    rows: Int64s,
    cuts: Mapping[str, Cut] = NO_CUTS,
    packed: PackedRows | None = None,
) -> Lists:
    """Read the ragged fields whose offsets are not known without their items.

    Parameters
    ----------
    cuts : mapping of str to Cut
        Fields whose longer rows are cut.
    packed : PackedRows, optional
        Which items of the rows are wanted, in all fields.
    """
    lists: dict[str, _List] = {}
    for field in (field for field in fields if field.is_ragged):
        own = field.flat_rows(rows)
        known = reader.list_offsets(field.column, own)
        items, offsets = reader.read_ragged(field.column, own) if known is None else (None, known)
        spans = None
        if packed is not None:
            spans = Spans(packed.begins, packed.lengths)
        elif field.name in cuts:
            spans = cuts[field.name].spans(np.diff(offsets))
        if spans is None:
            lists[field.name] = _List(items, offsets)
        else:
            taken = None if items is None else spans.taken(items, offsets)
            lists[field.name] = _List(taken, spans.offsets, spans.skipped)
    return lists


def lengths_of(lists: Lists) -> dict[str, int]:
    """Number of items of each ragged field."""
    return {name: int(one.offsets[-1]) for name, one in lists.items()}


def read_fields(
    reader: Reader,
    fields: Sequence[SampledField],
    rows: Int64s,
    lists: Lists,
    tensors: Mapping[str, npt.NDArray[Any]],
    starts: Int64s | None = None,
) -> None:
    """Read rows of fields into the tensors of a body. `lists` is from `lists_of`, for the same fields and rows.
    `starts` is where the parts of the rows begin, if some fields are cropped."""
    for field in fields:
        out = tensors[field.name]
        if field.has_mask:
            field.put_mask(rows, tensors[field.name + MASK])
        if not field.is_ragged:
            field.read(reader, rows, out, starts)
            continue
        items, offsets, skipped = lists[field.name]
        tensors[field.offsets_name][...] = offsets
        if items is None:
            reader.read_lists(field.column, field.flat_rows(rows), offsets, out, skipped)
        else:
            out[...] = items


def _expected(reader: Reader, fields: Sequence[SampledField], rows: int) -> dict[str, int]:
    """Estimated number of items in `rows` rows of each ragged field."""
    return {
        field.name: rows * field.rows_per_sample * reader.typical_items(field.column)
        for field in fields
        if field.is_ragged
    }


def body_of(
    dataset: Dataset,
    fields: Sequence[SampledField],
    rows: int,
    about: Mapping[str, str],
    extra: Sequence[Tensor],
    lengths: Mapping[str, int],
) -> Body:
    """The layout of a body.

    Parameters
    ----------
    rows : int
        Number of rows.
    about : mapping of str to str
        Additional metadata.
    extra : sequence of Tensor
        Additional tensors.
    lengths : mapping of str to int
        Number of items of each ragged field.

    Raises
    ------
    BadParameter
        A field has a reserved name.
    """
    tensors = [Tensor(ROWS, np.dtype("<i8"), (rows,)), *extra]
    shared: set[str] = set()
    for field in fields:
        if field.is_ragged:
            dtype = np.dtype("|u1") if field.is_text else field.dtype
            tensors.append(Tensor(field.name, dtype, (lengths[field.name],)))
            # Values and column indices of sparse rows share them.
            if field.field.offsets is None or field.field.offsets not in shared:
                tensors.append(Tensor(field.offsets_name, np.dtype("<i8"), (rows * field.rows_per_sample + 1,)))
                shared.add(field.offsets_name)
        else:
            shape = (rows, *field.sample_shape)
            tensors.append(Tensor(field.name, field.dtype, shape, is_bfloat16=field.column.is_bfloat16))
        if field.has_mask:
            tensors.append(Tensor(field.name + MASK, np.dtype("|b1"), (rows, *field.extra)))
    if len({"__metadata__", *(tensor.name for tensor in tensors)}) <= len(tensors):
        masks = [field.name + MASK for field in fields if field.has_mask]
        raise BadParameter(f"a field may not be named {', '.join([ROWS, WEIGHT, CROP, *masks])} or __metadata__")
    return Body(tensors, {"dataset": dataset.name, "revision": dataset.revision, **about})
