"""The listing of an object store as a folder: a small file stands for each object, so that it is found like a file.

The catalogue scans and watches this folder like any other. All workers of a server share it, and only one of them asks
the store in each interval; meanwhile, the others go on with what is there. A file is replaced only if its object was.
If the store cannot be listed, all stays as it was. The folder is part of the cache folder: safe to delete while no
server runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from h5feed.errors import FeedError, Overloaded, Unreadable
from h5feed.stored.local_file import Identity, changed

from .backend import StoredObject
from .store import ObjectStore

logger = logging.getLogger(__name__)

MOST_OBJECTS = 100_000
"""Objects below the prefix of a store, of any kind."""

_LIST_SECONDS = 120.0
"""How long a listing may take."""

_RETRY_SECONDS = 5.0
"""After a listing has failed, the next one begins after this long."""

_SOONEST_SECONDS = 1.0
"""Minimum interval of listings, even if objects are known to have changed. Also how often a worker looks whether
another one has finished its listing."""

_FRESH_SECONDS = 10.0
"""A worker that starts does without a listing of its own if there is one that is not older."""

_END_SECONDS = 5.0
"""How long closing waits for the thread, which may be writing the folder."""

_STAMP = ".listed"
"""File whose modification time is when the last listing began that succeeded. Hidden, so not served."""

_TROUBLE = ".trouble"
"""File with the reason for which the last listing failed; its modification time is when it did."""

_COPIED = ".copied-"
"""Prefix of the file that says of which version of an object the content is there."""

_LOCK = ".lock"

_MOST_BYTES = 16 << 10
"""Maximum size of a file that stands for an object."""


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
    noted : int
        Bytes of an object up to which its metadata are asked for the digest of its content.
    copied : mapping of str to int
        Objects of which the content is in the folder, instead of a file that stands for it; and how many bytes of it,
        at most.
    called : str
        The store, in messages.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: Path,
        only: str | None,
        endings: tuple[str, ...],
        interval: float,
        noted: int,
        copied: Mapping[str, int],
        called: str,
    ) -> None:
        self._store = store
        self._folder = folder
        self._only = only
        self._endings = endings
        self._interval = interval
        self._noted = noted
        self._copied = copied
        self._called = called
        self._began = time.time()
        self._noticed = float("-inf")
        self._wake = threading.Event()
        self._closed = False
        self._looked = threading.Event()
        self._skipped: set[str] = set()
        store.on_change = self.refresh
        self._thread = threading.Thread(target=self._run, name="h5feed-listing", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listing. Does not wait for a listing that runs: close the store, then `join`."""
        self._closed = True
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join(_END_SECONDS)

    def wait(self, seconds: float) -> str | None:
        """Wait for the first listing. Returns why there is none; None if there is one, from this server or another."""
        self._looked.wait(seconds)
        if self.listed() is not None:
            return None
        return self.trouble() or "its first listing has not finished yet"

    def listed(self) -> float | None:
        """When the last listing began, in seconds of Unix time; None if there was none."""
        return _time_of(self._folder / _STAMP)

    def trouble(self) -> str | None:
        """Why the last listing failed, by whichever worker; None if it succeeded."""
        try:
            return (self._folder / _TROUBLE).read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeError):
            return "the cache folder cannot be read"

    def refresh(self) -> None:
        """List again soon, because an object was replaced or deleted."""
        self._noticed = time.time()
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                wait = self._step()
            except OSError as error:
                logger.warning("the listing of %s cannot be stored in the cache folder: %s", self._called, error)
                wait = _RETRY_SECONDS
            self._wake.wait(wait)
            self._wake.clear()

    def _step(self) -> float:
        """List if a listing is due and no other worker is at it. Returns the seconds until the next look."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if (left := self._left()) <= 0:
            with self._locked() as is_mine:
                # Another worker may have finished one before the lock was free.
                if is_mine and self._left() <= 0:
                    self._attempt()
                    self._looked.set()
            left = self._left() if is_mine else _SOONEST_SECONDS
        if self.listed() is not None:
            self._looked.set()
        return max(left, 0.01)

    def _left(self) -> float:
        """Seconds until the next listing is due."""
        now = time.time()
        listed, failed = self.listed(), _time_of(self._folder / _TROUBLE)
        if failed is not None and failed >= self._began:
            due, longest = failed + _RETRY_SECONDS, _RETRY_SECONDS
        elif listed is None:
            return 0.0
        else:
            longest = self._interval if listed >= self._began else min(self._interval, _FRESH_SECONDS)
            # What was noticed before that listing began is in it.
            longest = _SOONEST_SECONDS if self._noticed >= listed else longest
            due = listed + longest
        # A clock that was set back would make it longer.
        return due - now if due - now <= longest else 0.0

    def _attempt(self) -> None:
        began, told = time.time(), self.trouble()
        try:
            if self._only is not None:
                found = [self._store.head(self._only)]
            else:
                found = self._store.list(MOST_OBJECTS, _LIST_SECONDS)
            if self._closed:
                return
            self._keep({one.key: one for one in found if one.key.lower().endswith(self._endings)})
            of_keys = {one.key: one for one in found}
            for key, most in self._copied.items():
                self._copy(key, of_keys.get(key), most)
            stamp = self._folder / _STAMP
            stamp.touch()
            os.utime(stamp, (began, began))
            (self._folder / _TROUBLE).unlink(missing_ok=True)
            if told is not None:
                logger.warning("%s can be listed again", self._called)
            return
        except (FeedError, OSError) as error:
            trouble = error.detail if isinstance(error, FeedError) else f"the cache folder: {error.strerror}"
        except Exception:
            logger.exception("listing %s failed", self._called)
            trouble = "listing it failed: the server's log has the reason"
        if self._closed:
            return
        # Like a file that stands for an object: hidden until it is complete.
        partial = self._folder / ".partial"
        partial.write_text(trouble)
        os.replace(partial, self._folder / _TROUBLE)
        if trouble != told:
            logger.warning("%s cannot be listed: %s", self._called, trouble)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Take the folder's lock, if no other worker has it. Whether it was taken."""
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _described(self, one: StoredObject) -> StoredObject | None:
        """The object with what is known of its content from an earlier listing; None if it must be asked for."""
        if one.size > self._noted or one.unreadable:
            return one
        with contextlib.suppress(OSError, TypeError, ValueError):
            known = StoredObject(**json.loads((self._folder / one.key).read_bytes()))
            if known.content is not None and replace(known, content="") == one:
                return known
        return None

    def _keep(self, found: dict[str, StoredObject]) -> None:
        """Make the folder like the listing. Of objects that could not be described, all stays as it was."""
        possible = {key: one for key, one in found.items() if self._is_possible(one)}
        described = {key: self._described(one) for key, one in possible.items()}
        asked = self._store.with_contents([one for key, one in possible.items() if not described[key]], _LIST_SECONDS)
        wanted = {key: one or asked.get(key) for key, one in described.items()}
        if None in wanted.values():
            self._noticed = time.time()
        for folder, _, names in os.walk(self._folder, topdown=False):
            for name in names:
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self._folder)
                is_own = name in (_STAMP, _TROUBLE, _LOCK) or name.startswith(_COPIED)
                if not is_own and key not in wanted and key not in self._copied:
                    os.unlink(path)
            if folder != str(self._folder):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        for one in filter(None, wanted.values()):
            try:
                _write(self._folder / one.key, json.dumps(asdict(one)).encode())
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                self._skip(one.key, "its name is also the folder of another object")

    def _copy(self, key: str, one: StoredObject | None, most: int) -> None:
        """Make the copy of an object like the object; without one if there is none, or if it cannot be read."""
        copy, version = self._folder / key, self._folder / f"{_COPIED}{key}"
        if one is not None and one.unreadable:
            self._skip(key, one.unreadable)
            one = None
        if one is None:
            version.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)
            return
        about = json.dumps(asdict(one)).encode()
        with contextlib.suppress(FileNotFoundError):
            if version.read_bytes() == about and copy.exists():
                return
        nbytes = min(one.size, most)
        content = self._store.read(one, 0, nbytes) if nbytes else b""
        version.unlink(missing_ok=True)
        _write(copy, content)
        _write(version, about)

    def _is_possible(self, one: StoredObject) -> bool:
        parts = one.key.split("/")
        if any(part.startswith(".") for part in parts):
            # Hidden, like files.
            return False
        try:
            lengths = [len(os.fsencode(part)) for part in parts]
        except UnicodeError:
            lengths = [0]
        if 0 in lengths or "\0" in one.key or sum(lengths) + len(parts) > 1024 or max(lengths) > 255:
            self._skip(one.key, "its name is not a valid file name")
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
    Unreadable
        Ranges of the object cannot be read.
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
    if stored.unreadable:
        raise Unreadable(stored.unreadable)
    return stored


def _time_of(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden until it is complete. One process at a time writes, so no other has this name.
    partial = path.parent / ".partial"
    partial.write_bytes(content)
    os.replace(partial, path)
