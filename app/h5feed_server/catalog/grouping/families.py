"""Finds files that may form one dataset, by declarations, names and folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from string import digits
from typing import Literal

from ..declared import DeclaredDataset
from ..discovery import dotted, name_files
from ..split_names import without_split
from .names import Tags, are_counted, natural, pattern, tags_of, without_numbers

_SPLIT_ORDER = (None, "train", "val", "test")

_MOST_CLASSES = 200
"""Maximum number of files in a folder that are considered as classes."""


@dataclass(frozen=True)
class Family:
    """Files that may form one dataset.

    Attributes
    ----------
    name : str
        Name of the dataset.
    files : tuple of str
        Relative to the data folder, in the order of their rows.
    tags : tuple of Tags
        The place of each file in the dataset.
    rows : tuple of str
        Name of the row or class, if each file is one.
    kind : str
        The reason: the files are ``declared`` as one dataset; their names say that they are parts of one (``named``);
        their names differ in ``numbers``; their names are ``words`` and they are in the same folder; or there is only
        one file (``alone``).
    declared : DeclaredDataset or None
        The declaration, if there is one.
    mount : str
        The store that they are in, which name and files begin with; empty if it is none of several.
    """

    name: str
    files: tuple[str, ...]
    tags: tuple[Tags, ...]
    rows: tuple[str, ...]
    kind: Literal["declared", "named", "numbers", "words", "alone"]
    declared: DeclaredDataset | None = None
    mount: str = ""

    def below(self, mount: str) -> Family:
        """The same family of the store that is mounted under this name; itself if it is empty."""
        if not mount:
            return self
        files = tuple(f"{mount}/{file}" for file in self.files)
        return replace(self, name=f"{mount}.{self.name}", files=files, mount=mount)

    @property
    def grows(self) -> bool:
        """Whether it is declared that rows are added while it is served."""
        return self.declared is not None and self.declared.growing


@dataclass(frozen=True)
class _Place:
    """A file, the folder that its dataset is named after, and the path from there to the file."""

    file: str
    folder: str
    below: str
    tags: Tags

    @property
    def stem(self) -> str:
        return _stem(self.file)


def families(files: Sequence[str], declared: Mapping[str, DeclaredDataset], *, counted: bool = True) -> list[Family]:
    """Divide files into families. Each file is in exactly one family, or in several declared ones.

    Parameters
    ----------
    files : sequence of str
        Relative to the data folder.
    declared : mapping of str to DeclaredDataset
        Declared datasets, by name.
    counted : bool
        Whether numbers next to a split word may count the files of the split.
    """
    grouped: list[Family] = []
    taken: set[str] = set()
    for name, dataset in declared.items():
        matching = dataset.matching(files)
        if matching:
            # Files follow in the declared order, except for splits and halves.
            grouped.append(
                _family(name, [_split_place(file) or _place(file) for file in matching], "declared", dataset)
            )
            taken.update(matching)
    names = {dotted(os.path.splitext(file)[0]) for file in files} | set(declared)

    def add(folder: str, stem: str, places: list[_Place], kind: Literal["named", "numbers", "words"]) -> None:
        name = dotted(os.path.join(folder, stem) if stem else folder or "data")
        if len(places) < 2 or name in names:
            return
        places.sort(key=lambda place: natural(place.file) if kind != "named" else ())
        places.sort(key=lambda place: (_SPLIT_ORDER.index(place.tags.split), place.tags.shard, place.tags.number))
        grouped.append(_family(name, places, kind))
        taken.update(place.file for place in places)
        names.add(name)

    def left() -> list[str]:
        return [file for file in files if file not in taken]

    # Folders that are named after splits.
    parted = [place for file in left() if (place := _split_place(file)) is not None]
    for (folder, stem), places in _by(parted, lambda place: (place.folder, pattern(place.tags.stem))).items():
        if _are_splits(places):
            numbered = "#" in stem
            own = without_numbers([place.tags.stem for place in places]) if numbered else places[0].tags.stem
            add(folder, own, places, "numbers" if numbered else "named")
    # Names that number the files of each split.
    numbers = [place for file in left() if counted and (place := _counted_place(file)) is not None]
    for (folder, _), places in _by(numbers, lambda place: (place.folder, place.tags.stem.lower())).items():
        counted_ones = [place for place in places if place.tags.number >= 0]
        # If the whole splits (``train``, ``val``) exist next to numbered parts, the parts are another dataset.
        for some, end in ((places, ""), (counted_ones, "_parts")):
            if are_counted([(place.tags.split, place.tags.number) for place in some]):
                add(folder, f"{places[0].tags.stem}{end}".strip("_"), some, "numbers")
                break
    # Names that say what part of a dataset a file is.
    tagged = [place for place in map(_place, left()) if place.tags.is_part]
    for (folder, _), places in _by(tagged, lambda place: (place.folder, place.tags.stem.lower())).items():
        if _are_splits(places) or {place.tags.split for place in places} == {None}:
            add(folder, places[0].tags.stem, places, "named")
    # Names that differ in numbers. Split words that were not used so far are part of the name.
    for (folder, stem), places in _by(
        map(_untagged, left()), lambda place: (place.folder, pattern(place.stem))
    ).items():
        if "#" in stem:
            add(folder, without_numbers([place.stem for place in places]), places, "numbers")
    # Folders of files whose names are words.
    words = [place for place in map(_untagged, left()) if place.folder and "#" not in pattern(place.stem)]
    for (folder, _), places in _by(words, lambda place: (place.folder, "")).items():
        if len(places) <= _MOST_CLASSES and all(place.stem.isalpha() for place in places):
            add(folder, "", places, "words")
    return grouped + alone(left(), [family.name for family in grouped])


class Grouping:
    """Calls `families`, and remembers the last result: most scans find the same files as the one before."""

    def __init__(self) -> None:
        self._last: tuple[Sequence[str], Mapping[str, DeclaredDataset], list[Family]] = ((), {}, [])

    def families(self, files: Sequence[str], declared: Mapping[str, DeclaredDataset]) -> list[Family]:
        """Same as `families`."""
        if self._last[:2] != (files, declared):
            self._last = (files, declared, families(files, declared))
        return self._last[2]


def apart(family: Family) -> list[Family]:
    """Divide a family whose files do not form one dataset: by the number in the names, or into single files."""
    files = tuple(file.removeprefix(f"{family.mount}/") for file in family.files) if family.mount else family.files
    is_numbered = any(tags.number >= 0 for tags in family.tags)
    found = families(files, {}, counted=False) if is_numbered else alone(files)
    return [one.below(family.mount) for one in found]


def alone(files: Sequence[str], taken: Collection[str] = ()) -> list[Family]:
    """A family for each file, with a name that is unique and not among `taken`."""
    return [_family(name, [_untagged(file)], "alone") for name, file in name_files(files, taken).items()]


def glob_of(files: Sequence[str]) -> str:
    """A pattern that matches these files."""
    if len(files) == 1:
        return files[0]
    first, last = min(files), max(files)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    begin = "".join(character for character, _ in alike)
    ends = [file[len(begin) :][::-1] for file in files]
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(ends), max(ends), strict=False))
    end = "".join(character for character, _ in alike)[::-1]
    return f"{begin.rstrip(digits)}*{end.lstrip(digits)}"


def _family(
    name: str,
    places: Sequence[_Place],
    kind: Literal["declared", "named", "numbers", "words", "alone"],
    declared: DeclaredDataset | None = None,
) -> Family:
    files = tuple(place.file for place in places)
    tags = []
    whole = _are_splits(places)
    alike: Counter[tuple[str | None, str | None]] = Counter()
    halves = {place.tags.half for place in places}
    for place in places:
        own = place.tags
        if kind == "declared":
            own = own if whole or place.below == "" else _place(place.file).tags
            # A half needs another one: ignore the tag if there is only one kind of half.
            own = replace(own, shards=1, half=own.half if len(halves - {None}) > 1 else None)
        if own.shards == 1:
            own = replace(own, shard=alike[own.split, own.half])
            alike[own.split, own.half] += 1
        tags.append(own if kind != "alone" else Tags(place.stem))
    base = f"{os.path.commonpath([os.path.dirname(file) for file in files])}/".lstrip("/") if len(files) > 1 else ""
    stems = [os.path.splitext(file)[0] for file in files]
    rows = [stem.removeprefix(base) if len(files) > 1 else os.path.basename(stem) for stem in stems]
    if whole and any(place.below for place in places):
        # Leave out the folder of the split, which the split already tells.
        below = [place.below for place in places]
        rows = below if len(set(below)) == len(below) else rows
    return Family(name, files, tuple(tags), tuple(rows), kind, declared)


def _place(file: str) -> _Place:
    return _Place(file, os.path.dirname(file), "", tags_of(_stem(file)))


def _untagged(file: str) -> _Place:
    return _Place(file, os.path.dirname(file), "", Tags(_stem(file)))


def _counted_place(file: str) -> _Place | None:
    """The place of a file whose name contains a split, and possibly a number in the split; else None."""
    tags = tags_of(_stem(file), counted=True)
    if tags.split is None or tags.shards > 1 or tags.half is not None:
        return None
    return _Place(file, os.path.dirname(file), "", tags)


def _split_place(file: str) -> _Place | None:
    """The place of a file in a folder named after a split; None without one, or if the file name has a split."""
    if "/" not in file:
        return None
    place = _place(file)
    if place.tags.split is not None:
        return None
    parts = os.path.splitext(file)[0].split("/")
    for depth, part in enumerate(parts[:-1]):
        rest, split = without_split(part)
        if split is not None:
            folder = "/".join(parts[:depth] + ([rest] if rest else []))
            return _Place(file, folder, "/".join(parts[depth + 1 :]), replace(place.tags, split=split))
    return None


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def _are_splits(places: Sequence[_Place]) -> bool:
    splits = {place.tags.split for place in places}
    return "train" in splits and None not in splits


def _by(places: Iterable[_Place], key: Callable[[_Place], tuple[str, str]]) -> dict[tuple[str, str], list[_Place]]:
    grouped: dict[tuple[str, str], list[_Place]] = {}
    for place in places:
        grouped.setdefault(key(place), []).append(place)
    return grouped
