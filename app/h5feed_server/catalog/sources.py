"""Where the files of the catalogue come from: the data folder, and stores that are mounted below a name."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from h5feed.errors import BadParameter

from ..settings import Settings
from .declared import NAME as DECLARATION
from .declared import Declaration, DeclaredStore
from .discovery import Walk, dotted, walk
from .entry import Entry, identity_of
from .grouping.families import Grouping
from .object_folder import ObjectFolder, ObjectFolders
from .presence import Presence
from .watching import notice

logger = logging.getLogger(__name__)

_FIRST_SECONDS = 2.0
"""How long the scan that mounts stores waits for their first listings."""


class Source:
    """The data folder, or a mounted store.

    Parameters
    ----------
    root : Path
        Its folder, without links in its path.
    objects : ObjectFolder, optional
        If its files stand for objects.
    mount : str
        The name of a mounted store; empty for the data folder.

    Attributes
    ----------
    entries : dict of str to Entry
        What the last scan has found in it, by name.
    presence : Presence
    grouping : Grouping
    closed : threading.Event
        Whether it is no longer served.
    """

    def __init__(self, root: Path, objects: ObjectFolder | None = None, mount: str = "") -> None:
        self.root = root
        self.objects = objects
        self.mount = mount
        self.entries: dict[str, Entry] = {}
        self.is_starting = False
        """Whether the first listing of the store is under way."""
        whole = objects.called if mount and objects is not None else "the data folder"
        self.presence = Presence(is_certain=objects is not None, whole=whole)
        self.grouping = Grouping()
        self.closed = threading.Event()

    def is_away(self) -> bool:
        """Whether the whole folder is unavailable, which had files. If so, marks its entries."""
        reason = self.presence.reason
        if reason is None or not self.presence.holds_files:
            return False
        self.entries = {name: replace(entry, away=reason) for name, entry in self.entries.items()}
        return True

    def own_name(self, name: str) -> str:
        """The name of a dataset in a mounted store, without that of the store."""
        return name.removeprefix(f"{self.mount}.") if self.mount else name

    def watch(self, is_wanted: Callable[[str], bool], is_due: Callable[[], bool], look: Callable[[], None]) -> None:
        """See `watching.notice`; until it is closed."""
        watching = (self.root, is_wanted, is_due, look, self.closed)
        threading.Thread(target=notice, args=watching, name="h5feed-watch", daemon=True).start()

    def walk(self, settings: Settings, declaration: Declaration, seconds: float | None = None) -> Walk:
        """Find its files. For a store, waits for the first listing, if `seconds` is given only so long."""
        objects = self.objects
        unlisted, self.is_starting = None, False
        if objects is not None:
            unlisted = objects.why_not_listed() if seconds is None else objects.why_not_listed(seconds)
        if objects is None or unlisted is None:
            return walk(str(self.root), declaration.endings(), str(settings.cache_dir.resolve()))
        walked = Walk(unlisted={"": unlisted})
        self.is_starting = bool(self.mount) and objects.trouble() is None
        if not self.is_starting:
            walked.refused[""] = f"the object store cannot be listed: {unlisted}"
        return walked


class Mounts:
    """The mounted stores, as ``h5feed.toml`` in the data folder declares them. Changed by one thread at a time.

    Parameters
    ----------
    folders : ObjectFolders
    may_mount : callable
        Whether the operator of the server permits a URL. Whoever can write into the data folder must not read with the
        server's credentials, or in its network, what they like.
    begin, end : callable
        Called with a source that has been mounted, or is not any more.
    """

    def __init__(
        self,
        folders: ObjectFolders,
        may_mount: Callable[[str], bool],
        begin: Callable[[Source], None],
        end: Callable[[Source], None],
    ) -> None:
        self._folders = folders
        self._may_mount = may_mount
        self._begin, self._end = begin, end
        self._mounted: dict[str, tuple[DeclaredStore, Source]] = {}
        self._first_until = 0.0

    def __iter__(self) -> Iterator[Source]:
        return iter([source for _, source in list(self._mounted.values())])

    def __len__(self) -> int:
        return len(self._mounted)

    def of(self, name: str) -> Source | None:
        """The mounted store that a dataset of this name would be in; None: the data folder."""
        # Looked up once: another thread may unmount it.
        found = self._mounted.get(name.partition(".")[0])
        return None if found is None else found[1]

    def path_of(self, file: str) -> Path | None:
        """The path of a file that the catalogue names; None if it is in the data folder."""
        mount, _, own = file.partition("/")
        found = self._mounted.get(mount)
        return None if found is None else found[1].root / own

    def seconds(self) -> float:
        """How long the current scan waits for first listings."""
        return max(0.0, self._first_until - time.monotonic())

    def follow(self, stores: Mapping[str, DeclaredStore], clashes: Mapping[str, str]) -> dict[str, str]:
        """Mount the stores that are declared now, and no others. Returns why some are not, by name.

        Parameters
        ----------
        stores : mapping of str to DeclaredStore
        clashes : mapping of str to str
            Why some must not be mounted.
        """
        refused = dict(clashes)
        wanted = {name: store for name, store in stores.items() if name not in clashes}
        for name, (store, source) in list(self._mounted.items()):
            if wanted.get(name) != store:
                logger.warning("the object store %r is not served any more", name)
                del self._mounted[name]
                self._unmount(source)
        for name, store in wanted.items():
            if name in self._mounted:
                continue
            if not self._may_mount(store.address.url):
                refused[name] = (
                    f"the server does not permit {store.address.url}: start it with H5FEED_MOUNTS={store.address.url}"
                )
                continue
            try:
                objects = self._folders.open(store.address, name, store.listing_seconds)
            except BadParameter as error:
                refused[name] = error.detail
                continue
            source = Source(objects.root, objects, name)
            self._mounted[name] = store, source
            self._first_until = time.monotonic() + _FIRST_SECONDS
            self._begin(source)
        return refused

    def close(self) -> None:
        """Stop watching them."""
        for source in self:
            source.closed.set()

    def _unmount(self, source: Source) -> None:
        source.closed.set()
        assert source.objects is not None
        self._folders.end(source.objects)
        self._end(source)


def clashes(root: Path, walked: Walk, declaration: Declaration) -> dict[str, str]:
    """Why stores must not be mounted under their names: something in the data folder has such names, too.

    Parameters
    ----------
    root : Path
        The data folder.
    walked : Walk
        Its files.
    declaration : Declaration
        Its ``h5feed.toml``.
    """
    if not declaration.stores:
        return {}
    found: dict[str, str] = {}
    taken = {dotted(os.path.splitext(file)[0]): f"the file {file!r}" for file in (*walked.files, *walked.declarable)}
    taken |= {name: f"the dataset {name!r} in {DECLARATION}" for name in declaration.datasets}
    for name, what in taken.items():
        if (mount := name.partition(".")[0]) in declaration.stores:
            found.setdefault(mount, what)
    for mount in declaration.stores:
        if identity_of(str(root / mount)) is not None:
            found[mount] = f"{mount!r} in the data folder"
    return {
        mount: f"{what} has the same name: rename one of them, because all datasets of the store are named {mount}.…"
        for mount, what in found.items()
    }
