"""Images named by a table, by path or by file name, with or without extension, in folders beside it.

Usual layouts: ``labels.csv`` with ``id,breed`` beside ``train/<id>.jpg``; ``train.csv`` with ``image_id`` beside
``train_images/``. If the folder is ambiguous, the user is asked to name it.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from h5feed.errors import BadParameter, Unreadable

from .image_spec import SUFFIXES
from .members import MAX_MEMBER_BYTES, BrokenMember, Everywhere, Listing, Member
from .options import BuildOptions

if TYPE_CHECKING:
    from .store_files import StoreFiles

_MAX_LISTED = 1 << 23
"""Files below the folder of a table that are looked at."""

_SAMPLE = 200
_WORDS = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Place:
    """Where the images of a column are.

    Attributes
    ----------
    root : Path
    paths : list of str or None
        Of each row, relative to it; None where there is no such file.
    said : str
        In words.
    """

    root: Path
    paths: list[str | None]
    said: str


class ImageFolder:
    """Finds images below a folder; it is listed on first use."""

    def __init__(self, table: Path, options: BuildOptions) -> None:
        self._table, self._options = table, options
        self.root = table.parent
        if options.image_dir is not None:
            beside = [folder for folder in (options.image_dir, table.parent / options.image_dir) if folder.is_dir()]
            if not beside:
                raise Unreadable(f"image_dir={str(options.image_dir)!r} is not a folder")
            self.root = beside[0]
        suffix = options.image_suffix
        self._suffix = None if suffix is None else suffix if suffix.startswith(".") or not suffix else f".{suffix}"
        self._by_name: dict[str, list[str]] | None = None

    def find(self, values: Sequence[str]) -> Place:
        """Paths of the images with these names.

        Raises
        ------
        BadParameter
            There are several folders that they may lie in.
        """
        tails = [value.replace("\\", "/").removeprefix("./") for value in values]
        direct = [self._direct(value, tail) for value, tail in zip(values, tails, strict=True)]
        if all(path is not None for path in direct[:_SAMPLE]) or all(direct):
            return Place(self.root, direct, "")
        all_candidates: list[list[tuple[str, str]]] = []
        for tail in tails:
            # prefix and rest of each file that ends in the value
            candidates = self._candidates(tail)
            all_candidates.append(candidates)
        votes = Counter(prefix for candidates in all_candidates for prefix in {prefix for prefix, _ in candidates})
        ambiguous = any(len({prefix for prefix, _ in candidates}) > 1 for candidates in all_candidates)
        best = self._best(votes) if ambiguous else None
        paths: list[str | None] = []
        for own, candidates in zip(direct, all_candidates, strict=True):
            here = [prefix + rest for prefix, rest in candidates if best is None or prefix == best]
            there = here or [prefix + rest for prefix, rest in candidates]
            paths.append(own if own is not None else there[0] if here or len(there) == 1 else None)
        return Place(self.root, paths, self._said(paths, tails, votes if best is None else Counter([best])))

    def _direct(self, value: str, tail: str) -> str | None:
        for path in dict.fromkeys((value, tail)):
            for suffix in ("", self._suffix or ""):
                try:
                    if path and stat.S_ISREG(os.stat(self.root / (path + suffix)).st_mode):
                        return path + suffix
                except (OSError, ValueError):
                    continue
        return None

    def _candidates(self, tail: str) -> list[tuple[str, str]]:
        if self._by_name is None:
            self._by_name = self._listed()
        name = tail.rpartition("/")[2]
        endings = [tail] if self._suffix is None else [tail + self._suffix]
        for ending in endings:
            exact = [
                (path[: len(path) - len(ending)], ending)
                for path in self._by_name.get(ending.rpartition("/")[2], ())
                if path == ending or path.endswith(f"/{ending}")
            ]
            if exact:
                return exact
        if self._suffix is not None:
            return []
        return [
            (path[: len(path) - len(rest)], rest)
            for path in self._by_name.get(f"{name}/", ())
            if (rest := tail + os.path.splitext(path)[1]) and (path == rest or path.endswith(f"/{rest}"))
        ]

    def _listed(self) -> dict[str, list[str]]:
        """Image paths by file name, and by name without extension followed by ``/``."""
        known: dict[str, list[str]] = defaultdict(list)
        count = 0
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(item for item in folders if not item.startswith((".", "__MACOSX")))
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for file in sorted(files):
                count += 1
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    path = file if relative == "." else f"{relative}/{file}"
                    known[file].append(path)
                    known[f"{os.path.splitext(file)[0]}/"].append(path)
            if count > _MAX_LISTED:
                raise Unreadable(
                    f"there are more than {_MAX_LISTED:,} files below {self.root}: pass the folder of the "
                    "images as image_dir"
                )
        return dict(known)

    def _best(self, votes: Counter[str]) -> str:
        """The right folder, if several have files with these names."""
        most = votes.most_common(1)[0][1]
        rivals = [prefix for prefix, count in votes.items() if count >= 0.9 * most]
        if len(rivals) > 1:
            # ``train.csv`` is of ``train/`` or ``train_images/``; ``labels.csv`` of train too, as test has none.
            words = {*_WORDS.findall(self._table.name.partition(".")[0].lower())} - {"csv"}
            for own in (words & {"train", "test", "val", "valid", "validation"} or words, {"train", "training"}):
                near = [prefix for prefix in rivals if own & {*_WORDS.findall(prefix.lower())}]
                if len(near) == 1:
                    return near[0]
            shown = ", ".join(repr(prefix or ".") for prefix in sorted(rivals)[:10])
            raise BadParameter(f"the images of {self._table.name} could be in {shown}: choose one with image_dir")
        return rivals[0]

    def _said(self, paths: Sequence[str | None], tails: Sequence[str], votes: Counter[str]) -> str:
        existing = [(path, tail) for path, tail in zip(paths, tails, strict=True) if path is not None]
        endings = sorted({os.path.splitext(path)[1] for path, tail in existing if not path.endswith(tail)})
        folders = sorted(prefix for prefix in votes if prefix)[:3]
        where = ", ".join(folders) + (" …" if len(votes) > len(folders) and folders else "")
        added = f", with {' or '.join(endings)} added to the names" if endings else ""
        return f"images are read from {where or self.root}{added}" if existing and (where or added) else ""


class ListedFiles(Everywhere):
    """Files by path below a folder."""

    def __init__(self, place: Place, names: Sequence[str], files: StoreFiles | None = None) -> None:
        self._root, self._files = place.root, files
        self.listing = Listing()
        for path, name in zip(place.paths, names, strict=True):
            member = Member(name, 0, "missing")
            if path is not None:
                try:
                    status = os.stat(place.root / path)
                    member = Member(path, status.st_size, f"{status.st_size} {status.st_mtime_ns}")
                except OSError:
                    member = Member(path, 0, "missing")
            self.listing.members.append(member)

    def begin(self, indices: Sequence[int]) -> None:
        if self._files is not None:
            listed = (self.listing.members[index] for index in indices)
            self._files.begin(self._root / one.name for one in listed if one.size <= MAX_MEMBER_BYTES)

    def read(self, index: int) -> bytes:
        member = self.listing.members[index]
        if member.stamp == "missing":
            raise BrokenMember("there is no such file")
        if member.size > MAX_MEMBER_BYTES:
            raise BrokenMember(f"it has {member.size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
        if self._files is not None and (content := self._files.read(self._root / member.name)) is not None:
            return content
        try:
            return (self._root / member.name).read_bytes()
        except OSError as error:
            raise BrokenMember(f"it cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Nothing to close."""
