"""Digests of files: computed at once for small ones, in the background for others, and kept in the cache folder.

All workers of a server share the work: a file is hashed by the worker that holds its lock in the cache folder, and that
tells the others how far it is. A digest that is cut off by a restart is begun anew. `block_hasher` reads the files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from h5feed.errors import RevisionChanged, SourceUnavailable
from h5feed.stored.local_file import Identity

from ..cache_folder.folder import CacheFolder
from ..storage.hdf5.child import Child, IdleChildren
from .revision import BLOCK, bytes_hashed, content_digest, digest_in_rounds

logger = logging.getLogger(__name__)
# There is a line at the begin and at the end, and a few in between.
logger.setLevel(logging.INFO)

FILES_AT_ONCE = 4
"""Files that a worker hashes at the same time in the background, besides one that was asked for. Their blocks share
`_children` processes."""

_BLOCK_SECONDS = 60.0
"""Timeout for one block, for the case that a disk hangs."""

_MOST_CHILDREN = 8
"""Maximum number of processes of a worker that hash, on machines with as many processors."""

_ANSWER_BYTES = 4096

_KNOWN = 65_536
"""Maximum number of digests in memory, of 64 bytes each."""

_LOOK_SECONDS = 0.25
"""Interval at which it is checked how far another worker is with a file."""

_AGAIN_SECONDS = 10.0
"""After a file could not be read, it is tried again after this long."""

_TELL_SECONDS = 30.0
"""Interval of the lines in the log."""

_USUAL_SPEED = 400e6
"""Bytes per second that are hashed, until it has been measured."""


@dataclass(eq=False)
class Content:
    """The content of a file in one state.

    Attributes
    ----------
    path : str
    identity : Identity
    digest : bytes or None
        None until the file has been hashed.
    total, done : int
        Bytes to hash for the digest, and those that have been hashed.
    layout : bytes
        Serialised layout, which the digest of a large file includes; see `content_digest`.
    is_wanted : bool
        Whether a client has asked for a dataset in this file.
    """

    path: str
    identity: Identity
    digest: bytes | None = None
    total: int = 0
    done: int = 0
    layout: bytes = field(default=b"", repr=False)
    is_wanted: bool = False
    not_before: float = 0.0


class _Closed(Exception):
    """The server stops: the digest is given up."""


class Digests:
    """Computes and finds digests; one per process.

    Parameters
    ----------
    folder : CacheFolder
    limit : int
        Bytes of a file up to which all of it is hashed.
    rate : int
        Maximum number of bytes per second to hash in the background; 0 for no limit.
    """

    def __init__(self, folder: CacheFolder, limit: int, rate: int) -> None:
        self._folder = folder
        self._limit = limit
        self._rate = rate
        self._known: OrderedDict[Identity, bytes] = OrderedDict()
        self._unfinished: dict[Identity, Content] = {}
        """All contents without a digest that were given out, whether they are queued or not."""
        self._queue: dict[Identity, Content] = {}
        self._running: set[Identity] = set()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads: dict[int, threading.Thread] = {}
        self._blocks: ThreadPoolExecutor | None = None
        self._hashers = _Hashers()
        self._free_at = 0.0
        self._began = self._told = 0.0
        self._files = self._bytes = 0
        """Hashed by this process since `_began`."""

    def cost(self, identity: Identity) -> int:
        """Bytes of a file to hash."""
        return bytes_hashed(identity.size, self._limit)

    def find(self, identity: Identity) -> bytes | None:
        """The digest of a file, if it is known."""
        with self._changed:
            if (digest := self._known.get(identity)) is not None:
                self._known.move_to_end(identity)
                return digest
        if (digest := self._folder.find(self._name(identity))) is not None:
            self._learn(identity, digest)
        return digest

    def compute(self, path: str, identity: Identity, layout: bytes, *, keep: bool) -> bytes:
        """Hash a file now, or wait for the process that does.

        Parameters
        ----------
        keep : bool
            Whether the digest may be kept: the file could not have changed since with the same identity.

        Raises
        ------
        RevisionChanged, SourceUnavailable
        """

        def compute() -> bytes:
            try:
                return content_digest(path, identity, self._limit, layout)
            except OSError as error:
                raise SourceUnavailable(f"it cannot be read: {error.strerror}") from error

        if not keep:
            return compute()
        digest = self._folder.get(self._name(identity), compute, behind=True)
        self._learn(identity, digest)
        return digest

    def later(self, path: str, identity: Identity, layout: bytes) -> Content:
        """The content of a file whose digest is not known. Nothing is hashed before `begin`."""
        with self._changed:
            content = self._unfinished.get(identity)
            if content is None:
                layout = layout if identity.size > self._limit else b""
                content = Content(path, identity, None, self.cost(identity), layout=layout)
                self._unfinished[identity] = content
            return content

    def begin(self, contents: Iterable[Content]) -> None:
        """Queue files to be hashed in the background, unless they are queued already."""
        with self._changed:
            if self._closed.is_set():
                return
            busy = self._queue.keys() | self._running
            new = [one for one in contents if one.digest is None and one.identity not in busy]
            if new and not self._queue and not self._running:
                self._began = self._told = time.monotonic()
                self._files = self._bytes = 0
                nbytes = sum(one.total for one in new)
                logger.info(
                    "hashing %s in the background: %s; until then, revisions are provisional",
                    _files(len(new)),
                    _size(nbytes),
                )
            self._queue.update((one.identity, one) for one in new)
            self._unfinished.update(self._queue)
            # One of them only hashes what was asked for.
            wanted = min(FILES_AT_ONCE, len(self._queue)) + 1 if self._queue else 0
            for number in sorted(set(range(wanted)) - self._threads.keys()):
                thread = threading.Thread(
                    target=self._run, args=(number,), name=f"h5feed-digests-{number}", daemon=True
                )
                self._threads[number] = thread
                thread.start()
            self._changed.notify_all()

    def prefer(self, contents: Iterable[Content]) -> None:
        """Hash these files before those that nobody has asked for."""
        new = [one for one in contents if not one.is_wanted and one.digest is None]
        if not new:
            return
        with self._changed:
            for content in new:
                content.is_wanted = True
            self._changed.notify_all()

    def seconds_left(self, contents: Iterable[Content]) -> float:
        """Roughly how long it takes until these files have been hashed, before any others."""
        left = sum(one.total - one.done for one in contents if one.digest is None)
        spent = time.monotonic() - self._began
        speed = self._bytes / spent if spent > 1 and self._bytes else _USUAL_SPEED
        return left / (min(speed, self._rate) if self._rate else speed)

    @property
    def left(self) -> int:
        """Number of files that are being hashed in the background or wait for that."""
        return len(self._queue) + len(self._running)

    def close(self, *, wait: bool) -> None:
        """Give up what is being hashed. If `wait`, also wait for the threads to end."""
        self._closed.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
            threads = list(self._threads.values())
        for thread in threads if wait else ():
            thread.join()
        if self._blocks is not None:
            self._blocks.shutdown(wait=wait, cancel_futures=True)
        self._hashers.rest()

    def _name(self, identity: Identity) -> str:
        return f"digests/{self._limit:x}-{identity.key}"

    def _learn(self, identity: Identity, digest: bytes) -> None:
        with self._changed:
            self._known[identity] = digest
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
            if (content := self._unfinished.pop(identity, None)) is not None:
                content.done, content.layout, content.digest = content.total, b"", digest

    # In the background ----------------------------------------------------------------------------------------------

    def _run(self, number: int) -> None:
        while (content := self._next(number)) is not None:
            try:
                self._hash(content)
            except Exception as error:
                if self._closed.is_set():
                    # The threads and processes that hash its blocks are stopped.
                    return
                self._failed(content, error)
            finally:
                self._ended(content)

    def _failed(self, content: Content, error: Exception) -> None:
        name = os.path.basename(content.path)
        if isinstance(error, (RevisionChanged, FileNotFoundError)):
            # The catalogue notices this, too, and has the file inspected again.
            self._drop(content)
        elif isinstance(error, OSError):
            logger.warning("%s cannot be hashed: %s; trying again", name, error.strerror or str(error))
            self._put_back(content, _AGAIN_SECONDS)
        else:
            logger.error("hashing %s failed", name, exc_info=error)
            self._drop(content)

    def _next(self, number: int) -> Content | None:
        """The next file to hash; None if there are none left, and the thread must end."""
        with self._changed:
            while self._queue and not self._closed.is_set():
                now = time.monotonic()
                due = [one for one in self._queue.values() if one.not_before <= now]
                content = next((one for one in due if one.is_wanted), due[0] if due and number else None)
                if content is not None:
                    del self._queue[content.identity]
                    self._running.add(content.identity)
                    return content
                later = [one.not_before - now for one in self._queue.values() if one.not_before > now]
                self._changed.wait(max(0.01, min(later)) if later else None)
            # Under the lock: whoever queues a file after this starts another thread.
            self._threads.pop(number, None)
            self._changed.notify_all()
            return None

    def _hash(self, content: Content) -> None:
        name = self._name(content.identity)
        begun, noted = 0, 0.0

        def begin(nbytes: int) -> None:
            nonlocal begun, noted
            self._wait_for_turn(nbytes)
            # What was begun before has been hashed.
            content.done = min(content.total, begun)
            begun += nbytes
            now = time.monotonic()
            if now - noted >= _LOOK_SECONDS:
                noted = now
                self._folder.note(name, str(content.done))
            self._tell(now)

        def compute() -> bytes:
            at_once = 1 if self._rate else 2 * _children()
            threads = self._pool()

            def hashed(fd: int, blocks: Sequence[int]) -> Iterable[bytes]:
                return threads.map(partial(self._hashers.digest, content), blocks)

            digest = digest_in_rounds(
                content.path, content.identity, self._limit, content.layout, hashed, at_once, begin
            )
            with self._changed:
                self._files += 1
            return digest

        digest = self._folder.get_unless_busy(name, compute)
        if digest is None:
            with contextlib.suppress(ValueError):
                content.done = min(content.total, int(self._folder.noted(name)))
            self._put_back(content, _LOOK_SECONDS)
            return
        self._learn(content.identity, digest)

    def _wait_for_turn(self, nbytes: int) -> None:
        """Wait until so many bytes may be read.

        Raises
        ------
        _Closed
        """
        wait = 0.0
        with self._changed:
            self._bytes += nbytes
            if self._rate:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + nbytes / self._rate
                wait = self._free_at - now
        if self._closed.wait(min(wait, threading.TIMEOUT_MAX)) if wait else self._closed.is_set():
            raise _Closed

    def _pool(self) -> ThreadPoolExecutor:
        with self._changed:
            if self._blocks is None:
                self._blocks = ThreadPoolExecutor(_children(), "h5feed-digest-block")
            return self._blocks

    def _put_back(self, content: Content, seconds: float) -> None:
        with self._changed:
            content.not_before = time.monotonic() + seconds
            if not self._closed.is_set():
                self._queue[content.identity] = content

    def _drop(self, content: Content) -> None:
        with self._changed:
            self._unfinished.pop(content.identity, None)

    def _ended(self, content: Content) -> None:
        with self._changed:
            self._running.discard(content.identity)
            if self._queue or self._running:
                return
            if self._blocks is not None:
                self._blocks.shutdown(wait=False)
                self._blocks = None
            if self._files:
                seconds = time.monotonic() - self._began
                logger.info("%s hashed, %s, in %.1f s", _files(self._files), _size(self._bytes), seconds)
        self._hashers.rest()

    def _tell(self, now: float) -> None:
        with self._changed:
            if now - self._told < _TELL_SECONDS:
                return
            self._told = now
            logger.info("hashing files: %s done, %d left", _size(self._bytes), self.left)


class _Hashers:
    """Child processes that hash blocks, started when they are needed."""

    def __init__(self) -> None:
        self._children = IdleChildren()
        self.rest = self._children.rest

    def digest(self, content: Content, block: int) -> bytes:
        """Digest of a block of a file.

        Raises
        ------
        RevisionChanged
            The file has changed or is gone.
        OSError
            It cannot be read, or no process can be started.
        """
        child, rests = self._children.take()
        child = child or Child(f"{__package__}.block_hasher", (), _ANSWER_BYTES)
        request = json.dumps([content.path, list(content.identity), block * BLOCK, BLOCK])
        try:
            answer = bytes(child.ask(request.encode() + b"\n", _BLOCK_SECONDS))
        except BaseException as error:
            child.end(0.0)
            if isinstance(error, (TimeoutError, EOFError)):
                raise OSError("the process that reads it did not answer") from None
            raise
        self._children.put_back(child, rests, 0.0)
        if answer[:1] == b"D":
            return answer[1:]
        if answer[:1] == b"C":
            raise RevisionChanged("the file changed while it was read")
        raise OSError(answer[1:].decode("utf-8", "replace"))


def _children() -> int:
    return min(_MOST_CHILDREN, len(os.sched_getaffinity(0)))


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def how_far(contents: Iterable[Content]) -> str:
    """How far files have been hashed, in words."""
    done, total = progress_of(contents)
    return f"{_size(done)} of {_size(total)}"


def progress_of(contents: Iterable[Content]) -> tuple[int, int]:
    """Bytes that have been hashed, and all that are to be."""
    listed = list(contents)
    return sum(one.done for one in listed), sum(one.total for one in listed)
