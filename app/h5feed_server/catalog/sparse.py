"""Sparse matrices: groups with arrays of values and of their row and column indices.

A matrix that is compressed by rows (CSR) or by columns (CSC) is one field, whose rows are sparse. Those of a matrix by
columns are read from a copy by rows, see `storage.transposed`. All others are listed with the reason why their rows
cannot be read. See https://anndata.readthedocs.io/en/stable/fileformat-prose.html#sparse-arrays. Matrices of 10x
Genomics are compressed by cells, and so by rows, although their shape is that of the transposed matrix:
https://www.10xgenomics.com/support/software/cell-ranger/latest/analysis/outputs/cr-outputs-h5-matrices. MATLAB stores
all of them by columns, under other names, and the number of rows in an attribute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from h5feed.stored.codecs import unsupported
from h5feed.stored.column import About, Segment
from h5feed.stored.layout import ArrayLayout

from ..storage.transposed.by_columns import ByColumns
from .array_probe import are_offsets, is_flat
from .pandas_frames import Read

Paired = Callable[[Segment, Segment], Segment]
"""Divides an array of items into lists, by an array of offsets; unreadable if that is impossible."""

ByRows = Callable[[ByColumns], Segment]
"""The rows of a matrix that is stored by columns; unreadable if that is impossible."""

_COMPRESSED = frozenset(("data", "indices", "indptr"))

_MATLAB = {"data": "data", "indices": "ir", "indptr": "jc"}
"""MATLAB's names for the same."""

_PARTS = (
    _COMPRESSED,
    frozenset(_MATLAB.values()),
    frozenset(("data", "row", "col")),
)
"""Members of such a group: compressed rows or columns, the same of MATLAB, and coordinates."""

_BESIDE = frozenset(("shape", "format"))
"""Other members that a sparse matrix may have."""

_BY_ROWS = ("csr_matrix", "csr")
_BY_COLUMNS = ("csc_matrix", "csc")
"""Names of the formats in ``encoding-type`` and in ``h5sparse_format``."""


_COPIED = "stored by columns (CSC): rows are read from a copy, which a job makes when they are first requested"


class _Unservable(Exception):
    """The rows of a sparse matrix cannot be served, for the reason given."""


def with_sparse(
    groups: Mapping[str, Mapping[str, Any]],
    segments: Mapping[str, Segment],
    read: Read,
    paired: Paired,
    by_rows: ByRows,
) -> dict[str, Segment]:
    """The arrays of a file, with the parts of each sparse matrix replaced by one array of sparse rows, or by an
    unreadable one.

    Parameters
    ----------
    groups : mapping
        Attributes of groups, by path.
    segments : mapping
        All arrays of the file, by path.
    read : callable
        Returns all values of a short array.
    paired : callable
        See `Paired`.
    by_rows : callable
        See `ByRows`.
    """
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for path in segments:
        group, _, name = path.rpartition("/")
        members[group][name] = path
    fields = dict(segments)
    for group, names in members.items():
        if names.keys() == {"jc"} and "MATLAB_sparse" in groups.get(group, {}):
            fields[group] = _unreadable(
                group, fields.pop(names["jc"]), groups[group], "all of its values are 0, and MATLAB has stored none"
            )
            continue
        parts = next((parts for parts in _PARTS if parts <= names.keys()), None)
        if parts is None or ("row" in parts and not _BESIDE & names.keys() and group not in groups):
            continue
        about = groups.get(group, {})
        if not _kind(about) and not _is_sparse(parts, {name: segments[names[name]] for name in parts}):
            continue
        own = {name: segments[path] for name, path in names.items()}
        path = group or "data"
        try:
            if "row" in parts:
                raise _Unservable("it is stored as coordinates, so finding a row would read all of it. " + _CONVERT)
            if "jc" in parts:
                own |= {name: own[theirs] for name, theirs in _MATLAB.items()}
            matrix = _rows_of(own, about, read, paired, by_rows)
        except _Unservable as why:
            matrix = _unreadable(path, own["data"], about, str(why))
        gone = {names[name] for name in (*parts, *(_BESIDE & names.keys()))}
        fields = {name: segment for name, segment in fields.items() if name not in gone}
        fields[path] = matrix
    return fields


def _unreadable(path: str, part: Segment, about: Mapping[str, Any], why: str) -> Segment:
    """What stands for a matrix with this part."""
    return Segment(part.source, ArrayLayout(path, (), "|u1", unreadable=f"{_described(about)}: {why}"))


def _rows_of(
    members: Mapping[str, Segment], about: Mapping[str, Any], read: Read, paired: Paired, by_rows: ByRows
) -> Segment:
    """A compressed matrix as sparse rows.

    Raises
    ------
    _Unservable
    """
    for name in _COMPRESSED:
        if (problem := members[name].array.unreadable) is not None:
            raise _Unservable(f"its {name} cannot be read: {problem}")
    data, indices, offsets = members["data"], members["indices"], members["indptr"]
    is_by_rows, rows, columns = _extents(members, about, read)
    which, across = ("rows", "column") if is_by_rows else ("columns", "row")
    count = rows if is_by_rows else columns
    kinds = {name: np.dtype(segment.array.dtype).str for name, segment in (("data", data), ("indices", indices))}
    if not is_flat(data) or data.array.is_bfloat16 or not is_flat(indices) or kinds["indices"][1] not in "iu":
        raise _Unservable(
            f"its data and indices are stored as {kinds['data']} and {kinds['indices']}, which is not read"
        )
    if data.rows != indices.rows:
        raise _Unservable(f"it has {data.rows} values, but {indices.rows} {across} indices")
    if (problem := unsupported(indices.array.filters)) is not None:
        raise _Unservable(f"its indices: {problem}")
    if not are_offsets(offsets) or offsets.rows != count + 1:
        raise _Unservable(f"its indptr has {offsets.rows} numbers, which are not those of {count} {which}")
    lists = paired(data, offsets)
    if lists.array.unreadable is not None:
        raise _Unservable(lists.array.unreadable.replace("its offsets", "its indptr"))
    if is_by_rows:
        return replace(lists, indices=replace(indices, offsets=lists.offsets, below=columns))
    matrix = by_rows(ByColumns(lists, indices, rows, columns))
    if matrix.array.unreadable is not None:
        raise _Unservable(matrix.array.unreadable)
    return replace(matrix, about=About(note=_COPIED))


def _extents(members: Mapping[str, Segment], about: Mapping[str, Any], read: Read) -> tuple[bool, int, int]:
    """Whether a matrix is compressed by rows, and not by columns, and its numbers of rows and columns.

    Raises
    ------
    _Unservable
        One of them is not known.
    """
    if "jc" in members:
        rows = about.get("MATLAB_sparse")
        if type(rows) is not int or rows < 0:
            raise _Unservable("its number of rows is missing: it should be the attribute MATLAB_sparse")
        return False, rows, members["indptr"].rows - 1
    kind = _kind(about)
    shape: Any = about.get("shape") or about.get("h5sparse_shape")
    if kind in (*_BY_ROWS, *_BY_COLUMNS):
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(one) is int and one >= 0 for one in shape):
            raise _Unservable("its shape is missing: it should be an attribute with two integers, 0 or more")
        return kind in _BY_ROWS, shape[0], shape[1]
    stored = members.get("shape")
    if kind or stored is None or "barcodes" not in members or not is_flat(stored) or stored.rows != 2:
        raise _Unservable("its group does not say whether it is stored by rows or by columns. " + _CONVERT)
    # Of 10x Genomics: features × barcodes, by barcodes.
    values = read(stored)
    if len(values) != 2 or min(values) < 0:
        raise _Unservable("its shape cannot be read, or is negative")
    return True, int(values[1]), int(values[0])


_CONVERT = (
    "Store it by rows: adata.X = adata.X.tocsr() in AnnData, or write scipy's .tocsr() as a group with data, indices, "
    "indptr and the attributes encoding-type='csr_matrix' and shape"
)


def _is_sparse(parts: frozenset[str], segments: Mapping[str, Segment]) -> bool:
    """Whether the lengths are those of a sparse matrix: as many values as indices."""
    shapes = {name: segment.array.shape for name, segment in segments.items()}
    if any(segment.array.unreadable is None and len(shapes[name]) != 1 for name, segment in segments.items()):
        return False
    counts = {shapes[name] for name in parts - {"indptr", "jc"} if segments[name].array.unreadable is None}
    return len(counts) <= 1


def _kind(about: Mapping[str, Any]) -> str:
    """The format that the attributes of a group name; empty if they name none."""
    return str(about.get("encoding-type") or about.get("h5sparse_format") or "")


def _described(about: Mapping[str, Any]) -> str:
    kind = _kind(about)
    shape = about.get("shape") or about.get("h5sparse_shape")
    sides = " × ".join(map(str, shape)) if isinstance(shape, list) else ""
    rows = about.get("MATLAB_sparse")
    if isinstance(rows, int):
        sides = f"{rows} rows"
    what = ", ".join(part for part in (kind, sides) if part)
    return f"it is a sparse matrix{f' ({what})' if what else ''}"
