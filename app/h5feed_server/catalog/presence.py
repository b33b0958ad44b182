"""What is not in the data folder any more though nobody has deleted it: its disk is away, for a moment or for good.

A folder on a disk that is away cannot be looked at, or looks sound: it is another one then, that on which the disk was
mounted, and mostly empty. Files that were there before are awaited, and not taken for deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .discovery import Walk, shown

AWAY_SECONDS = 120.0
"""How long files are awaited in a folder that is another one now. Longer than clients try by themselves: whoever has
read them hears why they are not there, and whoever puts another folder there on purpose need not restart anything."""

Place = tuple[int, int]
"""Device and inode of a folder."""


class Presence:
    """Remembers which files were found in which folders; not safe for threads.

    Attributes
    ----------
    reason : str or None
        Why nothing at all can be said of the data folder now.
    trouble : str or None
        The same, or why the first of the awaited files is not there.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.trouble: str | None = None
        self._files: set[str] = set()
        self._places: dict[str, Place] = {}
        self._replaced: dict[str, float] = {}
        self._unlisted: dict[str, str] = {}

    def awaited(self, walked: Walk, now: float) -> dict[str, str]:
        """Files that were found before, are not now, and may be there still: why, for each.

        Parameters
        ----------
        now : float
            By the monotonic clock.
        """
        present = {*walked.files, *walked.declarable}
        self._unlisted = walked.unlisted
        self.reason = None
        if "" in walked.unlisted:
            self.reason = f"the data folder cannot be looked at: {walked.unlisted['']}"
        elif self._files and not present and not walked.others:
            self.reason = "the data folder, which held datasets, is empty: is the disk not mounted that belongs there?"
        for folder, place in walked.places.items():
            if self._places.setdefault(folder, place) == place:
                self._replaced.pop(folder, None)
            else:
                self._replaced.setdefault(folder, now)
        for folder in [folder for folder, since in self._replaced.items() if now - since >= AWAY_SECONDS]:
            self._accept(folder, walked)
        missing = {file: self.why(file) for file in self._files - present}
        lost = {file: why for file, why in missing.items() if why is not None}
        self._files = present | lost.keys()
        # Another folder that has all that the one before had is as good.
        needed = {folder for file in lost for folder in _above(file)}
        for folder in [folder for folder in self._replaced if folder not in needed and self.reason is None]:
            self._accept(folder, walked)
        self.trouble = self.reason or next(iter(lost.values()), None)
        return lost

    @property
    def holds_files(self) -> bool:
        """Whether any were ever found, and not deleted since."""
        return bool(self._files)

    def is_sound(self, root: str) -> bool:
        """Whether the data folder looks, at a glance, as it did."""
        try:
            status = os.stat(root)
            with os.scandir(root) as entries:
                is_empty = next(entries, None) is None
        except OSError:
            return False
        return self._places.get("") == (status.st_dev, status.st_ino) and not (is_empty and self._files)

    def why(self, file: str) -> str | None:
        """Why a file that is not found may be there still; None where it is not there."""
        if self.reason is not None:
            return self.reason
        for folder in _above(file):
            name = f"the folder {shown(folder)!r}" if folder else "the data folder"
            if folder in self._unlisted:
                return f"{name} cannot be looked at: {self._unlisted[folder]}"
            if folder in self._replaced:
                return f"{name} is not the one that it was, and does not hold it: is a disk not mounted?"
        return None

    def doubt(self, name: str) -> str | None:
        """Why a dataset of which nothing is known may be there."""
        if self.reason is not None:
            return self.reason
        for folder, reason in self._unlisted.items():
            if name.startswith(shown(folder).replace("/", ".") + "."):
                return f"the folder {shown(folder)!r} cannot be looked at: {reason}"
        return None

    def _accept(self, folder: str, walked: Walk) -> None:
        """What is there now is what belongs there."""
        self._replaced.pop(folder, None)
        if folder in walked.places:
            self._places[folder] = walked.places[folder]


def _above(file: str) -> Iterator[str]:
    """The folders that a file lies in, from the inside out."""
    while file:
        file = os.path.dirname(file)
        yield file
