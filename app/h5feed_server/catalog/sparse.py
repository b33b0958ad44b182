"""Recognises sparse matrices: groups with arrays of values and of their row and column indices.

The arrays do not hold rows, so a sparse matrix is listed as one unreadable field.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from h5feed.stored.column import Segment
from h5feed.stored.layout import ArrayLayout

_PARTS = (
    frozenset(("data", "indices", "indptr")),
    frozenset(("data", "ir", "jc")),
    frozenset(("data", "row", "col")),
)
"""Members of such a group: compressed rows or columns, MATLAB's names for them, and coordinates."""

_BESIDE = frozenset(("shape", "format"))
"""Other members that a sparse matrix may have."""


def without_sparse(groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a file, with the parts of each sparse matrix replaced by one unreadable array."""
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for path in segments:
        group, _, name = path.rpartition("/")
        members[group][name] = path
    fields = dict(segments)
    for group, names in members.items():
        parts = next((parts for parts in _PARTS if parts <= names.keys()), None)
        if parts is None or ("row" in parts and not _BESIDE & names.keys() and group not in groups):
            continue
        if not _is_sparse(parts, {name: segments[names[name]] for name in parts}):
            continue
        first = segments[names["data"]]
        gone = {names[name] for name in (*parts, *(_BESIDE & names.keys()))}
        path = group or "data"
        reason = f"{_described(groups.get(group, {}))}, which is not supported yet: store it as a dense one"
        fields = {name: segment for name, segment in fields.items() if name not in gone}
        fields[path] = Segment(first.source, ArrayLayout(path, (), "|u1", unreadable=reason))
    return fields


def _is_sparse(parts: frozenset[str], segments: Mapping[str, Segment]) -> bool:
    """Whether the lengths are those of a sparse matrix: as many values as indices."""
    shapes = {name: segment.array.shape for name, segment in segments.items()}
    if any(segment.array.unreadable is None and len(shapes[name]) != 1 for name, segment in segments.items()):
        return False
    counts = {shapes[name] for name in parts - {"indptr", "jc"} if segments[name].array.unreadable is None}
    return len(counts) <= 1


def _described(about: Mapping[str, Any]) -> str:
    kind = str(about.get("encoding-type") or about.get("h5sparse_format") or "")
    shape = about.get("shape") or about.get("h5sparse_shape")
    sides = " × ".join(map(str, shape)) if isinstance(shape, list) else ""
    rows = about.get("MATLAB_sparse")
    if isinstance(rows, int):
        sides = f"{rows} rows"
    what = ", ".join(part for part in (kind, sides) if part)
    return f"it is a sparse matrix{f' ({what})' if what else ''}"
