"""The lengths of all rows of a list or text field: read once per revision, by a job where that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote, urlencode

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache, CacheUsage

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..row_bits import LISTED_ROWS
from ..settings import Settings
from ..storage.reader import Reader

Lengths = npt.NDArray[np.int32]

_KIND = "lengths"

QUICK_BYTES = 32 << 20
"""Up to this many bytes of a field are read within the request."""

QUICK_H5PY_BYTES = 4 << 20
"""The same for lists and text that only h5py can read, with at least 64 bytes for each row."""

_BLOCK_BYTES = 8 << 20
"""Approximate bytes to read at once."""

_BLOCK = 1 << 18
"""Maximum rows to read at once."""

_PATIENCE = 10
"""How long a thread waits for lengths that another thread is reading, in read timeouts."""

_MOST_ITEMS = np.iinfo(np.int32).max


class RowLengths:
    """Finds the lengths of rows; one per process.

    Results are cached in memory, within bounds. Those that have to be read are also in the cache folder, where one
    process reads them for all.
    """

    def __init__(self, settings: Settings, catalog: Catalog, reader: Reader, folder: CacheFolder, jobs: Jobs) -> None:
        self._catalog, self._reader, self._folder, self._jobs = catalog, reader, folder, jobs
        self._max_bytes = settings.order_cache_bytes
        self._kept: ByteCache[Lengths] = ByteCache(self._max_bytes, _PATIENCE * settings.read_timeout)
        jobs.register(_KIND, "rows", self._work)

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds."""
        self._kept.drop_old(seconds)

    def cache_usage(self) -> CacheUsage:
        """Of the lengths in memory."""
        return self._kept.usage

    def on_request(self, dataset: Dataset, field: Field) -> Lengths:
        """Number of items of each row, or of bytes of text, (rows,) int32.

        Raises
        ------
        TooLarge
        InProgress
            A job reads them.
        """
        self._check_fits(dataset)
        if _are_known(field) or self._has(dataset, field) or _is_quick(field):
            return self.of(dataset, field)
        request = {**state_of(dataset), "field": field.name}
        query = urlencode({"bucket": 1, "bucket_by": quote(field.name, safe=""), "revision": dataset.revision})
        result = f"/v1/datasets/{quote(dataset.name, safe='')}/plan?{query}"
        raise InProgress(self._jobs.start(_KIND, request, result, dataset.names.key))

    def of(self, dataset: Dataset, field: Field, progress: Progress | None = None) -> Lengths:
        """Same as `on_request`, without a job.

        Raises
        ------
        TooLarge
            Lengths do not fit into memory, or a row has too many items.
        """
        self._check_fits(dataset)
        name = _name(dataset, field)

        def find() -> Lengths:
            if _are_known(field):
                offsets = (segment.offsets for segment in field.column.segments)
                return _checked(field, (np.diff(one[:]) for one in offsets if one is not None))
            data = self._folder.get(
                name.kept, lambda: dump_arrays({}, {"lengths": _checked(field, self._read(field, progress))})
            )
            return load_arrays(data)[1]["lengths"]

        return self._kept.get(name.here, find, lambda lengths: lengths.nbytes)

    def _has(self, dataset: Dataset, field: Field) -> bool:
        name = _name(dataset, field)
        return name.here in self._kept or name.kept in self._folder

    def _check_fits(self, dataset: Dataset) -> None:
        # Besides the lengths, an order needs lists of rows.
        nbytes = 4 * dataset.rows
        if nbytes > self._max_bytes or dataset.rows > LISTED_ROWS:
            raise TooLarge(
                f"the lengths of the {dataset.rows} rows of {dataset.name!r} take {nbytes} bytes, more than "
                f"H5FEED_ORDER_CACHE_BYTES = {self._max_bytes}, or are more than {LISTED_ROWS}"
            )

    def _read(self, field: Field, progress: Progress | None) -> Iterator[npt.NDArray[np.int64]]:
        """Lengths of consecutive blocks of rows."""
        column = field.column
        row_bytes = column.row_bytes
        if column.has_lists and column.rows:
            row_bytes = self._reader.typical_items(column) * column.dtype.itemsize
        step = max(1, min(_BLOCK, _BLOCK_BYTES // max(16, row_bytes)))
        start = 0
        while start < column.rows:
            rows = np.arange(start, min(start + step, column.rows), dtype=np.int64)
            try:
                _, offsets = self._reader.read_ragged(column, rows)
            except TooLarge:
                # Rows are much longer here than elsewhere in the field.
                if step == 1:
                    raise
                step = max(1, step // 8)
                continue
            yield np.diff(offsets)
            start += len(rows)
            if progress is not None:
                progress.advance(len(rows))

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        progress.expect(dataset.rows)
        self.of(dataset, dataset.field(request["field"]), progress)


def listed_field(dataset: Dataset, option: str) -> str:
    """Name of the only list field, or else of the only text field, whose lengths `option` needs.

    Raises
    ------
    BadParameter
        There are none, or several.
    """
    ragged = [field for field in dataset.fields if not field.unreadable and field.is_ragged and not field.is_sparse]
    found = [field for field in ragged if not field.is_text] or ragged
    if len(found) != 1:
        names = ", ".join(repr(field.name) for field in found)
        has = f"has several fields of lists or text, {names}" if found else "has no field of lists or text"
        raise BadParameter(f"dataset {dataset.name!r} {has}: name one with {option}=")
    return found[0].name


def _are_known(field: Field) -> bool:
    return all(segment.offsets is not None for segment in field.column.segments)


def _is_quick(field: Field) -> bool:
    column = field.column
    if any(segment.array.by_h5py or segment.array.ragged for segment in column.segments):
        return max(column.stored_nbytes, 64 * column.rows) <= QUICK_H5PY_BYTES
    return column.stored_nbytes <= QUICK_BYTES


def _checked(field: Field, blocks: Iterator[npt.NDArray[np.int64]]) -> Lengths:
    """All lengths, (rows,) int32."""
    found = []
    for block in blocks:
        if len(block) and int(block.max()) > _MOST_ITEMS:
            raise TooLarge(f"a row of {field.name!r} has {int(block.max())} items, more than {_MOST_ITEMS}")
        found.append(block.astype(np.int32))
    lengths: Lengths = np.concatenate([np.zeros(0, np.int32), *found])
    lengths.flags.writeable = False
    return lengths


def _name(dataset: Dataset, field: Field) -> Key:
    return key_of("lengths/1", dataset.name, dataset.names, field.name)
