"""Makes plans of batches, and keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.order import BatchGrid
from h5feed.stored.byte_cache import ENTRY_BYTES, ByteCache, CacheUsage

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field
from ..jobs.registry import Jobs
from ..keys.partners import Partners
from ..row_bits import RowSet
from ..settings import Settings
from ..splits.bucketing import Bucketed
from ..splits.joins_spec import JoinsSpec
from ..splits.on_request import SplitJobs
from ..splits.order_spec import OrderSpec
from ..splits.packing import Packed
from ..splits.row_lengths import RowLengths
from ..splits.splitter import Splitter, balanced_by
from ..storage.reader import Reader
from .bodies import Wanted, body_of, expected_items, gathered
from .crops import with_crops
from .joins import Joined
from .limits import Limits
from .order import Order
from .plan import BatchPlan
from .ragged import RaggedRows
from .sampled import each_row
from .transposing import Transposing
from .windows import fields_of

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_PLAN_BYTES = 4096
"""Rough size of a plan, in bytes. The rows of its split are cached, and counted, elsewhere."""


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
        self.limits = Limits(settings)
        self._partners = partners
        self._catalog = catalog
        self.reader = reader
        self.splitter = Splitter(settings, reader, folder)
        self.split_jobs = SplitJobs(catalog, self.splitter, jobs)
        self.transposing = Transposing(catalog, reader, jobs, settings.transposed_bytes)
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
            A job computes the rows of the split, reads the classes to balance, or transposes a sparse matrix.
        """
        dataset = self._catalog.dataset(name, revision)
        # Looked up for each request: this caller may not see them, and they may have changed.
        windows = partial(self.splitter.windows, dataset, spec) if spec.has_windows else None
        joined = Joined.of(self._catalog, self._partners, dataset, spec, windows, spec.offsets_within)
        datasets = [dataset, *(other for _, other in joined.others)]
        copies = [one.copies for one in datasets]
        key = (dataset.name, dataset.revision, dataset.identity, spec, batch_size, joined.key, *copies)
        plan = self._plans.get(key, lambda: self._plan(joined, spec, batch_size), lambda _: _PLAN_BYTES)
        self.transposing.check(datasets, (field.field for field in plan.fields if field.is_ragged))
        return plan

    def joined(self, dataset: Dataset, spec: JoinsSpec) -> Joined:
        """The datasets that `spec` joins, for single rows.

        Raises
        ------
        DatasetNotFound, RevisionChanged, Unreadable
        FieldNotFound, UnsupportedField, BadParameter, AmbiguousKey, TooLarge
        InProgress
            A job finds partners.
        """
        joined = Joined.of(self._catalog, self._partners, dataset, spec)
        joined.check()
        return joined

    def _plan(self, joined: Joined, spec: OrderSpec, batch_size: int) -> BatchPlan:
        dataset = joined.dataset
        fields, crops = with_crops(spec, fields_of(joined, spec))

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
            bucketed = self._ragged.bucketed(joined, spec, batch_size * (spec.bucket_group or spec.shards))
        if spec.pack is not None:
            packed = self._ragged.packed(joined, spec, fields)
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
        plan = replace(plan, cuts=self._ragged.cuts(joined, spec))
        return self.limits.limited(plan, batch_size)

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
        expected = expected_items(self.reader, fields, len(rows))
        self.limits.check_bytes(len(rows), body_of(dataset, fields, len(rows), about, [], expected))
        self.limits.check_pieces(len(rows), fields)
        limit = self._settings.max_body_bytes
        return gathered(self.reader, dataset, fields, [Wanted(0, rows)], about, limit, lease)
