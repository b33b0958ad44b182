"""Makes tables of the arrays in files: which of them are fields of one dataset, in which order their rows follow.

People lay the same thing out in many ways: ``images`` and ``labels`` in the root; groups ``train`` and ``test``; arrays
``x_train`` and ``train_set_y``; files ``train.h5`` and ``test.h5``, ``…_x.h5`` and ``…_y.h5``, or shards
``name-00000-of-00010.h5``; one group for each episode. All of these become the same: fields, each cut into pieces that
follow each other, and rows that belong to native splits.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..split_names import SPLIT_WORDS, SPLITS, without_split
from ..storage.column import Column, Segment
from ..storage.layout import ArrayLayout

_SHARD = re.compile(r"[_.\-](\d{3,6})-of-(\d{3,6})$")
_HALF = re.compile(r"(?:^|[_.\-])(x|y|images?|labels?|data|targets?|inputs?|mask)$", re.I)
"""A file's ending that says which fields of the dataset it holds."""

_EPISODE = re.compile(r"^(\D*)(\d+)$")

_MAX_TRANSPOSED_BYTES = 64 << 20
"""Arrays whose rows are columns are read as a whole."""

_ABOUT = ("metadata", "meta")
"""Groups whose arrays are listed, but make no dataset."""

_NOT_DATA = re.compile(r"^(_i_|#refs#|#subsystem#)")
"""Groups that PyTables and MATLAB keep for themselves."""


@dataclass(frozen=True)
class Tags:
    """What a file's name says of its place in a dataset."""

    stem: str
    split: str | None = None
    shard: int = 0
    shards: int = 1
    half: str | None = None

    @property
    def is_part(self) -> bool:
        return self.split is not None or self.shards > 1 or self.half is not None


def tags_of(stem: str) -> Tags:
    """Take a file name without its ending apart."""
    shard, shards, half, split = 0, 1, None, None
    if match := _SHARD.search(stem):
        shard, shards, stem = int(match[1]), int(match[2]), stem[: match.start()]
    if match := _HALF.search(stem):
        half, stem = match[1].lower(), stem[: match.start()]
    stem, split = without_split(stem)
    return Tags(stem, split, shard, shards, half)


@dataclass(frozen=True)
class InspectedFile:
    """A file's arrays by the paths that are to name them, and its place in the dataset."""

    segments: Mapping[str, Segment]
    tags: Tags


class PartMissing(ValueError):
    """Files belong together, but one that they need is not there."""


@dataclass(frozen=True, order=True)
class _Piece:
    """Rows that follow each other: those of one split, shard and episode."""

    split_order: int
    split: str
    shard: int
    episode: int
    group: str = ""
    """The episode's name."""


@dataclass
class TableField:
    """One field: where its rows lie; or why it has none."""

    name: str
    column: Column
    unreadable: str | None = None
    note: str | None = None

    @property
    def array(self) -> ArrayLayout:
        """The first of the arrays that it is made of."""
        return self.column.segments[0].array


@dataclass
class Table:
    """Fields that share their rows.

    Attributes
    ----------
    path : str
        Of its group in the file, without splits and episodes; empty for the root.
    native : dict of str to list of (int, int)
        Runs of rows of each native split.
    text : dict of tuple of str to tuple of str
        Lists of strings found beside the fields, by the parts of their paths.
    """

    path: str
    rows: int
    fields: list[TableField]
    native: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    text: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    episodes: list[tuple[str, int]] = field(default_factory=list)
    """Name and rows of each piece."""


@dataclass
class _Found:
    """An array that is to become a field, piece by piece."""

    path: tuple[str, ...]
    pieces: dict[_Piece, Segment] = field(default_factory=dict)
    note: str | None = None

    @property
    def shape(self) -> frozenset[tuple[_Piece, int]]:
        """Pieces and their rows: fields of one table agree in it."""
        return frozenset((piece, segment.rows) for piece, segment in self.pieces.items())

    @property
    def nbytes(self) -> int:
        return sum(segment.array.nbytes for segment in self.pieces.values())


def tables_of(files: Sequence[InspectedFile]) -> list[Table]:
    """The tables in files that belong together; most are one file alone.

    Raises
    ------
    PartMissing
        A shard is not there.
    ValueError
        Their arrays do not fit together.
    """
    found: dict[tuple[str, ...], _Found] = {}
    unreadable: list[tuple[tuple[str, ...], Segment, str]] = []
    text: dict[tuple[str, ...], tuple[str, ...]] = {}
    masks: dict[str, tuple[str, ...]] = {}
    for file in files:
        usable = []
        for name, segment in file.segments.items():
            array = segment.array
            path = tuple(name.split("/"))
            if any(_NOT_DATA.match(part) for part in path):
                continue
            if array.text is not None:
                if len(path) > 1 and path[-2].lower() == "mask":
                    masks[path[-1]] = array.text
                    continue
                text[tuple(array.path.split("/"))] = array.text
            problem = array.unreadable or (None if array.shape else "it has no rows")
            if any(part.lower() in _ABOUT for part in path[:-1]):
                problem = problem or f"its group {path[-2]!r} holds data about the data"
            if problem is None:
                usable.append((path, segment))
            else:
                unreadable.append((path, segment, problem))
        _collect(file, usable, found)
    if len(files) > 1:
        _check_together(files, found)
    tables = _build(list(found.values()))
    _name_splits(tables, masks)
    for path, segment, problem in unreadable:
        owner = _owner(tables, path)
        prefix = tuple(owner.path.split("/")) if owner.path else ()
        name = ".".join(path[len(prefix) :] if path[: len(prefix)] == prefix else path)
        owner.fields.append(TableField(name, Column((segment,)), problem))
    for table in tables:
        table.text = text
    return tables


def _collect(
    file: InspectedFile, usable: list[tuple[tuple[str, ...], Segment]], found: dict[tuple[str, ...], _Found]
) -> None:
    """Sort the arrays of one file into fields and pieces."""
    matlab_rows = _matlab_rows(usable)
    split_groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    episodes: dict[tuple[tuple[str, ...], str], set[str]] = defaultdict(set)
    for path, segment in usable:
        for depth, part in enumerate(path):
            where = path[:depth]
            if depth < len(path) - 1:
                if part.lower() in SPLIT_WORDS:
                    split_groups[where].add(SPLIT_WORDS[part.lower()])
                if match := _EPISODE.match(part):
                    episodes[where, match[1]].add(part)
            elif not _is_column(segment) and (split := without_split(part)[1]) is not None:
                split_groups[(*where, "*")].add(split)
    for path, segment in usable:
        split, episode, group, rest = file.tags.split, -1, "", []
        for depth, part in enumerate(path):
            where = path[:depth]
            if depth < len(path) - 1:
                match = _EPISODE.match(part)
                if "train" in split_groups[where] and part.lower() in SPLIT_WORDS:
                    split = SPLIT_WORDS[part.lower()]
                elif match and len(episodes[where, match[1]]) > 1:
                    episode, group = int(match[2]), part
                else:
                    rest.append(part)
            else:
                name, word = (part, None) if _is_column(segment) else without_split(part)
                if word is not None and name and (split == word or "train" in split_groups[(*where, "*")]):
                    split, part = word, name
                rest.append(part)
        order = SPLITS.index(split) if split else -1
        piece = _Piece(order, split or "", file.tags.shard, episode, group)
        key = tuple(rest)
        if key in found and piece in found[key].pieces and file.tags.half is not None:
            # Both halves call their array the same: the file's name tells them apart.
            key = (*key[:-1], file.tags.half)
        entry = found.setdefault(key, _Found(key))
        if piece in entry.pieces:
            raise ValueError(f"{'/'.join(key)} is there twice")
        transposed = path in matlab_rows and segment.array.shape[0] != matlab_rows[path]
        if path in matlab_rows:
            entry.note = "written by MATLAB: axes are in reverse"
        entry.pieces[piece] = replace(segment, transposed=transposed)


def _is_column(segment: Segment) -> bool:
    """Whether it is a column of a data frame: what it is called says nothing of rows."""
    return segment.about is not None and segment.about.is_column


def _matlab_rows(usable: list[tuple[tuple[str, ...], Segment]]) -> dict[tuple[str, ...], int]:
    """Rows of each array that MATLAB wrote: axes are in reverse there, so they may be the first or the last one."""
    arrays = {path: segment.array for path, segment in usable}
    written = {
        path: array for path, array in arrays.items() if "MATLAB_class" in array.attributes and len(array.shape) > 1
    }
    ends = Counter(length for array in written.values() for length in {array.shape[0], array.shape[-1]})
    if not ends:
        return {}
    shared = max(ends, key=lambda length: (ends[length], length))
    return {
        path: shared if shared in (array.shape[0], array.shape[-1]) else array.shape[0]
        for path, array in written.items()
    }


def _check_together(files: Sequence[InspectedFile], found: Mapping[tuple[str, ...], _Found]) -> None:
    """Every shard must be there, and one field at least must run through all splits and shards."""
    for split in {file.tags.split for file in files}:
        alike = [file.tags for file in files if file.tags.split == split]
        missing = sorted(set(range(max(tags.shards for tags in alike))) - {tags.shard for tags in alike})
        if missing:
            raise PartMissing(f"shard {missing[0]:05d} of {max(tags.shards for tags in alike):05d} is missing")
    # Files that are named after no split may have groups of them, shards for instance.
    places = {(file.tags.split, file.tags.shard) for file in files}
    for entry in found.values():
        there = {(piece.split, piece.shard) for piece in entry.pieces}
        if there | {(None, shard) for _, shard in there} >= places:
            return
    raise ValueError("no array is there in all of them")


def _build(found: list[_Found], depth: int = 0) -> list[Table]:
    """Tables from fields whose first `depth` path parts are the same."""
    direct = [entry for entry in found if len(entry.path) == depth + 1]
    below: dict[str, list[_Found]] = defaultdict(list)
    for entry in found:
        if len(entry.path) > depth + 1:
            below[entry.path[depth]].append(entry)
    weights: Counter[frozenset[tuple[_Piece, int]]] = Counter()
    for entry in direct or found:
        weights[entry.shape] += entry.nbytes + 1
    main = max(weights, key=lambda shape: (weights[shape], len(shape)), default=frozenset())
    path = found[0].path[:depth] if found else ()
    # Groups of the same rows belong to one table; others, and one that agrees with nobody, are tables of their own.
    agreeing = [group for group in below.values() if all(entry.shape == main for entry in group)]
    if not direct and len(agreeing) < 2:
        agreeing = []
    mine = direct + [entry for group in agreeing for entry in group]
    others = [group for group in below.values() if group not in agreeing]
    tables = [_table(path, mine, main)] if mine else []
    for group in others:
        tables.extend(_build(group, depth + 1))
    return tables


def _table(path: tuple[str, ...], found: list[_Found], main: frozenset[tuple[_Piece, int]]) -> Table:
    pieces = sorted(main)
    rows = sum(count for _, count in pieces)
    table = Table("/".join(path), rows, [])
    begin = 0
    for piece, count in pieces:
        if piece.split:
            table.native.setdefault(piece.split, []).append((begin, begin + count))
        begin += count
    for entry in found:
        problem = None
        ordered = [entry.pieces[piece] for piece in sorted(entry.pieces)]
        if entry.shape != main and ordered[0].array.text is not None:
            problem = "it is a short list of text beside the rows, such as names of classes"
        elif entry.shape != main:
            own = sum(segment.rows for segment in ordered)
            problem = f"it has {own} rows, where the dataset has {rows}"
            if own == rows or set(entry.pieces) != {piece for piece, _ in pieces}:
                where = ", ".join(sorted({piece.split or piece.group or "one part" for piece in entry.pieces}))
                problem = f"it is not there for all rows, only in {where}"
        elif any((segment.offsets is None) != (ordered[0].offsets is None) for segment in ordered):
            problem = "some of its pieces are lists, others are not"
        elif any(segment.wire != ordered[0].wire for segment in ordered):
            shapes = sorted({f"{segment.wire[0]}{list(segment.wire[1])}" for segment in ordered})
            problem = f"its pieces differ: {', '.join(shapes[:3])}"
        elif any(segment.transposed and segment.array.nbytes > _MAX_TRANSPOSED_BYTES for segment in ordered):
            problem = "its rows lie along its last axis, so that every row is scattered over the whole file"
        table.fields.append(TableField(".".join(entry.path[len(path) :]), Column(tuple(ordered)), problem, entry.note))
    table.episodes = [(piece.group, count) for piece, count in pieces]
    return table


def _name_splits(tables: Iterable[Table], masks: Mapping[str, tuple[str, ...]]) -> None:
    """Native splits that are lists of episodes, as robomimic writes them."""
    for table in tables:
        if table.native or not masks:
            continue
        for name, members in masks.items():
            split = SPLIT_WORDS.get(name.lower(), name)
            begin, runs = 0, []
            for group, count in table.episodes:
                if group in members:
                    runs.append((begin, begin + count))
                begin += count
            if runs:
                table.native[split] = runs


def _owner(tables: list[Table], path: tuple[str, ...]) -> Table:
    """The table that an array which is no field is listed with: that of the nearest group."""
    if not tables:
        tables.append(Table("", 0, []))
    inside = [t for t in tables if not t.path or path[: len(t.path.split("/"))] == tuple(t.path.split("/"))]
    return max(inside or tables[:1], key=lambda table: len(table.path))
