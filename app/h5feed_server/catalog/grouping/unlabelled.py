"""Turns splits without labels into separate datasets, if other splits have labels.

A field must have all rows of its dataset. If train has ``x`` and ``y`` but test has only ``x``, a single dataset could
not have both fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..roles import names_classes
from .names import is_label
from .pieces import Path, Series, Table


def set_apart(members: Sequence[Series]) -> tuple[list[Series], dict[Path, str]]:
    """Move the rows of splits without a label to series in groups that are named after the splits.

    Returns
    -------
    series : list of Series
    notes : dict of tuple of str to str
        Notes for the tables that rows were moved from and to, by path.
    """
    left, made = list(members), list[Series]()
    notes: dict[Path, str] = {}
    labels = [series for series in members if is_label(series.path[-1]) and not names_classes(series.path[-1])]
    for parent in sorted({label.path[:-1] for label in labels}, key=len):
        level = [series for series in left if series.path[: len(parent)] == parent]
        aside = _without_label(level, [label for label in labels if label.path[:-1] == parent])
        if not aside:
            continue
        left = [series for series in left if series not in level]
        for series in level:
            made += [rest] if (rest := _with_splits(series, _splits(series) - {*aside})) else []
        names = " and ".join(map(repr, aside))
        notes[parent] = f"its rows of {names} have no label: they are a dataset of their own, named after the split"
        for split in aside:
            for series in level:
                if own := _with_splits(series, {split}):
                    path = (*parent, split, *series.path[len(parent) :])
                    made.append(replace(own, path=path))
                    notes[path[:-1]] = f"these are the rows of {split!r}, which have no label, although other splits do"
    return left + made, notes


def note(tables: Sequence[Table], notes: dict[Path, str]) -> None:
    """Add notes to the tables that they are about."""
    for table in tables:
        path = tuple(table.path.split("/")) if table.path else ()
        if path in notes:
            table.notes = (*table.notes, notes[path])


def _splits(series: Series) -> set[str]:
    return {piece.split for piece in series.pieces}


def _without_label(level: Sequence[Series], labels: Sequence[Series]) -> list[str]:
    """Splits that fields have but labels do not, sorted."""
    labelled = set[str]().union(*map(_splits, labels))
    rows = frozenset[object]().union(*(label.shape for label in labels))
    others = [series for series in level if series not in labels]
    if "" in labelled or not any(series.shape & rows for series in others):
        return []
    shared = [_splits(series) for series in others if _splits(series) & labelled]
    return sorted(set[str]().union(*shared) - labelled - {""})


def _with_splits(series: Series, splits: set[str]) -> Series | None:
    """The part of a series that is in these splits; None if it is empty."""
    pieces = {piece: segment for piece, segment in series.pieces.items() if piece.split in splits}
    return replace(series, pieces=pieces) if pieces else None
