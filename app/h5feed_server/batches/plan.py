"""A plan of batches: everything that is known about an order before any data is read.

A body is filled in three steps: rows of the split → their order → rows of every field, in a recycled buffer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.order import BatchGrid
from h5feed.stored.byte_cache import ByteCache
from h5feed.wire import CROP, OFFSETS, ROWS, WEIGHT, Body, Tensor

from ..catalog.dataset import Dataset
from ..sharing.slots import Slots
from ..storage.objects.object_file import ObjectFile
from ..storage.objects.store import ObjectStore
from ..storage.reader import Reader
from .bodies import Wanted, body_of, expected_items, gathered
from .crops import Crops
from .cutting import Cut, Spans
from .joins import Joined
from .order import Order
from .sampled import SampledField
from .upcoming import Looked, Upcoming

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_TINY_ROW_BYTES = 64
"""Rows up to this size in bytes, such as labels, are taken for several batches by one call. One more copy of them is
cheaper than a call for each batch."""

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
        return self.body_of_rows(self.grid.batch_size)

    @cached_property
    def tail(self) -> Body:
        """Body of the last batch."""
        batches = self.grid.batches
        return self.body_of_rows(self.grid.size(batches - 1)) if batches else self.full

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

    def _gathered(self, wanted: Sequence[Wanted], lease: Callable[[int], Bytes]) -> Bytes:
        return gathered(self.reader, self.dataset, self.fields, wanted, self.about, self.max_bytes, lease, self.cuts)

    def _wanted(self, index: int, part: slice = slice(None)) -> Wanted:
        """What batch `index` has, or a part of its rows."""
        together, are_real = self._rows(index, 1)
        rows, real = together[0, part], are_real[0, part]
        weight = real.astype("<f4") if self.padded else None
        if self.order.packed is None:
            starts = self._starts(index, 1)
            return Wanted(index, rows, weight, starts=None if starts is None else starts[0, part])
        packed = self.order.unpacked(rows)
        if weight is not None:
            weight = np.repeat(weight, np.diff(packed.offsets))
        return Wanted(index, packed.rows, weight, packed)

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
                    field.put_mask(rows, tensors[field.mask_name])
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

    def body_of_rows(self, rows: int) -> Body:
        extra = [] if self.order.packed is not None else self.extra(rows)
        items = expected_items(self.reader, self.fields, rows)
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


def _take(array: npt.NDArray[Any], rows: Int64s, out: npt.NDArray[Any]) -> None:
    """Copy rows of an array in memory into a tensor of several bodies: ``out[i] = array[rows[i]]``."""
    if array[:1].nbytes <= _TINY_ROW_BYTES:
        out[...] = array[rows]
        return
    take = array.take
    for wanted, place in zip(rows, out, strict=True):
        # The rows are known to exist. "clip" avoids the buffer that "raise" needs to leave `out` intact on errors.
        take(wanted, 0, place, "clip")


@dataclass(frozen=True)
class OtherBodies:
    """A plan whose batches are sent in bodies of another kind.

    Parameters
    ----------
    plan : BatchPlan
    """

    plan: BatchPlan

    @property
    def dataset(self) -> Dataset:
        return self.plan.dataset

    @property
    def revisions(self) -> str:
        return self.plan.revisions

    @property
    def is_pinned(self) -> bool:
        return self.plan.is_pinned

    def count_rows(self, start: int, stop: int) -> int:
        """Same as that of `BatchPlan`."""
        return self.plan.count_rows(start, stop)
