"""Fetch through local caches: take the rows that are cached, and request the others from the server.

Caches keep whole rows of datasets. Samples are made of them: of the row of the same number, of rows around it, or of
rows of joined datasets, and sometimes of a part of each. Which rows that are is told by the server, without the rows.
So all orders of a dataset share its cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..cache.folder import Piece, RowCache
from ..cache.lists import AnyStore, Lists, ListStore, Values
from ..cache.store import Bools, FieldStore, Int64s
from ..errors import BadAnswer, TooLarge
from ..net import trace
from ..offsets import MASK, Offsets
from ..plan import Plan
from ..wire import CROP, EPISODE, ITEMS, OFFSETS, ROWS, WEIGHT, Tensor
from .leased import leased

TAKE_BYTES = 64 << 20
"""Missing rows are requested by so many bytes at once, or one at a time."""

Take = Callable[[Int64s, Sequence[str], threading.Event], dict[str, npt.NDArray[Any]]]
"""Fetches rows of some fields, in the given order, without duplicates."""

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Origin:
    """A dataset whose rows samples are made of.

    Attributes
    ----------
    cache : RowCache
    take : callable
        Fetches single rows.
    tensor : str
        The tensor with the row of each sample.
    """

    cache: RowCache
    take: Take
    tensor: str = ROWS


@dataclass(frozen=True)
class MadeOf:
    """What a field of samples is made of.

    Attributes
    ----------
    origin : str
        Name of the dataset; empty: that of the plan.
    field : str
        Name of the field there.
    shape : tuple of int or None
        Of its rows; None: they differ in length.
    offsets : int or tuple of int
        Its rows, relative to the row of the sample.
    crop : tuple of int or None
        Lengths of the part of each row, along its first axes; None: all of it.
    """

    origin: str
    field: str
    shape: tuple[int, ...] | None
    offsets: Offsets = 0
    crop: tuple[int, ...] | None = None

    def is_other_form_of(self, other: MadeOf) -> bool:
        """Whether one is the files of the images that the other has decoded."""
        same = (self.origin, self.field) == (other.origin, other.field)
        return same and (self.shape is None) != (other.shape is None)

    @property
    def rows_per_sample(self) -> int:
        return 1 if isinstance(self.offsets, int) else len(self.offsets)


def cached_fetch(
    fetch: Fetch[Batch],
    plan: Plan,
    origins: Mapping[str, Origin],
    made_of: Mapping[str, MadeOf],
    *,
    fetch_ids: Fetch[Batch],
    fetch_fields: Callable[[Sequence[str]], Fetch[Batch]],
    pool: BufferPool,
) -> Fetch[Batch]:
    """Wrap `fetch` to take rows from caches if they are there.

    The batches are the same, byte for byte, but lists are not cut to ``max_length``. Rows from the server are stored.
    Sparse rows are not cached: they are fetched separately in every epoch.

    Parameters
    ----------
    fetch : callable
        Fetches blocks of the plan from the server, see `readahead.ReadAhead`.
    origins : mapping of str to Origin
        The datasets by name; that of the plan is ``""``.
    made_of : mapping of str to MadeOf
        What each field that is cached is made of, by its name in batches.
    fetch_ids : callable
        Fetches blocks of `Plan.of_row_ids`.
    fetch_fields : callable
        ``fetch_fields(names)`` fetches blocks with these fields only.
    pool : BufferPool
        Provides the memory of the batches.
    """
    fields = _fields_of(plan, origins, made_of)
    if not fields:
        return fetch
    others = [*plan.frame.sparse]
    return _CachedFetch(fetch, plan, origins, fields, fetch_ids, fetch_fields(others) if others else None, pool)


def takes_of(plan: Plan, made_of: Mapping[str, MadeOf]) -> int:
    """The most requests that fetch the missing rows of a block."""
    found = 0
    for tensor in plan.tensors:
        if (made := made_of.get(tensor.name)) is not None:
            row_bytes = _sample_bytes(plan) if made.shape is None else math.prod(made.shape) * tensor.dtype.itemsize
            samples = plan.batch_size * max(1, plan.block_bytes // max(1, plan.batch_bytes))
            found += -(-samples * made.rows_per_sample // _at_once(plan, row_bytes))
            # Lists may be longer than they are on average.
            found += made.shape is None
    return found


def _sample_bytes(plan: Plan) -> int:
    """Bytes of a sample, on average if lists differ in length."""
    return plan.batch_bytes // plan.batch_size


@dataclass(frozen=True)
class _Field:
    """A field that is cached, by its name in batches, with the dtype and shape that it has there."""

    name: str
    made: MadeOf
    store: AnyStore
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def is_list(self) -> bool:
        """Whether its rows differ in length."""
        return self.made.shape is None

    def values(self, came: Columns, name: str) -> Values:
        """The rows of the field in what has come from the server, where it has this name."""
        return Lists(came[name], came[name + OFFSETS]) if self.is_list else came[name]

    @property
    def key(self) -> tuple[str, str]:
        """What is cached: the dataset, and its field. Several fields may be made of the same one."""
        return self.made.origin, self.made.field


class _Wanted:
    """A field of the samples of a block, as far as its rows have come.

    Parameters
    ----------
    rows : (k, *extra) int64
        The rows of each sample.

    Attributes
    ----------
    field : _Field
    rows : (n,) int64
        The rows of all samples.
    held : (n,) bool
        Which of them came from the cache.
    """

    def __init__(self, field: _Field, rows: Int64s) -> None:
        self.field, self._samples = field, len(rows)
        self.rows = rows.reshape(-1)
        self.held: Bools = self._cached()
        self._missing = np.flatnonzero(~self.held)

    def _cached(self) -> Bools:
        """Take what is cached; returns `held`."""
        raise NotImplementedError

    def _set(self, places: Int64s, values: Any, rows: Int64s) -> None:
        """Put some of the rows of `values` at these places."""
        raise NotImplementedError

    @property
    def samples_held(self) -> Bools:
        """Which samples are made of cached rows only, (k,)."""
        return np.asarray(self.held.reshape(self._samples, -1).all(axis=1))

    def leave_out(self, samples: Int64s) -> None:
        """Do without the rows of these samples."""
        left_out = np.zeros(self._samples, np.bool_)
        left_out[samples] = True
        missing = ~self.held & ~np.repeat(left_out, self.field.made.rows_per_sample)
        self._missing = np.flatnonzero(missing)

    @property
    def missing(self) -> Int64s:
        """The rows that have not come from the cache; they may repeat."""
        return self.rows[self._missing]

    def put(self, rows: Int64s, values: Values) -> None:
        """Take what is missing from rows that have come, which ascend."""
        at = np.searchsorted(rows, self.missing)
        here = at < len(rows)
        here[here] = rows[at[here]] == self.missing[here]
        self._set(self._missing[here], values, at[here])


class _WantedArrays(_Wanted):
    """A field whose rows have the same shape.

    Parameters
    ----------
    starts : (k, axes) int64 or None
        Where the parts of the rows of each sample begin; None if they are whole.
    out : (k, *extra, *sample) array
        Is filled with the rows.
    """

    def __init__(self, field: _Field, rows: Int64s, starts: Int64s | None, out: npt.NDArray[Any]) -> None:
        self._starts = None if starts is None else np.repeat(starts, field.made.rows_per_sample, axis=0)
        self._out = out.reshape(rows.size, *out.shape[rows.ndim :])
        super().__init__(field, rows)

    def _cached(self) -> Bools:
        store, shape = self.field.store, self.field.made.shape
        assert isinstance(store, FieldStore) and shape is not None
        if self._starts is None:
            return store.take(self.rows, self._out)
        held = store.has(self.rows)
        places = np.flatnonzero(held)
        self._set(places, store.mapped(self.field.dtype, shape), self.rows[places])
        return held

    def _set(self, places: Int64s, values: npt.NDArray[Any], rows: Int64s) -> None:
        if self._starts is None:
            self._out[places] = values[rows]
            return
        lengths = self.field.made.crop
        assert lengths is not None
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            starts = self._starts[place].tolist()
            part = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
            self._out[place] = values[row][part]


class _WantedLists(_Wanted):
    """A field whose rows differ in length.

    Parameters
    ----------
    spans : (k, 2) int64 or None
        Which items of each row: the first, and how many; None: all.
    """

    def __init__(self, field: _Field, rows: Int64s, spans: Int64s | None) -> None:
        if spans is not None and (spans < 0).any():
            raise BadAnswer(f"received items of {field.name!r} with negative numbers")
        self._spans = spans
        self._found: list[npt.NDArray[Any] | None] = []
        super().__init__(field, rows)

    def _cached(self) -> Bools:
        assert isinstance(self.field.store, ListStore)
        self._found = self.field.store.take(self.rows, self._spans)
        return np.array([one is not None for one in self._found], np.bool_)

    def _set(self, places: Int64s, values: Lists, rows: Int64s) -> None:
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            items = values.row(row)
            if self._spans is not None:
                first, count = self._spans[place].tolist()
                if first + count > len(items):
                    raise BadAnswer(f"received a row of {self.field.name!r} that is shorter than its part")
                items = items[first : first + count]
            self._found[place] = items

    def lists(self, begin: int, end: int, pool: BufferPool) -> Lists:
        """Samples begin … end-1, in memory of `pool`."""
        found = [one for one in self._found[begin:end] if one is not None]
        assert len(found) == end - begin
        offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
        (items,) = leased(pool, {"": (self.field.dtype, (int(offsets[-1]),))}).values()
        return Lists(np.concatenate(found, out=items), offsets)


class _CachedFetch:
    """Fetches blocks of a plan, see `cached_fetch`."""

    def __init__(
        self,
        fetch: Fetch[Batch],
        plan: Plan,
        origins: Mapping[str, Origin],
        fields: Sequence[_Field],
        fetch_ids: Fetch[Batch],
        fetch_others: Fetch[Batch] | None,
        pool: BufferPool,
    ) -> None:
        self._fetch = fetch
        self._plan = plan
        self._origins = origins
        self._fields = fields
        self._fetch_ids = fetch_ids
        self._fetch_others = fetch_others
        self._pool = pool
        self._names = [tensor.name for tensor in _widest_first(plan) if tensor.name not in (ROWS, WEIGHT)]
        self._row_ids = origins[""].cache.row_ids
        # The server cuts lists to `max_length`, and packed rows.
        is_cut = plan.is_packed or "max_length" in plan.params
        self._is_each_row = (
            all((one.made.origin, one.made.offsets, one.made.crop) == ("", 0, None) for one in fields)
            and len({one.key for one in fields}) == len(fields)
            and not (is_cut and any(one.is_list for one in fields))
        )
        """Whether samples are the whole rows of the same numbers."""

    def __call__(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        if self._is_each_row and any(field.store.fresh for field in self._fields):
            return self._whole(block, cancelled)
        ids = self._row_ids.batches(self._plan, self._fetch_ids, block, cancelled)
        trace.enter(trace.DECODE)
        ends = np.cumsum([0, *(len(batch.rows) for batch in ids)]).tolist()
        arrays = self._lease(ends[-1], ids[0].weight is not None)
        columns = self._columns(ids, arrays)
        wanted = [self._wanted(field, columns, arrays) for field in self._fields]
        # held: (count,), whether all rows of the sample are cached
        held = np.logical_and.reduce([one.samples_held for one in wanted])
        trace.found(int(np.count_nonzero(held)))
        if self._is_each_row and not held.any():
            return self._whole(block, cancelled)
        cropped = self._cropped_by_server(block, wanted, held, ends, cancelled)
        self._fetch_missing(wanted, cancelled)
        others = self._fetch_others(block, cancelled) if self._fetch_others is not None else [None] * len(ids)
        batches = []
        for batch, other, (begin, end) in zip(ids, others, pairwise(ends), strict=True):
            if batch.index in cropped:
                batches.append(cropped[batch.index])
                continue
            made: dict[str, npt.NDArray[Any]] = {} if other is None else dict(other)
            if self._plan.is_packed:
                made[ROWS + OFFSETS] = np.array(batch[ROWS + OFFSETS])
            for one in wanted:
                if isinstance(one, _WantedLists):
                    lists, name = one.lists(begin, end, self._pool), one.field.name
                    made |= {name: lists.items, name + OFFSETS: lists.offsets}
            fields = {name: made[name] if name in made else arrays[name][begin:end] for name in self._names}
            batches.append(
                Batch(
                    fields,
                    arrays[ROWS][begin:end],
                    arrays[WEIGHT][begin:end] if WEIGHT in arrays else None,
                    index=batch.index,
                    epoch=batch.epoch,
                    revision=batch.revision,
                    sparse=self._plan.frame.sparse,
                )
            )
        return batches

    def _lease(self, count: int, weighted: bool) -> dict[str, npt.NDArray[Any]]:
        """Uninitialised tensors of `count` samples, in one recycled buffer, but none of uncached fields."""
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {ROWS: (np.dtype(np.int64), (count,))}
        kinds |= {field.name: (field.dtype, (count, *field.shape)) for field in self._fields if not field.is_list}
        for name, (dtype, sample) in self._plan.frame.tensors.items():
            if name == CROP or name in self._plan.frame.masks:
                kinds[name] = dtype, (count, *sample)
        if weighted:
            kinds[WEIGHT] = np.dtype(np.float32), (count,)
        return leased(self._pool, kinds)

    def _columns(self, ids: Sequence[Batch], arrays: Mapping[str, npt.NDArray[Any]]) -> Columns:
        """What the server tells of all samples of a block, by name; those that batches have, in their memory."""
        np.concatenate([batch.rows for batch in ids], out=arrays[ROWS])
        columns = {ROWS: arrays[ROWS]}
        for name in ids[0].keys() - {ROWS + OFFSETS}:
            columns[name] = np.concatenate([batch[name] for batch in ids], out=arrays.get(name))
        if WEIGHT in arrays:
            np.concatenate([batch.weight for batch in ids if batch.weight is not None], out=arrays[WEIGHT])
        return columns

    def _wanted(self, field: _Field, columns: Columns, arrays: Mapping[str, npt.NDArray[Any]]) -> _Wanted:
        made, origin = field.made, self._origins[field.made.origin]
        rows: Int64s = columns[origin.tensor]
        if made.offsets != 0:
            steps = np.asarray(made.offsets, np.int64)
            shape = (-1, *[1] * steps.ndim)
            rows = rows.reshape(shape) + steps
            if EPISODE in columns:
                firsts, ends = columns[EPISODE].T
                real, rows = rows, np.clip(rows, firsts.reshape(shape), ends.reshape(shape) - 1)
                np.equal(real, rows, out=arrays[field.name + MASK])
        # As unsigned integers, negative row ids are too large as well.
        if rows.size and int(rows.view(np.uint64).max()) >= origin.cache.rows:
            raise BadAnswer(f"received row ids out of range for the {origin.cache.rows:,} rows of {field.name!r}")
        if field.is_list:
            return _WantedLists(field, rows, columns.get(ITEMS))
        starts = None
        if made.crop is not None and made.shape is not None:
            starts = columns[CROP]
            rooms = np.array(made.shape[: len(made.crop)]) - np.array(made.crop)
            if ((starts < 0) | (starts > rooms)).any():
                raise BadAnswer(f"received crops of {field.name!r} that are not within its rows")
        return _WantedArrays(field, rows, starts, arrays[field.name])

    def _whole(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        """Fetch the whole block from the server and store it."""
        batches = self._fetch(block, cancelled)
        self._origins[""].cache.put(
            [
                Piece(batch.rows, {field.store: field.values(batch, field.name) for field in self._fields})
                for batch in batches
            ]
        )
        return batches

    def _cropped_by_server(
        self, block: Block, wanted: Sequence[_Wanted], held: Bools, ends: Sequence[int], cancelled: threading.Event
    ) -> dict[int, Batch]:
        """Batches of crops that are not made of cached rows, by number: if no more rows can be stored, requesting whole
        rows would be in vain."""
        full = [one for one in wanted if one.field.made.crop and self._origins[one.field.made.origin].cache.is_full]
        if not any(len(one.missing) for one in full):
            return {}
        incomplete = [number for number, (begin, end) in enumerate(pairwise(ends)) if not held[begin:end].all()]
        found: dict[int, Batch] = {}
        for run in np.split(incomplete, np.flatnonzero(np.diff(incomplete) != 1) + 1):
            first, stop = block.start + int(run[0]), block.start + int(run[-1]) + 1
            part = replace(block, start=first, stop=stop, nbytes=(stop - first) * self._plan.batch_bytes)
            found |= {batch.index: batch for batch in self._fetch(part, cancelled)}
        samples = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in incomplete])
        for one in wanted:
            one.leave_out(samples)
        return found

    def _fetch_missing(self, wanted: Sequence[_Wanted], cancelled: threading.Event) -> None:
        """Fetch the rows that are not cached, each once, and store them."""
        missing: dict[tuple[str, str], list[Int64s]] = {}
        for one in wanted:
            if len(one.missing):
                missing.setdefault(one.field.key, []).append(one.missing)
        # Fields that lack the same rows of a dataset are fetched together.
        together: dict[tuple[str, bytes], tuple[Int64s, list[str]]] = {}
        for (origin, field), lists in missing.items():
            rows = np.unique(np.concatenate(lists))
            together.setdefault((origin, rows.tobytes()), (rows, []))[1].append(field)
        for (origin, _), (rows, fields) in together.items():
            those = [one for one in wanted if one.field.made.origin == origin and one.field.made.field in fields]
            for asked, came in self._taken(origin, rows, [one.field for one in those], cancelled):
                values = {one.field.store: one.field.values(came, one.field.made.field) for one in those}
                for one in those:
                    one.put(asked, values[one.field.store])
                self._origins[origin].cache.put([Piece(asked, values)])

    def _taken(
        self, origin: str, rows: Int64s, fields: Sequence[_Field], cancelled: threading.Event
    ) -> Iterator[tuple[Int64s, Columns]]:
        """Rows of fields of a dataset, in parts."""
        names = {field.made.field: field.store for field in fields}
        sizes = [_sample_bytes(self._plan) if isinstance(one, ListStore) else one.row_bytes for one in names.values()]
        start, count = 0, _at_once(self._plan, sum(sizes))
        while start < len(rows):
            asked = rows[start : start + count]
            try:
                came = self._origins[origin].take(asked, list(names), cancelled)
            except TooLarge:
                # These rows are longer than others, or in more chunks than one response may read.
                if len(asked) == 1:
                    raise
                count = len(asked) // 2
                continue
            yield asked, came
            start += len(asked)


def _at_once(plan: Plan, row_bytes: int) -> int:
    """How many rows to request together."""
    return max(1, min(plan.max_rows, min(plan.max_bytes, TAKE_BYTES) // (row_bytes + 8)))


def _widest_first(plan: Plan) -> list[Tensor]:
    return sorted(plan.tensors, key=lambda tensor: -tensor.dtype.itemsize)


def _fields_of(plan: Plan, origins: Mapping[str, Origin], made_of: Mapping[str, MadeOf]) -> list[_Field]:
    """The fields that are cached; none if a cache is of no use."""
    fields = []
    for tensor in _widest_first(plan):
        if (made := made_of.get(tensor.name)) is not None:
            cache = origins[made.origin].cache
            store: AnyStore | None
            if made.shape is None:
                store = cache.list_store(made.field, tensor.dtype)
            else:
                store = cache.store(made.field, tensor.dtype, made.shape)
            if store is None:
                return []
            fields.append(_Field(tensor.name, made, store, tensor.dtype, tensor.shape[1:]))
    return fields
