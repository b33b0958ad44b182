"""An object store: its listing, and reads of ranges in parallel, each with retries and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from h5feed.errors import BadParameter, FeedError, RevisionChanged, SourceUnavailable, Unreadable
from h5feed.stored.scratch import Bytes

from ...store_address import StoreAddress
from .claims import Claims
from .fetching_ahead import FetchingAhead
from .link import Link
from .range_cache import RangeCache

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyStore

T = TypeVar("T")

MOST_AT_ONCE = 128
"""Ranges that a process fetches at the same time."""

MOST_AHEAD = 96
"""Of these, that nobody has asked for yet."""

_ATTEMPT_SECONDS = 10.0
"""Timeout of one attempt. A store that is slow for one range usually answers the next attempt at once."""

_CONNECT_SECONDS = 5.0

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds between attempts: twice as long each time, and at random between half of that and all of it."""

_LATE_SECONDS = 5.0
"""Added to the deadline of a fetch before its thread counts as hung."""

_SLOW_SECONDS = 5.0
MOST_SLOW = 4
"""Threads that may wait for ranges of one object for longer than this. All others are for other objects, which may be
on the local disk, or in a part of the store that answers."""

_STATUS = re.compile(r"status code: (\d{3})")

_METADATA_SERVICE = "169.254.169.254"
"""Where cloud machines get credentials: asked if the environment has none."""


@dataclass(frozen=True)
class StoredObject:
    """One version of an object.

    Attributes
    ----------
    key : str
        Relative to the prefix of the store.
    size : int
        Bytes.
    e_tag : str
        The store's name for its content, with quotes.
    """

    key: str
    size: int
    e_tag: str

    def digest(self, store: str) -> bytes:
        """Stands in for a digest of the content, which only the store knows.

        Parameters
        ----------
        store : str
            `ObjectStore.place`: other stores may give the same ETag to another content.
        """
        return hashlib.blake2b(repr(("store version", store, *asdict(self).values())).encode()).digest()


class _Cut(Exception):
    """Less came than was asked for."""


class ObjectStore:
    """The objects below a prefix of a bucket. Address and credentials of the store come from the environment.

    Parameters
    ----------
    address : StoreAddress
    timeout : float
        Seconds that one range may take, all attempts together.
    cache : RangeCache, optional
        What was fetched before.
    ahead_bytes : int
        Bound on what is fetched ahead.
    claims : Claims, optional
        See `FetchingAhead`.
    is_alone : bool
        See `FetchingAhead`.
    """

    def __init__(
        self,
        address: StoreAddress,
        timeout: float,
        cache: RangeCache | None = None,
        *,
        ahead_bytes: int = 0,
        claims: Claims | None = None,
        is_alone: bool = True,
    ) -> None:
        self.cache = cache
        self.ahead = FetchingAhead(self, ahead_bytes, claims, is_alone)
        self._url = address.url
        self._timeout = timeout
        self.place = f"{_endpoint() or ''} {address.url}"
        """Names the store among all others."""
        self._store = _opened(address)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._slow: dict[str, int] = {}
        """Threads that wait for long, by the name of the object."""
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._slots_ahead = asyncio.Semaphore(MOST_AHEAD)
        self.link = Link()
        """How fast the store answers."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="h5feed-store", daemon=True)
        self._thread.start()
        self.on_change: Callable[[], None] = lambda: None
        """Called when an object is found to be another one than was listed, or none. From any thread."""
        self.fetched_bytes = 0
        """Received so far."""
        self.fetches = 0
        """Requests for ranges that succeeded so far."""

    def close(self) -> None:
        """Give up all fetches."""
        self.ahead.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LATE_SECONDS)

    def begin(
        self, one: StoredObject, ranges: Sequence[tuple[int, int]], *, ahead: bool = False
    ) -> list[Future[Bytes]]:
        """Start to fetch ranges, given as offset and size. They must lie within the object.

        The futures raise RevisionChanged, SourceUnavailable or Unreadable.

        Parameters
        ----------
        ahead : bool
            Nobody has asked for them yet: they leave some of the requests at a time to others.
        """
        futures: list[Future[Bytes]] = [Future() for _ in ranges]
        if not ranges:
            return futures
        slots = self._slots_ahead if ahead else None

        def start() -> None:
            for future, (offset, nbytes) in zip(futures, ranges, strict=True):
                _forward(self._loop.create_task(self._range(one, offset, nbytes, slots)), future)

        self._loop.call_soon_threadsafe(start)
        return futures

    def read(self, one: StoredObject, offset: int, nbytes: int) -> bytes:
        """One range, see `begin`."""
        return self.wait(one, self.begin(one, [(offset, nbytes)])[0]).tobytes()

    def wait(self, one: StoredObject, future: Future[T]) -> T:
        """The result of what `begin` has started. Raises SourceUnavailable, too, if enough threads wait already."""
        if future.done():
            return future.result()
        if self._slow.get(one.key, 0) >= MOST_SLOW:
            raise _unavailable("other requests wait for the same object")
        try:
            return future.result(min(_SLOW_SECONDS, self._timeout))
        except FuturesTimeout:
            with self._waiting_slowly(one):
                try:
                    return future.result(max(0.0, self._timeout - _SLOW_SECONDS) + _LATE_SECONDS)
                except FuturesTimeout:
                    raise _unavailable("it does not answer") from None

    @contextlib.contextmanager
    def _waiting_slowly(self, one: StoredObject) -> Iterator[None]:
        with self._lock:
            if self._slow.get(one.key, 0) >= MOST_SLOW:
                raise _unavailable("other requests wait for the same object")
            self._slow[one.key] = self._slow.get(one.key, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._slow[one.key] -= 1
                if not self._slow[one.key]:
                    del self._slow[one.key]

    def head(self, key: str) -> StoredObject:
        """The current version of an object, asked for once.

        Raises
        ------
        Unreadable, SourceUnavailable
        """

        async def head() -> StoredObject:
            return _stored(await self._store.head_async(key))

        return self._once(head, _ATTEMPT_SECONDS)

    def list(self, most: int, seconds: float) -> list[StoredObject]:
        """All objects, at most `most`, within so many seconds; asked for once.

        Raises
        ------
        Unreadable, SourceUnavailable
        """

        async def listed() -> list[StoredObject]:
            found: list[StoredObject] = []
            pages: AsyncIterator[Any] = self._store.list()
            async for page in pages:
                found += (_stored(meta) for meta in page)
                if len(found) > most:
                    raise Unreadable(f"it has more than {most:,} objects below {self._url}: serve a longer prefix")
            return found

        return self._once(listed, seconds)

    def _once(self, work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T:
        async def attempt() -> T:
            try:
                async with asyncio.timeout(seconds):
                    return await work()
            except Exception as error:
                problem = _problem(error, None)
                raise problem from problem.__cause__

        future = asyncio.run_coroutine_threadsafe(attempt(), self._loop)
        try:
            return future.result(seconds + _LATE_SECONDS)
        except FuturesTimeout:
            future.cancel()
            raise _unavailable("it does not answer") from None

    async def _range(
        self, one: StoredObject, offset: int, nbytes: int, slots: asyncio.Semaphore | None = None
    ) -> Bytes:
        # The version is asked for and checked: some stores ignore the condition.
        wanted: Any = {"range": (offset, offset + nbytes), "if_match": one.e_tag}

        async def fetch() -> Bytes:
            began = self._loop.time()
            answer = await self._store.get_async(one.key, options=wanted)
            if (answer.meta["e_tag"], answer.meta["size"]) != (one.e_tag, one.size):
                raise _changed(one)
            data = await answer.bytes_async()
            # The library returns what came until the end of the object or the connection.
            if len(data) != nbytes:
                raise _Cut
            self.fetches += 1
            self.fetched_bytes += nbytes
            now = self._loop.time()
            self.link.note(now, now - began, nbytes)
            return np.frombuffer(data, np.uint8)

        async with slots or contextlib.nullcontext():
            return await self._persist(fetch, one)

    async def _persist(self, attempt: Callable[[], Coroutine[Any, Any, T]], one: StoredObject) -> T:
        """Repeat an attempt until it succeeds, fails for good, or the time is over."""
        until = self._loop.time() + self._timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout_at(min(until, self._loop.time() + _ATTEMPT_SECONDS)), self._slots:
                    return await attempt()
            except Exception as error:
                problem = _problem(error, one)
                if isinstance(problem, (RevisionChanged, Unreadable)):
                    self.on_change()
                wait = pause * random.uniform(0.5, 1)
                if not isinstance(problem, SourceUnavailable) or self._loop.time() + wait >= until:
                    raise problem from problem.__cause__
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)


def check(address: StoreAddress) -> None:
    """Raise BadParameter if a store cannot be used with this installation and environment, as far as can be known
    without a request.
    """
    _opened(address)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _opened(address: StoreAddress) -> AnyStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        raise BadParameter("object stores need obstore: pip install 'h5feed-server[object-store]'") from None
    options: Any = {
        "timeout": timedelta(seconds=_ATTEMPT_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
    }
    config: Any = {}
    endpoint = _endpoint()
    if endpoint is not None:
        config["endpoint"] = endpoint
        # Whoever sets such an address wants it.
        options["allow_http"] = endpoint.startswith("http://")
    try:
        # Attempts are repeated here, because the library does not know the deadline.
        return S3Store(
            address.bucket,
            prefix=address.prefix or None,
            config=config,
            client_options=options,
            retry_config={"max_retries": 0},
        )
    except (BaseError, ValueError) as error:
        raise BadParameter(f"{address.url}: {str(error).splitlines()[0][:200]}") from None


def _forward(task: asyncio.Task[T], future: Future[T]) -> None:
    def done(ended: asyncio.Task[T]) -> None:
        if ended.cancelled():
            future.set_exception(_unavailable("the server is stopping"))
        elif (error := ended.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(ended.result())

    task.add_done_callback(done)


def _stored(meta: Any) -> StoredObject:
    return StoredObject(str(meta["path"]), int(meta["size"]), meta["e_tag"] or "")


def _problem(error: Exception, one: StoredObject | None) -> FeedError:
    """The error to raise for one of the library, which tells most of them in words alone."""
    from obstore import exceptions

    if isinstance(error, FeedError):
        return error
    if isinstance(error, TimeoutError):
        return _unavailable("it does not answer in time")
    if isinstance(error, _Cut):
        return _unavailable("it sent less than was asked for")
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
        return _refused()
    if isinstance(error, (FileNotFoundError, exceptions.NotFoundError)):
        return Unreadable("the store has no such object")
    if one is not None and isinstance(error, exceptions.PreconditionError):
        return _changed(one)
    said = str(error)
    if _METADATA_SERVICE in said:
        return Unreadable(
            "the server has no credentials for the store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    match = _STATUS.search(said)
    status = int(match[1]) if match else 0
    if status in (401, 403):
        return _refused()
    if status == 404:
        return Unreadable("the store has no such bucket or object")
    if one is not None and status in (412, 416):
        # The range lies within the version that was listed.
        return _changed(one)
    if status and status < 500 and status not in (408, 425, 429):
        return Unreadable(f"the store refused the request with status {status}")
    return _unavailable(f"it answered with status {status}" if status else "it cannot be reached")


def _refused() -> Unreadable:
    refused = Unreadable("the store refused the server's credentials")
    # Rights may be granted at any time: with this cause, it is tried again when somebody asks.
    refused.__cause__ = PermissionError(errno.EACCES, "refused by the store")
    return refused


def _unavailable(why: str) -> SourceUnavailable:
    return SourceUnavailable(f"the object store is not available at the moment: {why}", retry_after=2)


def _changed(one: StoredObject) -> RevisionChanged:
    return RevisionChanged(
        f"the object {one.key!r} was replaced in its store: request the dataset again to get its new revision"
    )
