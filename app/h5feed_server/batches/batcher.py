"""Batches: everything known of an order before a byte is read, and the filling of bodies from it.

This is where the way of a batch comes together: split rows → order → rows of every field in a recycled buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.order import BatchGrid
from h5feed.wire import OFFSETS, ROWS, WEIGHT, Body, Tensor

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field
from ..jobs.registry import Jobs
from ..settings import Settings
from ..sharing.slots import Slots
from ..splits.compute import Rows
from ..splits.on_request import SplitJobs
from ..splits.order_spec import OrderSpec
from ..splits.splitter import Splitter, balanced_by
from ..storage.byte_cache import ENTRY_BYTES, ByteCache
from ..storage.reader import Reader
from .order import Order

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_PLAN_BYTES = 4096
"""Rough bytes of a plan itself; the rows of its split are counted where they are cached."""


MAX_PIECES = 1 << 20
"""Parts of chunks that one answer may be put together from: each costs more than its bytes."""

_TINY_ROW_BYTES = 64
"""Bytes: rows up to this size, such as labels, cost less by one copy more than by one call for each batch."""


_SEQUENCES = Slots(1, 60.0, "those that order blocks of rows")
"""Sequences are made one after the other: each takes twice its own memory meanwhile."""


class _Pace:
    """Foresees which batch of an order is asked for next, where they are asked for at an even pace.

    One of several workers sees every other batch, or what its connections happen to bring.
    """

    def __init__(self) -> None:
        self._last, self._step = 0, 0

    def after(self, index: int) -> int | None:
        """The one after `index`; None where nobody knows."""
        step, self._last = index - self._last, index
        steady, self._step = step == self._step, step
        return index + step if steady and step > 0 else None


@dataclass(frozen=True)
class BatchPlan:
    """One order of one dataset, cut into batches."""

    dataset: Dataset
    fields: tuple[Field, ...]
    order: Order
    padded: bool
    orders: ByteCache[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]
    reader: Reader
    max_bytes: int
    """Of one answer."""
    is_stored: bool | None = None
    """Whether its rows are those of the stored split of this name; None for all rows."""
    note: str | None = None
    """What one might not expect of the split."""
    replaces: Mapping[str, Mapping[str, int]] | None = None
    """See `Splits`."""
    key: object = dataclass_field(default_factory=object)
    """Stands for this plan in the cache of orders: comparing the whole spec for every batch would cost more."""
    pace: _Pace = dataclass_field(default_factory=lambda: _Pace())

    @property
    def grid(self) -> BatchGrid:
        return self.order.grid

    @cached_property
    def full(self) -> Body:
        """Body of every batch but a smaller last one."""
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
        """Bytes of batches start … stop-1."""
        if stop == start + 1:
            return self.body(start).nbytes
        self.grid.check_range(start, stop)
        return (stop - start - 1) * self.full.nbytes + self.body(stop - 1).nbytes

    @cached_property
    def ragged(self) -> bool:
        """Whether rows have lengths of their own, and so have bodies: `nbytes` is about what they have."""
        return any(field.is_ragged for field in self.fields)

    def filled(self, start: int, stop: int, lease: Callable[[int], Bytes]) -> Bytes:
        """Batches start … stop-1 back to back in a leased buffer."""
        if not self.ragged:
            buffer = lease(self.nbytes(start, stop))
            self.fill(start, stop, buffer)
            self._read_ahead(start)
            return buffer
        about = {"epoch": str(self.order.spec.epoch), "batches": str(self.grid.batches)}
        wanted = []
        for index in range(start, stop):
            rows, real = self._rows(index, 1)
            wanted.append(_Wanted(index, rows[0], real[0].astype("<f4") if self.padded else None))
        return _gathered(self.reader, self.dataset, self.fields, wanted, about, self.max_bytes, lease)

    def fill(self, start: int, stop: int, buffer: Bytes) -> None:
        """Write batches start … stop-1 back to back into `buffer`, (nbytes(start, stop),) uint8."""
        kept = [(field, self.reader.whole(field.column)) for field in self.fields]
        begin = 0
        while start < stop:
            # A run of equal bodies whose order was computed by one call.
            together = self.order.batches_at_once
            body = self.body(start)
            after = min(stop, start - start % together + together)
            if body is not self.tail:
                after = min(after, self.grid.batches - 1)
            count = after - start
            end = begin + count * body.nbytes
            rows, real = self._rows(start, count)
            tensors = body.place_many(buffer[begin:end], start, count)
            tensors[ROWS][...] = rows
            if self.padded:
                tensors[WEIGHT][...] = real
            for field, array in kept:
                outs = tensors[field.name]
                if array is not None:
                    _take(array, rows, outs)
                    continue
                for wanted, out in zip(rows, outs, strict=True):
                    self.reader.read_from_source(field.column, wanted, out)
            begin = end
            start = after

    def _read_ahead(self, start: int) -> None:
        """Have the chunks decoded from which the batch will be read that is asked for next, by the look of it."""
        in_chunks = [field for field in self.fields if field.block_rows > 1]
        upcoming = self.pace.after(start) if in_chunks else None
        if upcoming is not None and upcoming < self.grid.batches:
            rows, _ = self._rows(upcoming, 1)
            for field in in_chunks:
                self.reader.read_ahead(field.column, rows[0])

    def _rows(self, index: int, count: int) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Row ids of `count` equal batches, (count, rows), all from one call of the order."""
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
        if self.order.spec.window is None:
            return None

        def compute() -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
            with _SEQUENCES.acquire():
                return self.order.sequence(), np.zeros(0, np.bool_)

        return self.orders.get((self.key, "sequence"), compute, lambda value: value[0].nbytes)[0]

    def _body(self, rows: int) -> Body:
        spec = self.order.spec
        about = {"epoch": str(spec.epoch), "batches": str(self.grid.batches)}
        weight = [Tensor(WEIGHT, np.dtype("<f4"), (rows,))] if self.padded else []
        return _body(self.dataset, self.fields, rows, about, weight, _expected(self.reader, self.fields, rows))


class Batcher:
    """Makes plans and fills bodies; one per process.

    Parameters
    ----------
    reader : Reader
    folder : CacheFolder
        Keeps splits.
    jobs : Jobs
        Compute those that take long.
    """

    def __init__(self, settings: Settings, catalog: Catalog, reader: Reader, folder: CacheFolder, jobs: Jobs) -> None:
        self._settings = settings
        self._catalog = catalog
        self.reader = reader
        self.splitter = Splitter(settings, reader, folder)
        self.split_jobs = SplitJobs(catalog, self.splitter, jobs)
        self._orders: ByteCache[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]] = ByteCache(
            settings.order_cache_bytes, settings.read_timeout
        )
        self._plans: ByteCache[BatchPlan] = ByteCache(_PLAN_BYTES * 256, settings.read_timeout)

    def drop_old(self, seconds: float) -> None:
        """Let go of all that can be read or computed again, and was not asked for in so many seconds."""
        self._orders.drop_old(seconds)
        self._plans.drop_old(seconds)
        self.splitter.drop_old(seconds)
        self.reader.drop_old(seconds)

    def plan(self, name: str, spec: OrderSpec, batch_size: int, revision: str | None) -> BatchPlan:
        """The plan of an order.

        Raises
        ------
        FeedError
            Whatever is wrong with the request, before anything is read.
        InProgress
            A job has yet to find the rows of the split.
        """
        dataset = self._catalog.dataset(name, revision)
        key = (dataset.name, dataset.revision, dataset.identity, spec, batch_size)
        return self._plans.get(key, lambda: self._plan(dataset, spec, batch_size), lambda _: _PLAN_BYTES)

    def _plan(self, dataset: Dataset, spec: OrderSpec, batch_size: int) -> BatchPlan:
        fields = dataset.chosen(spec.fields, spec.encoded)

        def split_rows() -> Rows | None:
            return None if spec.split == "all" else self.splitter.splits(dataset, spec.split_spec).of(spec.split)

        about: dict[str, Any] = {}
        if spec.split != "all":
            splits = self.split_jobs.splits(dataset, spec.split_spec)
            about = {"is_stored": spec.split in splits.stored, "note": splits.note, "replaces": splits.replaces}
        if spec.balance:
            by, bins = balanced_by(dataset, spec)
            self.split_jobs.strata(dataset, by, bins=bins)
        listed = split_rows()
        rows = dataset.rows if listed is None else len(listed)
        if spec.limit is not None:
            rows = min(rows, spec.limit)
        resampled = None
        if spec.draws:
            resampled = partial(self.splitter.resampled, dataset, spec)
            # What is wrong with it is said now, and not in the middle of an epoch.
            resampled()
            if spec.epoch_rows is not None and not rows:
                raise BadParameter(f"epoch_rows={spec.epoch_rows}: the split has no rows to draw from")
            rows = spec.epoch_rows or rows
        if spec.window is not None and 4 * rows + ENTRY_BYTES > self._settings.order_cache_bytes:
            raise TooLarge(
                f"window={spec.window}: a list of {rows} rows takes {4 * rows} bytes, more than "
                f"H5FEED_ORDER_CACHE_BYTES = {self._settings.order_cache_bytes}"
            )
        last = spec.last or ("keep" if spec.shards == 1 else "pad")
        grid = BatchGrid(rows, batch_size, spec.shard, spec.shards, last)
        order = Order(spec, split_rows, grid, dataset.block_rows, resampled)
        limit = self._settings.max_body_bytes
        plan = BatchPlan(dataset, fields, order, last == "pad", self._orders, self.reader, limit, **about)
        self._check_size(batch_size, plan.full, fields)
        return plan

    def rows(self, dataset: Dataset, fields: Sequence[Field], rows: Int64s, lease: Callable[[int], Bytes]) -> Bytes:
        """The body of those rows, in a leased buffer.

        Raises
        ------
        TooLarge
        """
        about = {"epoch": "0", "batches": "1"}
        expected = _expected(self.reader, fields, len(rows))
        self._check_size(len(rows), _body(dataset, fields, len(rows), about, [], expected), fields)
        limit = self._settings.max_body_bytes
        return _gathered(self.reader, dataset, fields, [_Wanted(0, rows, None)], about, limit, lease)

    def check_count(self, rows: int) -> None:
        """Refuse more rows than one answer may have.

        Raises
        ------
        TooLarge
        """
        if rows > self._settings.max_rows:
            raise TooLarge(
                f"{rows} rows are more than the {self._settings.max_rows} that one answer may have (H5FEED_MAX_ROWS)"
            )

    def _check_size(self, rows: int, body: Body, fields: Sequence[Field]) -> None:
        limit = self._settings.max_body_bytes
        self.check_count(rows)
        if body.nbytes > limit:
            per_row = max(1, body.nbytes // max(1, rows))
            raise TooLarge(
                f"{rows} rows make {body.nbytes} bytes, more than the {limit} of one answer (H5FEED_MAX_BODY_BYTES): "
                f"ask for at most {max(1, limit // per_row)} rows at once, or for fewer fields"
            )
        for field in fields:
            for array in (segment.array for segment in field.column.segments):
                if rows * array.cells > MAX_PIECES:
                    raise TooLarge(
                        f"{rows} rows of {field.name!r} lie in {rows * array.cells} parts of chunks, more than the "
                        f"{MAX_PIECES} of one answer: ask for at most {max(1, MAX_PIECES // array.cells)} rows at once"
                    )
                if rows * array.stored_row_bytes > 2 * limit:
                    raise TooLarge(
                        f"{rows} records with {field.name!r} in them have {rows * array.stored_row_bytes} bytes, more "
                        f"than the {2 * limit} that are read for one answer (twice H5FEED_MAX_BODY_BYTES): ask for "
                        "fewer rows at once"
                    )
                table = array.shape[:1] if array.record else array.shape
                if array.chunk_shape is None or (not array.filters and array.chunk_shape[1:] == table[1:]):
                    continue
                itemsize = array.record[0] if array.record else np.dtype(array.dtype).itemsize
                chunk = math.prod(array.chunk_shape) * itemsize
                if chunk > limit:
                    raise TooLarge(
                        f"the chunks of {field.name!r} have {chunk} bytes, more than the {limit} allowed "
                        "(H5FEED_MAX_BODY_BYTES)"
                    )


def _take(array: npt.NDArray[Any], rows: Int64s, out: npt.NDArray[Any]) -> None:
    """Rows of an array in memory into a tensor of several bodies: ``out[i] = array[rows[i]]``."""
    if array[:1].nbytes <= _TINY_ROW_BYTES:
        out[...] = array[rows]
        return
    take = array.take
    for wanted, place in zip(rows, out, strict=True):
        # The rows are known to be there: "clip" spares the buffering that "raise" needs to leave `out` intact.
        take(wanted, 0, place, "clip")


class _Wanted(NamedTuple):
    """A batch to be put together: its number, row ids, and weights."""

    number: int
    rows: Int64s
    weight: npt.NDArray[np.float32] | None


def _gathered(
    reader: Reader,
    dataset: Dataset,
    fields: Sequence[Field],
    wanted: Sequence[_Wanted],
    about: Mapping[str, str],
    max_bytes: int,
    lease: Callable[[int], Bytes],
) -> Bytes:
    """Bodies of any lengths back to back: where nothing else tells how long they are, ragged rows are read first.

    Raises
    ------
    TooLarge
        One of the bodies has more than `max_bytes`.
    """
    ragged = [field for field in fields if field.is_ragged]
    lists = [{field.name: _lists(reader, field, one.rows) for field in ragged} for one in wanted]
    bodies = []
    for one, own_lists in zip(wanted, lists, strict=True):
        weight = [] if one.weight is None else [Tensor(WEIGHT, np.dtype("<f4"), one.rows.shape)]
        lengths = {name: int(offsets[-1]) for name, (_, offsets) in own_lists.items()}
        bodies.append(_body(dataset, fields, len(one.rows), about, weight, lengths))
        if bodies[-1].nbytes > max_bytes:
            raise TooLarge(
                f"these {len(one.rows)} rows make {bodies[-1].nbytes} bytes, more than the {max_bytes} of one answer "
                "(H5FEED_MAX_BODY_BYTES): ask for fewer rows at once, or for fewer fields"
            )
    buffer = lease(sum(body.nbytes for body in bodies))
    begin = 0
    for one, own_lists, body in zip(wanted, lists, bodies, strict=True):
        tensors = body.place(buffer[begin : begin + body.nbytes], one.number)
        begin += body.nbytes
        tensors[ROWS][...] = one.rows
        if one.weight is not None:
            tensors[WEIGHT][...] = one.weight
        for field in fields:
            if field.is_ragged:
                flat, offsets = own_lists[field.name]
                tensors[field.name + OFFSETS][...] = offsets
                if flat is None:
                    reader.read_lists(field.column, one.rows, offsets, tensors[field.name])
                else:
                    tensors[field.name][...] = flat
            else:
                reader.read(field.column, one.rows, tensors[field.name])
    return buffer


def _lists(reader: Reader, field: Field, rows: Int64s) -> tuple[npt.NDArray[Any] | None, Int64s]:
    """Ragged rows and where each begins; None for the rows where that is known before they are read."""
    offsets = reader.list_offsets(field.column, rows)
    return reader.read_ragged(field.column, rows) if offsets is None else (None, offsets)


def _expected(reader: Reader, fields: Sequence[Field], rows: int) -> dict[str, int]:
    """Items of each ragged field that so many rows may have."""
    return {field.name: rows * reader.typical_items(field.column) for field in fields if field.is_ragged}


def _body(
    dataset: Dataset,
    fields: Sequence[Field],
    rows: int,
    about: Mapping[str, str],
    extra: Sequence[Tensor],
    lengths: Mapping[str, int],
) -> Body:
    """A body of so many rows; `lengths` are the items of its ragged fields."""
    tensors = [Tensor(ROWS, np.dtype("<i8"), (rows,)), *extra]
    for field in fields:
        if field.is_ragged:
            dtype = np.dtype("|u1") if field.is_text else field.dtype
            tensors.append(Tensor(field.name, dtype, (lengths[field.name],)))
            tensors.append(Tensor(field.name + OFFSETS, np.dtype("<i8"), (rows + 1,)))
        else:
            shape = (rows, *field.sample_shape)
            tensors.append(Tensor(field.name, field.dtype, shape, is_bfloat16=field.column.is_bfloat16))
    if len({"__metadata__", *(tensor.name for tensor in tensors)}) <= len(tensors):
        raise BadParameter(f"a field may not be named {ROWS}, {WEIGHT} or __metadata__")
    return Body(tensors, {"dataset": dataset.name, "revision": dataset.revision, **about})
