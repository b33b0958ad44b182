"""Classes and splits from names of files and arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from h5feed.errors import BadParameter

from ..catalog.split_names import SPLIT_WORDS

_NUMBERED = re.compile(r"^(.*?[^\W\d_].*?)[ _.\-]*\(?\d+\)?$")
"""``cat.11866``, ``cat_001``, ``Abyssinian_100``, ``dog (3)``: the class, and the number of one of its images."""

_MANY_CLASSES = 2
"""A class that is guessed from names has so many files in the mean."""


@dataclass
class Names:
    """Classes and splits read from names.

    Attributes
    ----------
    labels : list of str or None
        Name of the class of each file; None where there are no classes.
    splits : list of str or None
        ``train``, ``val`` or ``test``.
    classes : list of str
        Ascending, those that have no files too.
    """

    labels: list[str] | None
    splits: list[str] | None
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_names(names: Sequence[str], folders: set[str], pattern: str | None) -> Names:
    """Classes and splits from names such as ``train/cat/1.jpg``, ``cat/1.jpg`` or ``cat.1.jpg``.

    Parameters
    ----------
    names : sequence of str
        Of the images, with ``/``.
    folders : set of str
        That are there, empty ones too.
    pattern : str or None
        Finds the class in a file's name; None: guessed, where there are no folders.

    Raises
    ------
    BadParameter
        A name says no class, where others do.
    """
    split_names = [name.split("/") for name in names]
    depth = _shared(split_names)
    parts = [path[depth:] for path in split_names]
    shared = split_names[0][:depth] if names else []
    below = [path for path in (folder.split("/") for folder in folders) if path[: len(shared)] == shared]
    inner = [path[len(shared) :] for path in below if len(path) > len(shared)]
    splits = None
    tops = {path[0].lower() for path in parts if len(path) > 1}
    if tops and tops <= SPLIT_WORDS.keys() and "train" in {SPLIT_WORDS[top] for top in tops}:
        loose = next(("/".join(path) for path in parts if len(path) == 1), None)
        if loose is not None:
            raise BadParameter(f"{loose!r} is next to the folders of the splits: move it into one of them")
        splits = [SPLIT_WORDS[path[0].lower()] for path in parts]
        parts = [path[1:] for path in parts]
        inner = [path[1:] for path in inner if len(path) > 1]
    if pattern is None and any(len(path) > 1 for path in parts):
        loose = next((name for name, path in zip(names, parts, strict=True) if len(path) == 1), None)
        if loose is not None:
            raise BadParameter(f"{loose!r} is next to the folders of the classes: move it into one of them")
        labels = [path[0] for path in parts]
        classes = sorted({*labels, *(path[0] for path in inner)})
        empty = sorted(set(classes) - set(labels))
        notes = [f"class {name!r} has no images: it has a number, but no rows" for name in empty]
        return Names(labels, splits, classes, notes)
    return _from_files(names, [path[-1] for path in parts], splits, pattern)


def _shared(names: Sequence[Sequence[str]]) -> int:
    """Number of leading folders that all names share, such as the folder an archive was made from."""
    depth = 0
    while True:
        tops = {path[depth] if len(path) > depth + 1 else None for path in names}
        deeper = any(len(path) > depth + 2 for path in names)
        top = next(iter(tops), None)
        if len(tops) != 1 or top is None or not deeper or top.lower() in SPLIT_WORDS:
            return depth
        depth += 1


def _from_files(names: Sequence[str], files: Sequence[str], splits: list[str] | None, pattern: str | None) -> Names:
    expression = re.compile(pattern) if pattern is not None else _NUMBERED
    labels = []
    for name, file in zip(names, files, strict=True):
        match = expression.search(name if pattern is not None else file.rpartition(".")[0])
        if match is None:
            if pattern is not None:
                raise BadParameter(f"label_pattern={pattern!r} does not match {name!r}")
            return Names(None, splits, [], ["the file names contain no classes: no labels are written"])
        labels.append(next((group for group in match.groups() if group), ""))
    counts = Counter(labels)
    if pattern is None and (len(counts) < 2 or len(labels) < _MANY_CLASSES * len(counts)):
        return Names(None, splits, [], ["the file names contain no classes: no labels are written"])
    notes = [] if pattern else [f"classes are taken from the file names: {files[0]!r} has the class {labels[0]!r}"]
    return Names(labels, splits, sorted(counts), notes)
