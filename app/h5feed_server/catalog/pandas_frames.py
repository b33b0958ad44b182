"""Interprets frames and series that pandas wrote (``DataFrame.to_hdf``, `HDFStore`).

pandas stores all columns of a frame with the same dtype in one array, called a block, and their names in another array.
This module turns them into fields with these names. The index becomes a field of role ``other``. ``format="fixed"``
writes arrays ``axis0`` (the columns), ``axis1`` (the index), ``block0_items`` and ``block0_values``. ``format="table"``
writes one table of records, with the names of columns in pickled attributes. These are parsed, never unpickled: see
`storage.hdf5.pickled_lists`.

The format is defined by ``pandas/io/pytables.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
from h5feed.stored.column import About, Segment

from .frame_columns import (
    PICKLED,
    FrameColumn,
    fields_of,
    is_pickled,
    refused,
    segment_of,
    time_note,
    with_bools,
    without_placeholder,
)
from .split_names import without_split

Read = Callable[[Segment], npt.NDArray[Any]]
"""Returns all values of an array."""

_KINDS = ("frame", "series", "frame_table", "appendable_frame", "series_table")


def as_frames(
    groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
) -> dict[str, Segment]:
    """Return the arrays of a file, with frames and series replaced by their columns.

    pandas' internal arrays, such as names of columns and search trees, are left out.

    Parameters
    ----------
    groups : mapping
        Attributes of groups, by path.
    segments : mapping
        All arrays, by path.
    read : callable
        Returns all values of an array.

    Returns
    -------
    dict of str to Segment
        By the path to use as the name.
    """
    keys = [path for path, about in groups.items() if about.get("pandas_type") in _KINDS and not _is_meta(path)]
    if not keys:
        return dict(segments)
    bases = _bases(keys)
    known = {path: with_bools(segment) for path, segment in segments.items()}
    columns: dict[str, Segment] = {}
    taken: set[str] = set()
    for key in keys:
        frame = _Frame(key, groups, known, read)
        own = dict(frame.fields(bases[key]))
        if own:
            columns |= own
            taken |= set(frame.parts())
    return columns | {path: segment for path, segment in segments.items() if path not in taken}


def _is_meta(path: str) -> bool:
    """Whether a group is a list of categories, which pandas stores as a series below the frame."""
    return path.endswith("/meta") and "/meta/" in path


def _bases(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The path to use for the columns under each key. If keys name splits, ``X_train`` becomes ``train/X``."""
    splits = {key: without_split(key.rpartition("/")[2]) for key in keys}
    if "train" not in {split for _, split in splits.values()}:
        return {key: tuple(part for part in key.split("/") if part) for key in keys}
    bases = {}
    for key, (rest, split) in splits.items():
        above = tuple(key.split("/")[:-1])
        bases[key] = (*above, split, *([rest] if rest else [])) if split else (*above, rest)
    return bases


class _Frame:
    """One frame or series."""

    def __init__(
        self, key: str, groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
    ) -> None:
        self._prefix = f"{key}/" if key else ""
        self._about, self._groups, self._read = groups[key], groups, read
        self._segments = segments
        self._kind: str = self._about["pandas_type"]

    def parts(self) -> Iterator[str]:
        """Paths of all arrays that belong to the frame or series."""
        others = [f"{path}/" for path in self._groups if path.startswith(self._prefix) and not _is_meta(path)]
        others = [path for path in others if path != self._prefix]
        for path in self._segments:
            if path.startswith(self._prefix) and not any(path.startswith(other) for other in others):
                yield path

    def fields(self, base: tuple[str, ...]) -> Iterator[tuple[str, Segment]]:
        """Columns and index, with the paths to use as names; none if the arrays are not as pandas writes them."""
        is_series = self._kind.startswith("series")
        columns = list(self._in_table() if self._kind.endswith(("_table", "_frame")) else self._fixed())
        if not columns:
            return
        if is_series:
            # A series is a single field, with the name of its key.
            above, name = (
                (base[:-1], base[-1]) if base and base[-1] not in ("train", "val", "test") else (base, "values")
            )
            yield _path(above, name), segment_of(replace(columns[0], names=(name,)))
        else:
            taken: dict[str, int] = {}
            for number, (name, segment) in enumerate(fields_of(columns)):
                own = name.replace("/", ".") or f"column_{number}"
                again = taken[own] = taken.get(own, -1) + 1
                yield _path(base, f"{own}.{again}" if again else own), segment
        known = {name for column in columns for name in column.names}
        for name, segment in self._index():
            free = name.replace("/", ".") or "index"
            while free in known and not is_series:
                free += "_"
            yield _path(base, free), segment

    # format="fixed" --------------------------------------------------------------------------------------------------

    def _fixed(self) -> Iterator[FrameColumn]:
        if self._kind == "series":
            values = self._get("values")
            if values is not None:
                yield self._column(("values",), without_placeholder(values), 0)
            return
        order = self._labels("axis0")
        columns: dict[str, FrameColumn] = {}
        for number in range(int(self._about.get("nblocks", 0) or 0)):
            values, names = self._get(f"block{number}_values"), self._labels(f"block{number}_items")
            if values is None or names is None:
                return
            values = without_placeholder(values)
            is_matrix = len(values.array.shape) == 2 and values.array.shape[1] == len(names)
            if not is_matrix and not is_pickled(values.array) and values.array.unreadable is None:
                return
            for place, name in enumerate(names):
                columns[name] = self._column((name,), values, place)
        yield from (columns.pop(name) for name in order or () if name in columns)
        yield from columns.values()

    def _column(self, names: tuple[str, ...], block: Segment, place: int) -> FrameColumn:
        dtype = str(block.array.attributes.get("value_type") or "")
        return FrameColumn(names, block, place, dtype, pickled=is_pickled(block.array))

    def _labels(self, axis: str) -> list[str] | None:
        """The labels of an axis; for several levels, joined with dots. None if they cannot be read."""
        if self._about.get(f"{axis}_variety") != "multi":
            segment = self._get(axis)
            return None if segment is None else texts_of(segment, self._read)
        levels = []
        for level in range(int(self._about.get(f"{axis}_nlevels", 0))):
            values, codes = self._get(f"{axis}_level{level}"), self._get(f"{axis}_label{level}")
            texts = None if values is None else texts_of(values, self._read)
            if codes is None or texts is None:
                return None
            levels.append([texts[code] if code >= 0 else "" for code in self._read(codes).tolist()])
        return [".".join(part for part in parts if part) for parts in zip(*levels, strict=True)]

    # format="table" --------------------------------------------------------------------------------------------------

    def _in_table(self) -> Iterator[FrameColumn]:
        members = {
            path.removeprefix(f"{self._prefix}table."): segment
            for path, segment in self._segments.items()
            if path.startswith(f"{self._prefix}table.")
        }
        attributes = next((segment.array.attributes for segment in members.values() if segment.array.attributes), {})
        axes = self._about.get("non_index_axes")
        order = axes[0][1] if isinstance(axes, list) and axes and isinstance(axes[0], list) and len(axes[0]) > 1 else []
        # Names may occur more than once.
        by_name: dict[str, list[FrameColumn]] = defaultdict(list)
        for name, block in members.items():
            if name in self._index_members():
                continue
            names = attributes.get(f"{name}_kind")
            dtype = str(attributes.get(f"{name}_dtype") or "")
            shape = block.array.shape
            width = 1 if len(shape) == 1 else shape[1] if len(shape) == 2 else 0
            if isinstance(names, list) and names and block.array.unreadable is not None:
                width = len(names)
            if not isinstance(names, list) or len(names) != width:
                # The names cannot be read, or do not fit: keep the block as one field with its own name.
                by_name[name].append(FrameColumn((name,), block, 0, dtype, whole=True))
                continue
            for place, one in enumerate(names):
                categories = self._categories(name) if attributes.get(f"{name}_meta") == "category" else None
                by_name[_name(one)].append(FrameColumn((_name(one),), block, place, dtype, categories))
        named = map(_name, order if isinstance(order, list) else [])
        yield from (by_name[name].pop(0) for name in named if by_name.get(name))
        yield from (column for columns in by_name.values() for column in columns)

    def _categories(self, member: str) -> tuple[str, ...] | None:
        values = self._segments.get(f"{self._prefix}meta/{member}/meta/table.values")
        if values is None:
            # Numeric categories are stored as a block of one column.
            values = self._segments.get(f"{self._prefix}meta/{member}/meta/table.values_block_0")
        texts = None if values is None else texts_of(values, self._read)
        return None if texts is None else tuple(texts)

    def _index_members(self) -> dict[str, str]:
        """Members of the table that hold the index, with the name of each."""
        levels = self._about.get("levels")
        members = {"index": "index"}
        if isinstance(levels, list):
            # Each level of a multi-index is a member, in addition to the row number.
            members |= {str(level): str(level) for level in levels if isinstance(level, str)}
        return members

    # ------------------------------------------------------------------------------------------------------------------

    def _index(self) -> Iterator[tuple[str, Segment]]:
        about = About("other", "the index of the frame that pandas wrote", is_column=True)
        if self._kind.endswith(("_table", "_frame")):
            for member, name in self._index_members().items():
                segment = self._get(f"table.{member}")
                if segment is not None:
                    kind = segment.array.attributes.get(f"{member}_kind")
                    yield name, replace(segment, about=replace(about, note=time_note(str(kind))))
            return
        axis = "index" if self._kind == "series" else "axis1"
        if self._about.get(f"{axis}_variety") == "multi":
            for level in range(int(self._about.get(f"{axis}_nlevels", 0))):
                values, codes = self._get(f"{axis}_level{level}"), self._get(f"{axis}_label{level}")
                if values is None or codes is None:
                    continue
                texts = texts_of(values, self._read)
                said = replace(about, class_names=tuple(texts) if texts else None, note="codes of the index's level")
                yield _named(values.array.attributes, f"index_{level}"), replace(codes, about=said)
            return
        segment = self._get(axis)
        if segment is not None:
            kind = str(segment.array.attributes.get("kind") or "")
            segment = without_placeholder(segment)
            if is_pickled(segment.array):
                segment = replace(segment, array=refused(segment.array, PICKLED))
            about = replace(about, note=time_note(kind))
            yield _named(segment.array.attributes, "index"), replace(segment, about=about)

    def _get(self, name: str) -> Segment | None:
        return self._segments.get(self._prefix + name)


def texts_of(segment: Segment, read: Read) -> list[str] | None:
    """The values of an array as text; None if they cannot be read."""
    if segment.array.text is not None:
        return list(segment.array.text)
    if segment.array.unreadable is not None or is_pickled(segment.array):
        return None
    return [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        for value in read(segment).reshape(-1).tolist()
    ]


def _name(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(attributes: Mapping[str, Any], default: str) -> str:
    """The name of an index. PyTables stores None as the pickle ``N.``."""
    name = attributes.get("name")
    return name if isinstance(name, str) and name not in ("", "N.") else default


def _path(base: tuple[str, ...], name: str) -> str:
    return "/".join((*base, name))
