"""Rows that follow each other: what the rules hand to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...storage.column import Column, Segment
from ...storage.layout import ArrayLayout
from ..roles import Role
from ..split_names import SPLITS
from .names import Tags, natural

Path = tuple[str, ...]
"""Names of groups, and of the array."""


class InDoubt(ValueError):
    """What is there can be read in two ways; the message says how."""


@dataclass(frozen=True)
class Hints:
    """What ``h5feed.toml`` decides; None where it says nothing.

    Attributes
    ----------
    stack : bool or None
        Whether a file, or a group, is one row.
    classes : bool or None
        Whether arrays, groups or files are classes, whose names are the labels.
    episodes : bool or None
        Whether groups of the same members follow each other.
    """

    stack: bool | None = None
    classes: bool | None = None
    episodes: bool | None = None


@dataclass(frozen=True)
class InspectedFile:
    """A file's arrays by the paths that are to name them, and its place in the dataset."""

    segments: Mapping[str, Segment]
    tags: Tags
    name: str = ""
    """Of its row, or class, where it is one."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Lists of text beside the arrays that are declared, by path: they may be names of classes."""


@dataclass(frozen=True)
class Piece:
    """Rows that follow each other: those of one split, class, shard and episode."""

    split: str = ""
    kind: str = ""
    """Name of the class."""
    shard: int = 0
    episode: Path = ()
    """Names of the groups that the episode lies in, or is."""
    file: str = ""
    """Name of the file that is one row."""

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """Pieces follow each other by this."""
        rank = SPLITS.index(self.split) if self.split in SPLITS else (len(SPLITS) if self.split else -1)
        names = (natural(self.kind), self.shard, natural(self.file), tuple(map(natural, self.episode)))
        # Some differ in nothing but how a number is written: s_1, s_01.
        return rank, self.split, *names, self.kind, self.file, self.episode

    @property
    def where(self) -> str:
        """For people."""
        return self.file or self.split or "/".join(self.episode) or self.kind or "one part"


@dataclass
class Leaf:
    """An array of one file, on its way to become a piece of a series: groups that say where it belongs are taken off
    its path, one after the other."""

    rest: Path
    """What is left of its path, below the group that is looked at."""
    segment: Segment
    shard: int
    split: str = ""
    kind: str = ""
    file: str = ""
    episode: Path = ()
    half: str | None = None
    """Which half of the dataset its file says that it holds."""
    note: str | None = None

    @property
    def is_column(self) -> bool:
        """Whether it is a column of a data frame: what it is called says nothing of rows."""
        return self.segment.about is not None and self.segment.about.is_column

    @property
    def piece(self) -> Piece:
        return Piece(self.split, self.kind, self.shard, self.episode, self.file)


@dataclass
class Series:
    """An array that is to become a field, piece by piece."""

    path: Path
    pieces: dict[Piece, Segment] = field(default_factory=dict)
    note: str | None = None
    apart: bool = False
    """It shares its rows with no other, whatever their number."""
    doubtful: bool = False
    """It may be a class as well as a field of its level."""

    @cached_property
    def shape(self) -> frozenset[tuple[Piece, int]]:
        """Pieces and their rows: fields of one table agree in it."""
        return frozenset((piece, segment.rows) for piece, segment in self.pieces.items())

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
    def is_text(self) -> bool:
        """Whether it is a short list of text."""
        return self.first.array.text is not None


Kind = tuple[np.dtype[Any], Path | tuple[int, ...], bool, bool]


def kind_of(segment: Segment) -> Kind:
    """What rows are: those of one field are the same in it."""
    dtype, shape = segment.wire
    # Text of another width is text.
    return (np.dtype("S") if dtype.kind == "S" else dtype), shape, segment.has_lists, segment.array.is_bfloat16


@dataclass
class TableField:
    """One field: where its rows lie; or why it has none."""

    name: str
    column: Column
    unreadable: str | None = None
    note: str | None = None
    role: Role | None = None
    """Where it is not to be guessed."""

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
        Of its group in the file, without splits and episodes, or of the array that it is; empty for the root.
    native : dict of str to list of (int, int)
        Runs of rows of each native split.
    text : dict of tuple of str to tuple of str
        Lists of strings found beside the fields, by the parts of their paths.
    episodes : list of (str, int)
        Name and rows of each piece.
    class_names : tuple of str or None
        Where its pieces are classes.
    problem : str or None
        Why it is not served.
    """

    path: str
    rows: int
    fields: list[TableField]
    native: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    text: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    episodes: list[tuple[str, int]] = field(default_factory=list)
    class_names: tuple[str, ...] | None = None
    names_differ: bool = False
    """Its files do not agree in what classes are called."""
    notes: tuple[str, ...] = ()
    problem: str | None = None
