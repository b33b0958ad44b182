"""Makes tables of the arrays in files: which of them are fields of one dataset, in which order their rows follow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ...storage.column import Column, Segment
from ...storage.layout import ArrayLayout
from ..roles import names_classes
from ..split_names import SPLIT_WORDS
from . import matlab, unlabelled
from .assembly import assemble
from .classes import doubt_of, merge_classes
from .collapse import Group, collapse, series_of
from .names import are_numbered, is_field, is_label
from .pieces import Hints, InspectedFile, Leaf, Path, Piece, Series, Table, TableField
from .stacking import as_row

_ABOUT = ("metadata", "meta")
"""Groups whose arrays are listed, but make no dataset; so are arrays of that name beside the rows."""

_NOT_DATA = ("_i_", "#refs#", "#subsystem#")
"""How groups begin that PyTables and MATLAB keep for themselves."""

_MOST_ELSEWHERE = 100
"""Arrays that a dataset says of that they are datasets of their own."""


class PartMissing(ValueError):
    """Files belong together, but one that they need is not there."""


def tables_of(files: Sequence[InspectedFile], hints: Hints = Hints()) -> list[Table]:  # noqa: B008
    """The tables in files that belong together; most are one file alone.

    Raises
    ------
    PartMissing
        A shard is not there.
    ValueError
        Their arrays do not fit together.
    """
    arrays = _Arrays()
    for file in files:
        arrays.add(file, hints, several=len(files) > 1)
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
    """The arrays of all files: those that may be fields, and what else there is.

    Attributes
    ----------
    root : Group
        Those that may be fields, in their groups.
    unreadable : dict
        Others, by path, and why they are no fields.
    text : dict
        Lists of text by their paths; None where files do not agree in one.
    masks : dict of str to tuple of str
        Names of the episodes of each split, as robomimic writes them.
    """

    def __init__(self) -> None:
        self.root = Group()
        self.unreadable: dict[Path, tuple[Segment, str]] = {}
        self.text: dict[Path, tuple[str, ...] | None] = {}
        self.masks: dict[str, tuple[str, ...]] = {}
        self.notes: list[str] = []

    def add(self, file: InspectedFile, hints: Hints, *, several: bool) -> None:
        """Sort in the arrays of a file, which may be one of several."""
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
                row = as_row(segment)
                problem, segment = (row, segment) if isinstance(row, str) else (None, row)
            if problem is None:
                usable[path] = segment
            else:
                self.unreadable.setdefault(path, (segment, problem))
        turned = {} if hints.stack else matlab.turned(usable)
        for path, segment in (usable | turned).items():
            tags = file.tags
            leaf = Leaf(path, segment, tags.shard, tags.split or "", half=tags.half)
            leaf.note = matlab.NOTE if path in turned else None
            leaf.file = file.name if hints.stack else ""
            leaf.kind = file.name if hints.classes and several else ""
            self.root.add(leaf)

    def _add_text(self, name: str, values: tuple[str, ...]) -> None:
        path = tuple(name.split("/"))
        if self.text.setdefault(path, values) != values:
            self.text[path] = None

    def _add_mask(self, path: Path, episodes: tuple[str, ...]) -> None:
        if self.masks.setdefault(path[-1], episodes) != episodes:
            self.notes.append(f"{'/'.join(path)!r} is not followed: there are several of that name")
            self.masks[path[-1]] = ()


def _problem_of(path: Path, array: ArrayLayout) -> str | None:
    """Why an array is no field, whatever else is there; None where it may be one."""
    about = next((part for part in path[:-1] if part.lower() in _ABOUT), None)
    if array.scalar is not None and about is None:
        return None
    problem = array.unreadable or (None if array.shape else "it has no rows")
    return problem or (f"its group {about!r} holds data about the data" if about is not None else None)


def _list_unreadable(tables: list[Table], path: Path, segment: Segment, problem: str) -> None:
    """List an array that is no field, and why, with the table of the nearest group."""
    owner = _owner(tables, path)
    prefix = tuple(owner.path.split("/")) if owner.path else ()
    name = ".".join(path[len(prefix) :] if path[: len(prefix)] == prefix else path)
    owner.fields.append(TableField(name, Column((segment,)), problem))


def _tell_apart(fields: list[TableField]) -> None:
    """Give each field a name of its own; of several that share one, the first that can be read is served."""
    first: dict[str, TableField] = {}
    for field in sorted(fields, key=lambda field: field.unreadable is not None):
        kept = first.setdefault(field.name, field)
        if kept is not field:
            there = kept.array.path
            field.unreadable = field.unreadable or (
                f"{there!r} is called {field.name!r} too: 'fields' in h5feed.toml gives it another name"
            )
            field.name = f"{field.name} ({field.array.path})"
            first[field.name] = field


def _check_together(files: Sequence[InspectedFile], leaves: Iterable[Leaf]) -> None:
    """Every shard must be there, and one field at least must run through all splits and shards."""
    for split in {file.tags.split for file in files}:
        alike = [file.tags for file in files if file.tags.split == split]
        shards = max(tags.shards for tags in alike)
        missing = sorted(set(range(shards)) - {tags.shard for tags in alike})
        if missing:
            raise PartMissing(f"shard {missing[0]:05d} of {shards:05d} is missing")
    # Files that are named after no split may have groups of them, shards for instance.
    places = {(file.tags.split or "", file.tags.shard) for file in files}
    there: dict[Path, set[tuple[str, int]]] = defaultdict(set)
    for leaf in leaves:
        there[leaf.rest] |= {(leaf.split, leaf.shard), ("", leaf.shard)}
    if not any(where >= places for where in there.values()):
        raise ValueError("no array is there in all of them")


def _main(clusters: Sequence[list[Series]]) -> list[Series]:
    """The arrays of a level that are called like the level itself; the others have names of their own.

    Which ones these are decides about no more than that: those with splits, with a label, the most.
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
    """Tables from series whose first `depth` path parts are the same."""
    direct = [series for series in members if len(series.path) == depth + 1]
    below: dict[str, list[Series]] = defaultdict(list)
    for series in members:
        if len(series.path) > depth + 1:
            below[series.path[depth]].append(series)
    path = members[0].path[:depth] if members else ()
    clusters: dict[frozenset[tuple[Piece, int]], list[Series]] = defaultdict(list)
    for series in direct:
        if not series.apart:
            clusters[series.shape].append(series)
    main = _main(list(clusters.values()))
    shape = main[0].shape if main else None
    # Groups of the same rows belong to one table; others, and one that agrees with nobody, are tables of their own.
    if not direct and below:
        shapes = [{series.shape for series in group} for group in below.values()]
        candidates = [next(iter(only)) for only in shapes if len(only) == 1]
        shape = max(candidates, key=candidates.count, default=None)
    agreeing = [name for name, group in below.items() if all(series.shape == shape for series in group)]
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


def _elsewhere(
    path: Path, cluster: list[Series], main: Table | None, shape: frozenset[tuple[Piece, int]]
) -> list[Table]:
    """A dataset of what shares no rows with the `main` one, of that `shape`, which says so."""
    if main is not None and all(series.is_text for series in cluster):
        for series in cluster:
            problem = "it is a short list of text beside the rows, such as names of classes"
            main.fields.append(TableField(series.path[-1], Column((series.first,)), problem))
        return []
    if main is not None and all(series.path[-1].lower() in _ABOUT for series in cluster):
        for series in cluster:
            problem = f"it has {series.rows} rows, where the dataset has {main.rows}: it holds data about the data"
            main.fields.append(TableField(series.path[-1], Column((series.first,)), problem, series.note))
        return []
    name = min(series.path[-1] for series in cluster if not series.is_text or len(cluster) == 1)
    table = assemble(path, cluster, name)
    served = any(field.unreadable is None for field in table.fields)
    if main is not None:
        for series in cluster[:_MOST_ELSEWHERE]:
            where = ", ".join(sorted({piece.where for piece in series.pieces}))[:80]
            problem = f"it has {series.rows} rows, where the dataset has {main.rows}"
            if series.rows == main.rows or series.shape < shape:
                problem = f"it is not there for all rows, only in {where}"
            own = next(field for field in table.fields if field.name == series.path[-1])
            problem = own.unreadable or f"{problem}: it is a dataset of its own"
            main.fields.append(TableField(series.path[-1], own.column, problem, series.note))
    return [table] if served or main is None else []


def _name_splits(tables: Iterable[Table], masks: Mapping[str, tuple[str, ...]]) -> None:
    """Native splits that are lists of episodes, as robomimic writes them."""
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
                # Two words may mean one split.
                table.native[split] = sorted({*table.native.get(split, ()), *runs})


def _owner(tables: list[Table], path: Path) -> Table:
    """The table that an array which is no field is listed with: that of the nearest group."""
    if not tables:
        tables.append(Table("", 0, []))
    inside = [t for t in tables if not t.path or path[: len(t.path.split("/"))] == tuple(t.path.split("/"))]
    return max(inside or tables[:1], key=lambda table: len(table.path))
