"""The listing of an object store as a folder: a small file stands for each object, so that it is found like a file.

The catalogue scans and watches this folder like any other. All workers of a server share it. Whichever finds that the
listing is old asks the store again; a file is replaced only if its object was. If the store cannot be listed, all stays
as it was. The folder is part of the cache folder: safe to delete while no server runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from h5feed.errors import FeedError, Overloaded
from h5feed.stored.local_file import Identity, changed

from .store import ObjectStore, StoredObject

logger = logging.getLogger(__name__)

MOST_OBJECTS = 100_000
"""Objects below the prefix of a store, of any kind."""

_LIST_SECONDS = 120.0
"""How long a listing may take."""

_RETRY_SECONDS = 5.0
"""After a listing has failed, the next one begins after this long."""

_SOONEST_SECONDS = 1.0
"""Minimum interval of listings, even if objects are known to have changed."""

_STAMP = ".listed"
"""File whose modification time is that of the last listing. Hidden, so not served."""

_LOCK = ".lock"

_MOST_BYTES = 16 << 10
"""Maximum size of a file that stands for an object."""

_WEAK = "W/"


class Listing:
    """Keeps the folder up to date in the background, until it is closed.

    Parameters
    ----------
    store : ObjectStore
    folder : Path
        Created if it is missing.
    only : str or None
        The only object to list.
    endings : tuple of str
        How names of objects end that are listed, in lower case.
    interval : float
        Seconds between listings.
    """

    def __init__(
        self, store: ObjectStore, folder: Path, only: str | None, endings: tuple[str, ...], interval: float
    ) -> None:
        self._store = store
        self._folder = folder
        self._only = only
        self._endings = endings
        self._interval = interval
        self._wake = threading.Event()
        self._closed = False
        self._listed = threading.Event()
        self._told: str | None = None
        self._skipped: set[str] = set()
        self.trouble: str | None = None
        """Why the last listing failed; None if it succeeded."""
        store.on_change = self.refresh
        threading.Thread(target=self._run, name="h5feed-listing", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def wait(self, seconds: float) -> str | None:
        """Wait for the first listing. Returns why there is none; None if there is one, from this server or another."""
        self._listed.wait(seconds)
        if self._age() is not None:
            return None
        return self.trouble or "its first listing takes a while"

    def refresh(self) -> None:
        """List again soon, because an object was replaced or deleted."""
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._list()
                if self.trouble is not None:
                    logger.warning("the object store is listed again")
                self.trouble = None
            except (FeedError, OSError) as error:
                self.trouble = error.detail if isinstance(error, FeedError) else f"the cache folder: {error.strerror}"
                if self.trouble != self._told:
                    self._told = self.trouble
                    logger.warning("the object store cannot be listed: %s", self.trouble)
            except Exception:
                logger.exception("listing the object store failed")
                self.trouble = "listing it failed: the server's log has the reason"
            self._listed.set()
            self._wake.wait(self._interval if self.trouble is None else _RETRY_SECONDS)
            if self._wake.is_set() and not self._closed:
                self._wake.clear()
                time.sleep(_SOONEST_SECONDS)

    def _age(self) -> float | None:
        """Seconds since the last listing; None if there was none."""
        try:
            return time.time() - os.stat(self._folder / _STAMP).st_mtime
        except OSError:
            return None

    def _list(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            age = self._age()
            # Another worker has listed it in the meantime. A clock that was set back makes the age negative.
            if age is not None and 0 <= age < _SOONEST_SECONDS and self._listed.is_set():
                return
            if self._only is not None:
                found = [self._store.head(self._only)]
            else:
                found = self._store.list(MOST_OBJECTS, _LIST_SECONDS)
            self._keep({one.key: one for one in found if one.key.lower().endswith(self._endings)})
            (self._folder / _STAMP).write_bytes(b"")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock: other workers wait, and find the listing that this one has made."""
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _keep(self, found: dict[str, StoredObject]) -> None:
        """Make the folder like the listing."""
        wanted = {key: one for key, one in found.items() if self._is_possible(one)}
        for folder, _, names in os.walk(self._folder, topdown=False):
            for name in names:
                path = os.path.join(folder, name)
                if name not in (_STAMP, _LOCK) and os.path.relpath(path, self._folder) not in wanted:
                    os.unlink(path)
            if folder != str(self._folder):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        for one in wanted.values():
            try:
                _write(self._folder / one.key, json.dumps(asdict(one)).encode())
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                self._skip(one.key, "another object has its name as a folder")

    def _is_possible(self, one: StoredObject) -> bool:
        parts = one.key.split("/")
        if any(part.startswith(".") for part in parts):
            # Hidden, like files.
            return False
        if "" in parts or len(os.fsencode(one.key)) > 1024 or any(len(os.fsencode(part)) > 255 for part in parts):
            self._skip(one.key, "its name cannot be that of a file")
            return False
        if not one.e_tag or one.e_tag.startswith(_WEAK):
            self._skip(one.key, "the store gives it no ETag that changes with each byte")
            return False
        return True

    def _skip(self, key: str, why: str) -> None:
        if key not in self._skipped:
            self._skipped.add(key)
            logger.warning("%s is not served: %s", key, why)


def stored_object(path: str, identity: Identity) -> StoredObject:
    """The object that a file of the folder stands for.

    Raises
    ------
    RevisionChanged
        The file has another identity by now.
    Overloaded
        It is gone, or is no such file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES)
            now = Identity.of(os.fstat(file.fileno()))
        stored = StoredObject(**json.loads(content))
    except (OSError, TypeError, ValueError):
        raise Overloaded("the listing of the object store has just changed", retry_after=1) from None
    if now != identity:
        raise changed(identity, now)
    return stored


def _write(path: Path, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden until it is complete. One process at a time writes, so no other has this name.
    partial = path.parent / ".partial"
    partial.write_bytes(content)
    os.replace(partial, path)
