"""What orders need to know of the lengths of rows: where to cut, which rows are alike, and which fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from h5feed.errors import BadParameter
from h5feed.stored.byte_cache import ByteCache, CacheUsage

from ..catalog.dataset import Dataset, Field, names_in
from ..settings import Settings
from ..splits.bucketing import Bucketed, window_of
from ..splits.order_spec import OrderSpec
from ..splits.packing import Packed
from ..splits.ragged_spec import MAX_BUCKET
from ..splits.row_lengths import RowLengths
from ..splits.splitter import Splitter
from .cutting import Cut
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
        self._packed: ByteCache[Packed] = ByteCache(self._max_bytes, _PATIENCE * settings.read_timeout)

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds."""
        self._lengths.drop_old(seconds)
        self._packed.drop_old(seconds)

    def cache_usage(self) -> CacheUsage:
        """Of the lengths and packed rows in memory."""
        return CacheUsage(*map(sum, zip(self._lengths.cache_usage(), self._packed.usage, strict=True)))

    def cuts(self, dataset: Dataset, spec: OrderSpec) -> dict[str, Cut]:
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
            field = self._lengths.field(dataset, name, "pad")
            if spec.truncate is None:
                self._check_longest(dataset, spec, field, most)
            else:
                cuts[name] = Cut(most, spec.truncate)
        return cuts

    def _check_longest(self, dataset: Dataset, spec: OrderSpec, field: Field, most: int) -> None:
        lengths = self._lengths.on_request(dataset, field)
        rows = self._splitter.pool(dataset, spec)
        own = lengths if rows is None else lengths[rows]
        if len(own) and own.max() > most:
            place = int(np.argmax(own > most))
            row = place if rows is None else int(rows[place])
            raise BadParameter(
                f"max_length={most}: row {row} of {field.name!r} has {own[place]} items, and the longest row has "
                f"{own.max()}: use truncate=start or truncate=end to keep that part of longer rows, or "
                f"max_length={own.max()}"
            )

    def bucketed(self, dataset: Dataset, spec: OrderSpec, step: int) -> Callable[[], Bucketed]:
        """Returns the windows of ``bucket``, for steps of so many rows.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
        """
        assert spec.bucket is not None
        by, window = self._lengths.field(dataset, spec.bucket_by, "bucket_by"), window_of(spec.bucket, step)
        if window > MAX_BUCKET:
            raise BadParameter(
                f"bucket={spec.bucket}: in whole steps of {step} rows, that is {window}, more than {MAX_BUCKET}"
            )
        self._lengths.on_request(dataset, by)
        return lambda: Bucketed(self._lengths.of(dataset, by), window, step)

    def _packed_by(self, dataset: Dataset, spec: OrderSpec, fields: Sequence[SampledField]) -> Field:
        """The field whose lengths ``pack`` needs.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
            Also if one of `fields` cannot be packed together with it.
        InProgress
        """
        by = self._lengths.field(dataset, spec.pack_by, "pack_by")
        lengths = self._lengths.on_request(dataset, by)
        for field in fields:
            if field.row_map is not None:
                raise BadParameter(f"pack={spec.pack}: {field.name!r} has other rows than those of the sample")
            if not field.is_ragged or field.field.is_sparse:
                raise BadParameter(
                    f"pack={spec.pack}: {field.name!r} has one value per row, but a packed row has several rows: name "
                    f"lists or text with fields= (x= and y= of a loop), such as {by.name!r}"
                )
            if field.name == by.name:
                continue
            differ = np.flatnonzero(self._lengths.on_request(dataset, field.field) != lengths)
            if len(differ):
                raise BadParameter(
                    f"pack={spec.pack}: row {differ[0]} of {field.name!r} has another length than that of {by.name!r}, "
                    "but fields that are packed together need equal lengths: leave one out"
                )
        return by

    def packed(self, dataset: Dataset, spec: OrderSpec, fields: Sequence[SampledField]) -> Callable[[], Packed]:
        """Returns the packed rows of a split, in which `fields` are packed together.

        They depend neither on the seed nor on the epoch.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
        """
        by = self._packed_by(dataset, spec, fields)
        way = (spec.split_spec, spec.split, spec.where, spec.limit, spec.pack, by.name, spec.overlong)

        def compute() -> Packed:
            assert spec.pack is not None
            rows, lengths = self._splitter.pool(dataset, spec), self._lengths.of(dataset, by)
            return Packed.of(rows, lengths, spec.pack, spec.overlong, by.name, self._max_bytes // _PACKED_ROW_BYTES)

        key = (dataset.name, dataset.names.key, dataset.identity, way)
        return lambda: self._packed.get(key, compute, lambda packed: packed.nbytes)
