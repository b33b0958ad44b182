"""Loom files (``.loom``): rows are the cells, which are the columns of `matrix` and of `layers`.

The format is described at https://linnarssonlab.org/loompy/format/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from h5feed.stored.column import About, Segment

from .frame_columns import refused
from .vocabulary import words_of

_GENES_BY_CELLS = {
    "matrix": "the matrix of the Loom file",
    "layers": "one of layers, in addition to matrix: select it with x=",
}
"""The matrix, the group of those of the same shape, and the reasons for their roles."""

_CELLS = "col_attrs"

_ASIDE = {
    "row_attrs": "it describes the genes, which are the columns of a row, not the rows",
    "row_graphs": "it is a graph of genes",
    "col_graphs": "it is a graph of cells",
    "attrs": "it describes the file",
}
"""Groups whose arrays do not have one row for each cell, and why their arrays are not served."""

_LABELS = (
    frozenset(("type", "types", "celltype", "celltypes", "annotation", "annotations")),
    frozenset(("cluster", "clusters", "louvain", "leiden")),
)
"""Words in the names of columns that are the label; the first ones are preferred."""


def is_loom(attributes: Mapping[str, Any], segments: Mapping[str, Segment]) -> bool:
    """Whether the file is in the Loom format, by its version or, for old files, by its groups."""
    matrix = segments.get("matrix")
    if matrix is None or (matrix.array.unreadable is None and len(matrix.array.shape) != 2):
        return False
    said = "LOOM_SPEC_VERSION" in attributes or "attrs/LOOM_SPEC_VERSION" in segments
    return said or {"row_attrs", _CELLS} <= {path.partition("/")[0] for path in segments}


def cells(segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a Loom file with their roles; arrays that are not rows are listed with the reason."""
    fields: dict[str, Segment] = {}
    shape = segments["matrix"].array.shape
    for path, segment in segments.items():
        top, name = path.partition("/")[0], path
        if top in _ASIDE:
            segment = replace(segment, array=refused(segment.array, segment.array.unreadable or _ASIDE[top]))
        elif top in _GENES_BY_CELLS:
            name = path.replace("/", ".")
            segment = _by_cells(segment, shape, About("input" if top == "matrix" else "other", _GENES_BY_CELLS[top]))
        elif top == _CELLS:
            name = path.replace("/", ".")
            reason = "a column of col_attrs, which describes the cells: select it with x= or y="
            about = About("other", "names of the cells" if path == f"{_CELLS}/CellID" else reason, is_column=True)
            segment = replace(segment, about=about)
        fields[name] = segment
    label = _label(fields)
    if label is not None:
        about = About("label", "a column that names the types of cells", is_column=True)
        fields[label] = replace(fields[label], about=about)
    order = (*_GENES_BY_CELLS, _CELLS, *_ASIDE)
    return dict(sorted(fields.items(), key=lambda one: _rank(one[0], order)))


def _by_cells(segment: Segment, shape: tuple[int, ...], about: About) -> Segment:
    """A matrix of genes × cells, with the cells as rows."""
    array = segment.array
    if array.unreadable is not None:
        return segment
    if array.shape != shape:
        reason = f"its shape {list(array.shape)} is not that of matrix, {list(shape)}"
        return replace(segment, array=refused(array, reason))
    return replace(segment, axis=1, about=about)


def _label(fields: Mapping[str, Segment]) -> str | None:
    """The column whose name says that it is the type of a cell, or else its cluster."""
    columns = [
        name
        for name, segment in fields.items()
        if name.startswith(f"{_CELLS}.") and len(segment.array.shape) == 1 and _may_be_classes(segment)
    ]
    for words in _LABELS:
        found = [name for name in columns if words.intersection(words_of(name.partition(".")[2]))]
        # Of a number and its text, the number.
        numbers = [name for name in found if np.dtype(fields[name].array.dtype).kind in "iu"]
        if found:
            return next((names[0] for names in (numbers, found) if len(names) == 1), None)
    return None


def _may_be_classes(segment: Segment) -> bool:
    return segment.array.unreadable is None and np.dtype(segment.array.dtype).kind in "iuS"


def _rank(name: str, order: tuple[str, ...]) -> int:
    top = name.replace("/", ".").partition(".")[0]
    return order.index(top) if top in order else len(order)
