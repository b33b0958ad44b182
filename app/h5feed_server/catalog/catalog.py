"""What is served: finds the HDF5 files below the data folder, has them inspected, and notices when they change."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from h5feed.errors import DatasetNotFound, FeedError, Overloaded, RevisionChanged, Unreadable

from ..settings import Settings
from ..storage.folder import CacheFolder
from ..storage.inspector import Inspector
from ..storage.reader_pool import ReaderPool
from ..storage.source import YOUNG_SECONDS, Identity, OpenFiles, changed
from .assembling import Assembler, Refused
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset, followed, read_declared
from .discovery import ALL_SUFFIXES, LEADS_OUT, Others, Walk, distinct, dotted, ending_of, shown, walk, why_not_there
from .grouping.families import Family, families
from .loading import PASSING, Beside, FileLoader, LoadedFile
from .other_files import other_files
from .watching import notice

logger = logging.getLogger(__name__)

RESCAN_SECONDS = 1.0
"""A listing may be this old. An unknown or changed name is always looked for anew."""

MANY_FILES = 4
MANY_FILES_SECONDS = 0.05
FILE_SECONDS = 100e-6
"""The files of a dataset of more files are looked at this often, and not for every request; of very many, after so long
for each of them."""

_AT_ONCE = 2
"""Entries that are looked at, and files of one, at the same time."""

RETRY_SECONDS = 2.0
"""What failed for a reason that may pass is looked at again after so long, when it is asked for."""

PATIENCE_SECONDS = 5.0
"""How long a request waits for a file that is still being inspected and digested before it is asked to come again."""


@dataclass(frozen=True)
class Entry:
    """Files that belong together, most often one alone, and the datasets that they turned out to be."""

    name: str
    files: tuple[str, ...]
    """Relative to the data folder."""
    paths: tuple[str, ...]
    identities: tuple[Identity, ...]
    outcome: Future[tuple[Dataset, ...]]
    beside: Beside
    """Other files that they lead to, as far as is known."""
    refused: dict[str, Refused] = field(default_factory=dict)
    """What of them cannot be served though other of it can, by name; as far as is known."""
    began: float = 0.0
    """When they were looked at, by the monotonic clock."""
    declared: bytes = b""
    """What was declared of them."""
    looked: float = 0.0
    """When they were looked at, by the clock that files' times are of."""
    is_second: bool = False
    """They were looked at before, and had only just been written then."""
    again: list[Entry] = field(default_factory=list)
    """The same files, looked at for the second time."""

    def reason(self) -> str | None:
        """Why it cannot be read; None where it can, or is not known yet."""
        if not self.outcome.done():
            return None
        error = self.outcome.exception()
        return None if error is None else str(error)

    def datasets(self) -> tuple[Dataset, ...]:
        """Those that are known and can be read."""
        if not self.outcome.done() or self.outcome.exception() is not None:
            return ()
        return self.outcome.result()

    def has_failed_for_now(self) -> bool:
        """Whether what is wrong may pass: the operating system refused it, or it changed meanwhile."""
        error = self.outcome.exception() if self.outcome.done() else None
        return isinstance(error, Overloaded) or (error is not None and isinstance(error.__cause__, OSError))

    def is_outdated(self, paths: tuple[str, ...], identities: tuple[Identity, ...], declared: bytes) -> bool:
        """Whether it must be looked at anew, being of these files now, of which this is declared."""
        if (self.paths, self.identities, self.declared) != (paths, identities, declared) or self.has_changed():
            return True
        return time.monotonic() - self.began >= RETRY_SECONDS and self.has_failed_for_now()

    def has_changed(self) -> bool:
        """Whether its files are others now."""
        known = [*zip(self.paths, self.identities, strict=True), *self.beside.copy().items()]
        return any(_identity(path) != identity for path, identity in known)

    def is_due(self) -> bool:
        """Whether a change might have been missed when it was looked at, which shows by now."""
        if not self.outcome.done() or time.time() < self.looked + YOUNG_SECONDS or not self.was_young():
            return False
        return not self.again or self.again[0].outcome.done()

    def was_young(self) -> bool:
        """Whether a file had only just been written when it was looked at, for the first time."""
        if self.is_second:
            return False
        known = (*self.identities, *self.beside.copy().values())
        return any(identity is not None and identity.is_young(self.looked) for identity in known)


def _identity(path: str) -> Identity | None:
    try:
        return Identity.of(os.stat(path))
    except OSError:
        return None


@dataclass(frozen=True)
class Listed:
    """One line of the catalogue."""

    name: str
    files: tuple[str, ...]
    status: Literal["ok", "unreadable", "preparing"]
    reason: str | None
    dataset: Dataset | None


class Catalog:
    """The datasets below ``settings.data_dir``.

    Parameters
    ----------
    only : sequence of str, optional
        Files to look at, relative to the data folder, whatever their names end in. Default: all, and those that appear.
    """

    def __init__(
        self, settings: Settings, folder: CacheFolder, hdf5: ReaderPool, only: Sequence[str] | None = None
    ) -> None:
        self._root = settings.data_dir.resolve()
        self._only = only
        self._settings = settings
        self._files = OpenFiles(settings.open_files)
        self._inspector = Inspector(settings.inspect_timeout)
        self._loader = FileLoader(self._root, settings, folder, self._files, self._inspector, hdf5)
        self._assembler = Assembler(settings.digest_limit, self._loader.holds_classes, self._loader.block)
        self._executor = ThreadPoolExecutor(_AT_ONCE, "h5feed-inspect")
        self._entries: dict[str, Entry] = {}
        self._found: dict[str, tuple[Entry, Dataset, float]] = {}
        self._scanned = float("-inf")
        self._second_look = float("inf")
        """When files that had only just been written are to be looked at again."""
        self._endings = frozenset[str]()
        self._others: Mapping[str, Others] = {}
        self._sniffed: dict[str, bool] = {}
        self._told: set[tuple[tuple[str, ...], str]] = set()
        self._lock = threading.Lock()
        self._loading = 0
        self._loading_lock = threading.Lock()
        self._closed = threading.Event()
        watching = (self._root, self._is_wanted, self._is_due, lambda: self._rescan(time.monotonic()), self._closed)
        if only is None:
            threading.Thread(target=notice, args=watching, name="h5feed-watch", daemon=True).start()

    def close(self, *, wait: bool = False) -> None:
        """End the threads and the inspector, close the files; waiting for what is being looked at only if told to."""
        self._closed.set()
        self._executor.shutdown(wait=wait, cancel_futures=True)
        self._inspector.rest()
        self._loader.close()
        self._files.close()

    def entries(self) -> list[Entry]:
        """All files, by name."""
        self._rescan(time.monotonic() - RESCAN_SECONDS)
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def listed(self) -> list[Listed]:
        """All datasets, by name, and what can be none."""
        lines: list[tuple[Entry, Listed]] = []
        entries = self.entries()
        # Parts of others that are nothing by themselves.
        parts = {path for entry in entries if entry.datasets() for path in entry.beside}
        for entry in entries:
            if entry.paths and not entry.datasets() and parts.issuperset(entry.paths):
                continue
            reason = entry.reason()
            if not entry.outcome.done():
                waits = "it is being inspected and digested"
                lines.append((entry, Listed(entry.name, entry.files, "preparing", waits, None)))
            elif reason is not None:
                lines.append((entry, Listed(entry.name, entry.files, "unreadable", reason, None)))
            else:
                lines += [(entry, Listed(one.name, one.files, "ok", None, one)) for one in entry.datasets()]
                lines += [
                    (entry, Listed(name, one.files, "unreadable", one.reason, None))
                    for name, one in entry.refused.items()
                ]
        listed = _told_apart(lines)
        below = f"{self._root}{os.sep}"
        known = {path.removeprefix(below) for path in parts} | {file for entry in entries for file in entry.files}
        known.add(DECLARATION)
        for name, files, reason in other_files(self._others, known, str(self._root), self._sniffed):
            listed.append(Listed(name, files, "unreadable", reason, None))
            self._tell(files, reason)
        return sorted(listed, key=lambda line: line.name)

    def names(self) -> list[str]:
        """Names of what can be read, as far as is known."""
        return [line.name for line in self.listed() if line.status != "unreadable"]

    def dataset(self, name: str, revision: str | None = None) -> Dataset:
        """The dataset as it is now.

        Raises
        ------
        DatasetNotFound, Unreadable, Overloaded
        RevisionChanged
            It is not `revision` any more.
        """
        found = self._found.get(name)
        if found is None or not self._is_current(name, *found):
            found = self._find(name)
        dataset = found[1]
        if revision is not None and revision != dataset.revision:
            raise RevisionChanged(
                f"dataset {name!r} has revision {dataset.revision} now, not {revision}: its file was changed. Ask for "
                "the dataset again and begin a new epoch."
            )
        return dataset

    def _is_current(self, name: str, entry: Entry, dataset: Dataset, checked: float) -> bool:
        now = time.monotonic()
        files = len(entry.paths) + len(entry.beside)
        if files > MANY_FILES and now - checked < max(MANY_FILES_SECONDS, files * FILE_SECONDS):
            return True
        if entry.has_changed() or entry.is_due():
            return False
        self._found[name] = (entry, dataset, now)
        return True

    def _is_wanted(self, path: str) -> bool:
        return path.lower().endswith((*ALL_SUFFIXES, DECLARATION)) or ending_of(path) in self._endings

    def _is_due(self) -> bool:
        return time.time() >= self._second_look

    def _find(self, name: str) -> tuple[Entry, Dataset, float]:
        """Look for a dataset among the files that are there now."""
        self._found.pop(name, None)
        self._rescan(time.monotonic())
        deadline = time.monotonic() + PATIENCE_SECONDS
        # The entry of that name, else those whose files may have several datasets.
        entries = self._entries
        own = [entries[name]] if name in entries else []
        inner = [entry for entry in entries.values() if name.startswith(f"{entry.name}.")]
        joined = [entry for entry in entries.values() if len(entry.files) > 1 and entry not in inner]
        failure: FeedError | None = None
        refused: Unreadable | None = None
        for candidates in (own, inner, joined):
            matching: list[tuple[Entry, Dataset]] = []
            for entry in candidates:
                try:
                    datasets = entry.outcome.result(max(0.0, deadline - time.monotonic()))
                except FuturesTimeout:
                    failure = Overloaded(f"dataset {name!r} is still being inspected", retry_after=1)
                except Unreadable as error:
                    if entry.name == name:
                        raise Unreadable(f"dataset {name!r} cannot be read: {error.detail}") from None
                else:
                    matching += [(entry, dataset) for dataset in datasets if dataset.name == name]
                    if name in entry.refused:
                        refused = Unreadable(f"dataset {name!r} cannot be read: {entry.refused[name].reason}")
            if len(matching) > 1:
                files = [dataset.files[0] for _, dataset in matching]
                raise Unreadable(f"dataset {name!r} cannot be read: {_of_one_name(name, files)}")
            # What else its file may hold is known before long; those of many files are too many to wait for.
            if failure is not None and not (matching and candidates is joined):
                raise failure
            if matching:
                found = self._found[name] = (*matching[0], time.monotonic())
                return found
        if refused is not None:
            raise refused
        names = self.names()
        shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        raise DatasetNotFound(f"there is no dataset {name!r}: valid are {shown or 'none, the data folder is empty'}")

    def _rescan(self, since: float) -> None:
        """Walk the folder, unless a walk began after `since`: many who wait for one share it."""
        with self._lock:
            if self._scanned >= since:
                return
            began, looked = time.monotonic(), time.time()
            entries: dict[str, Entry] = {}

            def free(name: str, files: Sequence[str]) -> str:
                # Nothing vanishes behind another thing of the same name.
                return distinct("/".join(files)) if name in entries else name

            def refuse(name: str, files: Sequence[str], reason: str) -> None:
                failed: Future[tuple[Dataset, ...]] = Future()
                failed.set_exception(Unreadable(reason))
                name = free(name, files)
                entries[name] = Entry(name, tuple(files), (), (), failed, {}, began=began)
                self._tell(files, reason)

            declaration = read_declared(self._root, follow_links=self._settings.follow_links)
            self._endings = declaration.endings()
            found = Walk(sorted(self._only or ()))
            if self._only is None:
                found = walk(str(self._root), self._endings, str(self._settings.cache_dir.resolve()))
            self._others = found.others
            known = sorted([*found.files, *found.declarable])
            declared, unfollowed = followed(declaration, known, partly=self._only is not None)
            claimed = {file for dataset in declared.values() for file in dataset.matching(known)}
            for name, (meant, why) in unfollowed.items():
                refuse(name, meant or [DECLARATION], why)
                # What was to be part of something else is not served by guessing.
                found.files = [file for file in found.files if file not in meant]
            files = sorted({*found.files, *claimed})
            for path, why in found.refused.items():
                refuse(dotted(path) or ".", (path or ".",), why)
            second_look = float("inf")
            # What is few is known soon: nobody waits for one file behind a thousand.
            for family in sorted(families(files, declared), key=lambda family: len(family.files)):
                members = family.files
                name = free(family.name, members)
                if not self._settings.follow_links and (outside := found.outside.intersection(members)):
                    # Before it is looked at: nobody is told what else there is on this disk.
                    which = "it" if len(members) == 1 else shown(min(outside))
                    refuse(name, members, f"{which} {LEADS_OUT}")
                    continue
                paths = tuple(str(self._root / file) for file in members)
                try:
                    states = [os.stat(path) for path in paths]
                except OSError as error:
                    if (reason := why_not_there(str(error.filename), error)) is not None:
                        refuse(name, members, reason)
                    continue
                if not all(stat.S_ISREG(status.st_mode) for status in states):
                    refuse(name, members, "it is not a regular file")
                    continue
                identities = tuple(map(Identity.of, states))
                look = partial(self._look, replace(family, name=name), paths, identities, began, looked)
                entry = self._entries.get(name)
                if entry is None or entry.is_outdated(paths, identities, _said(family.declared)):
                    entry = look()
                elif entry.is_due():
                    second = entry.again.pop() if entry.again else None
                    if second is not None and not second.has_failed_for_now():
                        entry = second
                    else:
                        entry.again.append(look(is_second=True))
                entries[name] = entry
                if entry.was_young() and not entry.again:
                    second_look = looked + YOUNG_SECONDS
            for name in [name for name, (entry, _, _) in self._found.items() if entries.get(entry.name) is not entry]:
                self._found.pop(name, None)
            self._entries = entries
            self._second_look = second_look
            self._scanned = began

    def _look(
        self,
        family: Family,
        paths: tuple[str, ...],
        identities: tuple[Identity, ...],
        began: float,
        looked: float,
        *,
        is_second: bool = False,
    ) -> Entry:
        """Begin to inspect files that belong together."""
        with self._loading_lock:
            self._loading += 1
        beside: Beside = {}
        refused: dict[str, Refused] = {}
        said = _said(family.declared)
        outcome = self._executor.submit(self._load, family, paths, identities, beside, refused, said)
        return Entry(
            family.name, family.files, paths, identities, outcome, beside, refused, began, said, looked, is_second
        )

    def _tell(self, files: Sequence[str], reason: str) -> None:
        """Log once why something is not served."""
        if (told := (tuple(files), reason)) not in self._told:
            self._told.add(told)
            # What is wrong with the declaration begins with its name.
            names = ", ".join(map(shown, files[:3]))
            where = {DECLARATION: "", ".": "the data folder: "}.get(names, f"{names}: ")
            logger.warning("%s%s", where, reason)

    def _load(
        self,
        family: Family,
        paths: tuple[str, ...],
        identities: tuple[Identity, ...],
        beside: Beside,
        refused: dict[str, Refused],
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        name, files = family.name, family.files
        try:
            # It may have waited for long, while a file was being written, for each of its states.
            if any(_identity(path) != identity for path, identity in zip(paths, identities, strict=True)):
                raise changed()
            loaded, failed = self._loaded(family, paths, identities, beside)
            found = self._assembler.divide(family, loaded, failed, refused, declaration)
            for line, one in list(refused.items()):
                # Parts of others are nothing by themselves.
                if beside.keys() >= {str(self._root / file) for file in one.files}:
                    del refused[line]
                else:
                    self._tell(one.files, one.reason)
            return found
        except PASSING as error:
            raise Overloaded(f"dataset {name!r} cannot be looked at now: {error.detail}", retry_after=1) from None
        except FeedError as error:
            self._tell(files, error.detail)
            raise
        except OSError as error:
            reason = error.strerror or "it cannot be opened"
            self._tell(files, reason)
            raise Unreadable(reason) from error
        except Exception:
            logger.exception("%s could not be described", files[0])
            raise Unreadable("describing it failed; the server's log has the reason") from None
        finally:
            with self._loading_lock:
                self._loading -= 1
                idle = not self._loading
            if idle:
                # The children do not outlive their work.
                self._inspector.rest()

    def _loaded(
        self, family: Family, paths: tuple[str, ...], identities: tuple[Identity, ...], beside: Beside
    ) -> tuple[dict[str, LoadedFile], dict[str, Unreadable]]:
        """The files of a family; and why those of them cannot be read that it may be without."""

        def load(path: str, identity: Identity) -> LoadedFile:
            if self._closed.is_set():
                raise Overloaded("the server stops")
            return self._loader.load(path, identity, beside)

        if len(paths) == 1:
            return {family.files[0]: load(paths[0], identities[0])}, {}
        loaded: dict[str, LoadedFile] = {}
        failed: dict[str, Unreadable] = {}
        threads = ThreadPoolExecutor(_AT_ONCE, "h5feed-inspect-part")
        try:
            parts = [threads.submit(load, path, identity) for path, identity in zip(paths, identities, strict=True)]
            for file, part in zip(family.files, parts, strict=True):
                try:
                    loaded[file] = part.result()
                except Unreadable as error:
                    if family.kind not in ("numbers", "words"):
                        raise Unreadable(f"{shown(file)}: {error.detail}") from error.__cause__
                    failed[file] = error
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
        return loaded, failed


def _said(declared: DeclaredDataset | None) -> bytes:
    """What is declared of a dataset, as part of its revision."""
    return b"" if declared is None else declared.model_dump_json().encode()


def _told_apart(lines: Sequence[tuple[Entry, Listed]]) -> list[Listed]:
    """The lines of a listing; of datasets that share a name, only the one that its file is called after is served."""
    counts = Counter(line.name for _, line in lines)
    listed = []
    for entry, line in lines:
        own = entry.name == line.name
        if counts[line.name] > 1 and line.dataset is not None and not own:
            files = [other.files[0] for _, other in lines if other.name == line.name and other.files]
            # Each line has a name of its own, though nothing can be asked for by this one.
            name, reason = f"{line.name} ({shown(line.files[0])})", _of_one_name(line.name, files)
            line = replace(line, name=name, status="unreadable", reason=reason, dataset=None)
        listed.append(line)
    return listed


def _of_one_name(name: str, files: Sequence[str]) -> str:
    return (
        f"what is in {', '.join(map(shown, files))} would all be called {name!r}: rename a file, or declare it under "
        "another name in h5feed.toml"
    )
