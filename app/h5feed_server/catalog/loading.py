"""Loads a file: inspects it, follows its links, and finds the other files that its arrays are read from.

A file can refer to any other file by name. Such references are followed only within the data folder, after resolving
symbolic links. With `Settings.follow_links`, files in the folder may themselves be links to files outside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from h5feed.errors import Overloaded, RevisionChanged, Unreadable
from h5feed.stored.column import Segment
from h5feed.stored.layout import LAYOUT_VERSION, ArrayLayout, ExternalLink, FileLayout, load_layout
from h5feed.stored.local_file import YOUNG_SECONDS, FileSource, Identity, LocalFile, OpenFiles, changed

from ..cache_folder.folder import CacheFolder
from ..settings import Settings
from ..storage.hdf5.drivers import members_of, next_member
from ..storage.hdf5.inspector import Inspector
from ..storage.hdf5.reader_pool import ReaderPool
from ..storage.transposed.by_columns import ByColumns
from ..storage.transposed.copy_file import TransposedFile
from ..storage.transposed.making import too_large
from .array_probe import MAX_OFFSETS_BYTES, ArrayProbe, unreadable_array
from .conventions import as_meant
from .digests import Content, Digests
from .discovery import LEADS_OUT, leads_out
from .known_files import MANY, KnownFiles
from .object_folder import ObjectFolders, why_not_remote
from .together import Together

COPIES = "by-rows"
"""Subfolder of the cache folder for copies of sparse matrices."""

MAX_LINKED = 10_000
"""Maximum number of arrays that are added to a file through its links."""

MAX_NESTING = 4
"""Maximum depth of files that refer to other files."""

PATIENCE = 10
"""A file and all files that it refers to may together take this many times the timeout of one file. Each has its own
timeout, but there may be thousands."""

MAX_PROBED = 64
"""Maximum number of arrays of a file that are tested by reading a row with h5py. Faults of others show when they are
read."""

_SETTLE_POLL_SECONDS = 0.1

Dependencies = dict[str, Identity | None]
"""Identities of the files that were looked up, by path; None if there was no file."""


class AtOnce:
    """Limits how much is hashed before a dataset is served; shared by the threads that load its files.

    Parameters
    ----------
    nbytes : int
        Bytes of all files together.
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._taken: set[str] = set()
        self._lock = threading.Lock()

    def has(self, path: str, nbytes: int) -> bool:
        """Whether so many bytes of a file may be hashed."""
        return path in self._taken or nbytes <= self._left

    def take(self, path: str, nbytes: int) -> bool:
        """Same as `has`. If so, they count from now on."""
        with self._lock:
            if not self.has(path, nbytes):
                return False
            if path not in self._taken:
                self._taken.add(path)
                self._left -= nbytes
            return True


@dataclass(frozen=True)
class LoadedFile:
    """An inspected file.

    Attributes
    ----------
    source : FileSource
    layout : FileLayout
    segments : dict of str to Segment
        The arrays, including those of linked files, by path in the file.
    fields : dict of str to Segment
        The arrays after applying the conventions of other programs, by the path to use as the name.
    contents : tuple of Content
        The content of the file, then of all files that it refers to.
    """

    source: FileSource
    layout: FileLayout
    segments: dict[str, Segment]
    fields: dict[str, Segment]
    contents: tuple[Content, ...]

    def below(self, path: str) -> Iterator[str]:
        """The paths of the array at `path`, or of all arrays in the group there, sorted."""
        if path in self.segments:
            yield path
        begin = f"{path}/" if path else ""
        # Binary search, because another file may have many links into this one.
        for name in islice(self._ordered, bisect_left(self._ordered, begin), None):
            if not name.startswith(begin):
                return
            yield name

    @cached_property
    def _ordered(self) -> list[str]:
        return sorted(self.segments)


class FileLoader:
    """Loads files; shared by all threads.

    Parameters
    ----------
    root : Path
        The data folder, without links in its path.
    settings : Settings
    folder : CacheFolder
        Caches layouts.
    digests : Digests
    files : OpenFiles
    inspector : Inspector
    hdf5 : ReaderPool
        Tests whether h5py can read arrays.
    stores : ObjectFolders, optional
        Those of files that stand for objects.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        folder: CacheFolder,
        digests: Digests,
        files: OpenFiles,
        inspector: Inspector,
        hdf5: ReaderPool,
        stores: ObjectFolders | None = None,
    ) -> None:
        self._stores = stores or ObjectFolders(settings)
        self._root = root
        self._settings = settings
        self._folder = folder
        self._digests = digests
        self._closed = threading.Event()
        self._files = files
        self._inspector = inspector
        self.probe = ArrayProbe(hdf5, settings.inspect_timeout)
        self.probe_seconds = settings.inspect_timeout
        """No test of an array of a file starts after this many seconds."""

    def load(
        self,
        path: str,
        identity: Identity,
        dependencies: Dependencies,
        at_once: AtOnce,
        known: KnownFiles | None = None,
        together: Together | None = None,
    ) -> LoadedFile:
        """Load a file and the files that it refers to.

        Parameters
        ----------
        path : str
        identity : Identity
            Expected identity of the file.
        dependencies : dict
            Updated with all files that it refers to.
        at_once : AtOnce
            Limits what is hashed now. Files beyond it have contents without a digest.
        known : KnownFiles, optional
            Holds the layout and digest of the file, instead of files of its own in the cache folder. Not those of files
            that it refers to.
        together : Together, optional
            Inspects the file, but not those that it refers to. Only with `known`.

        Raises
        ------
        Unreadable, RevisionChanged, SourceUnavailable, Overloaded, OSError
        """
        try:
            return _Loading(self, dependencies, at_once, known, together).load(path, identity, ())
        except _Overdue:
            raise Unreadable(
                f"inspecting the files that it refers to took more than {PATIENCE * self.probe_seconds:g} s "
                f"({PATIENCE} times H5FEED_INSPECT_TIMEOUT)"
            ) from None

    def content(
        self, path: str, identity: Identity, layout: bytes, at_once: AtOnce, known: KnownFiles | None = None
    ) -> Content:
        """The content of a file, with its digest if that is known or quick to compute.

        Parameters
        ----------
        layout : bytes
            Serialised layout, which is used for large files only.

        Raises
        ------
        RevisionChanged, SourceUnavailable, Overloaded
        """
        if (objects := self._stores.of(path)) is not None:
            # If the metadata do not tell the digest of the content, the store's version stands in for it.
            return Content(path, identity, objects.source(path, identity).digest)
        digests = self._digests
        cost, is_young = digests.cost(identity), _are_young([identity])
        digest = None if is_young or known is None else known.digest(identity)
        if digest is None and not is_young:
            digest = digests.find(identity)
        if digest is None and at_once.take(path, cost):
            digest = digests.compute(path, identity, layout, keep=not is_young and known is None)
        if digest is not None:
            return Content(path, identity, digest, cost, cost)
        self._settle(path, identity)
        return digests.later(path, identity, layout)

    def _settle(self, path: str, identity: Identity) -> None:
        """Wait until a file has not changed for so long that its identity can be trusted.

        Raises
        ------
        RevisionChanged, Overloaded
            It has changed, or the server stops.
        """
        # Not longer, because the times of files may be in the future.
        deadline = time.monotonic() + YOUNG_SECONDS
        while identity.is_young(time.time()) and (left := deadline - time.monotonic()) > 0:
            if self._closed.wait(min(left, _SETTLE_POLL_SECONDS)):
                raise Overloaded("the server is stopping").because_of("stopping")
            if _identity(path) != identity:
                break
        if _identity(path) != identity:
            raise changed()

    def layout(
        self,
        path: str,
        identity: Identity,
        members: Sequence[str],
        at_once: AtOnce,
        known: KnownFiles | None = None,
        together: Together | None = None,
    ) -> tuple[FileLayout, Content]:
        """Return the layout of a file, from the cache folder if possible: it is inspected once for all processes.

        Parameters
        ----------
        path : str
        identity : Identity
        members : sequence of str
            Paths of the other parts of a split file or file family.
        at_once, known, together
            See `load`.

        Returns
        -------
        layout : FileLayout
        content : Content
            Of the file at `path`.
        """
        objects = self._stores.of(path)
        identities = [identity]
        for member in members:
            if not self._settings.follow_links and leads_out(str(self._root), member):
                raise Unreadable(f"its part {os.path.basename(member)!r} {LEADS_OUT}")
            try:
                identities.append(_identity(member))
            except FileNotFoundError:
                raise Unreadable(f"its part {os.path.basename(member)!r} is missing") from None

        def inspect() -> bytes:
            if objects is not None:
                return objects.inspect(self._inspector, path, identity)
            content = self._inspector.inspect(path) if together is None else together.inspect(path)
            # Do not cache the layout of a new file under the key of the previous one.
            if _identity(path) != identity:
                raise RevisionChanged("the file changed while it was inspected")
            return content

        is_sampled = identity.size > self._settings.digest_limit
        if is_sampled and not at_once.has(path, self._digests.cost(identity)):
            self._settle(path, identity)
        # The digest of a large file includes its layout. All others are hashed first, because their digest is the key.
        content = None if is_sampled else self.content(path, identity, b"", at_once, known)
        if known is not None:
            is_young = _are_young([identity])
            data = None if is_young else known.layout(identity, None if content is None else content.digest)
            if data is None:
                data = inspect()
            content = content or self.content(path, identity, data, at_once, known)
            known.learn(identity, content.digest, data, keep=not is_young)
            return known.loaded(data), content
        # Of an object, the key is its version, which does not depend on times.
        if objects is None and _are_young(identities):
            data = inspect()
        else:
            key = identity.key
            if members:
                keys = " ".join(one.key for one in identities)
                key = hashlib.blake2b(keys.encode(), digest_size=16).hexdigest()
            elif content is not None and content.digest is not None:
                # Key by content, so that links, copies and touched files share the layout. Objects have layouts of
                # their own: what is beside a file is not beside an object.
                key = content.digest[slice(16) if objects is None else slice(16, 32)].hex()
            name, own = _layout_name(key), _layout_name(identity.key)
            # It was inspected before it was hashed, perhaps.
            data = self._folder.get(name, lambda: self._folder.find(own) or inspect(), behind=True)
        return load_layout(data), content or self.content(path, identity, data, at_once)

    @contextlib.contextmanager
    def known_files(
        self, name: str, paths: Sequence[str], identities: Sequence[Identity]
    ) -> Iterator[KnownFiles | None]:
        """What is known of the files of a family. It is saved at the end of the ``with`` block.

        None for objects, and for a few files, which have files of their own in the cache folder. Unless all is known,
        other processes wait until the end: the files are inspected once for all.
        """
        if len(identities) < MANY or self.is_remote(paths[0]):
            yield None
            return
        key = hashlib.blake2b(f"{self._root} {name}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        place = f"families/{LAYOUT_VERSION}-{self._settings.digest_limit:x}-{key}"

        def look() -> KnownFiles:
            return KnownFiles(self._folder.find(place), lambda data: self._folder.put(place, data))

        known = look()
        with contextlib.ExitStack() as lock:
            if not known.covers(identities):
                lock.enter_context(self._folder.alone(place))
                known = look()
            try:
                yield known
            finally:
                known.save(identities)

    def members(self, path: str, dependencies: Dependencies) -> tuple[str, ...]:
        """The other parts of a split file or file family.

        Adds them to `dependencies`, and for a family also the next part, which may be added later.
        """
        if self.is_remote(path):
            return ()
        driver, members = members_of(path)
        upcoming = (next_member(path, members),) if driver == "family" else ()
        for member in (*members, *upcoming):
            try:
                dependencies[member] = _identity(member)
            except OSError:
                dependencies[member] = None
        return members

    def is_remote(self, path: str) -> bool:
        """Whether a file stands for an object of a store."""
        return self._stores.of(path) is not None

    def source(self, path: str, identity: Identity, digest: bytes = b"") -> FileSource:
        """A file as a source of bytes; an object has a digest of its own."""
        if (objects := self._stores.of(path)) is not None:
            return objects.source(path, identity)
        return LocalFile(self._files, path, identity, digest)

    def by_rows(self, matrix: ByColumns) -> Segment:
        """The rows of a sparse matrix that is stored by columns, which are there once it has been transposed; an
        unreadable array if that would take too much."""
        limit, nbytes = self._settings.transposed_bytes, 8 * (matrix.rows + 1)
        reason = None
        if matrix.nbytes > limit:
            reason = too_large(matrix, limit)
        elif nbytes > MAX_OFFSETS_BYTES:
            reason = f"the offsets of its rows have {nbytes} bytes, more than the {MAX_OFFSETS_BYTES} that are kept"
        if reason is not None:
            return Segment(matrix.data.source, unreadable_array(matrix.data.array.path, reason))
        return TransposedFile(matrix, self._settings.cache_dir / COPIES).segment()

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        self.probe.close()

    def find(self, path: str, name: str, dependencies: Dependencies) -> tuple[str, Identity]:
        """Find the file that a name in the file at `path` refers to.

        Returns
        -------
        path : str
            Without symbolic links.
        identity : Identity

        Raises
        ------
        _BadExternalFile
            It must not or cannot be read.
        """
        named = os.path.join(os.path.dirname(path), name)
        target = os.path.realpath(named)
        # Show only the last part of an absolute path, which may be a path of the server.
        known = f"the file {_shown(name)!r}"
        # With follow_links, the named file itself may be a link out of the folder, but no folder on the way may.
        root = self._stores.root_of(path, self._root)
        # The folders of stores may be below the data folder.
        if self._stores.root_of(target, self._root) != root or leads_out(
            str(root), os.path.dirname(named) if self._settings.follow_links else target
        ):
            raise _BadExternalFile(f"{known}, which is outside the data folder")
        # Hidden files are not served under another name either, except through symbolic links.
        way = os.path.relpath(named, os.path.dirname(path))
        if any(part.startswith(".") and part != ".." for part in way.split(os.sep)):
            raise _BadExternalFile(f"{known}, which is hidden")
        try:
            status = os.stat(target)
        except (OSError, ValueError):
            dependencies[target] = None
            raise _BadExternalFile(f"{known}, which is missing") from None
        # Record the name as well as the target, because the name may lead to another file later.
        dependencies[target] = dependencies[named] = Identity.of(status)
        if not stat.S_ISREG(status.st_mode):
            raise _BadExternalFile(f"{known}, which is not a regular file")
        return target, Identity.of(status)


_Contents = dict[str, tuple[Content, ...]]
"""Contents of files and of those that they refer to, by path."""


class _BadExternalFile(Exception):
    """A reference leads to something that cannot be served. The message names it and gives the reason."""


class _Overdue(Exception):
    """Loading a file with all files that it refers to takes too long."""


class _Loading:
    """Loads files that refer to one another, each once."""

    def __init__(
        self,
        loader: FileLoader,
        dependencies: Dependencies,
        at_once: AtOnce,
        known: KnownFiles | None,
        together: Together | None,
    ) -> None:
        self._loader = loader
        self._dependencies = dependencies
        self._at_once = at_once
        self._known = known
        self._together = together
        self._loaded: dict[str, LoadedFile] = {}
        self._failed: dict[str, Unreadable] = {}
        self._overdue = time.monotonic() + PATIENCE * loader.probe_seconds
        self._sources: dict[str, FileSource] = {}
        self._contents: dict[str, Content] = {}

    def load(self, path: str, identity: Identity, above: tuple[str, ...]) -> LoadedFile:
        if path in self._failed:
            raise self._failed[path]
        if path not in self._loaded:
            if above and time.monotonic() > self._overdue:
                raise _Overdue
            try:
                self._loaded[path] = self._load(path, identity, above)
            except Unreadable as error:
                self._failed[path] = error
                raise
        return self._loaded[path]

    def _load(self, path: str, identity: Identity, above: tuple[str, ...]) -> LoadedFile:
        # Find the other parts first: a file cannot be inspected if one of them is missing.
        members = self._loader.members(path, self._dependencies)
        known, together = (None, None) if above or members else (self._known, self._together)
        layout, content = self._loader.layout(path, identity, members, self._at_once, known, together)
        source = self._source(path, identity, content)
        contents: _Contents = {path: (self._contents[path],)}
        segments = {}
        probed = 0
        deadline = time.monotonic() + self._loader.probe_seconds
        is_remote = self._loader.is_remote(path)
        for array in layout.arrays:
            if is_remote and (why := why_not_remote(array)) is not None:
                segments[array.path] = Segment(source, replace(unreadable_array(array.path, why), text=array.text))
                continue
            try:
                segment = self._segment(source, array, (*above, path), contents)
            except _BadExternalFile as error:
                segment = Segment(source, unreadable_array(array.path, f"its data is in {error}"))
            if (
                array.by_h5py
                and segment.array.unreadable is None
                and probed < MAX_PROBED
                and time.monotonic() < deadline
            ):
                probed += 1
                problem = self._loader.probe.problem(segment)
                if problem is not None:
                    segment = Segment(source, replace(unreadable_array(array.path, problem), text=array.text))
            segments[array.path] = segment
        self._loader.probe.pair_offsets(segments)
        for link in layout.links:
            room = len(layout.arrays) + MAX_LINKED - len(segments)
            if room <= 0:
                break
            for name, segment in islice(self._linked(source, link, (*above, path), contents), room):
                segments.setdefault(name, segment)
        ordered = [contents.pop(path), *(contents[other] for other in sorted(contents))]
        fields = as_meant(layout, segments, self._loader.probe.values, self._loader.probe.paired, self._loader.by_rows)
        return LoadedFile(source, layout, segments, fields, tuple(part for parts in ordered for part in parts))

    def _source(self, path: str, identity: Identity, content: Content | None = None) -> FileSource:
        if path not in self._sources:
            content = content or self._loader.content(path, identity, b"", self._at_once)
            self._contents[path] = content
            self._sources[path] = self._loader.source(path, identity, content.digest or b"")
        return self._sources[path]

    def _segment(self, source: FileSource, array: ArrayLayout, above: tuple[str, ...], contents: _Contents) -> Segment:
        if array.external is not None:
            path, identity = self._loader.find(source.path, array.external, self._dependencies)
            if array.offset is not None and array.offset + array.rows * array.stored_row_bytes > identity.size:
                raise _BadExternalFile(f"the file {_shown(array.external)!r}, which ends before the data does")
            # This file is a companion, and so part of the cache key: the offset depends on the file that has the array.
            stored = self._source(path, identity).with_companions((source,))
            contents[path] = (self._contents[path],)
            return Segment(stored, replace(array, external=None))
        others: dict[str, FileSource] = {}
        for name in array.others:
            path, identity = self._loader.find(source.path, name, self._dependencies)
            if path in above:
                # It is being loaded already. The reader checks that no array is a source of itself.
                others[path] = self._sources[path]
                continue
            try:
                loaded = self._nested(path, identity, above)
                others |= {path: loaded.source}
                contents[path] = loaded.contents
                for part in loaded.segments.values():
                    others |= {file.path: file for file in part.file.companions}
            except Unreadable:
                # It may be a part that is not an HDF5 file by itself. If it should be one, reading the first row fails.
                others[path] = self._source(path, identity)
                contents[path] = (self._contents[path],)
        others.pop(source.path, None)
        return Segment(source.with_companions(tuple(others.values())) if others else source, array)

    def _linked(
        self, source: FileSource, link: ExternalLink, above: tuple[str, ...], contents: _Contents
    ) -> Iterator[tuple[str, Segment]]:
        """The arrays that a link into another file leads to, with their paths through the link."""
        try:
            path, identity = self._loader.find(source.path, link.file, self._dependencies)
            if path in above:
                raise _BadExternalFile(f"the file {_shown(link.file)!r}, which links back to this one")
            loaded = self._nested(path, identity, above)
        except _BadExternalFile as error:
            yield link.path, Segment(source, unreadable_array(link.path, f"it is a link into {error}"))
            return
        except Unreadable as error:
            reason = f"it is a link into the file {_shown(link.file)!r}, which cannot be read: {error.detail}"
            yield link.path, Segment(source, unreadable_array(link.path, reason))
            return
        contents[path] = loaded.contents
        target = link.target.strip("/")
        any_array = False
        for name in loaded.below(target):
            any_array = True
            rest = name.removeprefix(target).strip("/")
            segment = loaded.segments[name]
            if segment.array.refers and segment.array.text is None:
                # Paths in that file, where this one may have other arrays.
                reason = f"it is a link into the file {_shown(link.file)!r}, where it has references"
                segment = Segment(source, unreadable_array(segment.array.path, reason))
            yield "/".join(part for part in (link.path, rest) if part), segment
        if not any_array:
            reason = f"it is a link to {link.target!r} in the file {_shown(link.file)!r}, where there is no array"
            yield link.path, Segment(source, unreadable_array(link.path, reason))

    def _nested(self, path: str, identity: Identity, above: tuple[str, ...]) -> LoadedFile:
        if len(above) > MAX_NESTING:
            raise _BadExternalFile(f"files that refer to one another more than {MAX_NESTING} deep")
        return self.load(path, identity, above)


def _are_young(identities: Sequence[Identity]) -> bool:
    """Whether files are so new that results must not be cached: they can change again with the same identity."""
    now = time.time()
    return any(identity.is_young(now) for identity in identities)


def _layout_name(key: str) -> str:
    """Name of a layout in the cache folder."""
    return f"layouts/{LAYOUT_VERSION}-{key}"


def _identity(path: str) -> Identity:
    return Identity.of(os.stat(path))


def _shown(name: str) -> str:
    return os.path.basename(name) if os.path.isabs(name) else name
