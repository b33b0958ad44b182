"""From a path to the arrays behind it: inspects a file, follows its links, finds the files that it is read with.

A name in a file may lead to any other: it is followed within the data folder only, whatever links lie on the way. Where
the settings say so, a file in the folder may itself be a link that leads out.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from h5feed.errors import (
    RevisionChanged,
    SourceUnavailable,
    Unreadable,
)

from ..cache_folder.folder import CacheFolder
from ..settings import Settings
from ..storage.column import Segment
from ..storage.hdf5.drivers import members_of, next_member
from ..storage.hdf5.inspector import Inspector
from ..storage.hdf5.reader_pool import ReaderPool
from ..storage.layout import LAYOUT_VERSION, ArrayLayout, ExternalLink, FileLayout, load_layout
from ..storage.local_file import Identity, LocalFile, OpenFiles
from .array_probe import ArrayProbe, unreadable_array
from .conventions import as_meant
from .discovery import LEADS_OUT, leads_out
from .revision import content_digest

MAX_LINKED = 10_000
"""Arrays that the links of one file may lead to."""

MAX_NESTING = 4
"""Files that lead to one another."""

PATIENCE = 10
"""Times that one file may take: so long the file and all that it leads to may. Each of those has its own time, and
there may be thousands of them."""

MAX_PROBED = 64
"""Arrays of a file that h5py reads are tried by a row; what is wrong with others shows when they are read."""

Dependencies = dict[str, Identity | None]
"""Files that were looked for, by path, and what was there."""


@dataclass(frozen=True)
class LoadedFile:
    """A file, inspected.

    Attributes
    ----------
    segments : dict of str to Segment
        Where the rows of each array lie, by its path in the file.
    fields : dict of str to Segment
        The same, as the program that wrote the file means them, by the paths that are to name them.
    digests : tuple of bytes
        Of its content, and of that of all files that it leads to.
    """

    source: LocalFile
    layout: FileLayout
    segments: dict[str, Segment]
    fields: dict[str, Segment]
    digests: tuple[bytes, ...]

    def below(self, path: str) -> Iterator[str]:
        """Paths of the array at `path`, or of those in the group there, in order."""
        if path in self.segments:
            yield path
        begin = f"{path}/" if path else ""
        # A file may have many links into this one.
        for name in islice(self._ordered, bisect_left(self._ordered, begin), None):
            if not name.startswith(begin):
                return
            yield name

    @cached_property
    def _ordered(self) -> list[str]:
        return sorted(self.segments)


class FileLoader:
    """Loads files; one for all threads.

    Parameters
    ----------
    root : Path
        The data folder, without links in it.
    hdf5 : ReaderPool
        Tries what h5py is to read.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        folder: CacheFolder,
        files: OpenFiles,
        inspector: Inspector,
        hdf5: ReaderPool,
    ) -> None:
        self._root = root
        self._settings = settings
        self._folder = folder
        self._files = files
        self._inspector = inspector
        self.probe = ArrayProbe(hdf5, settings.inspect_timeout)
        self.probe_seconds = settings.inspect_timeout
        """How long the arrays of a file are tried; the one at work on is tried to its end."""

    def load(self, path: str, identity: Identity, dependencies: Dependencies) -> LoadedFile:
        """The file at `path`, and, noted in `dependencies`, all that it leads to.

        Raises
        ------
        Unreadable, RevisionChanged, OSError
        """
        try:
            return _Loading(self, dependencies).load(path, identity, ())
        except _Overdue:
            raise Unreadable(
                f"looking at the files that it leads to took more than {PATIENCE * self.probe_seconds:g} s ({PATIENCE} "
                "times H5FEED_INSPECT_TIMEOUT)"
            ) from None

    def layout(
        self, path: str, identity: Identity, members: Sequence[str] = ()
    ) -> tuple[FileLayout, bytes, bytes | None]:
        """The layout of a file, inspected once for all processes, as it is and as it is kept; and the digest of the
        file's content, where the layout is kept by it.

        Parameters
        ----------
        members : sequence of str
            The other files that HDF5 wrote it into.
        """
        identities = [identity]
        for member in members:
            if not self._settings.follow_links and leads_out(str(self._root), member):
                raise Unreadable(f"its part {os.path.basename(member)!r} {LEADS_OUT}")
            try:
                identities.append(_identity(member))
            except FileNotFoundError:
                raise Unreadable(f"its part {os.path.basename(member)!r} is missing") from None

        def inspect() -> bytes:
            content = self._inspector.inspect(path)
            # It would be found again under the name of the file that was there before.
            if _identity(path) != identity:
                raise RevisionChanged("the file changed while it was inspected")
            return content

        if _are_young(identities):
            data = inspect()
            return load_layout(data), data, None
        digest: bytes | None = None
        if members:
            keys = " ".join(one.key for one in identities)
            name = hashlib.blake2b(keys.encode(), digest_size=16).hexdigest()
        elif identity.size > self._settings.digest_limit:
            name = identity.key
        else:
            # By its content, which links, copies and files that are only touched share.
            digest = self.digest(path, identity, b"")
            name = digest[:16].hex()
        data = self._folder.get(f"layouts/{LAYOUT_VERSION}-{name}", inspect, behind=True)
        return load_layout(data), data, digest

    def members(self, path: str, dependencies: Dependencies) -> tuple[str, ...]:
        """The other files that HDF5 wrote this one into, noted in `dependencies` with the one that it may go on in."""
        driver, members = members_of(path)
        upcoming = (next_member(path, members),) if driver == "family" else ()
        for member in (*members, *upcoming):
            try:
                dependencies[member] = _identity(member)
            except OSError:
                dependencies[member] = None
        return members

    def digest(self, path: str, identity: Identity, layout: bytes) -> bytes:
        """Of the content of a file, computed once for all processes."""
        limit = self._settings.digest_limit
        name = f"digests/{limit:x}-{identity.key}"

        def compute() -> bytes:
            try:
                return content_digest(path, identity, limit, layout)
            except OSError as error:
                raise SourceUnavailable(f"it cannot be read: {error.strerror}") from error

        return compute() if _are_young([identity]) else self._folder.get(name, compute, behind=True)

    def source(self, path: str, identity: Identity, digest: bytes) -> LocalFile:
        return LocalFile(self._files, path, identity, digest)

    def close(self) -> None:
        """End the threads."""
        self.probe.close()

    def find(self, path: str, name: str, dependencies: Dependencies) -> tuple[str, Identity]:
        """The file that a name in the file at `path` stands for.

        Raises
        ------
        _Astray
        """
        named = os.path.join(os.path.dirname(path), name)
        target = os.path.realpath(named)
        # Of an absolute path, no more than the last part: it may be that of a disk of the server's.
        known = f"the file {_shown(name)!r}"
        # Where links are followed, one may lie where the name leads; none on the way there leads out.
        if leads_out(str(self._root), os.path.dirname(named) if self._settings.follow_links else target):
            raise _Astray(f"{known}, which lies outside of the data folder")
        # Nor is what is hidden served by any other name, unless the operating system's links lead there.
        way = os.path.relpath(named, os.path.dirname(path))
        if any(part.startswith(".") and part != ".." for part in way.split(os.sep)):
            raise _Astray(f"{known}, which is hidden")
        try:
            status = os.stat(target)
        except (OSError, ValueError):
            dependencies[target] = None
            raise _Astray(f"{known}, which is missing") from None
        # By its name too, which may lead elsewhere some day.
        dependencies[target] = dependencies[named] = Identity.of(status)
        if not stat.S_ISREG(status.st_mode):
            raise _Astray(f"{known}, which is no regular file")
        return target, Identity.of(status)


class _Astray(Exception):
    """A name leads to what cannot be served; the message names it and says why."""


class _Overdue(Exception):
    """The files that one leads to take too long, taken together."""


class _Loading:
    """Files that lead to one another, each loaded once."""

    def __init__(self, loader: FileLoader, dependencies: Dependencies) -> None:
        self._loader = loader
        self._dependencies = dependencies
        self._loaded: dict[str, LoadedFile] = {}
        self._failed: dict[str, Unreadable] = {}
        self._overdue = time.monotonic() + PATIENCE * loader.probe_seconds
        self._sources: dict[str, LocalFile] = {}

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
        # Before it is inspected: it cannot be when one of them is missing.
        members = self._loader.members(path, self._dependencies)
        layout, data, digest = self._loader.layout(path, identity, members)
        source = self._source(path, identity, data, digest)
        digests: dict[str, tuple[bytes, ...]] = {path: (source.digest,)}
        segments = {}
        probed = 0
        deadline = time.monotonic() + self._loader.probe_seconds
        for array in layout.arrays:
            try:
                segment = self._segment(source, array, (*above, path), digests)
            except _Astray as error:
                segment = Segment(source, unreadable_array(array.path, f"its data lies in {error}"))
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
            for name, segment in islice(self._linked(source, link, (*above, path), digests), room):
                segments.setdefault(name, segment)
        ordered = [digests.pop(path), *(digests[other] for other in sorted(digests))]
        fields = as_meant(layout, segments, self._loader.probe.values)
        return LoadedFile(source, layout, segments, fields, tuple(part for parts in ordered for part in parts))

    def _source(self, path: str, identity: Identity, layout: bytes = b"", digest: bytes | None = None) -> LocalFile:
        if path not in self._sources:
            digest = digest or self._loader.digest(path, identity, layout)
            self._sources[path] = self._loader.source(path, identity, digest)
        return self._sources[path]

    def _segment(
        self, source: LocalFile, array: ArrayLayout, above: tuple[str, ...], digests: dict[str, tuple[bytes, ...]]
    ) -> Segment:
        if array.external is not None:
            path, identity = self._loader.find(source.path, array.external, self._dependencies)
            if array.offset is not None and array.offset + array.rows * array.stored_row_bytes > identity.size:
                raise _Astray(f"the file {_shown(array.external)!r}, which ends before it does")
            # Where it begins is another thing in every file that names it.
            stored = self._source(path, identity).with_companions((source,))
            digests[path] = (stored.digest,)
            return Segment(stored, replace(array, external=None))
        others: dict[str, LocalFile] = {}
        for name in array.others:
            path, identity = self._loader.find(source.path, name, self._dependencies)
            if path in above:
                # It is being loaded itself; that no array is made of itself is for the reader to see.
                others[path] = self._sources[path]
                continue
            try:
                loaded = self._nested(path, identity, above)
                others |= {path: loaded.source}
                digests[path] = loaded.digests
                for part in loaded.segments.values():
                    others |= {file.path: file for file in part.source.companions}
            except Unreadable:
                # A part that is no HDF5 file by itself; if it ought to be one, the first row shows.
                others[path] = self._source(path, identity)
                digests[path] = (others[path].digest,)
        others.pop(source.path, None)
        return Segment(source.with_companions(tuple(others.values())) if others else source, array)

    def _linked(
        self, source: LocalFile, link: ExternalLink, above: tuple[str, ...], digests: dict[str, tuple[bytes, ...]]
    ) -> Iterator[tuple[str, Segment]]:
        """The arrays that a link into another file leads to, by the paths that they have through it."""
        try:
            path, identity = self._loader.find(source.path, link.file, self._dependencies)
            if path in above:
                raise _Astray(f"the file {_shown(link.file)!r}, which leads back here")
            loaded = self._nested(path, identity, above)
        except _Astray as error:
            yield link.path, Segment(source, unreadable_array(link.path, f"it is a link into {error}"))
            return
        except Unreadable as error:
            reason = f"it is a link into the file {_shown(link.file)!r}, which cannot be read: {error.detail}"
            yield link.path, Segment(source, unreadable_array(link.path, reason))
            return
        digests[path] = loaded.digests
        target = link.target.strip("/")
        any_array = False
        for name in loaded.below(target):
            any_array = True
            rest = name.removeprefix(target).strip("/")
            yield "/".join(part for part in (link.path, rest) if part), loaded.segments[name]
        if not any_array:
            reason = f"it is a link to {link.target!r} in the file {_shown(link.file)!r}, where no array is"
            yield link.path, Segment(source, unreadable_array(link.path, reason))

    def _nested(self, path: str, identity: Identity, above: tuple[str, ...]) -> LoadedFile:
        if len(above) > MAX_NESTING:
            raise _Astray(f"files that lead to one another more than {MAX_NESTING} deep")
        return self.load(path, identity, above)


def _are_young(identities: Sequence[Identity]) -> bool:
    """Whether what is found out of files now is not to be kept: they may change without their identities telling."""
    now = time.time()
    return any(identity.is_young(now) for identity in identities)


def _identity(path: str) -> Identity:
    return Identity.of(os.stat(path))


def _shown(name: str) -> str:
    return os.path.basename(name) if os.path.isabs(name) else name
