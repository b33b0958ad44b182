"""The row of another dataset that has the same key, for each row of a dataset: found once for both revisions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import AmbiguousKey, BadParameter, TooLarge
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache, CacheUsage

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..row_bits import LISTED_ROWS
from ..splits.large import wait_for_content
from .key_index import KeyIndexes, is_quick
from .key_values import HASH_VERSION, as_other, classes_told, key_field, values_of_rows
from .sorted_file import TooManyRows

Rows = npt.NDArray[Any]
"""(rows,) int32, or int64 if the other dataset is large; -1 for rows without a partner."""

_KIND = "join"


class Partners:
    """Joins datasets by key; one per process.

    Parameters
    ----------
    max_bytes : int
        Memory for lists of partners, and of rows that have some.
    """

    def __init__(
        self, catalog: Catalog, keys: KeyIndexes, folder: CacheFolder, jobs: Jobs, max_bytes: int, timeout: float
    ) -> None:
        self._catalog = catalog
        self._keys = keys
        self._folder = folder
        self._jobs = jobs
        self._max_bytes = max_bytes
        self._kept: ByteCache[Rows] = ByteCache(max_bytes, timeout)
        jobs.register(_KIND, "rows", self._work)

    def drop_old(self, seconds: float) -> None:
        """Drop lists that were not used for this many seconds."""
        self._kept.drop_old(seconds)

    @property
    def usage(self) -> CacheUsage:
        """Of the cache of partners."""
        return self._kept.usage

    def selected(self, key: Hashable, select: Callable[[], Rows]) -> Rows:
        """Rows that have partners, from the cache or found by `select`."""
        return self._kept.get(key, select, lambda rows: rows.nbytes)

    def of(self, dataset: Dataset, key: str, other: Dataset, other_key: str) -> Rows:
        """For each row of `dataset`, the row of `other` that has the same key; -1: none.

        Raises
        ------
        AmbiguousKey
            Several rows of `other` have the key of a row.
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
            A job finds them.
        """
        fields = _fields(dataset, key, other, other_key)
        if dataset.rows > LISTED_ROWS:
            raise TooLarge(
                f"join={other.name}: {dataset.name!r} has {dataset.rows} rows, more than the limit of {LISTED_ROWS} "
                "for joins by key"
            )
        if 4 * dataset.rows > self._max_bytes:
            raise TooLarge(
                f"join={other.name}: the partners of {dataset.rows} rows take {4 * dataset.rows} bytes, more than "
                f"H5FEED_ORDER_CACHE_BYTES = {self._max_bytes}"
            )
        name = _name(dataset, fields[0], other, fields[1])
        if (kept := self._kept.find(name.here)) is not None:
            return kept
        data = self._folder.find(name.kept)
        if data is None:
            if not all(is_quick(*one) for one in zip((dataset, other), fields, strict=True)):
                request = {**state_of(dataset), "key": key, "other": state_of(other), "other_key": other_key}
                raise InProgress(self._jobs.start(_KIND, request, "", dataset.names.key))
            data = self._folder.get(
                name.kept, lambda: self._find(dataset, fields[0], other, fields[1], lambda rows: None)
            )
        return self._loaded(name, data)

    def _work(self, request: Request, progress: Progress) -> None:
        both = [
            self._catalog.dataset_within(WAIT_SECONDS, state["dataset"], state["revision"])
            for state in (request, request["other"])
        ]
        dataset, other = both
        fields = _fields(dataset, request["key"], other, request["other_key"])
        progress.expect(dataset.rows + 2 * other.rows)
        # What is on disk is named by the content.
        for one in both:
            wait_for_content(one, progress)
        name = _name(dataset, fields[0], other, fields[1])

        def find() -> bytes:
            self._keys.ensure(other, fields[1], progress.advance)
            return self._find(dataset, fields[0], other, fields[1], progress.advance)

        self._loaded(name, self._folder.get(name.kept, find))

    def _find(
        self, dataset: Dataset, field: Field, other: Dataset, other_field: Field, advance: Callable[[int], None]
    ) -> bytes:
        partners = np.full(dataset.rows, -1, np.int32 if other.rows < 1 << 31 else np.int64)
        translated = as_other(field, other_field)
        start = 0
        for values in values_of_rows(self._keys.reader, field):
            count = len(values)
            values, places = translated(values)
            # Found twice, a key is an error: how often does not matter.
            try:
                which, rows = self._keys.matches(other, other_field, values, limit=2 * count + 1_000_000)
            except TooManyRows:
                raise TooLarge(
                    f"join={other.name}: too many rows of {other.name!r} have the {field.name!r} of rows {start} … "
                    f"{start + count - 1} of {dataset.name!r} as {other_field.name!r}: join by a key that is unique "
                    "there, and whose texts do not differ in their middle only"
                ) from None
            several = np.flatnonzero(np.bincount(which, minlength=len(values)) > 1)
            if len(several):
                own = rows[which == several[0]][:5].tolist()
                value, names = values.shown(int(several[0])), other_field.class_names or ()
                if value.isdecimal() and int(value) < len(names):
                    value = repr(names[int(value)])
                raise AmbiguousKey(
                    f"join={other.name}: several rows of {other.name!r} have {other_field.name!r} {value}, such as "
                    f"{', '.join(map(str, own))}, which row {start + int(places[several[0]])} of {dataset.name!r} has "
                    f"as {field.name!r}: join by a key that is unique there"
                )
            partners[start + places[which]] = rows
            start += count
            advance(count)
        return dump_arrays({}, {"rows": partners})

    def _loaded(self, name: Key, data: bytes) -> Rows:
        rows = load_arrays(data)[1]["rows"]
        self._kept.put(name.here, rows, rows.nbytes)
        return rows


def _fields(dataset: Dataset, key: str, other: Dataset, other_key: str) -> tuple[Field, Field]:
    """The fields that are compared.

    Raises
    ------
    FieldNotFound, UnsupportedField, BadParameter
    """
    field, other_field = key_field(dataset, key), key_field(other, other_key)
    integers = other_field if field.is_text else field
    if field.is_text != other_field.is_text and integers.class_names is None:
        raise BadParameter(
            f"join={other.name}: {key!r} of {dataset.name!r} holds {field.type_name}, but {other_key!r} of "
            f"{other.name!r} {other_field.type_name}: both must be text, or both integers; or one text, and the other "
            "integers with class names"
        )
    unnamed = [
        f"{one.name!r} of {whose.name!r}"
        for one, whose in ((field, dataset), (other_field, other))
        if one.class_names is None and not one.is_text
    ]
    told = classes_told(field), classes_told(other_field)
    if unnamed and None not in told and told[0] != told[1]:
        raise BadParameter(
            f"join={other.name}: the numbers of {key!r} of {dataset.name!r} and of {other_key!r} of {other.name!r} "
            "stand for different classes, which cannot be compared without the class names of "
            f"{' and '.join(unnamed)}: declare it as a label, with class_names, in h5feed.toml, or join by another key"
        )
    return field, other_field


def _name(dataset: Dataset, field: Field, other: Dataset, other_field: Field) -> Key:
    revision = other.names.current
    # Class names may be declared, which does not change a revision.
    names = f"{field.class_names} {other_field.class_names}"
    about = f"{field.name!r} {other.name!r} {revision} {other_field.name!r} {names}"
    name = key_of(f"joins/{HASH_VERSION}", dataset.name, dataset.names, about)
    # Nothing on disk has a provisional name.
    return name if revision == other.names.content else Key(name.here, lambda: None)
