"""Pieces of datasets (runs of rows), and the other types that the grouping rules pass to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout

from ..roles import Role
from ..split_names import SPLITS
from .names import Tags, natural

Path = tuple[str, ...]
"""Names of the groups, then of the array."""


class InDoubt(ValueError):
    """Files or arrays can be interpreted in two ways. The message names both."""


@dataclass(frozen=True)
class Hints:
    """What ``h5feed.toml`` declares about the arrays; None if it does not.

    Attributes
    ----------
    stack : bool or None
        Whether each file or group is one row.
    classes : bool or None
        Whether arrays, groups or files are classes, and their names the labels.
    episodes : bool or None
        Whether groups with the same members are joined.
    rows_along : int or None
        The axis of arrays that is that of rows; of arrays with fewer axes, it is the first.
    """

    stack: bool | None = None
    classes: bool | None = None
    episodes: bool | None = None
    rows_along: int | None = None


@dataclass(frozen=True)
class InspectedFile:
    """The arrays of a file, by the path to use as the name, and the place of the file in the dataset."""

    segments: Mapping[str, Segment]
    tags: Tags
    name: str = ""
    """Name of the row or class, if the file is one."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Lists of text in addition to the declared arrays, by path. They may be class names."""


@dataclass(frozen=True)
class Piece:
    """Identifies a run of rows: those of one split, class, shard and episode."""

    split: str = ""
    kind: str = ""
    """Name of the class."""
    shard: int = 0
    episode: Path = ()
    """Names of the groups that lead to the episode, ending with its own."""
    file: str = ""
    """Name of the file, if that is served: it is one row, or its rows are the slices of a volume."""

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """Sort key of pieces."""
        rank = SPLITS.index(self.split) if self.split in SPLITS else (len(SPLITS) if self.split else -1)
        names = (natural(self.kind), self.shard, natural(self.file), tuple(map(natural, self.episode)))
        # Names may be equal in natural order: s_1, s_01.
        return rank, self.split, *names, self.kind, self.file, self.episode

    @property
    def where(self) -> str:
        """Name of the piece, for messages."""
        return self.file or self.split or "/".join(self.episode) or self.kind or "one part"


@dataclass
class Leaf:
    """An array of one file that will be a piece of a series.

    The grouping rules move the parts of its path that tell the place of the piece to the other attributes.
    """

    rest: Path
    """The remaining path, below the current group."""
    segment: Segment
    shard: int
    split: str = ""
    kind: str = ""
    file: str = ""
    episode: Path = ()
    half: str | None = None
    """The half of the dataset that its file holds, by the file name."""
    note: str | None = None

    @property
    def is_column(self) -> bool:
        """Whether it is a column of a data frame, whose name does not tell a split."""
        return self.segment.about is not None and self.segment.about.is_column

    @property
    def piece(self) -> Piece:
        return Piece(self.split, self.kind, self.shard, self.episode, self.file)


Shape = frozenset[tuple[Piece, int, str | None]]
"""Pieces, each with the number of its rows, and the object that they describe."""


@dataclass
class Series:
    """The pieces of a future field."""

    path: Path
    pieces: dict[Piece, Segment] = field(default_factory=dict)
    note: str | None = None
    apart: bool = False
    """It does not share its rows with other series, even if their number is the same."""
    doubtful: bool = False
    """It may be either a class or a field."""

    @cached_property
    def shape(self) -> Shape:
        """The pieces with their rows. The fields of a table have the same shape."""
        return frozenset((piece, segment.rows, rows_of(segment)) for piece, segment in self.pieces.items())

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.pieces.values())

    @property
    def nbytes(self) -> int:
        return sum(segment.array.nbytes for segment in self.pieces.values())

    @property
    def first(self) -> Segment:
        return next(iter(self.pieces.values()))

    @property
    def why_apart(self) -> str | None:
        """Why it is `apart` by the convention of the program that wrote it."""
        return self.first.about.apart if self.first.about is not None else None

    @property
    def is_text(self) -> bool:
        """Whether it is a short list of text."""
        return self.first.array.text is not None


def rows_of(segment: Segment) -> str | None:
    """The object that the rows of an array describe, if the file says so; see `About.rows_of`."""
    return None if segment.about is None else segment.about.rows_of


Kind = tuple[np.dtype[Any], Path | tuple[int, ...], bool, bool]


def kind_of(segment: Segment) -> Kind:
    """The kind of rows, which is the same for all pieces of a field: dtype, sample shape, lists, bfloat16."""
    dtype, shape = segment.wire
    # The width of text does not matter.
    return (np.dtype("S") if dtype.kind == "S" else dtype), shape, segment.has_lists, segment.array.is_bfloat16


@dataclass
class TableField:
    """One field of a table: its column, or why it cannot be served."""

    name: str
    column: Column
    unreadable: str | None = None
    note: str | None = None
    role: Role | None = None
    """The role, if it is known and need not be guessed."""

    @property
    def array(self) -> ArrayLayout:
        """The first array of the field."""
        return self.column.segments[0].array


@dataclass
class Table:
    """Fields with the same rows.

    Attributes
    ----------
    path : str
        Path of the group without splits and episodes, or of the array if it has only one; empty for the root.
    rows : int
    fields : list of TableField
    native : dict of str to list of (int, int)
        Ranges of rows of each native split.
    text : dict of tuple of str to tuple of str
        Short lists of strings in the files, by the parts of their paths.
    episodes : list of (str, int)
        Name and number of rows of each piece.
    class_names : tuple of str or None
        Names of the classes, if the pieces are classes.
    notes : tuple of str
    problem : str or None
        Why the table cannot be served; None if it can.
    """

    path: str
    rows: int
    fields: list[TableField]
    native: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    text: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    episodes: list[tuple[str, int]] = field(default_factory=list)
    class_names: tuple[str, ...] | None = None
    names_differ: bool = False
    """Whether its files have different class names."""
    notes: tuple[str, ...] = ()
    problem: str | None = None
