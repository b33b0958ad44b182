"""Inspects families of files and assembles their datasets, in threads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from h5feed.errors import FeedError, Overloaded, Preparing, SourceUnavailable, Unreadable
from h5feed.stored.local_file import FileSource, Identity, OpenFiles, changed, is_away

from ..cache_folder.folder import CacheFolder
from ..settings import Settings
from ..storage.hdf5.inspector import MOST_TOGETHER, Inspector
from ..storage.hdf5.reader_pool import ReaderPool
from .array_probe import TRANSIENT_ERRORS
from .assembling import Assembler, Refused
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset
from .digests import Digests
from .discovery import shown
from .entry import Entry, identity_of
from .grouping.families import Family
from .growing import GrowingFiles
from .inspections import Lanes
from .known_files import MANY, KnownFiles
from .loading import AtOnce, Dependencies, FileLoader, LoadedFile
from .object_folder import ObjectFolders
from .together import Together

logger = logging.getLogger(__name__)

_ENTRIES_AT_ONCE = 2
"""Number of entries of one source that are inspected at the same time."""

_FILES_AT_ONCE = max(2, min(8, len(os.sched_getaffinity(0))))
"""Number of files of one entry that are inspected at the same time."""

_SLICES = 64
"""Parts into which the files of an entry are divided: so many jobs, not one for each of thousands of files."""


class Indexer:
    """Inspects families of files; one per process.

    Parameters
    ----------
    root : Path
        The data folder.
    settings : Settings
    folder : CacheFolder
        Caches layouts and digests.
    hdf5 : ReaderPool
    stores : ObjectFolders
        Those of files that stand for objects.

    Attributes
    ----------
    inspections : Lanes
        The jobs and their order, by the name of a mounted store.
    digests : Digests
        Hashes files.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        folder: CacheFolder,
        hdf5: ReaderPool,
        stores: ObjectFolders,
    ) -> None:
        self._files = OpenFiles(settings.open_files)
        self._inspector = Inspector(settings.inspect_timeout)
        self.digests = Digests(folder, settings.digest_limit, settings.digest_rate)
        self._at_once = settings.provisional_bytes
        self._loader = FileLoader(root, settings, folder, self.digests, self._files, self._inspector, hdf5, stores)
        self._assembler = Assembler(
            root, settings.digest_limit, self._loader.probe.holds_classes, self._loader.probe.block
        )
        self._told: set[tuple[tuple[str, ...], str]] = set()
        self._closed = threading.Event()
        self._growing = GrowingFiles(
            folder,
            self._inspector,
            self._assembler,
            self._loader.probe.values,
            is_remote=self._loader.is_remote,
            closed=self._closed,
        )
        self.inspections = Lanes[tuple[Dataset, ...]](_ENTRIES_AT_ONCE)

    def close(self, *, wait: bool) -> None:
        """End the threads and the inspector, and close the files. Waits for running inspections only if `wait`."""
        self._closed.set()
        self._loader.close()
        self.digests.close(wait=wait)
        self.inspections.close(wait=wait)
        self._inspector.rest()
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
        """Start inspecting a family of files.

        Parameters
        ----------
        family : Family
        paths, identities : tuple
            Of its files.
        began, looked : float
            See `Entry`.
        is_second : bool
            Whether this is the second inspection of files that had just been written at the first one.
        """
        dependencies: Dependencies = {}
        refused: dict[str, Refused] = {}
        said, served = declared_text(family.declared), declared_text(family.declared, with_card=False)
        work = partial(self._load, family, paths, identities, dependencies, refused, served)
        outcome = self.inspections.submit(family.mount, work)
        return Entry(
            family.name,
            family.files,
            paths,
            identities,
            outcome,
            dependencies,
            refused,
            began,
            said,
            looked,
            is_second,
            grows=family.grows,
        )

    def source(self, path: str, identity: Identity) -> FileSource:
        """See `Catalog.source`."""
        return self._loader.source(path, identity)

    def tell(self, files: Sequence[str], reason: str) -> None:
        """Log once why something is not served."""
        if (told := (tuple(files), reason)) not in self._told:
            self._told.add(told)
            # Reasons about the declaration begin with its name already.
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
            if family.grows:
                return self._growing.load(family, paths[0], refused, declaration)
            # A file that is being written has queued a job for each of its states. Skip those that are out of date.
            if any(identity_of(path) != identity for path, identity in zip(paths, identities, strict=True)):
                raise changed()
            together = len(paths) >= MANY and not self._loader.is_remote(paths[0])
            while True:
                loaded, failed = self._loaded(family, paths, identities, dependencies, together=together)
                datasets = self._assembler.divide(family, loaded, failed, refused, declaration)
                found = {one.files for one in datasets} | {one.files for one in refused.values()}
                if not together or found == {family.files}:
                    break
                # They are several datasets, after all: none may affect what is served of another.
                together = False
                refused.clear()
            for dataset in datasets:
                self.digests.begin(dataset.names.contents)
            path_of = dict(zip(files, paths, strict=True))
            for line, one in list(refused.items()):
                # Files that a readable file refers to need not be datasets themselves.
                if dependencies.keys() >= {path_of[file] for file in one.files}:
                    del refused[line]
                else:
                    self.tell(one.files, one.reason)
            return datasets
        except Preparing as error:
            raise Preparing(f"dataset {name!r} is not ready yet: {error.detail}", retry_after=1) from None
        except TRANSIENT_ERRORS as error:
            kind = SourceUnavailable if isinstance(error, SourceUnavailable) else Overloaded
            raise kind(f"dataset {name!r} is unavailable at the moment: {error.detail}", retry_after=1) from None
        except FeedError as error:
            if any(identity_of(path) != identity for path, identity in zip(paths, identities, strict=True)):
                # The error says nothing about the file in its new state.
                raise Overloaded(f"dataset {name!r} changed while it was inspected", retry_after=1) from None
            self.tell(files, error.detail)
            raise
        except OSError as error:
            reason = error.strerror or "it cannot be opened"
            if is_away(error):
                raise SourceUnavailable(
                    f"dataset {name!r} is unavailable at the moment: {reason}", retry_after=1
                ) from None
            self.tell(files, reason)
            raise Unreadable(reason) from error
        except Exception:
            if self._closed.is_set():
                # The error is a consequence of closing.
                raise Overloaded("the server is stopping").because_of("stopping") from None
            logger.exception("inspecting %s failed", files[0])
            raise Unreadable("inspecting it failed: the server's log has the reason") from None
        finally:
            if self.inspections.left <= 1:
                # This was the last job: end the child processes.
                self._inspector.rest()

    def _loaded(
        self,
        family: Family,
        paths: tuple[str, ...],
        identities: tuple[Identity, ...],
        dependencies: Dependencies,
        *,
        together: bool,
    ) -> tuple[dict[str, LoadedFile], dict[str, Unreadable]]:
        """Load the files of a family.

        Parameters
        ----------
        together : bool
            Whether they may be inspected together, as files of one dataset.

        Returns
        -------
        loaded : dict of str to LoadedFile
        failed : dict of str to Unreadable
            Unreadable files, if the family can do without them.
        """

        at_once = AtOnce(self._at_once)

        def load(
            path: str, identity: Identity, known: KnownFiles | None = None, group: Together | None = None
        ) -> LoadedFile:
            if self._closed.is_set():
                raise Overloaded("the server is stopping").because_of("stopping")
            return self._loader.load(path, identity, dependencies, at_once, known, group)

        if len(paths) == 1:
            return {family.files[0]: load(paths[0], identities[0])}, {}
        loaded: dict[str, LoadedFile] = {}
        failed: dict[str, Unreadable] = {}
        stopped = threading.Event()

        def load_some(places: range, known: KnownFiles | None) -> None:
            group = None
            if known is not None and together:
                group = Together(self._inspector, known.loaded, ((paths[at], identities[at]) for at in places))
            for place in places:
                if stopped.is_set():
                    return
                try:
                    loaded[family.files[place]] = load(paths[place], identities[place], known, group)
                except Unreadable as error:
                    if family.kind not in ("numbers", "words"):
                        raise Unreadable(f"{shown(family.files[place])}: {error.detail}") from error.__cause__
                    failed[family.files[place]] = error

        # As few jobs as that, but enough that no processor is left without one at the end.
        size = max(-(-len(paths) // _SLICES), min(MOST_TOGETHER, len(paths) // (2 * _FILES_AT_ONCE)), 1)
        slices = [range(begin, min(begin + size, len(paths))) for begin in range(0, len(paths), size)]
        name = family.name if together else f"{family.name} apart"
        with self._loader.known_files(name, paths, identities) as known:
            threads = ThreadPoolExecutor(_FILES_AT_ONCE, "h5feed-inspect-part")
            try:
                for part in [threads.submit(load_some, places, known) for places in slices]:
                    part.result()
            finally:
                stopped.set()
                threads.shutdown(wait=True, cancel_futures=True)
        # In the order of the files, whichever was loaded first.
        loaded = {file: loaded[file] for file in family.files if file in loaded}
        failed = {file: failed[file] for file in family.files if file in failed}
        return loaded, failed


def declared_text(declared: DeclaredDataset | None, *, with_card: bool = True) -> bytes:
    """The declaration of a dataset, serialised; for its revision without the card. Empty if there is none."""
    if declared is None:
        return b""
    # So that revisions of all others do not depend on it.
    without = {*(() if with_card else ("card",)), *(() if declared.growing else ("growing",))}
    return declared.model_dump_json(exclude=without).encode()
