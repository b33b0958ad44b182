"""Finds rows by the values of a field, such as file names: by an index that is built once for each revision.

The index has hashes, so it is the same size for short and long keys. Rows with the right hash are read, and their
values compared with the key: equal hashes of different values never give a wrong row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from h5feed.errors import AmbiguousKey, InternalError, KeysNotFound, Overloaded
from h5feed.runs import consecutive
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache
from h5feed.suggestions import did_you_mean

from ..cache_folder.folder import CacheFolder
from ..cache_folder.sealed import discard
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..filters.predicates import classes_shown
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..splits.large import wait_for_content
from ..splits.on_request import QUICK_BYTES, QUICK_ROWS
from ..storage.reader import Reader
from .key_values import HASH_VERSION, Values, block_rows, key_field, values_at, values_of_keys, values_of_rows
from .sorted_file import Damaged, SortedFile, TooManyRows, write_sorted

Int64s = npt.NDArray[np.int64]

_KIND = "key-index"

_KEPT_BYTES = 32 << 20
"""Tables of indexes kept in memory; the cache folder has the others."""

_SHOWN = 5
"""Keys that an error names."""

_COMPARED_ROWS = 2000
"""Up to this many rows, an error for a missing key suggests a similar one: all values have to be read for it."""

_SHOWN_CHARS = 100


class KeyIndexes:
    """Finds rows by key; one per process."""

    def __init__(self, catalog: Catalog, reader: Reader, folder: CacheFolder, jobs: Jobs, timeout: float) -> None:
        self._catalog = catalog
        self.reader = reader
        self._folder = folder
        self._jobs = jobs
        self._kept: ByteCache[SortedFile] = ByteCache(_KEPT_BYTES, timeout)
        jobs.register(_KIND, "rows", self._work)

    def drop_old(self, seconds: float) -> None:
        """Drop tables that were not used for this many seconds."""
        self._kept.drop_old(seconds)

    def rows(
        self,
        dataset: Dataset,
        name: str,
        keys: Sequence[str | int],
        *,
        are_words: bool = False,
        several: bool = False,
        limit: int = 1_000_000,
    ) -> Int64s:
        """The rows with these keys, in the order of the keys.

        Parameters
        ----------
        name : str
            Field of one integer or text per row.
        are_words : bool
            See `values_of_keys`.
        several : bool
            Whether a key may have several rows, which then follow each other in ascending order.
        limit : int
            Most rows.

        Returns
        -------
        (k,) int64

        Raises
        ------
        KeysNotFound
            No row has one of the keys.
        AmbiguousKey
            Several rows have one of the keys, and `several` is not set.
        FieldNotFound, UnsupportedField, BadParameter, TooLarge
        InProgress
            A job builds the index.
        """
        field = key_field(dataset, name)
        wanted = values_of_keys(field, keys, are_words=are_words)
        which, rows = self.matches(dataset, field, wanted, limit)
        counts = np.bincount(which, minlength=len(wanted))
        if (missing := np.flatnonzero(counts == 0)).size:
            raise self._not_found(field, keys, missing)
        if not several and (ambiguous := np.flatnonzero(counts > 1)).size:
            one = int(ambiguous[0])
            own = rows[which == one]
            shown = wanted.shown(one) if field.class_names is None else repr(keys[one])[:_SHOWN_CHARS]
            raise AmbiguousKey(
                f"{counts[one]} rows have {name!r} {shown}: {', '.join(map(str, own[:_SHOWN].tolist()))}"
                f"{' …' if len(own) > _SHOWN else ''}. Use duplicates=all to get all rows of each key"
            )
        return rows

    def matches(self, dataset: Dataset, field: Field, wanted: Values, limit: int) -> tuple[Int64s, Int64s]:
        """All rows that have one of the wanted values.

        Returns
        -------
        which : (m,) int64
            Indices of `wanted`, ascending.
        rows : (m,) int64
            Ascending for each of them.

        Raises
        ------
        TooManyRows
            The keys have more rows than `limit`, those of keys that repeat counted each time.
        InProgress
        """
        hashes, places = np.unique(wanted.hashes(), return_inverse=True)
        for is_again in (False, True):
            try:
                found, rows = self._index(dataset, field, anew=is_again).find(hashes, limit)
                break
            except Damaged:
                self._forget(dataset, field)
        else:
            raise Overloaded("the index of the keys was removed from the cache folder; try again", retry_after=1)
        # Every key with the rows of its hash: keys may repeat, and different ones may have the same hash.
        counts = np.bincount(found, minlength=len(hashes))
        begins = np.cumsum(counts) - counts
        each = counts[places]
        if int(each.sum()) > limit:
            # Keys that are listed often multiply: each has all the rows again.
            raise TooManyRows(limit)
        which = np.repeat(np.arange(len(wanted)), each)
        candidates = rows[consecutive(begins[places], each)]
        same = self._are_same(field, candidates, wanted, which)
        return which[same], candidates[same]

    def _are_same(self, field: Field, rows: Int64s, wanted: Values, which: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each row has the value that it was found for."""
        same = np.zeros(len(rows), np.bool_)
        step = block_rows(self.reader, field)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            # In ascending order, which is the faster way to read.
            distinct, places = np.unique(rows[part], return_inverse=True)
            same[part] = values_at(self.reader, field, distinct).equal(places, wanted, which[part])
        return same

    def ensure(self, dataset: Dataset, field: Field, advance: Callable[[int], None]) -> None:
        """Build the index of a field, unless it is there. Only for jobs: it may take long.

        Parameters
        ----------
        advance : callable
            Called with rows that are read and sorted, and then merged: with each row twice.
        """
        name = _name(dataset, field).kept
        self._loaded(dataset, field, self._folder.get(name, lambda: self._build(dataset, field, advance)))

    def _index(self, dataset: Dataset, field: Field, *, anew: bool = False) -> SortedFile:
        """The index of a field; with `anew`, not the one in memory.

        Raises
        ------
        InProgress
            A job builds it.
        """
        name = _name(dataset, field)
        if not anew and (kept := self._kept.find(name.here)) is not None:
            return kept
        data = self._folder.find(name.kept)
        if data is None:
            if not is_quick(dataset, field):
                request = {**state_of(dataset), "key": field.name}
                raise InProgress(self._jobs.start(_KIND, request, "", dataset.names.key))
            data = self._folder.get(name.kept, lambda: self._build(dataset, field, lambda rows: None))
        return self._loaded(dataset, field, data)

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        field = key_field(dataset, request["key"])
        # Rows are read and sorted, then merged.
        progress.expect(2 * dataset.rows)
        # What is on disk is named by the content.
        wait_for_content(dataset, progress)
        self.ensure(dataset, field, progress.advance)

    def _build(self, dataset: Dataset, field: Field, advance: Callable[[int], None]) -> bytes:
        """Write the index, and return its table."""
        try:
            hashes = (values.hashes() for values in values_of_rows(self.reader, field))
            index = write_sorted(self._path(dataset, field), hashes, advance)
        except OSError as error:
            raise InternalError(
                f"the server's cache folder cannot keep the index of {field.name!r}: {error.strerror or error}"
            ) from None
        return dump_arrays({"entries": index.entries}, {"fences": index.fences, "sums": index.sums})

    def _loaded(self, dataset: Dataset, field: Field, data: bytes) -> SortedFile:
        about, arrays = load_arrays(data)
        index = SortedFile(self._path(dataset, field), arrays["fences"], arrays["sums"], about["entries"])
        self._kept.put(_name(dataset, field).here, index, index.nbytes)
        with contextlib.suppress(OSError):
            # The least recently used files are removed first.
            os.utime(index.path)
        return index

    def _forget(self, dataset: Dataset, field: Field) -> None:
        """Remove a damaged index, to build it again."""
        discard(self._path(dataset, field))
        if (kept := _name(dataset, field).kept()) is not None:
            discard(self._folder.path / kept)

    def _path(self, dataset: Dataset, field: Field) -> Path:
        return self._folder.path / f"{_name(dataset, field).kept()}.sorted"

    def _not_found(self, field: Field, keys: Sequence[str | int], missing: Int64s) -> KeysNotFound:
        shown = ", ".join(repr(keys[one])[:_SHOWN_CHARS] for one in missing[:_SHOWN].tolist())
        more = " …" if len(missing) > _SHOWN else ""
        hint, count, first = "", field.column.rows, str(keys[int(missing[0])])
        if field.class_names is not None:
            if isinstance(keys[int(missing[0])], int):
                hint = f": its classes are numbered 0 … {len(field.class_names) - 1}"
            elif first not in field.class_names:
                hint = f": {did_you_mean(first, field.class_names, classes_shown(field.class_names))}"
        elif 0 < count <= _COMPARED_ROWS:
            values = values_at(self.reader, field, np.arange(count, dtype=np.int64))
            known = dict.fromkeys(map(values.text, range(count)))
            hint = f": {did_you_mean(first, known, 'check the spelling')}"
        return KeysNotFound(f"{len(missing)} of {len(keys)} keys are in no row of {field.name!r}: {shown}{more}{hint}")


def is_quick(dataset: Dataset, field: Field) -> bool:
    """Whether a field can be read while a request waits, and the result be kept."""
    column = field.column
    is_small = column.rows <= QUICK_ROWS and column.stored_nbytes <= QUICK_BYTES
    return is_small and dataset.names.content is not None


def _name(dataset: Dataset, field: Field) -> Key:
    return key_of(f"keys/{HASH_VERSION}", dataset.name, dataset.names, field.name)
