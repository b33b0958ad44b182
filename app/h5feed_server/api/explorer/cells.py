"""Values of rows as people read them: short ones as text, the others as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.csr import SparseRows
from h5feed.errors import FeedError
from h5feed.wire import DATA, INDICES, INDPTR, OFFSETS, read_body

from ...catalog.dataset import Dataset, Field
from ...services import Services
from .kinds import DRAWN, SINGLE, Kind, kind_of
from .samples import text_at
from .web import exact, link, number

CELL_CHARS = 240
"""Characters of a text in a table."""

CELL_NUMBERS = 4
"""Numbers of a vector in a table."""

_CELL_ROW_BYTES = 4096
"""Bytes of a row that are read for a table: of longer ones, a picture or the row's page shows more."""

_CELL_LIST_BYTES = 64 << 10
"""The same of lists and texts, on average."""


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes
    ----------
    text : str
        What is read, or the text of the picture.
    picture : str or None
        Its URL, where it is one.
    value : object
        As JSON has it.
    problem : bool
        The text says why the value cannot be shown.
    """

    text: str
    picture: str | None = None
    value: Any = None
    problem: bool = False


def cells(
    services: Services, dataset: Dataset, fields: Sequence[Field], rows: npt.NDArray[np.int64], side: int
) -> dict[str, list[Cell]]:
    """Cells of each field, by its name. Only these rows are read, and of what is a picture none.

    Parameters
    ----------
    side : int
        Pixels of pictures.
    """
    found: dict[str, list[Cell]] = {}
    read: list[Field] = []
    for field in fields:
        kind = kind_of(dataset, field)
        if kind in DRAWN:
            found[field.name] = [_pictured(dataset, field, row, side) for row in rows.tolist()]
        elif kind == "none":
            found[field.name] = [Cell(str(field.unreadable), problem=True)] * len(rows)
        elif field.is_ragged and not field.is_sparse and _list_bytes(services, field) > _CELL_LIST_BYTES:
            found[field.name] = [Cell("too long to show here: open the row")] * len(rows)
        elif (field.is_ragged and not field.is_sparse) or field.row_bytes <= _CELL_ROW_BYTES:
            read.append(field)
        else:
            shape = " × ".join(map(str, field.sample_shape))
            found[field.name] = [Cell(f"{shape} numbers")] * len(rows)
    if read:
        found |= _read(services, dataset, read, rows)
    return {field.name: found[field.name] for field in fields}


def _list_bytes(services: Services, field: Field) -> int:
    return services.batcher.reader.typical_items(field.column) * field.dtype.itemsize if field.column.rows else 0


def _read(
    services: Services, dataset: Dataset, fields: Sequence[Field], rows: npt.NDArray[np.int64]
) -> dict[str, list[Cell]]:
    try:
        tensors = read_body(services.batcher.rows(dataset, fields, rows, services.pool.lease))[0]
    except FeedError as error:
        if len(fields) == 1:
            return {fields[0].name: [Cell(error.detail, problem=True)] * len(rows)}
        # One that cannot be read does not take the others with it.
        each = [_read(services, dataset, [field], rows) for field in fields]
        return {name: cells for found in each for name, cells in found.items()}
    return {field.name: _as_cells(dataset, field, tensors) for field in fields}


def _as_cells(dataset: Dataset, field: Field, tensors: Any) -> list[Cell]:
    if field.is_sparse:
        data, indices, indptr = (tensors[field.name + suffix] for suffix in (DATA, INDICES, INDPTR))
        return [_listed(row) for row in SparseRows(data, indices, indptr, field.sample_shape[0]).dense()]
    values, kind = tensors[field.name], kind_of(dataset, field)
    if field.is_text:
        return [Cell(text, value=text) for text in text_at(values, tensors[field.name + OFFSETS], CELL_CHARS)]
    # Of bfloat16, `read_body` makes ml_dtypes' type where that is installed.
    values = field.column.widened(values.view(field.dtype))
    if field.is_ragged:
        offsets = tensors[field.name + OFFSETS]
        return [_listed(values[begin:end]) for begin, end in pairwise(offsets)]
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    if kind in SINGLE:
        return [single(field, value, kind) for value in flat[:, 0].tolist()]
    return [_listed(row) for row in flat]


def single(field: Field, value: Any, kind: Kind) -> Cell:
    """One number, or the class that it stands for."""
    name = class_name(field, value) if kind == "class" else None
    text = exact(value) if name is None else name if name == str(value) else f"{name} ({value})"
    return Cell(text, value=value)


def class_name(field: Field, value: Any) -> str | None:
    """Name of the class that a number stands for; None where it has none."""
    names = field.class_names
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else None


def _listed(values: npt.NDArray[Any]) -> Cell:
    flat = values.reshape(-1)
    shown = [number(value) for value in flat[:CELL_NUMBERS].tolist()]
    more = f", … ({len(flat):,})" if len(flat) > CELL_NUMBERS else ""
    return Cell(f"[{', '.join(shown)}{more}]", value=flat[: 4 * CELL_NUMBERS].tolist())


def _pictured(dataset: Dataset, field: Field, row: int, side: int) -> Cell:
    url = link(
        "datasets", dataset.name, "rows", row, "view", field=field.name, side=side, revision=dataset.revision
    )  # fmt: skip
    return Cell(f"{field.name} of row {row}", url)
