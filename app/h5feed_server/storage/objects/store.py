"""An object store: its listing, and reads of ranges in parallel, each with retries and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from h5feed.errors import FeedError, RevisionChanged, SourceUnavailable, Unreadable
from h5feed.stored.scratch import Bytes

from ...sharing.metrics import BOUNDS
from ...store_address import StoreAddress
from .backend import ATTEMPT_SECONDS, MOST_AT_ONCE, Backend, Cut, StoredObject, missing, of_status, unavailable
from .content_note import ContentNote
from .fetching_ahead import FetchingAhead
from .link import Link
from .parts import Piece
from .range_cache import RangeCache
from .request_rate import RequestRate
from .slots import Slots

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds between attempts: twice as long each time, and at random between half of that and all of it."""

_LATE_SECONDS = 5.0
"""Added to the deadline of a fetch before its thread counts as hung."""

_SLOW_SECONDS = 5.0
MOST_SLOW = 4
"""Threads that may wait for ranges of one object for longer than this. All others are for other objects, which may be
on the local disk, or in a part of the store that answers."""

_OUTCOMES = {RevisionChanged: "changed", Unreadable: "refused", SourceUnavailable: "unavailable"}


class Traffic:
    """What a store was asked for so far, by this process.

    Attributes
    ----------
    outcomes : Counter of str
        Requests that have ended; see `STORE_OUTCOMES` in `sharing.metrics`.
    durations : list of float
        How many took how long, by the buckets of `BOUNDS`; then the sum of their seconds.
    nbytes : int
        Size of the ranges that came.
    running : int
        Requests that the store has not answered yet.
    """

    def __init__(self) -> None:
        self.outcomes = Counter[str]()
        self.durations = [0.0] * (len(BOUNDS) + 2)
        self.nbytes = 0
        self.running = 0

    def end(self, outcome: str, seconds: float) -> None:
        """Count a request that has ended."""
        self.running -= 1
        self.outcomes[outcome] += 1
        self.durations[bisect_left(BOUNDS, seconds)] += 1
        self.durations[-1] += seconds


class ObjectStore:
    """The objects below a prefix of a bucket, or a folder of a web server.

    Parameters
    ----------
    address : StoreAddress
    timeout : float
        Seconds that one range may take, all attempts together.
    cache : RangeCache, optional
        What was fetched before; other stores may share it.
    ahead : FetchingAhead, optional
        Fetches ahead of this store and of others; by default, nothing is. Its cache is `cache`.
    rate : RequestRate, optional
        Limits the requests to this store and to others; by default, nothing does.
    most_slow : int, optional
        Threads that may wait for ranges of this store for long, whatever their objects. By default, only those of one
        object are limited.

    Raises
    ------
    BadParameter
        The store cannot be used with this installation and environment.
    """

    def __init__(
        self,
        address: StoreAddress,
        timeout: float,
        cache: RangeCache | None = None,
        *,
        ahead: FetchingAhead | None = None,
        rate: RequestRate | None = None,
        most_slow: int | None = None,
    ) -> None:
        self.cache = cache
        self.ahead = ahead or FetchingAhead(cache, 0, None, True)
        self._rate = rate or RequestRate(0)
        self._most_slow = most_slow
        self._is_closed = False
        self._url = address.url
        self._timeout = timeout
        self.place = address.place
        """Names the store among all others."""
        self._backend = _opened(address)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._slow: dict[str, int] = {}
        """Threads that wait for long, by the name of the object."""
        self._slots = Slots()
        self.link = Link()
        """How fast the store answers."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="h5feed-store", daemon=True)
        self._thread.start()
        self.on_change: Callable[[], None] = lambda: None
        """Called when an object is found to be another one than was listed, or none. From any thread."""
        self.traffic = Traffic()

    def close(self) -> None:
        """Give up all fetches: those who wait for them, and who ask for more, get SourceUnavailable."""
        self._is_closed = True
        if not self._thread.is_alive():
            return

        async def give_up() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_LATE_SECONDS)
            await self._backend.close()

        with contextlib.suppress(FuturesTimeout, RuntimeError):
            asyncio.run_coroutine_threadsafe(give_up(), self._loop).result(2 * _LATE_SECONDS)
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
        if self._is_closed or self._is_slow(one):
            # Nobody would wait for them, and many such requests would fill the memory.
            for future in futures:
                future.set_exception(_ended() if self._is_closed else _busy())
            return futures

        def start() -> None:
            for future, (offset, nbytes) in zip(futures, ranges, strict=True):
                _forward(self._loop.create_task(self._range(one, offset, nbytes, ahead)), future)

        self._loop.call_soon_threadsafe(start)
        return futures

    def read(self, one: StoredObject, offset: int, nbytes: int) -> bytes:
        """One range, see `begin`."""
        return self.wait(one, self.begin(one, [(offset, nbytes)])[0]).tobytes()

    def wait(self, one: StoredObject, future: Future[T]) -> T:
        """The result of what `begin` has started. Raises SourceUnavailable, too, if enough threads wait already."""
        if future.done():
            return future.result()
        if self._is_slow(one):
            raise _busy()
        try:
            return future.result(min(_SLOW_SECONDS, self._timeout))
        except FuturesTimeout:
            with self._waiting_slowly(one):
                try:
                    return future.result(max(0.0, self._timeout - _SLOW_SECONDS) + _LATE_SECONDS)
                except FuturesTimeout:
                    raise unavailable("it does not answer") from None

    def wait_for_others(self, one: StoredObject, digest: bytes, piece: Piece) -> None:
        """Return when no other worker is fetching a range: if it has succeeded, it is on the disk. Like `wait`, raises
        SourceUnavailable if enough threads wait already.
        """
        if (claims := self.ahead.claims) is None:
            return
        if self._is_slow(one):
            raise _busy()
        if not claims.wait(digest, piece, min(_SLOW_SECONDS, self._timeout)):
            with self._waiting_slowly(one):
                claims.wait(digest, piece, max(0.0, self._timeout - _SLOW_SECONDS))

    def _is_slow(self, one: StoredObject) -> bool:
        """Whether so many threads wait for an object, or for the store, that no other is to."""
        if not self._slow:
            return False
        if self._slow.get(one.key, 0) >= MOST_SLOW:
            return True
        return self._most_slow is not None and sum(list(self._slow.values())) >= self._most_slow

    @property
    def window_bytes(self) -> int:
        """How much to fetch ahead of an order: twice what the store sends within the time that it takes to answer."""
        return min(self.ahead.max_bytes, self.link.window_bytes)

    @contextlib.contextmanager
    def _waiting_slowly(self, one: StoredObject) -> Iterator[None]:
        with self._lock:
            if self._is_slow(one):
                raise _busy()
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
        return self._once(lambda: self._backend.head(key), self._timeout)

    def find(self, key: str) -> StoredObject | None:
        """The current version of an object; None if there is none. Asked for again until the time of a range is over.

        Raises
        ------
        Unreadable, SourceUnavailable
        """

        async def head() -> StoredObject | None:
            try:
                return await self._backend.head(key)
            except FileNotFoundError:
                return None

        future = asyncio.run_coroutine_threadsafe(self._persist(head, None), self._loop)
        try:
            return _result(future, self._timeout)
        except Unreadable as error:
            if error.detail in (missing().detail, of_status(404, None).detail):
                return None
            raise

    def with_contents(self, objects: Sequence[StoredObject], seconds: float) -> dict[str, StoredObject]:
        """The objects with what their metadata say of their content, by key, at most `MOST_AT_ONCE` asked for at once.

        Those are missing that were replaced, or that the store has not told within so many seconds.
        """
        known: dict[str, StoredObject] = {}
        if not objects:
            return known

        async def ask_all(waiting: Iterator[StoredObject]) -> None:
            for one in waiting:
                try:
                    note = ContentNote.parse(await self._persist(partial(self._backend.note, one), one))
                    is_known = note is not None and note.is_of(one.size, one.e_tag)
                    known[one.key] = replace(one, content=note.digest if note is not None and is_known else "")
                except Unreadable:
                    known[one.key] = replace(one, content=None)
                except (RevisionChanged, SourceUnavailable):
                    continue

        async def all_of_them() -> None:
            waiting = iter(objects)
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(ask_all(waiting) for _ in range(min(MOST_AT_ONCE, len(objects)))))

        future = asyncio.run_coroutine_threadsafe(all_of_them(), self._loop)
        with contextlib.suppress(TimeoutError, CancelledError):
            future.result(seconds + _LATE_SECONDS)
        return dict(known)

    def list(self, most: int, seconds: float) -> list[StoredObject]:
        """All objects, at most `most`, within so many seconds; asked for once.

        Raises
        ------
        Unreadable, SourceUnavailable
        """

        async def listed() -> list[StoredObject]:
            found: list[StoredObject] = []
            async for page in self._backend.pages():
                found += page
                if len(found) > most:
                    raise Unreadable(f"it has more than {most:,} objects below {self._url}: use a longer prefix")
            return found

        return self._once(listed, seconds)

    def _once(self, work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T:
        return _result(asyncio.run_coroutine_threadsafe(self._attempt(work, None, seconds), self._loop), seconds)

    async def _range(self, one: StoredObject, offset: int, nbytes: int, ahead: bool) -> Bytes:
        data = await self._persist(lambda: self._fetch(one, offset, nbytes), one, self.on_change, ahead=ahead)
        self.traffic.nbytes += nbytes
        return data

    async def _fetch(self, one: StoredObject, offset: int, nbytes: int) -> Bytes:
        began = self._loop.time()
        data = await self._backend.fetch(one, offset, nbytes)
        now = self._loop.time()
        self.link.note(now, now - began, nbytes)
        return data

    async def _persist(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        one: StoredObject | None,
        on_change: Callable[[], None] = lambda: None,
        *,
        ahead: bool = False,
    ) -> T:
        """Repeat an attempt until it succeeds, fails for good, or the time is over."""
        until = self._loop.time() + self._timeout
        pause = _FIRST_PAUSE
        problem: FeedError | None = None
        while True:
            try:
                async with asyncio.timeout_at(until), self._slots.one(one.key if one else None, ahead=ahead):
                    await self._turn(until)
                    return await self._attempt(work, one, ATTEMPT_SECONDS)
            except (FeedError, TimeoutError) as error:
                # What the attempts before have met says more than that the time was over during the last.
                if problem is None or isinstance(error, FeedError):
                    problem = self._problem(error, one)
                if isinstance(problem, (RevisionChanged, Unreadable)):
                    on_change()
                wait = pause * random.uniform(0.5, 1)
                if not isinstance(problem, SourceUnavailable) or self._loop.time() + wait >= until:
                    raise problem from problem.__cause__
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _turn(self, until: float) -> None:
        """Wait until another request may be sent."""
        wait = self._rate.wait(self._loop.time(), until)
        if wait is None:
            raise unavailable("H5FEED_STORE_REQUEST_RATE allows no more requests in time")
        await asyncio.sleep(wait)

    async def _attempt(self, work: Callable[[], Coroutine[Any, Any, T]], one: StoredObject | None, seconds: float) -> T:
        """Ask the store once, and count it. Raises FeedErrors only."""
        self.traffic.running += 1
        began = self._loop.time()
        # Also if the deadline of the caller ends it.
        outcome = "timeout"
        try:
            async with asyncio.timeout(seconds):
                result = await work()
            outcome = "ok"
            if one is not None:
                self._slots.has_answered(one.key)
            return result
        except Exception as error:
            problem = self._problem(error, one)
            if not isinstance(error, TimeoutError):
                outcome = _OUTCOMES.get(type(problem), "unavailable")
            raise problem from problem.__cause__
        finally:
            seconds = self._loop.time() - began
            self.traffic.end(outcome, seconds)
            # The libraries have timeouts of their own, and name them differently.
            if one is not None and outcome in ("timeout", "unavailable") and seconds >= _SLOW_SECONDS:
                self._slots.has_hung(one.key)

    def _problem(self, error: Exception, one: StoredObject | None) -> FeedError:
        if isinstance(error, FeedError):
            return error
        if isinstance(error, TimeoutError):
            return unavailable("it does not answer in time")
        if isinstance(error, Cut):
            return unavailable("it sent less than was asked for")
        return self._backend.problem(error, one)


def check(address: StoreAddress) -> None:
    """Raise BadParameter if a store cannot be used with this installation and environment, as far as can be known
    without a request.
    """
    _opened(address)


def _opened(address: StoreAddress) -> Backend:
    if address.is_web:
        from .web_server import WebServer

        return WebServer(address)
    from .cloud import CloudStore

    return CloudStore(address)


def _busy() -> SourceUnavailable:
    return unavailable("other requests wait for the same object")


def _ended() -> SourceUnavailable:
    return unavailable("the server stops, or has ceased to serve it")


def _result(future: Future[T], seconds: float) -> T:
    try:
        return future.result(seconds + _LATE_SECONDS)
    except FuturesTimeout:
        future.cancel()
        raise unavailable("it does not answer") from None
    except CancelledError:
        raise _ended() from None


def _forward(task: asyncio.Task[T], future: Future[T]) -> None:
    def done(ended: asyncio.Task[T]) -> None:
        if ended.cancelled():
            future.set_exception(_ended())
        elif (error := ended.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(ended.result())

    task.add_done_callback(done)
