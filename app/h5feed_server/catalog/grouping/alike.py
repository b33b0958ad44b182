"""Decides how files with similar names are related, by their contents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from h5feed.stored.layout import ArrayLayout

from .names import is_label, numbers_in
from .pieces import InDoubt, InspectedFile, kind_of
from .stacking import FEWEST, are_samples, is_sample, members_of, seem_samples, shapes_of


@dataclass(frozen=True)
class Verdict:
    """How files are related.

    Attributes
    ----------
    kind : str
        ``parts``: they hold consecutive rows of one dataset; ``samples``: each is a row; ``classes``: each is a class;
        ``apart``: each is a dataset.
    note : str or None
    """

    kind: Literal["parts", "samples", "classes", "apart"]
    note: str | None = None


APART = Verdict("apart")

_FOLDS = (
    "each split has files with the same numbers, which are taken for its parts: if each number is a fold, declare each "
    "fold in h5feed.toml"
)


def of_numbers(files: Sequence[InspectedFile], paths: Sequence[str]) -> Verdict:
    """Judge files whose names differ in numbers.

    Parameters
    ----------
    files : sequence of InspectedFile
    paths : sequence of str
        Paths of the files of the family.

    Raises
    ------
    InDoubt
        The files are ambiguous.
    """
    samples = {file.name: _arrays(file) for file in files}
    # If no split has several numbers, the number is part of the name: ``train36``, ``val36``.
    splits = [file.tags.split for file in files if file.tags.number >= 0]
    numbered = len(set(splits)) < len(splits)
    if (numbered or not splits) and are_samples(samples, "file"):
        return Verdict("samples")
    members = [members_of(sample) for sample in samples.values()]
    most, count = Counter(members).most_common(1)[0]
    typical = samples[files[members.index(most)].name]
    doubtful = not splits and is_sample(typical) == "maybe"
    agree = _kinds_agree(files)
    # If most files agree, a single different one does not resolve the ambiguity.
    if doubtful and (count == len(files) if agree else count >= FEWEST and 2 * count > len(files)):
        raise InDoubt(
            f"the arrays of {count} files have the same shapes, {shapes_of(typical)}: each file may be one sample, "
            "or hold rows along its first axis"
        )
    # Names of splits decide, unless each number is a dataset with splits: images of 28 and of 64 pixels, for instance.
    if not agree and (not numbered or _are_several(files)):
        return APART
    return Verdict("parts", _gap(paths) or (_FOLDS if numbered and _share_numbers(files) else None))


def of_words(files: Sequence[InspectedFile]) -> Verdict:
    """Judge files of a folder whose names are words.

    Raises
    ------
    InDoubt
        The files seem to be samples.
    """
    if seem_samples([_arrays(file) for file in files]):
        raise InDoubt(f"{len(files)} files seem to hold one sample each, but their names are not alike")
    segments = [segment for file in files for segment in file.segments.values() if segment.array.shape]
    if not _kinds_agree(files) or any(segment.array.unreadable for segment in segments):
        return APART
    names = {name.rpartition("/")[2] for file in files for name in file.segments}
    # A label, or any column of single values, shows that the file is not the class.
    if any(is_label(name) for name in names) or any(not segment.wire[1] for segment in segments):
        return APART
    if len({frozenset((name, one.rows) for name, one in file.segments.items()) for file in files}) > 1:
        return Verdict("classes")
    return Verdict("apart", "other files in its folder hold the same arrays: if each is a class, say so in h5feed.toml")


def _arrays(file: InspectedFile) -> dict[str, ArrayLayout]:
    arrays = {name: segment.array for name, segment in file.segments.items()}
    return {name: one for name, one in arrays.items() if one.unreadable is None or one.scalar is not None}


def _kinds(file: InspectedFile) -> frozenset[tuple[object, ...]]:
    """The names, dtypes and row shapes of the arrays in a file."""
    return frozenset((name, *kind_of(segment)) for name, segment in file.segments.items() if segment.array.shape)


def _kinds_agree(files: Sequence[InspectedFile]) -> bool:
    """Whether all files hold the same arrays, and at least one."""
    kinds = {_kinds(file) for file in files}
    return len(kinds) == 1 and bool(next(iter(kinds)))


def _share_numbers(files: Sequence[InspectedFile]) -> bool:
    """Whether all splits have files with the same numbers."""
    numbers: dict[str | None, set[int]] = {}
    for file in files:
        numbers.setdefault(file.tags.split, set()).add(file.tags.number)
    return len(numbers) > 1 and len({frozenset(own) for own in numbers.values()}) == 1


def _are_several(files: Sequence[InspectedFile]) -> bool:
    """Whether each number is a dataset: files with the same number hold the same arrays."""
    kinds: dict[int, set[object]] = {}
    for file in files:
        kinds.setdefault(file.tags.number, set()).add(_kinds(file))
    return _share_numbers(files) and all(len(own) == 1 for own in kinds.values())


def _gap(paths: Sequence[str]) -> str | None:
    """A note about a missing number, if file names differ in a single number; else None."""
    numbers = [numbers_in(os.path.splitext(os.path.basename(path))[0]) for path in paths]
    places = range(len(numbers[0])) if len({*map(len, numbers)}) == 1 else ()
    differing = [place for place in places if len({row[place] for row in numbers}) > 1]
    there = sorted({row[differing[0]] for row in numbers}) if len(differing) == 1 else []
    missing = [after - 1 for before, after in pairwise(there) if after == before + 2]
    return f"file number {missing[0]} is missing" if missing else None
