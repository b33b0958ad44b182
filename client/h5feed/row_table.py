"""Rows as a table of values, where there are no images to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .errors import RowOutOfRange
from .frames import DTYPES, Field
from .options import SplitOptions
from .plan import conditions, conditions_text
from .remote_dataset import RemoteDataset
from .tables import text_lines, titled_table

ROWS = 10
"""Rows of a table, if none are named."""

MAX_ROWS = 100
"""Maximum number of rows of a table."""

_MAX_CELL_BYTES = 64 << 10
"""Larger values are not fetched: a table has no room for them."""

_SEED = 0
_VALUES, _CHARS = 4, 60
"""Maximum number of values, and of characters of a string, in a cell."""


class RowTable:
    """A line per row, with its id and the value of each field. Prints as a table in terminals and notebooks.

    Attributes
    ----------
    rows : list of int
        Row ids.
    """

    def __init__(self, title: str, rows: list[int], columns: dict[str, list[str]]) -> None:
        self.rows = rows
        self._title = title
        lines = zip(map(str, rows), *columns.values(), strict=True)
        self._table = [["row", *columns], *map(list, lines)]

    def __repr__(self) -> str:
        return "\n".join([f"<{self._title}>", *text_lines([[*map(_printable, line)] for line in self._table])])

    def _repr_html_(self) -> str:
        return titled_table(self._title, self._table[0], self._table[1:])


def row_table(
    dataset: RemoteDataset,
    split: str,
    field: str | None,
    rows: npt.NDArray[np.int64] | None,
    options: SplitOptions,
) -> RowTable:
    """A table of `rows`, or of some rows of a split, always the same.

    Raises
    ------
    RowOutOfRange
        The split is empty.
    """
    chosen = [one for one in dataset.fields.values() if (one.readable if field is None else one.name == field)]
    names = [one.name for one in chosen if _is_small(one, is_wanted=field is not None)]
    if rows is not None:
        batch = dataset.take(rows[:MAX_ROWS], fields=names)
        count = f"{len(batch.rows):,}" if len(rows) <= MAX_ROWS else f"The first {MAX_ROWS:,} of {len(rows):,}"
        title = f"{count} chosen rows of {dataset.name!r}"
        order: Sequence[int] = range(len(batch.rows))
    else:
        where = conditions_text(conditions(options.get("where")))
        there = dataset.plan(split, batch_size=ROWS, shuffle=True, seed=_SEED, fields=names, **options).rows
        if not there:
            raise RowOutOfRange(f"split {split!r} of {dataset.name!r} has no rows to show{where}")
        batch = dataset.batch(0, split=split, batch_size=ROWS, shuffle=True, seed=_SEED, fields=names, **options)
        title = f"{len(batch.rows):,} of {there:,} rows of {split!r} of {dataset.name!r}{where}, drawn at random"
        order = np.argsort(batch.rows, kind="stable").tolist()
    columns = {one.name: _cells(one, batch if one.name in names else None, order) for one in chosen}
    return RowTable(title, [int(batch.rows[place]) for place in order], columns)


def _is_small(field: Field, *, is_wanted: bool) -> bool:
    """Whether the values of a field can be fetched for a table."""
    if field.dtype == "string":
        return True
    if field.ragged:
        # Lists may be of any length.
        return is_wanted
    itemsize = DTYPES[field.dtype].itemsize if field.dtype in DTYPES else 2
    return math.prod(field.shape) * itemsize <= _MAX_CELL_BYTES


def _cells(field: Field, batch: Batch | None, order: Sequence[int]) -> list[str]:
    """The values of a field as text; only their type if they were not fetched."""
    if batch is None:
        kind = f"list of {field.dtype}" if field.ragged else f"{field.dtype}{list(field.shape)}"
        return [kind] * len(order)
    if field.dtype == "string":
        texts = batch.text(field.name)
        return [_cut(texts[place]) for place in order]
    values = batch.lists(field.name) if field.ragged else batch.dense(field.name)
    return [_cell(values[place], field.class_names) for place in order]


def _cell(value: Any, class_names: Sequence[str] | None) -> str:
    array = np.asarray(value)
    if not array.ndim:
        plain = array.item()
        if class_names and isinstance(plain, int) and 0 <= plain < len(class_names):
            return f"{plain} {_cut(class_names[plain])}"
        return _number(plain)
    if array.ndim == 1:
        first = ", ".join(_number(item) for item in array[:_VALUES].tolist())
        return f"[{first}]" if len(array) <= _VALUES else f"[{first}, …] of {len(array):,}"
    kind = f"{array.dtype}{list(array.shape)}"
    return f"{kind}, {_number(array.min().item())} … {_number(array.max().item())}" if array.size else kind


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _CHARS else f"{text[: _CHARS - 1]}…"


def _printable(text: str) -> str:
    """Without line breaks and what else a terminal obeys."""
    return text if text.isprintable() else repr(text)[1:-1]
