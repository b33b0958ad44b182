"""Request bodies: bounded in size, and parsed without blocking other requests."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from h5feed.errors import BadParameter, FeedError, TooLarge, TooManyRequests
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ..sharing.caller import CALLER
from .dependencies import ServicesDep, in_thread
from .queries import RowsRequest

MAX_HELD_BYTES = 64 << 20
"""Bytes of posted bodies that are held while they come, per worker."""

_MAX_NAMES = 10_000
"""Members of objects in one body, and names in its lists of fields."""

_MEMBER = re.compile(rb'"\s*:')
"""Behind the name of a member of an object."""

_MAX_DIGITS = 24
"""Characters that a row id takes at most."""

JSON_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RowsRequest"}}},
    }
}
"""For the description of endpoints that read their body by `RowsPosted`."""


class Uploads:
    """Bytes that are held of bodies under way, by caller."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: dict[str, int] = {}

    @contextmanager
    def of(self, caller: str) -> Iterator[Upload]:
        """One body of this caller's."""
        upload = Upload(self, caller)
        try:
            yield upload
        finally:
            self.add(caller, -upload.nbytes)

    def add(self, caller: str, nbytes: int) -> None:
        held = self._held.get(caller, 0) + nbytes
        others = len(self._held.keys() - {caller})
        # Alone up to all of it; beyond, who holds more than a share has to wait.
        if nbytes > 0 and sum(self._held.values()) + nbytes > self._max_bytes < held * (others + 1):
            raise TooManyRequests(
                f"{self._max_bytes} bytes of posted bodies are under way already; try again in a moment", retry_after=1
            )
        if held:
            self._held[caller] = held
        else:
            self._held.pop(caller, None)


class Upload:
    """Bytes of one body."""

    def __init__(self, uploads: Uploads, caller: str) -> None:
        self._uploads = uploads
        self._caller = caller
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        self._uploads.add(self._caller, nbytes)
        self.nbytes += nbytes


def longest_body(max_rows: int) -> int:
    """Bytes of the longest list of row ids that may be asked for."""
    return _MAX_DIGITS * max_rows + (1 << 16)


def check_content_type(request: Request, wanted: str) -> None:
    """Refuse a body of another kind.

    Raises
    ------
    BadParameter
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise BadParameter(f"Content-Type: {kind[:100] or 'none'}: send {wanted}")


async def pieces_of(request: Request, upload: Upload, longest: int, too_long: FeedError) -> AsyncIterator[bytes]:
    """The body of a request as it comes, of at most `longest` bytes.

    Raises
    ------
    FeedError
        `too_long`, or the body did not arrive.
    """
    try:
        async for piece in request.stream():
            if upload.nbytes + len(piece) > longest:
                raise too_long
            upload.add(len(piece))
            yield piece
    except ClientDisconnect:
        # An answer for nobody.
        raise BadParameter("the request body did not arrive in time") from None


async def _rows_posted(request: Request, services: ServicesDep) -> RowsRequest:
    check_content_type(request, "application/json")
    longest = longest_body(services.settings.max_rows)
    too_long = TooLarge(
        f"the request body is longer than {longest} bytes, which hold as many rows as a request may have"
    )
    if int(request.headers.get("content-length", "0")) > longest:
        raise too_long
    uploads: Uploads = request.app.state.uploads
    with uploads.of(CALLER.get()) as upload:
        body = bytearray()
        async for piece in pieces_of(request, upload, longest, too_long):
            body += piece
        return await in_thread(services, partial(_parsed, body, services.settings.max_rows))


RowsPosted = Annotated[RowsRequest, Depends(_rows_posted)]
"""The list of rows in a request's body, read by a thread."""


def _parsed(body: bytearray, max_rows: int) -> RowsRequest:
    # Counted first: what is none of ours may be a million things, each an object and an error.
    if sum(1 for _ in _MEMBER.finditer(body)) > _MAX_NAMES or body.count(b'"') > 2 * (max_rows + _MAX_NAMES):
        raise TooLarge(f"the body holds more than {_MAX_NAMES} names, or {max_rows} keys")
    if body.count(b",") > max_rows + _MAX_NAMES:
        raise TooLarge(f"the body lists more rows than the limit of {max_rows} per response")
    try:
        return RowsRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in problems]) from None
