"""Writes files into an object store: by multipart upload, in bounded memory, and never over an object by mistake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent import futures
from concurrent.futures import Future
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from h5feed.errors import BadParameter, FeedError, SourceUnavailable, Unreadable

from ...store_address import StoreAddress
from .cloud import CloudStore, opened
from .content_note import KEY, ContentNote

_PART_BYTES = 8 << 20
"""Size of a part, as other programs choose it: then copies that they make have the same ETag."""

_MOST_PARTS = 9000
"""Stores allow 10,000 parts. Larger files have larger parts."""

_ALIGNED = 4 << 20
"""Parts have a multiple of this many bytes."""

_WINDOW_BYTES = 128 << 20
"""Bytes of parts that are sent at the same time. A single part may have more."""

_MOST_AT_ONCE = 8

_REQUEST_SECONDS = 60.0
"""Timeout of a request with a part of `_PART_BYTES`; in proportion for larger ones."""

_RETRY_SECONDS = 120.0
"""A part is sent again for so long, with pauses from `_FIRST_PAUSE` to `_LONGEST_PAUSE`."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0

_MOST_RETRIES = 20

_POLL_SECONDS = 0.2

_ABORT_SECONDS = 30.0
"""How long aborting an upload may take."""


class ObjectExists(BadParameter):
    """An object of that name exists, and must not be replaced."""


class ObjectState(Enum):
    """Whether an object exists, and has the expected content.

    Attributes
    ----------
    ABSENT, DIFFERENT : ObjectState
        There is no object of this name; there is one with other content.
    UNCONFIRMED : ObjectState
        The metadata of the object match the content, but its ETag does not confirm this.
    COMPLETE : ObjectState
        The ETag confirms that the object has the content.
    """

    ABSENT = "absent"
    DIFFERENT = "different"
    UNCONFIRMED = "unconfirmed"
    COMPLETE = "complete"


class _Found(NamedTuple):
    size: int
    e_tag: str
    note: str


class _GivenUp(Exception):
    """Ends an upload from within, so that the library aborts it and the store deletes its parts."""


def part_bytes(size: int) -> int:
    """Bytes of a part of a file of this size; a file that is no larger is sent by one request."""
    least = -(-size // _MOST_PARTS)
    return max(_PART_BYTES, -(-least // _ALIGNED) * _ALIGNED)


class Uploads:
    """Writes objects below a prefix.

    Parameters
    ----------
    address : StoreAddress
    """

    def __init__(self, address: StoreAddress) -> None:
        if address.is_web:
            raise BadParameter(f"{address.url}: web servers cannot be written to")
        self._address = address
        self._problem = CloudStore(address).problem
        self._small = self._opened(_REQUEST_SECONDS)

    def _opened(self, seconds: float) -> Any:
        pauses = {
            "init_backoff": timedelta(seconds=_FIRST_PAUSE),
            "max_backoff": timedelta(seconds=_LONGEST_PAUSE),
            "base": 2,
        }
        retry_timeout = timedelta(seconds=max(_RETRY_SECONDS, 2 * seconds))
        retries: Any = {"max_retries": _MOST_RETRIES, "retry_timeout": retry_timeout, "backoff": pauses}
        return opened(self._address, seconds, retries)

    def url(self, key: str) -> str:
        """That of an object."""
        return f"{self._address.url}/{key}"

    def check_bucket(self) -> None:
        """Raise Unreadable if there is no such bucket: other requests cannot tell it from a missing object."""
        try:
            next(iter(self._small.list(chunk_size=1)), None)
        except FileNotFoundError:
            raise _no_bucket() from None
        except Exception as error:
            problem = self._problem(error, None)
            # Whoever may write need not have the right to list.
            if not isinstance(problem.__cause__, PermissionError):
                raise problem from problem.__cause__

    def look(self, key: str, note: ContentNote | None = None) -> ObjectState:
        """Compare the object of this name with the content that it should have.

        Raises
        ------
        Unreadable, SourceUnavailable
        """
        found = self._found(key)
        if found is None:
            return ObjectState.ABSENT
        if note is None or found.size != note.size or found.note != str(note):
            return ObjectState.DIFFERENT
        return ObjectState.COMPLETE if note.is_of(found.size, found.e_tag) else ObjectState.UNCONFIRMED

    def remove(self, key: str) -> None:
        """Delete an object, if it is there."""
        if self.look(key) != ObjectState.ABSENT:
            self._ask(lambda: self._small.delete(key))

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write a small object, over any other."""
        self._ask(lambda: self._small.put(key, content, mode="overwrite", use_multipart=False))

    def put_file(
        self, path: Path, key: str, note: ContentNote, *, replace: bool, on_sent: Callable[[int], None]
    ) -> None:
        """Upload a file as an object with a note. If this fails or is interrupted, the upload is aborted, so the store
        keeps neither an object nor parts. Parts may stay if the last ones are in flight, or if it does not answer.

        Parameters
        ----------
        note : ContentNote
            Of the file.
        replace : bool
            Whether it may replace an object.
        on_sent : callable
            Called with the number of bytes that have been given to the network so far, several times a second
            and at the end.

        Raises
        ------
        ObjectExists
            There is an object of that name, or another program has written one at the same time.
        Unreadable, SourceUnavailable
            The store refuses it, or does not answer for minutes.
        OSError
            The file cannot be read.
        """
        from obstore import exceptions

        part = part_bytes(note.size)
        seconds = _REQUEST_SECONDS * part / _PART_BYTES
        store = self._small if part == _PART_BYTES else self._opened(seconds)
        sending = _Sending(path, note.size, part)
        if not replace:
            sending.at_end = lambda: self._check_free(key)

        async def send() -> Any:
            # One request has the condition that there is no such object, if the store knows it. Several have not.
            mode = "create" if note.size <= part and not replace else "overwrite"
            content: Any = sending.parts()
            if note.size <= part:
                content = b"".join([piece async for piece in content])
            at_once = max(1, min(_MOST_AT_ONCE, _WINDOW_BYTES // part))
            return await store.put_async(
                key,
                content,
                attributes={KEY: str(note)},
                mode=mode,
                use_multipart=note.size > part,
                chunk_size=part,
                max_concurrency=at_once,
            )

        try:
            e_tag = _wait(_started(send), sending, seconds, on_sent)["e_tag"]
        except (exceptions.BaseError, FileNotFoundError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # Of the local file: the library's have no number.
                raise
            # The answer to the request that has succeeded may be lost; and then, the next one finds no upload.
            if self._is_whole(key, note):
                return
            if isinstance(error, FileNotFoundError):
                raise _no_bucket() from None
            if isinstance(error, (exceptions.AlreadyExistsError, exceptions.PreconditionError)):
                raise self._taken(key) from None
            problem = self._problem(error, None)
            raise problem from problem.__cause__
        found = self._found(key)
        if found is None or found.e_tag != e_tag or (found.size, found.note) != (note.size, str(note)):
            raise ObjectExists(f"{self.url(key)} was replaced or deleted by another program just after it was written")

    def _is_whole(self, key: str, note: ContentNote) -> bool:
        with contextlib.suppress(FeedError):
            return self.look(key, note) == ObjectState.COMPLETE
        return False

    async def _check_free(self, key: str) -> None:
        try:
            await self._small.head_async(key)
        except FileNotFoundError:
            return
        raise self._taken(key)

    def _taken(self, key: str) -> ObjectExists:
        return ObjectExists(f"{self.url(key)} already exists: choose another name, or pass overwrite=True")

    def _ask(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            problem = self._problem(error, None)
            raise problem from problem.__cause__

    def _found(self, key: str) -> _Found | None:
        try:
            answer = self._small.get(key, options={"head": True})
        except FileNotFoundError:
            return None
        except Exception as error:
            problem = self._problem(error, None)
            raise problem from problem.__cause__
        meta = answer.meta
        return _Found(int(meta["size"]), str(meta["e_tag"] or ""), str(answer.attributes.get(KEY, "")))


class _Sending:
    """Reads the parts of a file, as the library asks for them."""

    def __init__(self, path: Path, size: int, part: int) -> None:
        self._path, self._size, self._part = path, size, part
        self.sent = 0
        self.given_up = threading.Event()
        self.at_end: Callable[[], Awaitable[None]] | None = None
        """Called when the last part is on its way: after it, the object comes into being."""

    async def parts(self) -> AsyncIterator[bytes]:
        with open(self._path, "rb", buffering=0) as file:
            for begin in range(0, self._size, self._part):
                self._check()
                yield _read(file.fileno(), begin, min(self._part, self._size - begin))
                self.sent = min(self._size, begin + self._part)
        if self.at_end is not None:
            await self.at_end()
        self._check()

    def _check(self) -> None:
        # Cancelled, the library would leave its parts in the store. An error from here makes it delete them.
        if self.given_up.is_set():
            raise _GivenUp


def _read(descriptor: int, begin: int, nbytes: int) -> bytes:
    pieces: list[bytes] = []
    while nbytes and (piece := os.pread(descriptor, nbytes, begin)):
        pieces.append(piece)
        begin, nbytes = begin + len(piece), nbytes - len(piece)
    if nbytes:
        raise OSError("the file has become shorter while it was sent")
    return b"".join(pieces)


def _started(work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
    """Run in a thread that cannot hold up the end of the process."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(work()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="h5feed-upload", daemon=True).start()
    return future


def _wait(future: Future[Any], sending: _Sending, seconds: float, on_sent: Callable[[int], None]) -> Any:
    """The result of an upload. It is given up if it is interrupted, or if nothing is sent for too long."""
    # The library repeats requests for so long, and each of them may take `seconds`.
    patience = max(_RETRY_SECONDS, 2 * seconds) + 2 * seconds
    began, before = time.monotonic(), -1
    try:
        while not futures.wait([future], _POLL_SECONDS).done:
            on_sent(sending.sent)
            if sending.sent != before:
                began, before = time.monotonic(), sending.sent
            elif time.monotonic() - began > patience:
                raise SourceUnavailable("the object store has accepted no part of the upload for minutes")
    except BaseException:
        sending.given_up.set()
        futures.wait([future], _ABORT_SECONDS)
        raise
    result = future.result()
    on_sent(sending.sent)
    return result


def _no_bucket() -> Unreadable:
    return Unreadable("the store has no such bucket")
