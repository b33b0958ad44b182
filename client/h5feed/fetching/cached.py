"""Fetch through a local cache: take the rows that are cached, and request the others from the server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..cache.folder import Piece, RowCache
from ..cache.store import FieldStore, Int64s
from ..errors import TooLarge
from ..net import trace
from ..plan import Plan
from ..wire import ROWS, WEIGHT, Tensor
from .leased import leased

Take = Callable[[Int64s, Sequence[str], threading.Event], dict[str, npt.NDArray[Any]]]
"""Fetches rows of some fields, in the given order, without duplicates."""


def cached_fetch(
    fetch: Fetch[Batch],
    cache: RowCache,
    plan: Plan,
    *,
    fetch_fields: Callable[[Sequence[str]], Fetch[Batch]],
    take: Take,
    pool: BufferPool,
) -> Fetch[Batch]:
    """Wrap `fetch` to take rows from `cache` if they are there.

    The batches are the same, byte for byte. Rows from the server are stored. Fields whose rows differ in length (text)
    are not cached: they are fetched separately in every epoch.

    Parameters
    ----------
    fetch : callable
        Fetches blocks of the plan from the server, see `readahead.ReadAhead`.
    fetch_fields : callable
        ``fetch_fields(names)`` is the same for other fields of the same rows; without names it gets only row ids.
    take : callable
        Fetches single rows.
    pool : BufferPool
        Provides the memory of the batches.
    """
    stores = _stores_of(cache, plan)
    if not stores:
        return fetch
    return _CachedFetch(fetch, cache, plan, stores, fetch_fields, take, pool)


class _CachedFetch:
    """Fetches blocks of a plan, see `cached_fetch`.

    Parameters
    ----------
    stores : dict of str to FieldStore
        The store of each cached field.
    """

    def __init__(
        self,
        fetch: Fetch[Batch],
        cache: RowCache,
        plan: Plan,
        stores: dict[str, FieldStore],
        fetch_fields: Callable[[Sequence[str]], Fetch[Batch]],
        take: Take,
        pool: BufferPool,
    ) -> None:
        self._fetch = fetch
        self._cache = cache
        self._plan = plan
        self._stores = stores
        self._take = take
        self._pool = pool
        self._fetch_ids = fetch_fields([])
        flat = _flat_fields(plan)
        self._fetch_flat = fetch_fields(flat) if flat else None
        tensors = _widest_first(plan)
        self._names = [tensor.name for tensor in tensors if tensor.name not in (ROWS, WEIGHT)]
        self._kept = [tensor for tensor in tensors if tensor.name in stores]
        row_bytes = sum(store.row_bytes for store in stores.values())
        self._at_once = max(1, min(plan.max_rows, plan.max_bytes // (row_bytes + 8)))

    def __call__(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        if any(store.fresh for store in self._stores.values()):
            return self._whole(block, cancelled)
        wanted = self._cache.row_ids.batches(self._plan, self._fetch_ids, block, cancelled)
        trace.enter(trace.DECODE)
        count = sum(len(batch.rows) for batch in wanted)
        rows, weight, arrays = _lease(self._pool, count, self._kept, wanted[0].weight is not None)
        np.concatenate([batch.rows for batch in wanted], out=rows)
        # held: (count,), whether all fields of the row are cached
        held = np.logical_and.reduce([store.take(rows, arrays[name]) for name, store in self._stores.items()])
        trace.found(int(np.count_nonzero(held)))
        if not held.any():
            return self._whole(block, cancelled)
        if not held.all():
            self._fetch_missing(rows, arrays, np.flatnonzero(~held), cancelled)
        others = self._fetch_flat(block, cancelled) if self._fetch_flat is not None else [None] * len(wanted)
        batches, begin = [], 0
        for batch, other in zip(wanted, others, strict=True):
            end = begin + len(batch.rows)
            if weight is not None:
                weight[begin:end] = batch.weight
            fields = {
                name: other[name] if other is not None and name in other else arrays[name][begin:end]
                for name in self._names
            }
            batches.append(
                Batch(
                    fields,
                    rows[begin:end],
                    None if weight is None else weight[begin:end],
                    index=batch.index,
                    epoch=batch.epoch,
                    revision=batch.revision,
                    sparse=self._plan.frame.sparse,
                )
            )
            begin = end
        return batches

    def _whole(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        """Fetch the whole block from the server and store it."""
        batches = self._fetch(block, cancelled)
        self._cache.put(
            [Piece(batch.rows, {store: batch[name] for name, store in self._stores.items()}) for batch in batches]
        )
        return batches

    def _fetch_missing(
        self, rows: Int64s, arrays: dict[str, npt.NDArray[Any]], places: Int64s, cancelled: threading.Event
    ) -> None:
        """Fetch the rows at these positions and store them."""
        # distinct: (m,) int64, ascending; origin: (places,), the index of each position's row in it
        distinct, origin = np.unique(rows[places], return_inverse=True)
        start, count = 0, self._at_once
        while start < len(distinct):
            asked = distinct[start : start + count]
            try:
                came = self._take(asked, list(self._stores), cancelled)
            except TooLarge:
                # These rows are longer than others, or in more chunks than one response may read.
                if len(asked) == 1:
                    raise
                count = len(asked) // 2
                continue
            here = np.flatnonzero((origin >= start) & (origin < start + len(asked)))
            for name, array in arrays.items():
                array[places[here]] = came[name][origin[here] - start]
            self._cache.put([Piece(asked, {store: came[name] for name, store in self._stores.items()})])
            start += len(asked)


def _widest_first(plan: Plan) -> list[Tensor]:
    return sorted(plan.tensors, key=lambda tensor: -tensor.dtype.itemsize)


def _flat_fields(plan: Plan) -> list[str]:
    """Fields whose rows differ in length, which are not cached. Image files that are decoded here do not count."""
    frame = plan.frame
    flat = (name for name in frame.fields if name in frame.sparse or name in frame.flat)
    return [name for name in flat if name not in plan.decoding]


def _stores_of(cache: RowCache, plan: Plan) -> dict[str, FieldStore]:
    """The store of each field that can be cached; empty if the cache is of no use."""
    uncached = {ROWS, WEIGHT, *plan.frame.flat, *plan.frame.offsets} - plan.decoding.keys()
    stores: dict[str, FieldStore] = {}
    for tensor in _widest_first(plan):
        if tensor.name not in uncached:
            store = cache.store(tensor.name, tensor.dtype, tensor.shape[1:])
            if store is None:
                return {}
            stores[tensor.name] = store
    return stores


def _lease(
    pool: BufferPool, count: int, tensors: Sequence[Tensor], weighted: bool
) -> tuple[Int64s, npt.NDArray[np.float32] | None, dict[str, npt.NDArray[Any]]]:
    """Uninitialised row ids, weights and fields of `count` rows, in one recycled buffer."""
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"": (np.dtype(np.int64), (count,))}
    kinds |= {tensor.name: (tensor.dtype, (count, *tensor.shape[1:])) for tensor in tensors}
    if weighted:
        kinds[WEIGHT] = np.dtype(np.float32), (count,)
    arrays = leased(pool, kinds)
    return arrays.pop(""), arrays.pop(WEIGHT, None), arrays
