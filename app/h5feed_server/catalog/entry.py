"""Catalogue entries: a family of files, its datasets, and whether both are up to date."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

from h5feed.errors import Transient
from h5feed.stored.local_file import YOUNG_SECONDS, Identity

from .assembling import Refused
from .dataset import Dataset
from .discovery import shown
from .loading import Dependencies

Status = Literal["ok", "unreadable", "preparing", "unavailable"]

GROWTH_SECONDS = 0.5
"""Minimum interval between inspections of a growing file."""

RETRY_SECONDS = 2.0
"""After a temporary error, a requested file is inspected again after this long."""


@dataclass(frozen=True)
class Entry:
    """A family of files (usually a single one), and the datasets in it."""

    name: str
    files: tuple[str, ...]
    """Relative to the data folder."""
    paths: tuple[str, ...]
    identities: tuple[Identity, ...]
    outcome: Future[tuple[Dataset, ...]]
    dependencies: Dependencies
    """Other files that the files refer to, as far as they are known."""
    refused: dict[str, Refused] = field(default_factory=dict)
    """Parts of the files that cannot be served although others can, by name, as far as they are known."""
    began: float = 0.0
    """When the scan that found the files began, in seconds of the monotonic clock."""
    declared: bytes = b""
    """The declaration in ``h5feed.toml``, serialised; empty if there is none."""
    looked: float = 0.0
    """When that scan began, in seconds of the system clock, which file times also use."""
    is_second: bool = False
    """This is the second inspection of files that had just been written at the first one."""
    again: list[Entry] = field(default_factory=list)
    """The entry of the second inspection, if it has begun."""
    tried: list[float] = field(default_factory=lambda: [0.0])
    """When the last inspection of a growing file began that could not be made then."""
    away: str | None = None
    """Why the files are temporarily unavailable; None if they are available."""
    grows: bool = False
    """Rows are added to its file. It stays current until `again` has inspected the file as it is then."""

    def reason(self) -> str | None:
        """Why the files cannot be read; None if they can, or if that is not known yet."""
        if not self.outcome.done():
            return None
        error = self.outcome.exception()
        return None if error is None else str(error)

    def datasets(self) -> tuple[Dataset, ...]:
        """The readable datasets known so far."""
        if not self.outcome.done() or self.outcome.exception() is not None:
            return ()
        return self.outcome.result()

    def has_failed_for_now(self) -> bool:
        """Whether the problem may go away: the system refused access, or the file was changing."""
        error = self.outcome.exception() if self.outcome.done() else None
        return isinstance(error, Transient) or (error is not None and isinstance(error.__cause__, OSError))

    def is_outdated(self, paths: tuple[str, ...], identities: tuple[Identity, ...], declared: bytes) -> bool:
        """Whether it must be inspected again for these files, in the state that they are in now, and declarations."""
        if (self.paths, self.declared) != (paths, declared):
            return True
        if any(map(self._differ, self.identities, identities)):
            return True
        if any(identity_of(path) != identity for path, identity in self.dependencies.copy().items()):
            return True
        return time.monotonic() - self.began >= RETRY_SECONDS and self.has_failed_for_now()

    def has_changed(self) -> bool:
        """Whether its files have changed."""
        known = [*zip(self.paths, self.identities, strict=True), *self.dependencies.copy().items()]
        return any(self._differ(identity_of(path), identity) for path, identity in known)

    def _differ(self, one: Identity | None, other: Identity | None) -> bool:
        """Whether these are states of different content; of a growing file, whether they are different files."""
        if self.grows and one is not None and other is not None:
            return one[:2] != other[:2]
        return one != other

    def is_behind(self) -> bool:
        """Whether its file has grown since the scan that found it, or could not be read as it was then."""
        if not self.grows:
            return False
        files = zip(self.paths, self.identities, strict=True)
        return any(one.growth is not None and one.growth.is_earlier for one in self.datasets()) or any(
            identity_of(path) != known for path, known in files
        )

    def has_looked_since(self, moment: float) -> bool:
        """Whether an inspection of the growing file that began after this time has ended."""
        return max(self.began, *self.tried) >= moment

    def is_due(self) -> bool:
        """Whether it is time for a second look at a file that was new when it was inspected, or that has grown."""
        if self.grows:
            now, latest = time.monotonic(), self.again[0] if self.again else self
            if not latest.outcome.done():
                return False
            if self.again and not latest.has_failed_for_now():
                return True
            if now < latest.began + GROWTH_SECONDS:
                return False
            return bool(self.again) or self.is_behind() or (self.was_young() and now >= self.began + YOUNG_SECONDS)
        if not self.outcome.done() or time.monotonic() < self.began + YOUNG_SECONDS or not self.was_young():
            return False
        return not self.again or self.again[0].outcome.done()

    def was_young(self) -> bool:
        """Whether a file had just been written when it was inspected."""
        if self.is_second:
            return False
        known = (*self.identities, *self.dependencies.copy().values())
        return any(identity is not None and identity.is_young(self.looked) for identity in known)


@dataclass(frozen=True)
class Listed:
    """One line of the catalogue."""

    name: str
    files: tuple[str, ...]
    status: Status
    reason: str | None
    dataset: Dataset | None


def identity_of(path: str) -> Identity | None:
    """Identity of the file at a path; None if there is none."""
    try:
        return Identity.of(os.stat(path))
    except OSError:
        return None


_MOST_NAMED = 8
"""Files that are named when their datasets have the same name."""


def told_apart(lines: Sequence[tuple[Entry, Listed]]) -> list[Listed]:
    """The lines of a listing. Of datasets with the same name, only the one whose entry has that name is served."""
    counts = Counter(line.name for _, line in lines)
    files_of: dict[str, list[str]] = {}
    for _, line in lines:
        if counts[line.name] > 1 and line.files:
            files_of.setdefault(line.name, []).append(line.files[0])
    listed = []
    for entry, line in lines:
        own = entry.name == line.name
        if counts[line.name] > 1 and line.dataset is not None and not own:
            # Lines need unique names, although this one cannot be requested.
            name, reason = f"{line.name} ({shown(line.files[0])})", of_one_name(line.name, files_of[line.name])
            line = replace(line, name=name, status="unreadable", reason=reason, dataset=None)
        listed.append(line)
    return listed


def of_one_name(name: str, files: Sequence[str]) -> str:
    """Return the reason why datasets in these files are not served."""
    more = f" and {len(files) - _MOST_NAMED} more files" if len(files) > _MOST_NAMED else ""
    return (
        f"datasets in {', '.join(map(shown, files[:_MOST_NAMED]))}{more} would have the same name {name!r}: rename a "
        "file, or declare it under another name in h5feed.toml"
    )
