"""Merges arrays that hold one class each: they are alike except for their lengths and names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .collapse import UNNAMED
from .names import are_numbered, is_field, natural
from .pieces import Hints, Path, Series, kind_of


def merge_classes(all_series: Sequence[Series], hints: Hints) -> list[Series]:
    """Merge series that are classes into one. Ambiguous ones are marked, see `Series.doubtful` and `Series.apart`."""
    if hints.classes is False:
        return list(all_series)
    levels: dict[Path, list[Series]] = defaultdict(list)
    for series in all_series:
        if not series.is_text:
            levels[series.path[:-1]].append(series)
    merged = [series for series in all_series if series.is_text]
    answers = {
        path: "classes" if hints.classes and _are_alike(level) else _judge(level) for path, level in levels.items()
    }
    # If there are other arrays too, arrays that are alike are not classes.
    are_classes = hints.classes or set(answers.values()) == {"classes"}
    for path, level in levels.items():
        if answers[path] == "classes" and are_classes:
            merged.append(_merged(path, level))
        else:
            apart, doubtful = answers[path] == "apart", answers[path] == "doubt"
            merged += [replace(series, apart=apart or series.apart, doubtful=doubtful) for series in level]
    return merged


def doubt_of(level: Sequence[Series]) -> str:
    """The message about arrays that may be classes or fields."""
    names = sorted(series.path[-1] for series in level)
    shown = ", ".join(map(repr, names[:4])) + (" …" if len(names) > 4 else "")
    return (
        f"its arrays {shown} are alike, each of {level[0].rows} rows: each may be a class, with rows of its own, or a "
        "field of the same rows"
    )


def _are_alike(level: Sequence[Series]) -> bool:
    return len({kind_of(segment) for series in level for segment in series.pieces.values()}) == 1 < len(level)


def _judge(level: Sequence[Series]) -> Literal["classes", "apart", "doubt", "fields"]:
    """How the arrays of one level are related, judged by their names, shapes and lengths."""
    names = [series.path[-1] for series in level]
    # Arrays of single values are columns. If one name is that of a field, the other arrays are fields too.
    if not _are_alike(level) or not level[0].first.wire[1] or any(map(is_field, names)):
        return "fields"
    if any(piece.kind or piece.episode for series in level for piece in series.pieces):
        return "fields"
    agree = len({series.shape for series in level}) == 1
    if are_numbered(names):
        # Numbers are not class names. The arrays are fields if all have the same number of rows, else separate series.
        return "fields" if agree else "apart"
    return "doubt" if agree else "classes"


def _merged(path: Path, level: Sequence[Series]) -> Series:
    one = Series((*path, UNNAMED))
    for series in sorted(level, key=lambda series: natural(series.path[-1])):
        for piece, segment in series.pieces.items():
            one.pieces[replace(piece, kind=series.path[-1])] = segment
        one.note = one.note or series.note
    return one
