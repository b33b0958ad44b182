"""What files whose names are alike are to each other, by what is in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ...storage.layout import ArrayLayout
from .names import is_label, numbers_in
from .pieces import InDoubt, InspectedFile, kind_of
from .stacking import FEWEST, are_samples, is_sample, members_of, seem_samples, shapes_of


@dataclass(frozen=True)
class Verdict:
    """``parts`` follow each other, of ``samples`` each is a row, of ``classes`` each is one; those ``apart`` are
    datasets each."""

    kind: Literal["parts", "samples", "classes", "apart"]
    note: str | None = None


APART = Verdict("apart")

_FOLDS = (
    "each split has files of the same numbers, which are taken for its parts: where each number is a fold, h5feed.toml "
    "says which files are one dataset"
)


def of_numbers(files: Sequence[InspectedFile], paths: Sequence[str]) -> Verdict:
    """Of files whose names differ in numbers.

    Raises
    ------
    InDoubt
        They can be read in two ways.
    """
    samples = {file.name: _arrays(file) for file in files}
    # A number that tells no files of a split apart belongs to all of them: ``train36``, ``val36``.
    splits = [file.tags.split for file in files if file.tags.number >= 0]
    numbered = len(set(splits)) < len(splits)
    if (numbered or not splits) and are_samples(samples, "file"):
        return Verdict("samples")
    members = [members_of(sample) for sample in samples.values()]
    most, count = Counter(members).most_common(1)[0]
    typical = samples[files[members.index(most)].name]
    doubtful = not splits and is_sample(typical) == "maybe"
    agree = _kinds_agree(files)
    # One that is odd settles nothing for the others.
    if doubtful and (count == len(files) if agree else count >= FEWEST and 2 * count > len(files)):
        raise InDoubt(
            f"the arrays of {count} files have the same shapes, {shapes_of(typical)}: each file may be one sample, "
            "or its first axis may be that of rows"
        )
    # Splits' names win, unless each number is a dataset with splits: images of 28 and of 64 pixels.
    if not agree and (not numbered or _are_several(files)):
        return APART
    return Verdict("parts", _gap(paths) or (_FOLDS if numbered and _share_numbers(files) else None))


def of_words(files: Sequence[InspectedFile]) -> Verdict:
    """Of the files of a folder that are called by words.

    Raises
    ------
    InDoubt
        They seem to be samples.
    """
    if seem_samples([_arrays(file) for file in files]):
        raise InDoubt(f"{len(files)} files seem to hold one sample each, but their names are not alike")
    segments = [segment for file in files for segment in file.segments.values() if segment.array.shape]
    if not _kinds_agree(files) or any(segment.array.unreadable for segment in segments):
        return APART
    names = {name.rpartition("/")[2] for file in files for name in file.segments}
    # A label, or any column of single values, says that the class is told otherwise.
    if any(is_label(name) for name in names) or any(not segment.wire[1] for segment in segments):
        return APART
    if len({frozenset((name, one.rows) for name, one in file.segments.items()) for file in files}) > 1:
        return Verdict("classes")
    return Verdict("apart", "files beside it hold the same arrays: where each is a class, h5feed.toml says so")


def _arrays(file: InspectedFile) -> dict[str, ArrayLayout]:
    arrays = {name: segment.array for name, segment in file.segments.items()}
    return {name: one for name, one in arrays.items() if one.unreadable is None or one.scalar is not None}


def _kinds(file: InspectedFile) -> frozenset[tuple[object, ...]]:
    """Members, dtypes and row shapes of a file."""
    return frozenset((name, *kind_of(segment)) for name, segment in file.segments.items() if segment.array.shape)


def _kinds_agree(files: Sequence[InspectedFile]) -> bool:
    """Whether files hold the same, and anything."""
    kinds = {_kinds(file) for file in files}
    return len(kinds) == 1 and bool(next(iter(kinds)))


def _share_numbers(files: Sequence[InspectedFile]) -> bool:
    """Whether each split has files of the same numbers."""
    numbers: dict[str | None, set[int]] = {}
    for file in files:
        numbers.setdefault(file.tags.split, set()).add(file.tags.number)
    return len(numbers) > 1 and len({frozenset(own) for own in numbers.values()}) == 1


def _are_several(files: Sequence[InspectedFile]) -> bool:
    """Whether each number is a dataset: files of one hold the same, those of others do not."""
    kinds: dict[int, set[object]] = {}
    for file in files:
        kinds.setdefault(file.tags.number, set()).add(_kinds(file))
    return _share_numbers(files) and all(len(own) == 1 for own in kinds.values())


def _gap(paths: Sequence[str]) -> str | None:
    """What is missing between parts that one number tells apart."""
    numbers = [numbers_in(os.path.splitext(os.path.basename(path))[0]) for path in paths]
    places = range(len(numbers[0])) if len({*map(len, numbers)}) == 1 else ()
    differing = [place for place in places if len({row[place] for row in numbers}) > 1]
    there = sorted({row[differing[0]] for row in numbers}) if len(differing) == 1 else []
    missing = [after - 1 for before, after in pairwise(there) if after == before + 2]
    return f"between its files, number {missing[0]} is missing" if missing else None
