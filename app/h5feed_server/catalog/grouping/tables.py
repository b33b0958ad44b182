"""Groups the arrays of files into tables: which are fields of the same dataset, and in which order their rows are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout

from ..roles import names_classes
from ..split_names import SPLIT_WORDS
from . import matlab, unlabelled
from .assembly import assemble
from .classes import doubt_of, merge_classes
from .collapse import Group, collapse, series_of
from .names import are_numbered, is_field, is_label
from .pieces import Hints, InspectedFile, Leaf, Path, Series, Shape, Table, TableField
from .stacking import as_row

_ABOUT = ("metadata", "meta")
"""Arrays in groups with these names are listed, but do not form datasets. The same holds for arrays with these names
next to the rows of a dataset."""

_NOT_DATA = ("_i_", "#refs#", "#subsystem#")
"""Prefixes of the internal groups of PyTables and MATLAB."""

_MOST_ELSEWHERE = 100
"""Maximum number of arrays that a dataset lists as datasets of their own."""


class PartMissing(ValueError):
    """A file that a dataset needs is missing."""


def tables_of(files: Sequence[InspectedFile], hints: Hints = Hints()) -> list[Table]:  # noqa: B008
    """Return the tables in files that form one unit, usually a single file.

    Parameters
    ----------
    files : sequence of InspectedFile
    hints : Hints
        What is declared about them.

    Raises
    ------
    PartMissing
        A shard is missing.
    InDoubt
        The arrays are ambiguous.
    ValueError
        The arrays do not fit together.
    """
    arrays = _Arrays()
    for file in files:
        arrays.add(file, hints, several=len(files) > 1)
    if hints.rows_along and not arrays.has_turned:
        raise ValueError(f"rows_along = {hints.rows_along}: no array has an axis of this number (the first one is 0)")
    leaves = collapse(arrays.root, hints)
    for leaf in [leaf for leaf in leaves if not leaf.segment.array.shape]:
        arrays.unreadable.setdefault(leaf.rest, (leaf.segment, leaf.segment.array.unreadable or "it has no rows"))
    leaves = [leaf for leaf in leaves if leaf.segment.array.shape]
    if len(files) > 1:
        _check_together(files, leaves)
    series = series_of(leaves)
    if not hints.stack:
        series = merge_classes(series, hints)
    series, apart = unlabelled.set_apart(series)
    tables = _build(series)
    unlabelled.note(tables, apart)
    _name_splits(tables, arrays.masks)
    for path, (segment, problem) in arrays.unreadable.items():
        _list_unreadable(tables, path, segment, problem)
    for table in tables:
        _tell_apart(table.fields)
        table.text = {path: values for path, values in arrays.text.items() if values is not None}
        table.names_differ = any(values is None and names_classes(path[-1]) for path, values in arrays.text.items())
        table.notes = (*table.notes, *arrays.notes)
    return tables


class _Arrays:
    """The arrays of all files.

    Attributes
    ----------
    root : Group
        Arrays that may be fields, in their groups.
    unreadable : dict
        Other arrays by path, with the reason why they are not fields.
    text : dict
        Short lists of text by path; None if files have different lists at the same path.
    masks : dict of str to tuple of str
        Names of the episodes of each split, in robomimic's format.
    notes : list of str
    """

    def __init__(self) -> None:
        self.root = Group()
        self.unreadable: dict[Path, tuple[Segment, str]] = {}
        self.text: dict[Path, tuple[str, ...] | None] = {}
        self.masks: dict[str, tuple[str, ...]] = {}
        self.notes: list[str] = []
        self.has_turned = False
        """Whether rows of some array are along the declared axis, which is not the first."""

    def add(self, file: InspectedFile, hints: Hints, *, several: bool) -> None:
        """Add the arrays of a file. `several`: there are other files too."""
        usable: dict[Path, Segment] = {}
        for name, values in file.names.items():
            self._add_text(name, values)
        for name, segment in file.segments.items():
            array = segment.array
            path = tuple(name.split("/"))
            if any(part.startswith(_NOT_DATA) for part in path):
                continue
            if array.text is not None:
                if len(path) > 1 and path[-2].lower() == "mask":
                    self._add_mask(path, array.text)
                    continue
                self._add_text(array.path, array.text)
            problem = _problem_of(path, array)
            if hints.stack and problem is None:
                row = as_row(replace(segment, axis=0))
                problem, segment = (row, segment) if isinstance(row, str) else (None, row)
            if problem is None:
                usable[path] = segment
            else:
                self.unreadable.setdefault(path, (segment, problem))
        if hints.rows_along is not None:
            turned = {}
            usable = {path: _along(segment, hints.rows_along) for path, segment in usable.items()}
            self.has_turned |= any(segment.transposed for segment in usable.values())
        else:
            turned = {} if hints.stack else matlab.turned(usable)
        for path, segment in (usable | turned).items():
            tags = file.tags
            leaf = Leaf(path, segment, tags.shard, tags.split or "", half=tags.half)
            leaf.note = matlab.NOTE if path in turned else None
            leaf.file = file.name if hints.stack or hints.rows_along is not None else ""
            leaf.kind = file.name if hints.classes and several else ""
            self.root.add(leaf)

    def _add_text(self, name: str, values: tuple[str, ...]) -> None:
        path = tuple(name.split("/"))
        if self.text.setdefault(path, values) != values:
            self.text[path] = None

    def _add_mask(self, path: Path, episodes: tuple[str, ...]) -> None:
        if self.masks.setdefault(path[-1], episodes) != episodes:
            self.notes.append(f"{'/'.join(path)!r} is ignored: the files have different ones")
            self.masks[path[-1]] = ()


def _along(segment: Segment, axis: int) -> Segment:
    """The array with rows along an axis, if it has it. Lists and members of records have rows along the first only."""
    array = segment.array
    if len(array.shape) <= axis or segment.has_lists or array.record is not None or array.member is not None:
        return replace(segment, axis=0)
    return replace(segment, axis=axis)


def _problem_of(path: Path, array: ArrayLayout) -> str | None:
    """Why an array cannot be a field, regardless of other arrays; None if it may be one."""
    about = next((part for part in path[:-1] if part.lower() in _ABOUT), None)
    if array.scalar is not None and about is None:
        return None
    problem = array.unreadable or (None if array.shape else "it has no rows")
    return problem or (f"its group {about!r} holds metadata" if about is not None else None)


def _list_unreadable(tables: list[Table], path: Path, segment: Segment, problem: str) -> None:
    """List an array that is not a field, with the reason, in the table of the nearest group."""
    owner = _owner(tables, path)
    prefix = tuple(owner.path.split("/")) if owner.path else ()
    name = ".".join(path[len(prefix) :] if path[: len(prefix)] == prefix else path)
    owner.fields.append(TableField(name, Column((segment,)), problem))


def _tell_apart(fields: list[TableField]) -> None:
    """Make names of fields unique. Of several fields with the same name, only the first readable one is served."""
    first: dict[str, TableField] = {}
    for field in sorted(fields, key=lambda field: field.unreadable is not None):
        kept = first.setdefault(field.name, field)
        if kept is not field:
            there = kept.array.path
            field.unreadable = field.unreadable or (
                f"{there!r} also has the name {field.name!r}: give it another one with 'fields' in h5feed.toml"
            )
            field.name = f"{field.name} ({field.array.path})"
            first[field.name] = field


def _check_together(files: Sequence[InspectedFile], leaves: Iterable[Leaf]) -> None:
    """Raise unless all shards exist and at least one field is in all splits and shards.

    Raises
    ------
    PartMissing
    ValueError
    """
    for split in {file.tags.split for file in files}:
        alike = [file.tags for file in files if file.tags.split == split]
        shards = max(tags.shards for tags in alike)
        missing = sorted(set(range(shards)) - {tags.shard for tags in alike})
        if missing:
            raise PartMissing(f"shard {missing[0]:05d} of {shards:05d} is missing")
    # Files without a split in their names may have groups for splits, as shards do.
    places = {(file.tags.split or "", file.tags.shard) for file in files}
    there: dict[Path, set[tuple[str, int]]] = defaultdict(set)
    for leaf in leaves:
        there[leaf.rest] |= {(leaf.split, leaf.shard), ("", leaf.shard)}
    if not any(where >= places for where in there.values()):
        raise ValueError("there is no array that all files have")


def _main(clusters: Sequence[list[Series]]) -> list[Series]:
    """Select the arrays of a level that form its main table, which has the name of the level.

    The choice only affects names. It prefers arrays with splits, then with a label, then the most arrays.
    """

    def weight(cluster: list[Series]) -> tuple[bool, bool, int, int, int]:
        arrays = [series for series in cluster if not series.is_text]
        names = [series.path[-1] for series in arrays]
        has_splits = any(piece.split for piece in cluster[0].pieces)
        nbytes = sum(series.nbytes for series in cluster)
        return has_splits, any(map(is_label, names)), len(arrays), sum(map(is_field, names)), nbytes

    if not clusters:
        return []
    best = max(clusters, key=weight)
    return best if len(clusters) == 1 or len(best) > 1 or is_field(best[0].path[-1]) else []


def _build(members: Sequence[Series], depth: int = 0) -> list[Table]:
    """Build tables from series whose paths have the same first `depth` parts."""
    direct = [series for series in members if len(series.path) == depth + 1]
    below: dict[str, list[Series]] = defaultdict(list)
    for series in members:
        if len(series.path) > depth + 1:
            below[series.path[depth]].append(series)
    path = members[0].path[:depth] if members else ()
    clusters: dict[Shape, list[Series]] = defaultdict(list)
    for series in direct:
        if not series.apart:
            clusters[series.shape].append(series)
    main = _main(list(clusters.values()))
    shape = main[0].shape if main else None
    # Groups with the same rows are part of one table. All other groups are separate tables.
    if not direct and below:
        shapes = [{series.shape for series in group} for group in below.values()]
        candidates = [next(iter(only)) for only in shapes if len(only) == 1]
        shape = max(candidates, key=candidates.count, default=None)
    agreeing = [
        name
        for name, group in below.items()
        if all(series.shape == shape and series.why_apart is None for series in group)
    ]
    if not direct and (len(agreeing) < 2 or are_numbered(agreeing)):
        agreeing = []
    mine = main + [series for name in agreeing for series in below[name]]
    tables = [assemble(path, mine)] if mine else []
    if main and main[0].doubtful:
        tables[0].problem = doubt_of(main)
    elsewhere = [[series] for series in direct if series.apart]
    elsewhere += [cluster for cluster in clusters.values() if cluster is not main]
    for cluster in elsewhere:
        tables += _elsewhere(path, cluster, tables[0] if mine else None, mine[0].shape if mine else frozenset())
    for name, group in below.items():
        if name not in agreeing:
            tables.extend(_build(group, depth + 1))
    return tables


def _elsewhere(path: Path, cluster: list[Series], main: Table | None, shape: Shape) -> list[Table]:
    """Build a separate table of arrays that do not share the rows of the `main` one, which lists them with the reason.

    Short lists of text and metadata are only listed.

    Parameters
    ----------
    path : tuple of str
        The group of the arrays.
    cluster : list of Series
        The arrays, of the same rows.
    main : Table or None
    shape : frozenset
        `Series.shape` of the fields of `main`.
    """
    if main is not None and all(series.is_text for series in cluster):
        for series in cluster:
            problem = "it is a short list of text and not a field: class names, for instance"
            main.fields.append(TableField(series.path[-1], Column((series.first,)), problem))
        return []
    if main is not None and all(series.path[-1].lower() in _ABOUT for series in cluster):
        for series in cluster:
            problem = f"it has {series.rows} rows, but the dataset has {main.rows}: it holds metadata"
            main.fields.append(TableField(series.path[-1], Column((series.first,)), problem, series.note))
        return []
    name = min(series.path[-1] for series in cluster if not series.is_text or len(cluster) == 1)
    table = assemble(path, cluster, name)
    served = any(field.unreadable is None for field in table.fields)
    if main is not None:
        for series in cluster[:_MOST_ELSEWHERE]:
            where = ", ".join(sorted({piece.where for piece in series.pieces}))[:80]
            problem = f"it has {series.rows} rows, but the dataset has {main.rows}"
            if series.rows == main.rows or series.shape < shape:
                problem = f"it does not exist for all rows, only in {where}"
            problem = series.why_apart or problem
            own = next(field for field in table.fields if field.name == series.path[-1])
            problem = own.unreadable or f"{problem}: it is a dataset of its own"
            main.fields.append(TableField(series.path[-1], own.column, problem, series.note))
    return [table] if served or main is None else []


def _name_splits(tables: Iterable[Table], masks: Mapping[str, tuple[str, ...]]) -> None:
    """Add native splits that are lists of episodes, in robomimic's format."""
    for table in tables:
        if table.native or not masks:
            continue
        for name, members in masks.items():
            split = SPLIT_WORDS.get(name.lower(), name)
            among = set(members)
            begin, runs = 0, []
            for group, count in table.episodes:
                if group in among:
                    runs.append((begin, begin + count))
                begin += count
            if runs:
                # Several words can mean the same split.
                table.native[split] = sorted({*table.native.get(split, ()), *runs})


def _owner(tables: list[Table], path: Path) -> Table:
    """The table of the nearest group, which lists an array that is not a field."""
    if not tables:
        tables.append(Table("", 0, []))
    inside = [t for t in tables if not t.path or path[: len(t.path.split("/"))] == tuple(t.path.split("/"))]
    return max(inside or tables[:1], key=lambda table: len(table.path))
