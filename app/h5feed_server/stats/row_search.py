"""Rows in the order of a field's values, and rows that hold a text: found once, by a job where that takes long."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge, UnsupportedField
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache

from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..jobs.registry import WAIT_SECONDS, InProgress, Jobs, Progress, Request
from ..row_bits import LISTED_ROWS
from ..splits.on_request import QUICK_BYTES, QUICK_ROWS
from ..storage.reader import Reader

Rows = npt.NDArray[np.int32]

_KIND = "row-search"

_KEPT_BYTES = 32 << 20
"""Lists of rows kept in memory; the cache folder has the others."""

_BLOCK = 1 << 18
"""Rows that are read at a time, fewer where they are long."""

_BLOCK_BYTES = 16 << 20

_PIECE_BYTES = 32
"""Bytes of each text that are compared at a time."""

_MAX_SORTED_BYTES = 4096
"""Bytes of a text after which rows count as equal."""

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

        NaN comes last either way. Text is sorted by its first `_MAX_SORTED_BYTES`, in UTF-8.

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
        if dataset.rows > LISTED_ROWS:
            raise TooLarge(f"{dataset.rows:,} rows are more than the {LISTED_ROWS:,} that are sorted or searched")
        file = _file(dataset, wanted)
        if (kept := self._kept.find(file.here)) is not None:
            return kept
        data = self._folder.find(file.kept)
        if data is None:
            stored = sum(field.column.stored_nbytes for field in fields)
            if dataset.rows > QUICK_ROWS or stored > QUICK_BYTES:
                request = {**state_of(dataset), **wanted}
                raise InProgress(self._jobs.start(_KIND, request, "", dataset.names.key))
            data = self._folder.get(file.kept, lambda: self._compute(dataset, wanted, lambda rows: None))
        rows = _load(data)
        self._kept.put(file.here, rows, rows.nbytes)
        return rows

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        wanted = {key: value for key, value in request.items() if key not in ("dataset", "revision")}
        progress.expect(dataset.rows * (len(text_fields(dataset)) if "text" in wanted else 1))
        file = _file(dataset, wanted)
        rows = _load(self._folder.get(file.kept, lambda: self._compute(dataset, wanted, progress.advance)))
        self._kept.put(file.here, rows, rows.nbytes)

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
        if field.is_text:
            values: npt.NDArray[Any] = self._ranks(field, advance)
        else:
            blocks = []
            for begin in range(0, column.rows, step):
                blocks.append(self._reader.read_block(column, begin, min(begin + step, column.rows)).reshape(-1))
                advance(len(blocks[-1]))
            values = column.widened(np.concatenate(blocks) if blocks else np.zeros(0))
        nan = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
        there = np.flatnonzero(~nan)
        known = values[there]
        if descending:
            order = len(known) - 1 - np.argsort(known[::-1], kind="stable")[::-1]
        else:
            order = np.argsort(known, kind="stable")
        return np.concatenate([there[order], np.flatnonzero(nan)])

    def _ranks(self, field: Field, advance: Callable[[int], None]) -> npt.NDArray[np.int64]:
        """Numbers in the order of the texts, equal for equal texts, (rows,).

        Compares a piece of each text, then the next pieces of those that are equal so far: paths of files may differ
        in their last characters alone.
        """
        ranks = np.zeros(field.column.rows, np.int64)
        equal, begin = np.arange(len(ranks)), 0
        while len(equal) and begin < _MAX_SORTED_BYTES:
            pieces, are_longer = self._pieces(field, equal, begin, (lambda rows: None) if begin else advance)
            own = np.lexsort((pieces, ranks[equal]))
            before, piece, count = ranks[equal[own]], pieces[own], np.arange(len(own))
            is_first = np.concatenate([[True], before[1:] != before[:-1]])
            is_other = is_first | np.concatenate([[True], piece[1:] != piece[:-1]])
            # A text's rank is how many texts come before it: those before the equal ones so far, and of these the less.
            starts, starts_of_other = (np.maximum.accumulate(np.where(one, count, 0)) for one in (is_first, is_other))
            ranks[equal[own]] = before + starts_of_other - starts
            run = np.cumsum(is_other) - 1
            goes_on = (np.bincount(run) > 1) & (np.bincount(run, are_longer[own]) > 0)
            equal = np.sort(equal[own[goes_on[run]]])
            begin += _PIECE_BYTES
        return ranks

    def _pieces(
        self, field: Field, rows: npt.NDArray[np.int64], begin: int, advance: Callable[[int], None]
    ) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.bool_]]:
        """`_PIECE_BYTES` of each text from byte `begin` on, and whether more follow; both (k,)."""
        pieces, are_longer = np.zeros((len(rows), _PIECE_BYTES), np.uint8), np.zeros(len(rows), np.bool_)
        step = _block_rows(self._reader, field)
        for first in range(0, len(rows), step):
            own = slice(first, first + step)
            items, offsets = self._reader.read_ragged(field.column, rows[own])
            places = offsets[:-1, None] + np.arange(begin, begin + _PIECE_BYTES)
            inside = places < offsets[1:, None]
            pieces[own][inside] = items[places[inside]]
            are_longer[own] = np.diff(offsets) > begin + _PIECE_BYTES
            advance(len(offsets) - 1)
        return pieces.view(f"S{_PIECE_BYTES}").reshape(-1), are_longer

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


def text_fields(dataset: Dataset) -> list[Field]:
    """The fields that a search looks through."""
    return [field for field in dataset.fields if field.is_text and not field.unreadable]


def _block_rows(reader: Reader, field: Field) -> int:
    row_bytes = field.row_bytes
    if field.column.has_lists:
        row_bytes = max(16, reader.typical_items(field.column)) if field.column.rows else 1
    return max(1, min(_BLOCK, _BLOCK_BYTES // max(1, row_bytes)))


def _file(dataset: Dataset, wanted: Request) -> Key:
    return key_of("row-search/2", dataset.name, dataset.names, sorted(wanted.items()))


def _load(data: bytes) -> Rows:
    rows: Rows = load_arrays(data)[1]["rows"]
    return rows
