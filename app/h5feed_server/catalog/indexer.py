"""Files that belong together, looked at: inspected, and put together to datasets, in threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from h5feed.errors import FeedError, Overloaded, SourceUnavailable, Unreadable

from ..cache_folder.folder import CacheFolder
from ..settings import Settings
from ..storage.hdf5.inspector import Inspector
from ..storage.hdf5.reader_pool import ReaderPool
from ..storage.local_file import Identity, OpenFiles, changed, is_away
from .array_probe import TRANSIENT_ERRORS
from .assembling import Assembler, Refused
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset
from .discovery import shown
from .entry import Entry, identity_of
from .grouping.families import Family
from .inspections import Inspections
from .loading import Dependencies, FileLoader, LoadedFile

logger = logging.getLogger(__name__)

_AT_ONCE = 2
"""Entries that are looked at, and files of one, at the same time."""


class Indexer:
    """Looks at files; one per process.

    Attributes
    ----------
    inspections : Inspections
        Says what is looked at next.
    """

    def __init__(self, root: Path, settings: Settings, folder: CacheFolder, hdf5: ReaderPool) -> None:
        self._root = root
        self._files = OpenFiles(settings.open_files)
        self._inspector = Inspector(settings.inspect_timeout)
        self._loader = FileLoader(root, settings, folder, self._files, self._inspector, hdf5)
        self._assembler = Assembler(settings.digest_limit, self._loader.probe.holds_classes, self._loader.probe.block)
        self._told: set[tuple[tuple[str, ...], str]] = set()
        self._closed = threading.Event()
        self.inspections = Inspections[tuple[Dataset, ...]](_AT_ONCE)

    def close(self, *, wait: bool) -> None:
        """End the threads and the inspector, close the files; waiting for what is being looked at only if told to."""
        self._closed.set()
        self.inspections.close(wait=wait)
        self._inspector.rest()
        self._loader.close()
        self._files.close()

    def begin(
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
        dependencies: Dependencies = {}
        refused: dict[str, Refused] = {}
        said = said_of(family.declared)
        outcome = self.inspections.submit(partial(self._load, family, paths, identities, dependencies, refused, said))
        return Entry(
            family.name, family.files, paths, identities, outcome, dependencies, refused, began, said, looked, is_second
        )

    def tell(self, files: Sequence[str], reason: str) -> None:
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
        dependencies: Dependencies,
        refused: dict[str, Refused],
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        name, files = family.name, family.files
        try:
            # It may have waited for long, while a file was being written, for each of its states.
            if any(identity_of(path) != identity for path, identity in zip(paths, identities, strict=True)):
                raise changed()
            loaded, failed = self._loaded(family, paths, identities, dependencies)
            datasets = self._assembler.divide(family, loaded, failed, refused, declaration)
            for line, one in list(refused.items()):
                # Parts of others are nothing by themselves.
                if dependencies.keys() >= {str(self._root / file) for file in one.files}:
                    del refused[line]
                else:
                    self.tell(one.files, one.reason)
            return datasets
        except TRANSIENT_ERRORS as error:
            kind = SourceUnavailable if isinstance(error, SourceUnavailable) else Overloaded
            raise kind(f"dataset {name!r} cannot be looked at now: {error.detail}", retry_after=1) from None
        except FeedError as error:
            if any(identity_of(path) != identity for path, identity in zip(paths, identities, strict=True)):
                # That says nothing of the file that it is now, or will be again.
                raise Overloaded(f"dataset {name!r} changed while it was looked at", retry_after=1) from None
            self.tell(files, error.detail)
            raise
        except OSError as error:
            reason = error.strerror or "it cannot be opened"
            if is_away(error):
                raise SourceUnavailable(f"dataset {name!r} cannot be looked at now: {reason}", retry_after=1) from None
            self.tell(files, reason)
            raise Unreadable(reason) from error
        except Exception:
            if self._closed.is_set():
                # What it was at has been closed under it.
                raise Overloaded("the server stops") from None
            logger.exception("%s could not be described", files[0])
            raise Unreadable("describing it failed; the server's log has the reason") from None
        finally:
            if self.inspections.left <= 1:
                # The children do not outlive their work.
                self._inspector.rest()

    def _loaded(
        self, family: Family, paths: tuple[str, ...], identities: tuple[Identity, ...], dependencies: Dependencies
    ) -> tuple[dict[str, LoadedFile], dict[str, Unreadable]]:
        """The files of a family; and why those of them cannot be read that it may be without."""

        def load(path: str, identity: Identity) -> LoadedFile:
            if self._closed.is_set():
                raise Overloaded("the server stops")
            return self._loader.load(path, identity, dependencies)

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


def said_of(declared: DeclaredDataset | None) -> bytes:
    """What is declared of a dataset, as part of its revision."""
    return b"" if declared is None else declared.model_dump_json().encode()
