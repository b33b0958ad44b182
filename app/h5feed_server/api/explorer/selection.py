"""Which rows a page shows, and in which order: a split, conditions, what is searched for, and a field to sort by."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from h5feed.order import SPLIT_ALIASES
from pydantic import Field

from ...catalog.dataset import Dataset
from ...row_bits import RowBits, RowRuns, RowSet, as_list
from ...services import Services
from ...splits.split_spec import FilteredSpec
from ...stats.row_search import MAX_TEXT

EVERYTHING = FilteredSpec.model_validate({})
"""Splits as they are stored, and all of their rows."""


class Selection(FilteredSpec):
    """What is selected, as the query of a page says it."""

    split: str = Field("all", description="Rows of this split only.")
    q: str | None = Field(None, max_length=MAX_TEXT, description="Rows that hold this text.")
    sort: str | None = Field(None, description="Field by whose values rows are sorted.")
    order: Literal["asc", "desc"] = Field("asc", description="Of the sorted rows.")

    @property
    def spec(self) -> FilteredSpec:
        return FilteredSpec(**{name: getattr(self, name) for name in FilteredSpec.model_fields})

    @property
    def canonical_split(self) -> str:
        return SPLIT_ALIASES.get(self.split, self.split)

    @property
    def is_everything(self) -> bool:
        return not self.selects and self.sort is None

    @property
    def selects(self) -> bool:
        """Whether rows may be left out."""
        return self.canonical_split != "all" or bool(self.where) or self.q is not None

    def query(self, **changes: Any) -> dict[str, Any]:
        """The parameters of a link to the same selection, those left out that are as they are by default."""
        own = {name: getattr(self, name) for name in Selection.model_fields}
        defaults = Selection.model_construct()
        given = {name: value for name, value in own.items() if value != getattr(defaults, name)}
        return {name: _in_query(value) for name, value in (given | changes).items() if value not in (None, ())}


def _in_query(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def selected(services: Services, dataset: Dataset, selection: Selection) -> RowSet | None:
    """The rows, in order; None: all, by position.

    Raises
    ------
    SplitNotFound, SplitImpossible, FieldNotFound, UnsupportedField, BadParameter, TooLarge
    InProgress
        A job has yet to find them.
    """
    parts = [
        services.statistics.rows(dataset, selection.canonical_split, selection.spec),
        None if selection.q is None else services.search.with_text(dataset, selection.q),
    ]
    wanted: RowSet | None = None
    for rows in parts:
        if rows is not None:
            wanted = rows if wanted is None else _both(as_list(wanted), as_list(rows), dataset.rows)
    if selection.sort is None:
        return wanted
    order = services.search.by_value(dataset, selection.sort, descending=selection.order == "desc")
    return order if wanted is None else order[_mask(as_list(wanted), dataset.rows)[order]]


def page_of(rows: RowSet | None, total: int, offset: int, limit: int) -> npt.NDArray[np.int64]:
    """Ids of the rows of one page."""
    if rows is None:
        return np.arange(offset, min(offset + limit, total), dtype=np.int64)
    return np.asarray(rows[offset : offset + limit], np.int64)


def place_of(rows: RowSet | None, row: int) -> int | None:
    """Where a row stands among the selected ones; None where it is none of them."""
    if rows is None:
        return row
    if isinstance(rows, RowBits | RowRuns):
        return rows.place(row)
    places = np.flatnonzero(rows == row)
    return int(places[0]) if len(places) else None


def _both(first: npt.NDArray[Any], second: npt.NDArray[Any], total: int) -> npt.NDArray[Any]:
    both: npt.NDArray[Any] = first[_mask(second, total)[first]]
    return both


def _mask(rows: npt.NDArray[Any], total: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(total, bool)
    mask[rows] = True
    return mask
