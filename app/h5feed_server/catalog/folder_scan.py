"""Makes catalogue entries from a scan of the data folder, or of a mounted store."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from h5feed.errors import Unreadable
from h5feed.stored.local_file import YOUNG_SECONDS, Identity, is_away

from ..settings import Settings
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import Declaration, followed
from .discovery import LEADS_OUT, Walk, distinct, dotted, shown, why_not_there
from .entry import Entry, identity_of
from .grouping.families import Family
from .indexer import Indexer, declared_text
from .sources import Source


class FolderScan:
    """Makes the entries of one scan. Unchanged files keep their entries.

    Parameters
    ----------
    source : Source
        With the entries of its previous scan.
    settings : Settings
    indexer : Indexer
        Inspects new and changed files.
    began, looked : float
        When the scan began, in seconds of the monotonic clock and of the system clock.

    Attributes
    ----------
    second_look : float
        When recently written files must be inspected again, in seconds of the system clock; infinite if there are none.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        indexer: Indexer,
        began: float,
        looked: float,
    ) -> None:
        self._source = source
        self._root = source.root
        self._follow_links = settings.follow_links
        self._indexer = indexer
        self._presence = source.presence
        self._before = source.entries
        self._began = began
        self._looked = looked
        self._entries: dict[str, Entry] = {}
        self.second_look = float("inf")

    def entries_of(
        self, walked: Walk, awaited: Mapping[str, str], declaration: Declaration, *, partly: bool
    ) -> dict[str, Entry]:
        """Return the entries, by name.

        Parameters
        ----------
        walked : Walk
            The files that were found.
        awaited : mapping of str to str
            Files that are temporarily unavailable, with the reason.
        declaration : Declaration
            The contents of ``h5feed.toml``.
        partly : bool
            Whether only some files of the folder are scanned.
        """
        known = sorted([*walked.files, *walked.declarable])
        declared, unfollowed = followed(declaration, known, partly=partly)
        claimed = {file for dataset in declared.values() for file in dataset.matching(known)}
        for name, (meant, why) in unfollowed.items():
            self.refuse(name, meant or [DECLARATION], why)
            # Files of a dataset that is declared, but cannot be served, are not served in another way either.
            walked.files = [file for file in walked.files if file not in meant]
        for path, why in walked.refused.items():
            self.refuse(dotted(path) or ".", (path or ".",), why)
        grouped = self._source.grouping.families(sorted({*walked.files, *claimed}), declared)
        # Small families first, so that a single file does not wait for a thousand others.
        for family in sorted(grouped, key=lambda one: len(one.files)):
            self._add(family, walked, awaited)
        return self._entries

    def _add(self, family: Family, walked: Walk, awaited: Mapping[str, str]) -> None:
        """Add the entry of a family of files, unless the files were deleted in the meantime."""
        files = family.files
        if not self._follow_links and (outside := walked.outside.intersection(files)):
            # Check this before inspecting the file: a reason must not reveal what else is on the disk.
            which = "it" if len(files) == 1 else shown(min(outside))
            self.refuse(family.name, files, f"{which} {LEADS_OUT}")
            return
        away = next((awaited[file] for file in files if file in awaited), None)
        paths = tuple(str(self._root / file) for file in files)
        placed = family.below(self._source.mount)
        name = self._free(placed.name, placed.files)
        if away is not None:
            self._entries[name] = self._away(name, placed.files, away)
            return
        try:
            states = [os.stat(path) for path in paths]
        except OSError as error:
            if is_away(error):
                self._entries[name] = self._away(name, placed.files, f"a file cannot be accessed: {error.strerror}")
            elif (reason := why_not_there(str(error.filename), error)) is not None:
                self.refuse(family.name, files, reason)
            return
        if not all(stat.S_ISREG(status.st_mode) for status in states):
            self.refuse(family.name, files, "it is not a regular file")
            return
        entry = self._entries[name] = self._current(replace(placed, name=name), paths, tuple(map(Identity.of, states)))
        if entry.away is None and entry.was_young() and not entry.again:
            self.second_look = self._began + YOUNG_SECONDS

    def _current(self, family: Family, paths: tuple[str, ...], identities: tuple[Identity, ...]) -> Entry:
        """The entry of files that exist: the previous one if it is still valid, else a new one."""
        look = partial(self._indexer.begin, family, paths, identities, self._began, self._looked)
        entry = self._before.get(family.name)
        if entry is None:
            return look()
        if entry.away is not None:
            entry = replace(entry, away=None)
        if (lost := self._lost_dependency(entry)) is not None:
            return replace(entry, away=lost)
        if entry.is_outdated(paths, identities, declared_text(family.declared)):
            return look()
        if entry.is_due():
            second = entry.again.pop() if entry.again else None
            if second is not None and not second.has_failed_for_now():
                return second
            if second is not None:
                entry.tried[:] = [second.began]
            entry.again.append(look(is_second=identities == entry.identities))
        return entry

    def _free(self, name: str, files: Sequence[str]) -> str:
        # An entry must not hide another one with the same name.
        return distinct("/".join(files)) if name in self._entries else name

    def refuse(self, name: str, files: Sequence[str], reason: str) -> None:
        """Add an entry of what cannot be served."""
        failed: Future[tuple[Dataset, ...]] = Future()
        failed.set_exception(Unreadable(reason))
        if mount := self._source.mount:
            # The store as a whole has its name.
            name = mount if name == "." else f"{mount}.{name}"
            files = [mount if file == "." else f"{mount}/{file}" for file in files]
        name = self._free(name, files)
        self._entries[name] = Entry(name, tuple(files), (), (), failed, {}, began=self._began)
        self._indexer.tell(files, reason)

    def _away(self, name: str, files: tuple[str, ...], reason: str) -> Entry:
        """The entry of files that are temporarily unavailable: the previous one with the reason, or an empty one."""
        entry = self._before.get(name)
        if entry is not None and entry.files == files:
            return replace(entry, away=reason)
        nothing: Future[tuple[Dataset, ...]] = Future()
        nothing.set_result(())
        return Entry(name, files, (), (), nothing, {}, away=reason)

    def _lost_dependency(self, entry: Entry) -> str | None:
        """Why a file that the entry's files refer to is temporarily unavailable; None if none is."""
        below = f"{self._root}{os.sep}"
        for path, identity in entry.dependencies.copy().items():
            if identity is None or not path.startswith(below) or identity_of(path) is not None:
                continue
            if (why := self._presence.why(path.removeprefix(below))) is not None:
                return why
        return None
