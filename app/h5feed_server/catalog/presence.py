"""Tells files that were deleted from files that are missing because their disk is unavailable.

If a disk is unavailable, a folder on it cannot be listed, or looks intact: it is then another folder, the mount point,
and usually empty. Files that were in it before are not taken for deleted, but reported as unavailable ("awaited").
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .discovery import Walk, shown

AWAY_SECONDS = 120.0
"""How long files are awaited in a folder that was replaced by another one. This is longer than clients retry, so they
get the reason; and after it, a folder that was replaced on purpose is accepted without a restart."""

Place = tuple[int, int]
"""Device and inode of a folder."""


class Presence:
    """Remembers which files were found in which folders. Not thread-safe.

    Parameters
    ----------
    is_certain : bool
        Whether a file that is missing was deleted in any case: the folder is on no disk that can be unavailable.
    whole : str
        What the folder is called.

    Attributes
    ----------
    reason : str or None
        Why the data folder as a whole is unavailable; None if it is available.
    trouble : str or None
        `reason`, or why the first awaited file is unavailable; None if nothing is missing.
    """

    def __init__(self, *, is_certain: bool = False, whole: str = "the data folder") -> None:
        self._is_certain = is_certain
        self._whole = whole
        self.reason: str | None = None
        self.trouble: str | None = None
        self._files: set[str] = set()
        self._places: dict[str, Place] = {}
        self._replaced: dict[str, float] = {}
        self._unlisted: dict[str, str] = {}

    def awaited(self, walked: Walk, now: float) -> dict[str, str]:
        """Update with the result of a scan. Returns the missing files that may still exist, with the reason for each.

        Parameters
        ----------
        walked : Walk
        now : float
            Seconds of the monotonic clock.
        """
        present = {*walked.files, *walked.declarable}
        self._unlisted = walked.unlisted
        self.reason = None
        if "" in walked.unlisted:
            self.reason = f"{self._whole} cannot be read: {walked.unlisted['']}"
        elif self._is_certain:
            self._files, self.trouble = present, None
            return {}
        elif self._files and not present and not walked.others:
            self.reason = "the data folder, which contained datasets, is empty: is its disk mounted?"
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
        # Accept a replaced folder if it has all files that the previous one had.
        needed = {folder for file in lost for folder in _above(file)}
        for folder in [folder for folder in self._replaced if folder not in needed and self.reason is None]:
            self._accept(folder, walked)
        self.trouble = self.reason or next(iter(lost.values()), None)
        return lost

    @property
    def holds_files(self) -> bool:
        """Whether files were found that were not deleted since."""
        return bool(self._files)

    def is_sound(self, root: str) -> bool:
        """Whether the data folder is still the same folder and not unexpectedly empty. A quick check without a scan."""
        if self._is_certain:
            return True
        try:
            status = os.stat(root)
            with os.scandir(root) as entries:
                is_empty = next(entries, None) is None
        except OSError:
            return False
        return self._places.get("") == (status.st_dev, status.st_ino) and not (is_empty and self._files)

    def why(self, file: str) -> str | None:
        """Why a missing file may still exist; None if it was deleted."""
        if self.reason is not None:
            return self.reason
        for folder in _above(file):
            name = f"the folder {shown(folder)!r}" if folder else "the data folder"
            if folder in self._unlisted:
                return f"{name} cannot be read: {self._unlisted[folder]}"
            if folder in self._replaced:
                return f"{name} was replaced by another one that does not contain it: is its disk mounted?"
        return None

    def doubt(self, name: str) -> str | None:
        """Why an unknown dataset may exist all the same; None if it does not."""
        if self.reason is not None:
            return self.reason
        for folder, reason in self._unlisted.items():
            if name.startswith(shown(folder).replace("/", ".") + "."):
                return f"the folder {shown(folder)!r} cannot be read: {reason}"
        return None

    def _accept(self, folder: str, walked: Walk) -> None:
        """Accept the current state of a folder as the intended one."""
        self._replaced.pop(folder, None)
        if folder in walked.places:
            self._places[folder] = walked.places[folder]


def _above(file: str) -> Iterator[str]:
    """The folders that a file is in, innermost first, relative to the data folder."""
    while file:
        file = os.path.dirname(file)
        yield file
