"""Frames and series that pandas wrote (``DataFrame.to_hdf``, `HDFStore`), as pandas means them.

A frame's columns of one dtype lie in one array, a block, and another array says what they are called. Here they become
fields by their names; the index becomes one of role ``other``. ``format="fixed"`` writes arrays ``axis0`` (the columns),
``axis1`` (the index), ``block0_items`` and ``block0_values``; ``format="table"`` one table of records, with names of
columns in attributes that are pickles, which are never loaded as such: see `storage.pickled_lists`.

The format is that of ``pandas/io/pytables.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..split_names import without_split
from ..storage.block import columns_of
from ..storage.column import About, Segment
from ..storage.layout import ArrayLayout
from .words import has_meaning

MAX_COLUMNS = 64
"""Columns of a frame up to which each is a field; the blocks of a wider one stay matrices."""

Read = Callable[[Segment], npt.NDArray[Any]]
"""All values of an array."""

_KINDS = ("frame", "series", "frame_table", "appendable_frame", "series_table")

_PICKLED = (
    "pandas has pickled these values, and a pickle is a program: write the frame with to_hdf(format='table'), which "
    "stores text as text"
)
_TIMES = ("datetime64", "timedelta64")


@dataclass(frozen=True)
class _Column:
    """A column, or several of a block that stay together."""

    names: tuple[str, ...]
    block: Segment
    begin: int
    dtype: str
    """As pandas calls it."""
    categories: tuple[str, ...] | None = None
    pickled: bool = False


def as_frames(
    groups: Mapping[str, Mapping[str, Any]], segments: Mapping[str, Segment], read: Read
) -> dict[str, Segment]:
    """The arrays of a file, those of each frame and series as its columns, by paths that are to name them.

    Parameters
    ----------
    groups : mapping
        Attributes of groups, by path.
    segments : mapping
        All arrays, by path.

    What pandas keeps for itself, names of columns and search trees, is left out.
    """
    keys = [path for path, about in groups.items() if about.get("pandas_type") in _KINDS and not _is_meta(path)]
    if not keys:
        return dict(segments)
    bases = _bases(keys)
    found: dict[str, Segment] = {}
    taken: set[str] = set()
    for key in keys:
        frame = _Frame(key, groups, segments, read)
        own = dict(frame.fields(bases[key]))
        if own:
            found |= own
            taken |= set(frame.parts())
    return found | {path: segment for path, segment in segments.items() if path not in taken}


def _is_meta(path: str) -> bool:
    """Whether it is a list of categories, which pandas writes as a series below the frame."""
    return path.endswith("/meta") and "/meta/" in path


def _bases(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The path that names what lies under each key; ``X_train`` is ``X`` of a group ``train``."""
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
        """Paths of all arrays that it consists of."""
        others = [f"{path}/" for path in self._groups if path.startswith(self._prefix) and not _is_meta(path)]
        others = [path for path in others if path != self._prefix]
        for path in self._segments:
            if path.startswith(self._prefix) and not any(path.startswith(other) for other in others):
                yield path

    def fields(self, base: tuple[str, ...]) -> Iterator[tuple[str, Segment]]:
        """Its columns and its index, by the paths that are to name them; none where it is not as pandas writes it."""
        is_series = self._kind.startswith("series")
        columns = list(self._in_table() if self._kind.endswith(("_table", "_frame")) else self._fixed())
        if not columns:
            return
        if is_series:
            # A series is one field, which its key names.
            above, name = (base[:-1], base[-1]) if base and base[-1] not in ("train", "val", "test") else (base, "values")
            yield _path(above, name), _segment(replace(columns[0], names=(name,)), 1)
        else:
            taken: dict[str, int] = {}
            for number, (name, segment) in enumerate(_arranged(columns)):
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

    def _fixed(self) -> Iterator[_Column]:
        if self._kind == "series":
            values = self._get("values")
            if values is not None:
                yield self._column(("values",), values, 0)
            return
        order = self._labels("axis0")
        found: dict[str, _Column] = {}
        for number in range(int(self._about.get("nblocks", 0) or 0)):
            values, names = self._get(f"block{number}_values"), self._labels(f"block{number}_items")
            if values is None or names is None:
                return
            is_matrix = len(values.array.shape) == 2 and values.array.shape[1] == len(names)
            if not is_matrix and not _is_pickled(values.array):
                return
            for place, name in enumerate(names):
                found[name] = self._column((name,), values, place)
        yield from (found.pop(name) for name in order or () if name in found)
        yield from found.values()

    def _column(self, names: tuple[str, ...], block: Segment, place: int) -> _Column:
        dtype = str(block.array.attributes.get("value_type") or "")
        return _Column(names, block, place, dtype, pickled=_is_pickled(block.array))

    def _labels(self, axis: str) -> list[str] | None:
        """The names that an axis has."""
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

    def _in_table(self) -> Iterator[_Column]:
        members = {
            path.removeprefix(f"{self._prefix}table."): segment
            for path, segment in self._segments.items()
            if path.startswith(f"{self._prefix}table.")
        }
        attributes = next((segment.array.attributes for segment in members.values() if segment.array.attributes), {})
        axes = self._about.get("non_index_axes")
        order = axes[0][1] if isinstance(axes, list) and axes and isinstance(axes[0], list) and len(axes[0]) > 1 else []
        found: dict[str, _Column] = {}
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
                # Its names are no plain list: they are what the table calls them.
                names = [f"{name}.{place}" for place in range(width)] if width > 1 else [name]
            for place, one in enumerate(names):
                categories = self._categories(name) if attributes.get(f"{name}_meta") == "category" else None
                found[_name(one)] = _Column((_name(one),), block, place, dtype, categories)
        yield from (found.pop(name) for name in map(_name, order if isinstance(order, list) else []) if name in found)
        yield from found.values()

    def _categories(self, member: str) -> tuple[str, ...] | None:
        values = self._segments.get(f"{self._prefix}meta/{member}/meta/table.values")
        if values is None:
            # Those of numbers lie in a block of one column.
            values = self._segments.get(f"{self._prefix}meta/{member}/meta/table.values_block_0")
        texts = None if values is None else texts_of(values, self._read)
        return None if texts is None else tuple(texts)

    def _index_members(self) -> dict[str, str]:
        """Members of the table that are the index, and how they are called."""
        levels = self._about.get("levels")
        found = {"index": "index"}
        if isinstance(levels, list):
            # Of several levels each is a member of its own beside a number for each row.
            found |= {str(level): str(level) for level in levels if isinstance(level, str)}
        return found

    # ------------------------------------------------------------------------------------------------------------------

    def _index(self) -> Iterator[tuple[str, Segment]]:
        about = About("other", "the index of the frame that pandas wrote", is_column=True)
        if self._kind.endswith(("_table", "_frame")):
            for member, name in self._index_members().items():
                segment = self._get(f"table.{member}")
                if segment is not None:
                    kind = segment.array.attributes.get(f"{member}_kind")
                    yield name, replace(segment, about=replace(about, note=_time_note(str(kind))))
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
            if _is_pickled(segment.array):
                segment = replace(segment, array=_refused(segment.array, _PICKLED))
            about = replace(about, note=_time_note(kind))
            yield _named(segment.array.attributes, "index"), replace(segment, about=about)

    def _get(self, name: str) -> Segment | None:
        return self._segments.get(self._prefix + name)


def _arranged(columns: Sequence[_Column]) -> Iterator[tuple[str, Segment]]:
    """Columns as fields; of a wide frame, those that follow each other in a block, and are no labels, as a matrix."""
    width = len(columns)
    if width <= MAX_COLUMNS:
        for column in columns:
            yield column.names[0], _segment(column, width)
        return
    runs: list[_Column] = []
    for column in sorted(columns, key=lambda one: (one.block.array.path, one.begin)):
        last = runs[-1] if runs else None
        alone = has_meaning(column.names[0]) or column.pickled or column.categories is not None or column.dtype in _TIMES
        if (
            last is not None
            and not alone
            and not has_meaning(last.names[-1])
            and (last.block.array.path, last.begin + len(last.names)) == (column.block.array.path, column.begin)
        ):
            runs[-1] = replace(last, names=(*last.names, *column.names))
        else:
            runs.append(column)
    matrices = [run for run in runs if len(run.names) > 1]
    for run in runs:
        if len(run.names) == 1:
            yield run.names[0], _segment(run, width)
            continue
        name = "values" if len(matrices) == 1 else f"values_{np.dtype(run.block.array.dtype).name}"
        whole = _matrix(run)
        yield from [(name, whole)] if whole is not None else ((n, s) for n, s in _each(run, width))


def _each(run: _Column, width: int) -> Iterator[tuple[str, Segment]]:
    for place, name in enumerate(run.names):
        yield name, _segment(replace(run, names=(name,), begin=run.begin + place), width)


def _matrix(run: _Column) -> Segment | None:
    """Columns that follow each other as one array (rows, columns)."""
    array = run.block.array
    attributes = {**array.attributes, "columns": list(run.names)}
    about = About("input", f"{len(run.names)} columns of a frame: its attribute 'columns' has their names", True)
    if len(array.shape) == 2 and len(run.names) == array.shape[1]:
        return replace(run.block, array=replace(array, attributes=attributes), about=about)
    found = columns_of(array, run.begin, run.begin + len(run.names), attributes)
    return None if found is None else replace(run.block, array=found, about=about)


def _segment(column: _Column, width: int) -> Segment:
    array = column.block.array
    note = _time_note(column.dtype)
    if column.categories is not None:
        note = "codes of pandas' categories, which are its class names; -1 where a value is missing"
    about = About(
        "other" if note and column.categories is None else None,
        "a point in time" if note and column.categories is None else None,
        is_column=True,
        class_names=column.categories,
        note=note,
    )
    if column.pickled:
        return replace(column.block, array=_refused(array, _PICKLED), about=about)
    if array.unreadable is not None:
        own = f"{array.path}[:, {column.begin}]"
        return replace(column.block, array=replace(_refused(array, array.unreadable), path=own), about=about)
    if len(array.shape) == 1:
        return replace(column.block, array=replace(array, attributes={}), about=about)
    # Its block's attributes are those of all columns.
    found = columns_of(array, column.begin, column.begin + 1, {})
    if found is None and array.shape[1:] == (1,):
        found = array
    if found is None:
        path = f"{array.path}[:, {column.begin}]"
        reason = f"it is one of {array.shape[1]} columns that can only be read together: ask for {array.path!r} by h5feed.toml"
        found = replace(_refused(array, reason), path=path)
    return replace(column.block, array=found, about=about)


def texts_of(segment: Segment, read: Read) -> list[str] | None:
    """Values as names; None where they cannot be read."""
    if segment.array.text is not None:
        return list(segment.array.text)
    if segment.array.unreadable is not None or _is_pickled(segment.array):
        return None
    return [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        for value in read(segment).reshape(-1).tolist()
    ]


def _name(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(attributes: Mapping[str, Any], default: str) -> str:
    """The name of an index; PyTables writes None as the pickle ``N.``."""
    name = attributes.get("name")
    return name if isinstance(name, str) and name not in ("", "N.") else default


def _is_pickled(array: ArrayLayout) -> bool:
    return array.attributes.get("PSEUDOATOM") == "object"


def _time_note(dtype: str) -> str | None:
    if not dtype.startswith(_TIMES):
        return None
    since = " since 1970-01-01" if dtype.startswith("datetime64") else ""
    unit = dtype[dtype.find("[") + 1 :].split(",")[0].rstrip("]") if "[" in dtype else "ns"
    return f"{dtype.split(',')[0]}: whole {_UNITS.get(unit, unit)}{since}"


_UNITS = {"ns": "nanoseconds", "us": "microseconds", "ms": "milliseconds", "s": "seconds"}


def _refused(array: ArrayLayout, reason: str) -> ArrayLayout:
    return ArrayLayout(array.path, (), "|u1", unreadable=reason, attributes=array.attributes)


def _path(base: tuple[str, ...], name: str) -> str:
    return "/".join((*base, name))
