"""What files whose names are alike are to each other, by what is in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ...storage.layout import ArrayLayout
from .classes import InDoubt
from .names import is_label, numbers_in
from .pieces import InspectedFile, kind_of
from .stacking import FEWEST, are_alike, is_sample


@dataclass(frozen=True)
class Verdict:
    """``parts`` follow each other, of ``samples`` each is a row, of ``classes`` each is one; those ``apart`` are
    datasets each."""

    kind: Literal["parts", "samples", "classes", "apart"]
    note: str | None = None


APART = Verdict("apart")


def of_numbers(files: Sequence[InspectedFile], paths: Sequence[str]) -> Verdict:
    """Of files whose names differ in numbers.

    Raises
    ------
    InDoubt
        They can be read in two ways.
    """
    samples = [_arrays(file) for file in files]
    members = {frozenset((name, _type(one), len(one.shape)) for name, one in s.items() if one.shape) for s in samples}
    if len(members) > 1 or not next(iter(members)):
        return APART
    answer = is_sample(samples[0])
    same = are_alike(samples)
    if any(file.tags.split is not None and file.tags.number >= 0 for file in files):
        answer = "no"
    if answer == "yes" and same and len(files) >= FEWEST:
        return Verdict("samples")
    if answer == "yes":
        raise InDoubt(
            f"{len(files)} files seem to hold one sample each, "
            + ("but they are few" if same else f"but of several shapes, and one dataset has one: {_shapes(samples)}")
        )
    if not _kinds_agree(files):
        return APART
    if answer == "maybe" and same:
        raise InDoubt(
            f"the arrays of {len(files)} files have the same shapes, {_shapes(samples[:1])}: each file may be one "
            "sample, or its first axis may be that of rows"
        )
    return Verdict("parts", _gap(paths))


def of_words(files: Sequence[InspectedFile]) -> Verdict:
    """Of the files of a folder that are called by words."""
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


def _type(array: ArrayLayout) -> str:
    """What its elements are: text of any width, numbers of either endianness."""
    dtype = np.dtype(array.dtype)
    return "S" if dtype.kind == "S" else dtype.newbyteorder("<").str


def _kinds_agree(files: Sequence[InspectedFile]) -> bool:
    """Whether files have the same members, dtypes and row shapes."""
    kinds = {
        frozenset((name, *kind_of(segment)) for name, segment in file.segments.items() if segment.array.shape)
        for file in files
    }
    return len(kinds) == 1


def _shapes(samples: Sequence[dict[str, ArrayLayout]]) -> str:
    """Some of the shapes, for people."""
    shapes = sorted({f"{name} {list(one.shape)}" for sample in samples for name, one in sample.items() if one.shape})
    return ", ".join(shapes[:4]) + (" …" if len(shapes) > 4 else "")


def _gap(paths: Sequence[str]) -> str | None:
    """What is missing between parts that one number tells apart."""
    numbers = [numbers_in(os.path.splitext(os.path.basename(path))[0]) for path in paths]
    differing = [place for place in range(len(numbers[0])) if len({row[place] for row in numbers}) > 1]
    there = sorted({row[differing[0]] for row in numbers}) if len(differing) == 1 else []
    missing = [after - 1 for before, after in pairwise(there) if after == before + 2]
    return f"between its files, number {missing[0]} is missing" if missing else None
