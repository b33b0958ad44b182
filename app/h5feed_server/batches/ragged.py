"""What orders need to know of the lengths of rows: where to cut, which rows are alike, and which fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from h5feed.errors import BadParameter
from h5feed.stored.byte_cache import ByteCache, CacheUsage

from ..catalog.dataset import names_in
from ..settings import Settings
from ..splits.bucketing import Bucketed, window_of
from ..splits.order_spec import OrderSpec
from ..splits.packing import Packed
from ..splits.row_lengths import Lengths, RowLengths, listed_field
from ..splits.splitter import Splitter
from .cutting import Cut
from .joins import Joined, Source
from .sampled import SampledField

_PACKED_ROW_BYTES = 24
"""Bytes that a row takes while it is packed, and less afterwards."""

_PATIENCE = 10
"""How long a thread waits for rows that another thread is packing, in read timeouts."""


class RaggedRows:
    """Answers the parameters of `RaggedSpec`; one per process."""

    def __init__(self, settings: Settings, splitter: Splitter, lengths: RowLengths) -> None:
        self._splitter, self._lengths = splitter, lengths
        self._max_bytes = settings.order_cache_bytes
        timeout = _PATIENCE * settings.read_timeout
        self._packed: ByteCache[Packed] = ByteCache(self._max_bytes, timeout)
        self._joined: ByteCache[Lengths] = ByteCache(self._max_bytes, timeout)

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds."""
        self._lengths.drop_old(seconds)
        self._packed.drop_old(seconds)
        self._joined.drop_old(seconds)

    def cache_usage(self) -> CacheUsage:
        """Of the lengths and packed rows in memory."""
        caches = (self._lengths.cache_usage(), self._packed.usage, self._joined.usage)
        return CacheUsage(*map(sum, zip(*caches, strict=True)))

    def cuts(self, joined: Joined, spec: OrderSpec) -> dict[str, Cut]:
        """What ``max_length`` leaves of the fields of ``pad``.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
            Also if a row is longer and ``truncate`` is not given.
        InProgress
            A job reads the lengths of rows, to check them.
        """
        if spec.pad is None or spec.max_length is None:
            return {}
        names, numbers = names_in(spec.pad), [int(number) for number in spec.max_length.split(",")]
        if len(numbers) not in (1, len(names)):
            raise BadParameter(
                f"max_length={spec.max_length}: one number, or one for each of the {len(names)} fields of pad"
            )
        cuts = {}
        for name, most in zip(names, numbers * len(names) if len(numbers) == 1 else numbers, strict=True):
            source = self._source(joined, name, "pad")
            if spec.truncate is None:
                self._check_longest(joined, spec, source, most)
            else:
                cuts[name] = Cut(most, spec.truncate)
        return cuts

    def _check_longest(self, joined: Joined, spec: OrderSpec, source: Source, most: int) -> None:
        lengths = self._on_request(joined, source)
        rows = self._splitter.pool(joined.dataset, spec, partial(joined.select, spec))
        own = lengths if rows is None else lengths[rows]
        if len(own) and own.max() > most:
            place = int(np.argmax(own > most))
            row = place if rows is None else int(rows[place])
            raise BadParameter(
                f"max_length={most}: row {row} of {source.field.name!r} has {own[place]} items, and the longest row "
                f"has {own.max()}: use truncate=start or truncate=end to keep that part of longer rows, or "
                f"max_length={own.max()}"
            )

    def bucketed(self, joined: Joined, spec: OrderSpec, step: int) -> Callable[[], Bucketed]:
        """Returns the windows of ``bucket``, for steps of so many rows.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
        """
        assert spec.bucket is not None
        by, window = self._source(joined, spec.bucket_by, "bucket_by"), window_of(spec.bucket, step)
        self._on_request(joined, by)
        return lambda: Bucketed(self._of(joined, by), window, step)

    @staticmethod
    def _source(joined: Joined, name: str | None, option: str) -> Source:
        """The field whose lengths `option` needs; default: the only list field of the dataset, or its only text field.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
        """
        name = listed_field(joined.dataset, option) if name is None else name
        source = joined.source(name)
        if not source.field.is_ragged or source.field.is_sparse:
            raise BadParameter(f"{option}={name}: all rows of {name!r} have the same shape, so there is no length")
        return source

    def _on_request(self, joined: Joined, source: Source) -> Lengths:
        """Same as `_of`, but long reading is left to a job.

        Raises
        ------
        TooLarge
        InProgress
        """
        self._lengths.on_request(source.dataset, source.stored)
        return self._of(joined, source)

    def _of(self, joined: Joined, source: Source) -> Lengths:
        """The length of a field for each row of the dataset that others are joined to, (rows,) int32."""
        lengths, partners, dataset = self._lengths.of(source.dataset, source.stored), source.partners, joined.dataset
        if partners is None:
            return lengths

        def mapped() -> Lengths:
            # Rows without a partner are in no sample.
            rows = partners(np.arange(dataset.rows))
            found: Lengths = np.where(rows < 0, np.int32(0), lengths[rows])
            return found

        key = (dataset.name, dataset.names.key, dataset.identity, joined.key, source.field.name)
        return self._joined.get(key, mapped, lambda found: found.nbytes)

    def _packed_by(self, joined: Joined, spec: OrderSpec, fields: Sequence[SampledField]) -> Source:
        """The field whose lengths ``pack`` needs.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
            Also if one of `fields` cannot be packed together with it.
        InProgress
        """
        by = self._source(joined, spec.pack_by, "pack_by")
        lengths, rows = (
            self._on_request(joined, by),
            self._splitter.pool(joined.dataset, spec, partial(joined.select, spec)),
        )
        for field in fields:
            if not field.is_ragged or field.field.whole_name != field.name:
                raise BadParameter(
                    f"pack={spec.pack}: {field.field.whole_name!r} has one value per row, but a packed row has several "
                    f"rows: name lists or text with fields= (x= and y= of a loop), such as {by.field.name!r}"
                )
            if field.name == by.field.name:
                continue
            differ = lengths != self._on_request(joined, joined.source(field.name))
            different = np.flatnonzero(differ) if rows is None else rows[differ[rows]]
            if len(different):
                raise BadParameter(
                    f"pack={spec.pack}: row {different[0]} of {field.name!r} has another length than that of "
                    f"{by.field.name!r}, but fields that are packed together need equal lengths: leave one out"
                )
        return by

    def packed(self, joined: Joined, spec: OrderSpec, fields: Sequence[SampledField]) -> Callable[[], Packed]:
        """Returns the packed rows of a split, in which `fields` are packed together.

        They depend neither on the seed nor on the epoch.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
        """
        by, dataset = self._packed_by(joined, spec, fields), joined.dataset
        way = (spec.split_spec, spec.split, spec.where, spec.limit, spec.pack, by.field.name, spec.overlong)

        def compute() -> Packed:
            assert spec.pack is not None
            rows, lengths = self._splitter.pool(dataset, spec, partial(joined.select, spec)), self._of(joined, by)
            most = self._max_bytes // _PACKED_ROW_BYTES
            return Packed.of(rows, lengths, spec.pack, spec.overlong, by.field.name, most)

        key = (dataset.name, dataset.names.key, dataset.identity, way, spec.how, joined.key)
        return lambda: self._packed.get(key, compute, lambda packed: packed.nbytes)
