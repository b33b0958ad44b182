"""The catalogue: finds HDF5 files in the data folder and in mounted stores, inspects them, and notices changes.

Whoever asks it sees what is in `SCOPE`. What is not in it is not there, and is decided by its name alone: how long an
answer takes does not tell either whether there is a dataset of that name.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from h5feed.errors import (
    DatasetNotFound,
    FeedError,
    Overloaded,
    PageNotFound,
    Preparing,
    RevisionChanged,
    SourceUnavailable,
    Transient,
    Unreadable,
)
from h5feed.revisions import is_provisional
from h5feed.stored.local_file import FileSource, Identity
from h5feed.suggestions import did_you_mean

from ..cache_folder.folder import CacheFolder
from ..settings import Settings
from ..sharing.fair_threads import FairThreads
from ..storage.hdf5.reader_pool import ReaderPool
from ..suffixes import ALL_SUFFIXES
from ..tokens.scope import SCOPE
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import Declaration, read_declared
from .digests import how_far
from .discovery import Others, Walk, ending_of, shown
from .entry import Entry, Listed, Status, identity_of, of_one_name, told_apart
from .folder_scan import FolderScan
from .growing import Growth
from .hanging import Hanging
from .indexer import Indexer
from .inspections import Lanes, NotYet
from .names import tell
from .object_folder import ObjectFolders
from .other_files import other_files
from .sources import Mounts, Source, clashes

T = TypeVar("T")

logger = logging.getLogger(__name__)

RESCAN_SECONDS = 1.0
"""Minimum interval between scans of the folder. A listing may be this old. A request for an unknown name waits for the
next scan."""

SCAN_SECONDS = 2.0
"""How long a listing waits for a scan. After that, it shows what the scan before has found."""

_WALK_SHARE = 0.05
"""After a known file has changed, scans may take this share of the time, if that makes them more frequent."""

MANY_FILES = 4
MANY_FILES_SECONDS = 0.05
FILE_SECONDS = 100e-6
"""Datasets of more than `MANY_FILES` files are not checked for changes at each request, but at this interval: at least
`MANY_FILES_SECONDS`, and `FILE_SECONDS` for each file."""

_POLL_SECONDS = 0.02

_SOON_SECONDS = 3.0
"""If files will have been hashed within this time, a request waits for that, else it is to be repeated."""

_HASHED_RETRY_SECONDS = 10
"""Longest ``Retry-After`` of responses that depend on whether files have been hashed."""

_MOST_RENAMED = 10_000
"""Outdated provisional names that are remembered."""

GROWN_SECONDS = 1.0
"""How long a request for the current revision of a growing dataset waits for rows that were just added."""

AWAY_RETRY_SECONDS = 2.0
"""``Retry-After`` of responses about data that is temporarily unavailable."""


class Catalog:
    """The datasets below ``settings.data_dir``, and those of the stores that are mounted there.

    Parameters
    ----------
    settings : Settings
    folder : CacheFolder
        Caches layouts and digests.
    hdf5 : ReaderPool
    only : sequence of str, optional
        Files to inspect, relative to the data folder, with any extension. Default: all files, including new ones.
    """

    def __init__(
        self, settings: Settings, folder: CacheFolder, hdf5: ReaderPool, only: Sequence[str] | None = None
    ) -> None:
        self._root = settings.data_dir.resolve()
        self._only = only
        self._settings = settings
        self.stores = ObjectFolders(settings)
        """The object stores that are served."""
        self._indexer = Indexer(self._root, settings, folder, hdf5, self.stores)
        self._own = Source(self._root, None if settings.store is None else self.stores.open(settings.store))
        self._presence = self._own.presence
        self._mounts = Mounts(self.stores, settings.may_mount, self._watch, self._unmounted)
        self.hanging = Hanging()
        self._asking = threading.local()
        self._entries: dict[str, Entry] = {}
        self._found: dict[str, tuple[Entry, Dataset, float]] = {}
        self._renamed: OrderedDict[tuple[str, str], str] = OrderedDict()
        """Names by content of datasets and provisional names that are outdated: the files have another identity now."""
        self._scanned = float("-inf")
        self._walk_seconds = 0.0
        self._declarations: list[Identity | None] = []
        """Identities of ``h5feed.toml`` in each source at the last scan."""
        self._second_look = float("inf")
        """When recently written files must be inspected again, in seconds of the monotonic clock."""
        self._endings = frozenset[str]()
        self._others: Mapping[str, Others] = {}
        self._sniffed: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._scanner = FairThreads(1, "h5feed-scan", settings.idle_seconds)
        self._scan: Future[None] | None = None
        self._scan_lock = threading.Lock()
        self._closed = threading.Event()
        if only is None:
            self._watch(self._own)

    def close(self, *, wait: bool = False) -> None:
        """Stop the threads and the inspector, and close all files. Waits for running inspections only if `wait`."""
        self._closed.set()
        self._own.closed.set()
        self._mounts.close()
        self._scanner.shutdown(wait=wait, cancel_futures=True)
        self._indexer.close(wait=wait)
        self.stores.close()

    def drop_old(self, seconds: float) -> None:
        """Drop what was fetched from an object store for orders that nobody has read for this many seconds."""
        self.stores.drop_old(seconds)

    def entries(self) -> list[Entry]:
        """All entries, sorted by name, whatever is in scope."""
        if self._scanned > float("-inf"):
            self._rescan_within(SCAN_SECONDS)
        else:
            self._rescan(time.monotonic() - RESCAN_SECONDS)
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def is_known(self) -> bool:
        """Whether everything found by the last scan has been inspected."""
        # No scan here: this is polled while files are inspected, and scans would slow that down.
        entries = self._entries.values() if self._scanned > float("-inf") else self.entries()
        return all(entry.outcome.done() for entry in list(entries)) and not self._starting()

    @property
    def root(self) -> Path:
        """The data folder."""
        return self._root

    def path_of(self, file: str) -> str:
        """The path of a file; it may be that of a file that stands for an object.

        Parameters
        ----------
        file : str
            As in `Entry.files`.
        """
        return str(self._mounts.path_of(file) or self._root / file)

    def source(self, path: str, identity: Identity) -> FileSource:
        """A file of the data folder.

        Raises
        ------
        RevisionChanged, Overloaded
            It is an object, and the listing has changed.
        """
        return self._indexer.source(path, identity)

    @property
    def inspections(self) -> Lanes[tuple[Dataset, ...]]:
        """The jobs that inspect files."""
        return self._indexer.inspections

    def statuses(self) -> list[tuple[str, Status]]:
        """Name and status of each dataset, and of each file that cannot be served, as the last scan has found them,
        whatever is in scope.

        Never waits for a disk, unlike `listed`.
        """
        return [line for entry in list(self._entries.values()) for line in _statuses_of(entry)]

    def trouble(self) -> str | None:
        """Why files of the data folder that were served are not available now, or read without end; None if they are.

        What mounted stores lack is no trouble of the server.
        """
        if time.monotonic() - self._scanned >= RESCAN_SECONDS and (
            self._presence.trouble is not None or not self._presence.is_sound(str(self._root))
        ):
            self._rescan(time.monotonic() - RESCAN_SECONDS)
        return self._presence.trouble or self.hanging.trouble(lambda name: self._mounts.of(name) is None)

    def is_mounted(self, name: str) -> bool:
        """Whether a dataset of this name would be in a mounted store."""
        return self._mounts.of(name) is not None

    def listed(self) -> list[Listed]:
        """All datasets in scope, and everything that cannot be served with the reason, sorted by name.

        Raises
        ------
        SourceUnavailable
            The data folder is unavailable.
        """
        lines: list[tuple[Entry, Listed]] = []
        entries = self.entries()
        if self._presence.reason is not None and self._presence.holds_files and not self._mounts:
            raise SourceUnavailable(self._presence.reason, retry_after=AWAY_RETRY_SECONDS)
        # Files that are only parts of other datasets are not listed themselves.
        parts = {path for entry in entries if entry.datasets() for path in entry.dependencies}
        for entry in entries:
            if entry.paths and not entry.datasets() and parts.issuperset(entry.paths):
                continue
            reason = entry.reason()
            if entry.away is not None:
                names = [(one.name, one.files) for one in entry.datasets()] or [(entry.name, entry.files)]
                lines += [(entry, Listed(name, files, "unavailable", entry.away, None)) for name, files in names]
            elif not entry.outcome.done():
                waits = "it is being inspected"
                lines.append((entry, Listed(entry.name, entry.files, "preparing", waits, None)))
            elif reason is not None:
                status = _status_of(entry.outcome.exception())
                lines.append((entry, Listed(entry.name, entry.files, status, reason, None)))
            else:
                lines += [(entry, Listed(one.name, one.files, "ok", None, one.now)) for one in entry.datasets()]
                lines += [
                    (entry, Listed(name, one.files, "unreadable", one.reason, None))
                    for name, one in entry.refused.items()
                ]
        scope = SCOPE.get()
        listed = told_apart([(entry, line) for entry, line in lines if scope.covers(line.name)])
        waits = "the store is being listed for the first time"
        listed += [Listed(one, (one,), "preparing", waits, None) for one in self._starting() if scope.covers(one)]
        if not scope.is_everything:
            # Files that are no datasets have names as well, and no scope.
            return sorted(listed, key=lambda line: line.name)
        below = f"{self._root}{os.sep}"
        known = {path.removeprefix(below) for path in parts}
        known |= {file for entry in entries for file in entry.files if self._mounts.path_of(file) is None}
        known.add(DECLARATION)
        for name, files, reason in other_files(self._others, known, str(self._root), self._sniffed):
            listed.append(Listed(name, files, "unreadable", reason, None))
            self._indexer.tell(files, reason)
        return sorted(listed, key=lambda line: line.name)

    def _starting(self) -> list[str]:
        """Names of the mounted stores that are being listed for the first time."""
        return [source.mount for source in self._mounts if source.is_starting]

    def names(self) -> list[str]:
        """Names of readable datasets known so far; empty if the data folder is not available."""
        try:
            return [line.name for line in self.listed() if line.status != "unreadable"]
        except SourceUnavailable:
            return []

    def dataset(self, name: str, revision: str | None = None) -> Dataset:
        """Return a dataset in its current state.

        Raises
        ------
        DatasetNotFound, Unreadable, SourceUnavailable, Overloaded
            SourceUnavailable, too, if its disk hangs.
        RevisionChanged
            The dataset has another revision than `revision`.
        NotYet
            It is being inspected, now with priority, or a scan must find out whether it exists.
        """
        if not SCOPE.get().covers(name):
            raise self._not_found(name)
        self.hanging.check(name)
        current = self._found.get(name)
        if current is None or not self._is_current(name, *current):
            current = self._find(name)
        entry, dataset, _ = current
        if entry.grows and revision is None:
            self._check_recent(name, entry)
        if revision != dataset.revision:
            dataset = dataset.now if revision is None else self._called(dataset, revision)
        tell(dataset.revision, dataset.names)
        return dataset

    def _called(self, dataset: Dataset, revision: str) -> Dataset:
        """The dataset under one of its names.

        Raises
        ------
        RevisionChanged
            It is no name of it.
        NotYet
            That is not known before its files have been hashed.
        """
        name, names = dataset.name, dataset.names
        content = names.content
        if revision == content:
            called = dataset.called(revision)
            if (found := self._found.get(name)) is not None and found[1] is dataset:
                # From now on, most requests have this name.
                self._found[name] = (found[0], called, found[2])
            return called
        if revision == names.here:
            return dataset.called(revision)
        if dataset.growth is not None and (cut := self._earlier(dataset, dataset.growth, revision)) is not None:
            return cut
        may_be = revision
        if is_provisional(revision):
            earlier = self._renamed.get((name, revision))
            if earlier is None:
                raise RevisionChanged(
                    f"dataset {name!r} has revision {names.current} now. {revision} is a provisional name, which a "
                    "server gives before it has hashed the files: since then, the files were changed or replaced, or "
                    "another server gave it. Request the dataset again and begin a new epoch."
                )
            may_be = earlier
        if content is None:
            raise self._not_hashed(dataset, revision)
        if may_be != content:
            raise RevisionChanged(
                f"dataset {name!r} has revision {content} now, not {revision}: its file was changed. "
                "Request the dataset again and begin a new epoch."
            )
        return dataset.called(revision)

    def _check_recent(self, name: str, entry: Entry) -> None:
        """Check that a growing dataset is as it was when the request was made, or that this takes long.

        Raises
        ------
        NotYet
        """
        now = time.monotonic()
        asked: float = getattr(self._asking, "since", now)
        if now < asked + GROWN_SECONDS and entry.is_behind() and not entry.has_looked_since(asked):
            raise self._grown(name, asked)

    def _grown(self, name: str, asked: float) -> NotYet:
        return NotYet(Preparing(f"dataset {name!r} has grown and is inspected again", retry_after=1), asked, 0.0)

    def _earlier(self, dataset: Dataset, growth: Growth, revision: str) -> Dataset | None:
        """A growing dataset as it was when it had this revision; None if it never had.

        Raises
        ------
        NotYet
            That is not known before what has been added meanwhile is inspected: another process may have served it.
        """
        name = dataset.name
        earlier = growth.at(name, revision)
        if earlier is not None:
            return earlier
        entry = self._found[name][0] if name in self._found else None
        asked: float = getattr(self._asking, "since", time.monotonic())
        if entry is not None and entry.began < asked and (entry.again or entry.is_behind()):
            raise self._grown(name, asked)
        return None

    def _not_hashed(self, dataset: Dataset, revision: str) -> NotYet:
        contents = dataset.names.contents
        self._indexer.digests.prefer(contents)
        seconds = self._indexer.digests.seconds_left(contents)
        detail = (
            f"dataset {dataset.name!r} has the provisional revision {dataset.names.here} until its files have been "
            f"hashed ({how_far(contents)}): only then is it known whether this is revision {revision}"
        )
        retry_after = min(_HASHED_RETRY_SECONDS, max(1, math.ceil(seconds)))
        asked: float = getattr(self._asking, "since", time.monotonic())
        return NotYet(Preparing(detail, retry_after=retry_after), asked, seconds if seconds > _SOON_SECONDS else 0.0)

    def entry_of(self, file: str) -> Entry:
        """Return the entry of a file, which has not changed since it was inspected.

        Parameters
        ----------
        file : str
            Relative to the data folder.

        Raises
        ------
        PageNotFound
            The catalogue lists no such file, or a part of it is out of scope.
        Unreadable, SourceUnavailable
        NotYet
            It is being looked at, before others now.
        """
        asked: float = getattr(self._asking, "since", time.monotonic())
        for attempt in (1, 2):
            entries = list(self._entries.values())
            entry = next((entry for entry in entries if file in entry.files), None)
            if entry is not None and not self._is_in_scope(file, entry, entries):
                # From here on as for a file that does not exist, and as slowly.
                entry = None
            if entry is not None and entry.away is None and not entry.has_changed():
                break
            if attempt == 1:
                self._rescan(time.monotonic() - RESCAN_SECONDS)
        if entry is None:
            known = [shown(name) for line in self.listed() if line.files for name in line.files]
            said = did_you_mean(file, known, "GET /v1/datasets lists the files of each dataset")
            raise PageNotFound(f"File not found: no file {file!r} is served: {said}")
        if entry.away is not None:
            raise _unavailable(entry.name, entry.away)
        if not entry.outcome.done():
            self._indexer.inspections.prefer(entry.outcome)
            raise NotYet(self._preparing(entry.name, entry), asked, 0.0)
        if not entry.paths:
            _raise_reason(entry.name, entry)
        if entry.has_changed():
            raise self._next_walk(f"file {file!r} has changed and is being inspected again", asked, RESCAN_SECONDS)
        return entry

    def _is_in_scope(self, file: str, entry: Entry, entries: Sequence[Entry]) -> bool:
        """Whether a file may be shown as it is, with all that is in it and all that it refers to.

        Raises
        ------
        PageNotFound
            Some of its datasets are in scope, so it is no secret that it exists.
        """
        scope = SCOPE.get()
        if scope.is_everything:
            return True
        reached = {self.path_of(file), *entry.dependencies.copy()}
        own = _names_of(entry) or {entry.name}
        names = own | {name for one in entries if reached.intersection(one.paths) for name in _names_of(one)}
        if all(map(scope.covers, names)):
            return True
        if any(map(scope.covers, own)):
            raise PageNotFound(
                f"file {file!r} cannot be shown: your token does not cover all that is in it and that it refers to"
            )
        return False

    def dataset_within(self, seconds: float, name: str, revision: str | None = None) -> Dataset:
        """Same as `dataset`, but waits up to this many seconds.

        Raises
        ------
        Preparing
            It takes longer. The other errors are those of `dataset`.
        """
        deadline = time.monotonic() + seconds
        look = partial(self.dataset, name, revision)
        while True:
            try:
                return look()
            except NotYet as late:
                if time.monotonic() >= deadline:
                    raise late.problem from None
                look = partial(self.asked_at, late.asked, partial(self.dataset, name, revision))
                time.sleep(min(max(late.seconds, _POLL_SECONDS), max(0.0, deadline - time.monotonic())))

    def asked_at(self, moment: float, work: Callable[[], T]) -> T:
        """Run `work` for a request that was made at this time, in seconds of the monotonic clock.

        Scans since then are recent enough for it.
        """
        self._asking.since = moment
        try:
            return work()
        finally:
            del self._asking.since

    def _is_current(self, name: str, entry: Entry, dataset: Dataset, checked: float) -> bool:
        now = time.monotonic()
        files = len(entry.paths) + len(entry.dependencies)
        if files > MANY_FILES and now - checked < max(MANY_FILES_SECONDS, files * FILE_SECONDS):
            return True
        if entry.has_changed() or entry.is_due():
            return False
        self._found[name] = (entry, dataset, now)
        return True

    def _is_wanted(self, path: str) -> bool:
        return path.lower().endswith((*ALL_SUFFIXES, DECLARATION)) or ending_of(path) in self._endings

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now >= self._second_look:
            return True
        # A file that is written to all the time never settles.
        growing = [entry for entry in list(self._entries.values()) if entry.grows]
        return now - self._scanned >= self._pause and any(one.is_due() or one.has_failed_for_now() for one in growing)

    def _find(self, name: str) -> tuple[Entry, Dataset, float]:
        """Find a dataset among the current files, after a scan if necessary."""
        self._found.pop(name, None)
        now = time.monotonic()
        asked: float = getattr(self._asking, "since", now)
        own = self._entries.get(name)
        declared_anew = self._declared_now() != self._declarations
        # Search before scanning: with thousands of files, a scan for the first request of each dataset takes too long.
        if not declared_anew and now - self._scanned < self._walk_seconds / _WALK_SHARE:
            with contextlib.suppress(NotYet, FeedError):
                match = self._search(name, asked)
                if not match[0].has_changed() and not match[0].is_due():
                    return self._remembered(name, match)
        # A dataset that is being inspected exists: no scan is needed.
        if own is None or own.outcome.done() or own.has_changed():
            since = now if declared_anew else now - (RESCAN_SECONDS if own is None else self._pause)
            # If another thread is scanning, go on with what is known. The request is retried if that is not enough.
            self._rescan(since, wait=declared_anew or self._scanned == float("-inf"))
        # Read this before the search: another thread may finish a scan during it.
        scanned = self._scanned
        try:
            return self._remembered(name, self._search(name, asked))
        except DatasetNotFound as error:
            if scanned >= asked:
                raise
            # The file may have been added since the last scan.
            raise self._next_walk(f"{error.detail}; looking for it again", asked, RESCAN_SECONDS) from None

    def _remembered(self, name: str, match: tuple[Entry, Dataset, float]) -> tuple[Entry, Dataset, float]:
        self._found[name] = match
        names = match[1].names
        if names.content is None:
            # Somebody asks for it: hash it before the others. It may also have been impossible to hash before.
            self._indexer.digests.prefer(names.contents)
            self._indexer.digests.begin(names.contents)
        return match

    @property
    def _pause(self) -> float:
        """Minimum interval between scans after a known file has changed."""
        return min(RESCAN_SECONDS, self._walk_seconds / _WALK_SHARE)

    def _next_walk(self, detail: str, asked: float, pause: float) -> NotYet:
        seconds = max(0.0, self._scanned + pause - time.monotonic())
        return NotYet(Preparing(detail, retry_after=1), asked, seconds)

    def _search(self, name: str, asked: float) -> tuple[Entry, Dataset, float]:
        # First the entry of that name, then those whose files may hold several datasets.
        mount = self._mounts.of(name)
        entries = {key: one for key, one in self._entries.items() if self._mounts.of(key) is mount}
        own = [entries[name]] if name in entries else []
        inner = [entry for entry in entries.values() if name.startswith(f"{entry.name}.")]
        joined = [entry for entry in entries.values() if len(entry.files) > 1 and entry not in inner]
        pending: Entry | None = None
        away: str | None = None
        refused: Unreadable | None = None
        for candidates in (own, inner, joined):
            matching: list[tuple[Entry, Dataset]] = []
            for entry in candidates:
                if entry.away is None and not entry.outcome.done():
                    self._indexer.inspections.prefer(entry.outcome)
                    pending = pending or entry
                    continue
                held = entry.datasets()
                own_matches = [(entry, dataset) for dataset in held if dataset.name == name]
                if entry.away is None and (own_matches or candidates is not joined) and entry.has_changed():
                    detail = f"dataset {name!r} has changed and is being inspected again"
                    raise self._next_walk(detail, asked, self._pause if entry.name == name else RESCAN_SECONDS)
                matching += own_matches
                if entry.away is not None and not held:
                    away = entry.away
                elif not held and entry.name == name:
                    _raise_reason(name, entry)
                if name in entry.refused:
                    refused = Unreadable(f"dataset {name!r} cannot be read: {entry.refused[name].reason}")
            if len(matching) > 1:
                files = [dataset.files[0] for _, dataset in matching]
                raise Unreadable(f"dataset {name!r} cannot be read: {of_one_name(name, files)}")
            # Wait for the remaining inspections: they may find the dataset, or another one of that name. But if it was
            # found, do not wait for all families of several files.
            if pending is not None and not (matching and candidates is joined):
                raise NotYet(self._preparing(name, pending), asked, 0.0)
            if matching:
                away = matching[0][0].away
                if away is None:
                    return (*matching[0], time.monotonic())
            if away is not None:
                raise _unavailable(name, away)
        source = mount or self._own
        if (why := source.presence.doubt(source.own_name(name))) is not None:
            raise _unavailable(name, why)
        if refused is not None:
            raise refused
        raise self._not_found(name)

    def _not_found(self, name: str) -> DatasetNotFound:
        names = self.names()
        known = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        empty = "the data folder is empty" if SCOPE.get().is_everything else "there is none that your token covers"
        said = did_you_mean(name, names, f"choose from {known}" if known else empty)
        return DatasetNotFound(f"there is no dataset {name!r}: {said}")

    def _preparing(self, name: str, entry: Entry) -> Preparing:
        how_far = self._indexer.inspections.describe(entry.outcome)
        return Preparing(
            f"dataset {name!r} is being inspected for the first time ({how_far}): try again in a moment", retry_after=1
        )

    def _rescan_within(self, seconds: float) -> None:
        """Scan the folder, unless that was done lately. While a disk hangs, a scan does not end: it is not waited for
        any longer, and what is known is as it was before.
        """
        now = time.monotonic()
        with self._scan_lock:
            if now - self._scanned <= RESCAN_SECONDS or self._closed.is_set():
                return
            if self._scan is None or self._scan.done():
                self._scan = self._scanner.submit(self._rescan, now - RESCAN_SECONDS)
            scan = self._scan
        with contextlib.suppress(TimeoutError, CancelledError):
            scan.result(seconds)

    def _rescan(self, since: float, *, wait: bool = True) -> None:
        """Scan the folder, unless a scan began after `since`. Concurrent callers share a scan.

        Parameters
        ----------
        since : float
            In seconds of the monotonic clock.
        wait : bool
            Whether to wait if another thread is scanning.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._scanned < since:
                self._walk()
        finally:
            self._lock.release()

    def _walk(self) -> None:
        began, looked = time.monotonic(), time.time()
        self._declarations = self._declared_now()
        own = self._scan_own(began, looked)
        scans = [*([own] if own else ()), *self._scan_mounts(began, looked)]
        entries = dict(self._own.entries)
        for source in self._mounts:
            entries |= source.entries
        for name in [name for name, (entry, _, _) in self._found.items() if entries.get(entry.name) is not entry]:
            self._found.pop(name, None)
        self._remember_names(entries)
        self._entries = entries
        self._second_look = min((scan.second_look for scan in scans), default=float("inf"))
        self._scanned = began
        self._walk_seconds = time.monotonic() - began if own else RESCAN_SECONDS

    def _scan_own(self, began: float, looked: float) -> FolderScan | None:
        """Scan the data folder, or the only store, and mount what it declares. None if the folder is unavailable."""
        own = self._own
        declaration = self._declaration_of(own)
        walked, awaited = Walk(sorted(self._only or ())), dict[str, str]()
        refused: dict[str, str] = {}
        if self._only is None:
            walked = own.walk(self._settings, declaration)
            awaited = self._await(walked, began)
            if own.is_away():
                # And keep the mounted stores.
                return None
            self._endings = declaration.endings()
            if not walked.unlisted.get(""):
                refused = self._mounts.follow(declaration.stores, clashes(self._root, walked, declaration))
        elif own.objects is not None and (unlisted := own.objects.why_not_listed()) is not None:
            walked = Walk(refused={"": f"the object store cannot be listed: {unlisted}"}, unlisted={"": unlisted})
        self._others = walked.others
        scan = FolderScan(own, self._settings, self._indexer, began, looked)
        own.entries = scan.entries_of(walked, awaited, declaration, partly=self._only is not None)
        for mount, reason in refused.items():
            scan.refuse(f"stores.{mount}", [DECLARATION], f"{DECLARATION}: stores.{mount}: {reason}")
        return scan

    def _scan_mounts(self, began: float, looked: float) -> list[FolderScan]:
        scans = []
        for source in self._mounts:
            declaration = self._declaration_of(source)
            walked = source.walk(self._settings, declaration, self._mounts.seconds())
            source.presence.awaited(walked, began)
            if source.is_away():
                continue
            scan = FolderScan(source, self._settings, self._indexer, began, looked)
            source.entries = scan.entries_of(walked, {}, declaration, partly=False)
            scans.append(scan)
        return scans

    def _declaration_of(self, source: Source) -> Declaration:
        follow_links, is_of_store = self._settings.follow_links, source.objects is not None
        return read_declared(source.root, follow_links=follow_links, is_of_store=is_of_store)

    def _declared_now(self) -> list[Identity | None]:
        return [identity_of(str(source.root / DECLARATION)) for source in (self._own, *self._mounts)]

    def _watch(self, source: Source) -> None:
        # One of the threads is enough for what is due.
        is_due = self._is_due if source is self._own else lambda: False
        source.watch(self._is_wanted, is_due, lambda: self._rescan(time.monotonic()))

    def _unmounted(self, source: Source) -> None:
        self._indexer.inspections.end(source.mount, Overloaded("the store is not served any more", retry_after=1))

    def _remember_names(self, entries: Mapping[str, Entry]) -> None:
        """Remember the names of datasets whose files have another identity now: their content may be the same."""
        outdated = [entry for name, entry in self._entries.items() if entries.get(name) is not entry]
        for dataset in (dataset for entry in outdated for dataset in entry.datasets()):
            if (content := dataset.names.content) is not None:
                self._renamed[dataset.name, dataset.names.here] = content
        while len(self._renamed) > _MOST_RENAMED:
            self._renamed.popitem(last=False)

    def _await(self, walked: Walk, began: float) -> dict[str, str]:
        """Add the temporarily unavailable files to the result of a scan. Returns the reason for each of them."""
        before = self._presence.trouble if self._presence.holds_files else None
        awaited = self._presence.awaited(walked, began)
        if not self._presence.holds_files:
            # The folder was never readable: it is listed with the reason, like an unreadable file.
            return awaited
        if self._presence.trouble is not None and before is None:
            logger.warning("%s; requests get 503 until it is back", self._presence.trouble)
        elif before is not None and self._presence.trouble is None:
            logger.warning("the data folder is complete again")
        walked.files = sorted([*walked.files, *(file for file in awaited if file.lower().endswith(ALL_SUFFIXES))])
        walked.declarable = sorted({*walked.declarable, *(awaited.keys() - set(walked.files))})
        return awaited


def _names_of(entry: Entry) -> set[str]:
    """Names of what an entry holds, as far as they are known; a file that is only a part of others holds nothing."""
    if not entry.outcome.done():
        return {entry.name}
    return {dataset.name for dataset in entry.datasets()} | entry.refused.keys()


def _statuses_of(entry: Entry) -> list[tuple[str, Status]]:
    names = [dataset.name for dataset in entry.datasets()]
    if entry.away is not None:
        return [(name, "unavailable") for name in names or [entry.name]]
    if not entry.outcome.done():
        return [(entry.name, "preparing")]
    if entry.reason() is not None:
        return [(entry.name, _status_of(entry.outcome.exception()))]
    return [*((name, "ok") for name in names), *((name, "unreadable") for name in entry.refused)]


def _status_of(error: BaseException | None) -> Status:
    """Status of what could not be inspected for this reason."""
    if isinstance(error, Preparing):
        return "preparing"
    return "unavailable" if isinstance(error, Transient) else "unreadable"


def _unavailable(name: str, why: str) -> SourceUnavailable:
    return SourceUnavailable(f"dataset {name!r} is unavailable at the moment: {why}", retry_after=AWAY_RETRY_SECONDS)


def _raise_reason(name: str, entry: Entry) -> None:
    """Raise the error of an entry whose inspection failed."""
    error = entry.outcome.exception()
    if isinstance(error, Unreadable):
        raise Unreadable(f"dataset {name!r} cannot be read: {error.detail}")
    if error is not None:
        raise error
