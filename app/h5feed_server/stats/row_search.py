"""Rows in the order of a field's values, and rows that hold a text: found once, by a job where that takes long."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge, UnsupportedField

from ..cache_folder.array_file import dump_arrays, load_arrays
from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..splits.on_request import QUICK_BYTES, QUICK_ROWS
from ..splits.splitter import MAX_SPLIT_ROWS
from ..storage.byte_cache import ByteCache
from ..storage.reader import Reader

Rows = npt.NDArray[np.int32]

_KIND = "row-search"

_KEPT_BYTES = 32 << 20
"""Lists of rows kept in memory; the cache folder has the others."""

_BLOCK = 1 << 18
"""Rows that are read at a time, fewer where they are long."""

_BLOCK_BYTES = 16 << 20

SORTED_BYTES = 64
"""Bytes of a text that rows are sorted by."""

MAX_TEXT = 200
"""Characters that can be searched for."""


class RowSearch:
    """Sorts and searches rows; one per process."""

    def __init__(self, catalog: Catalog, reader: Reader, folder: CacheFolder, jobs: Jobs, timeout: float) -> None:
        self._catalog = catalog
        self._reader = reader
        self._folder = folder
        self._jobs = jobs
        self._kept: ByteCache[Rows] = ByteCache(_KEPT_BYTES, timeout)
        jobs.register(_KIND, "rows", self._work)

    def drop_old(self, seconds: float) -> None:
        """Let go of what nobody has asked for in so many seconds."""
        self._kept.drop_old(seconds)

    def by_value(self, dataset: Dataset, name: str, *, descending: bool) -> Rows:
        """All rows, (rows,) int32, by the value of a field of one number or text a row; equal ones by position.

        NaN comes last either way. Of text, the first `SORTED_BYTES` count.

        Raises
        ------
        FieldNotFound, UnsupportedField, TooLarge
        InProgress
            A job sorts them.
        """
        field = dataset.field(name)
        if math.prod(field.sample_shape) != 1 or (field.is_ragged and not field.is_text):
            raise UnsupportedField(f"sort={name}: rows can be sorted only by a field with one value per row")
        return self._found(dataset, {"sort": name, "descending": descending}, [field])

    def with_text(self, dataset: Dataset, text: str) -> Rows:
        """Rows, ascending, that hold a text in any of their fields of text. A to Z match in either case.

        Raises
        ------
        UnsupportedField, TooLarge
        InProgress
            A job looks for them.
        """
        fields = text_fields(dataset)
        if not fields:
            raise UnsupportedField(f"dataset {dataset.name!r} has no field of text to search")
        return self._found(dataset, {"text": text}, fields)

    def _found(self, dataset: Dataset, wanted: Request, fields: list[Field]) -> Rows:
        if dataset.rows > MAX_SPLIT_ROWS:
            raise TooLarge(f"{dataset.rows:,} rows are more than the {MAX_SPLIT_ROWS:,} that are sorted or searched")
        file = _file(dataset, wanted)
        if (kept := self._kept.find(file)) is not None:
            return kept
        data = self._folder.find(file)
        if data is None:
            stored = sum(field.column.stored_nbytes for field in fields)
            if dataset.rows > QUICK_ROWS or stored > QUICK_BYTES:
                request = {"dataset": dataset.name, "revision": dataset.revision, **wanted}
                raise InProgress(self._jobs.start(_KIND, request, ""))
            data = self._folder.get(file, lambda: self._compute(dataset, wanted, lambda rows: None))
        rows = _load(data)
        self._kept.put(file, rows, rows.nbytes)
        return rows

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        wanted = {key: value for key, value in request.items() if key not in ("dataset", "revision")}
        progress.expect(dataset.rows * (len(text_fields(dataset)) if "text" in wanted else 1))
        file = _file(dataset, wanted)
        rows = _load(self._folder.get(file, lambda: self._compute(dataset, wanted, progress.advance)))
        self._kept.put(file, rows, rows.nbytes)

    def _compute(self, dataset: Dataset, wanted: Request, advance: Callable[[int], None]) -> bytes:
        if "text" in wanted:
            found = [self._holding(field, wanted["text"], advance) for field in text_fields(dataset)]
            rows = np.unique(np.concatenate(found))
        else:
            rows = self._sorted(dataset.field(wanted["sort"]), wanted["descending"], advance)
        return dump_arrays({}, {"rows": rows.astype(np.int32)})

    def _sorted(self, field: Field, descending: bool, advance: Callable[[int], None]) -> npt.NDArray[np.int64]:
        column = field.column
        step = _block_rows(self._reader, field)
        blocks = []
        for begin in range(0, column.rows, step):
            end = min(begin + step, column.rows)
            if field.is_text:
                items, offsets = self._reader.read_ragged(column, np.arange(begin, end, dtype=np.int64))
                blocks.append(_beginnings(items, offsets))
            else:
                blocks.append(self._reader.read_block(column, begin, end).reshape(-1))
            advance(end - begin)
        values = column.widened(np.concatenate(blocks) if blocks else np.zeros(0))
        nan = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
        there = np.flatnonzero(~nan)
        known = values[there]
        if descending:
            order = len(known) - 1 - np.argsort(known[::-1], kind="stable")[::-1]
        else:
            order = np.argsort(known, kind="stable")
        return np.concatenate([there[order], np.flatnonzero(nan)])

    def _holding(self, field: Field, text: str, advance: Callable[[int], None]) -> npt.NDArray[np.int64]:
        column = field.column
        step = _block_rows(self._reader, field)
        wanted = re.compile(b"(?=" + re.escape(text.encode("utf-8", "replace").lower()) + b")")
        length = len(text.encode("utf-8", "replace"))
        found = []
        for begin in range(0, column.rows, step):
            rows = np.arange(begin, min(begin + step, column.rows), dtype=np.int64)
            items, offsets = self._reader.read_ragged(column, rows)
            places = np.array([match.start() for match in wanted.finditer(items.tobytes().lower())], np.int64)
            own = np.searchsorted(offsets, places, side="right") - 1
            # What begins in one row and ends in the next is in neither.
            found.append(begin + own[places + length <= offsets[own + 1]])
            advance(len(rows))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _beginnings(items: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
    """The first bytes of each text, (n,)."""
    places = offsets[:-1, None] + np.arange(SORTED_BYTES)
    inside = places < offsets[1:, None]
    cut = np.zeros(places.shape, np.uint8)
    cut[inside] = items[places[inside]]
    return cut.view(f"S{SORTED_BYTES}").reshape(-1)


def text_fields(dataset: Dataset) -> list[Field]:
    """The fields that a search looks through."""
    return [field for field in dataset.fields if field.is_text and not field.unreadable]


def _block_rows(reader: Reader, field: Field) -> int:
    row_bytes = field.row_bytes
    if field.column.has_lists:
        row_bytes = max(16, reader.typical_items(field.column)) if field.column.rows else 1
    return max(1, min(_BLOCK, _BLOCK_BYTES // max(1, row_bytes)))


def _file(dataset: Dataset, wanted: Request) -> str:
    text = f"{dataset.name} {dataset.revision} {sorted(wanted.items())}"
    return f"row-search/1-{hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"


def _load(data: bytes) -> Rows:
    rows: Rows = load_arrays(data)[1]["rows"]
    return rows
