"""Files of a plain web server: its folders are listed by pages with links, as nginx, Apache and Caddy make them.

A file is served only if the server proves that it answers requests for ranges, and names the version in an ETag.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import netrc
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np
from h5feed.errors import BadParameter, FeedError, Unreadable
from h5feed.net.http import httpx
from h5feed.stored.scratch import Bytes

from ...store_address import StoreAddress
from ...suffixes import ALL_SUFFIXES
from .backend import (
    ATTEMPT_SECONDS,
    CONNECT_SECONDS,
    MOST_AT_ONCE,
    Cut,
    StoredObject,
    missing,
    of_status,
    refused,
    replaced,
    unavailable,
)

_CLIENTS = 32
"""The library looks at all connections of a client for each request: many clients with few connections each take a
third of the time of one with all of them."""

_MOST_REDIRECTS = 5
_MOST_FOLDERS = 10_000
_DEEPEST = 32
"""Folders in folders: a link to a folder above would make endless ones."""

_MOST_PAGE_BYTES = 32 << 20

_PARSED_AT_ONCE = 64 << 10
"""Characters of a page."""

_MOST_UNPARSED = 1 << 20
"""Characters that the parser may keep until it finds their end: it begins with them again each time."""

_ASKED_TOGETHER = 16
"""Files of a folder whose versions are asked for at the same time."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class WebServer:
    """The files below a folder of a web server.

    Parameters
    ----------
    address : StoreAddress

    Raises
    ------
    BadParameter
        The file with credentials, or the certificates or the proxy of the environment cannot be used.
    """

    def __init__(self, address: StoreAddress) -> None:
        self._base = f"{address.url}/"
        self._advice = address.advice
        auth = _credentials()
        most = MOST_AT_ONCE // _CLIENTS
        try:
            verify = httpx.create_ssl_context()
            self._clients = [
                httpx.AsyncClient(
                    auth=auth,
                    verify=verify,
                    timeout=httpx.Timeout(ATTEMPT_SECONDS, connect=CONNECT_SECONDS),
                    limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                    # As stored: ranges of a compressed response are of no use.
                    headers={"accept-encoding": "identity", "user-agent": "h5feed-server"},
                )
                for _ in range(_CLIENTS)
            ]
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            # Certificates (SSL_CERT_FILE) or a proxy (HTTPS_PROXY) that cannot be used.
            raise BadParameter(f"{address.url}: SSL_CERT_FILE or a proxy of the environment: {error}") from None
        self._next = itertools.cycle(self._clients)

    async def head(self, key: str) -> StoredObject:
        """See `Backend`. The first byte is asked for, because this also proves that ranges are heeded."""
        async with self._answer(self._url(key), {"range": "bytes=0-0"}) as answer:
            status, headers = answer.status_code, answer.headers
            if (status == 416 and headers.get("content-range") == "bytes */0") or (
                status == 200 and headers.get("content-length") == "0"
            ):
                return StoredObject(key, 0, "", "it is empty")
            if status == 200:
                return StoredObject(key, 0, "", _WHOLE)
            if status != 206:
                raise _of_status(status, None, self._advice)
            _, _, size = _range_of(answer)
            return StoredObject.of(key, size, headers.get("etag"))

    async def pages(self) -> AsyncIterator[list[StoredObject]]:
        """See `Backend`."""
        folders = [("", 0)]
        seen = 0
        while folders:
            folder, depth = folders.pop()
            seen += 1
            if seen > _MOST_FOLDERS or depth > _DEEPEST:
                raise Unreadable(
                    f"it has more than {_MOST_FOLDERS:,} folders, or more than {_DEEPEST} in each other, below "
                    f"{self._base}: serve a folder further down"
                )
            files, below = await self._links(folder)
            folders += [(f"{folder}{name}/", depth + 1) for name in below]
            for begin in range(0, len(files), _ASKED_TOGETHER):
                names = files[begin : begin + _ASKED_TOGETHER]
                yield list(await asyncio.gather(*(self._described(f"{folder}{name}") for name in names)))

    async def fetch(self, one: StoredObject, offset: int, nbytes: int) -> Bytes:
        """See `Backend`."""
        if not nbytes:
            return np.empty(0, np.uint8)
        asked = {"range": f"bytes={offset}-{offset + nbytes - 1}", "if-match": one.e_tag}
        async with self._answer(self._url(one.key), asked) as answer:
            if answer.status_code == 200:
                # The whole file, of this version or another.
                raise replaced(one) if _e_tag_of(answer) != one.e_tag else Unreadable(_WHOLE)
            if answer.status_code != 206:
                raise _of_status(answer.status_code, one, self._advice)
            begin, end, size = _range_of(answer)
            # Asked for and checked: some servers ignore the condition.
            if (_e_tag_of(answer), size) != (one.e_tag, one.size):
                raise replaced(one)
            if (begin, end) != (offset, offset + nbytes - 1):
                raise Cut
            data = np.empty(nbytes, np.uint8)
            done = 0
            async for chunk in answer.aiter_raw():
                if len(chunk) > nbytes - done:
                    raise Cut
                data[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
                done += len(chunk)
            if done != nbytes:
                raise Cut
            return data

    async def note(self, one: StoredObject) -> str:
        """See `Backend`. Web servers have no metadata of users."""
        return ""

    def problem(self, error: Exception, one: StoredObject | None) -> FeedError:
        """See `Backend`."""
        if isinstance(error, httpx.TimeoutException):
            return unavailable("it does not answer in time")
        if isinstance(error, httpx.ConnectError):
            # The library tells in words alone what a certificate lacks.
            why = str(error) if "certificate" in str(error).lower() else "it cannot be reached"
            return unavailable(why)
        if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError)):
            return unavailable("it ended the connection early")
        return unavailable("it cannot be reached")

    async def close(self) -> None:
        """See `Backend`."""
        for client in self._clients:
            await client.aclose()

    def _url(self, key: str) -> str:
        return self._base + quote(key)

    async def _described(self, key: str) -> StoredObject:
        """A file of a folder. If it alone cannot be read, the others are served."""
        try:
            return await self.head(key)
        except Unreadable as error:
            return StoredObject(key, 0, "", error.detail)

    async def _links(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the HDF5 files and of the folders that the page of a folder links to."""
        url = self._url(folder)
        async with self._answer(url, {"accept": "application/json;q=0.9, text/html"}) as answer:
            if answer.status_code != 200:
                if answer.status_code == 404:
                    raise Unreadable(f"the web server has no page for the folder {url}")
                if answer.status_code == 403:
                    raise Unreadable(
                        f"the web server does not list the folder {url}, or needs credentials: switch its listing on "
                        "(autoindex in nginx), or serve the URL of a single file"
                    )
                raise _of_status(answer.status_code, None, self._advice)
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            encoding = answer.charset_encoding or "utf-8"
            content = bytearray()
            async for chunk in answer.aiter_raw():
                content += chunk
                if len(content) > _MOST_PAGE_BYTES:
                    raise Unreadable(f"the page of {url} is larger than {_MOST_PAGE_BYTES >> 20} MiB")
        try:
            text = content.decode(encoding)
            if kind == "application/json":
                names = _named(json.loads(text))
            elif kind in ("text/html", "application/xhtml+xml"):
                names = await _linked(text, url)
            else:
                raise ValueError
        except (ValueError, LookupError):
            raise Unreadable(
                f"the web server's response for {url} is not a listing of a folder: serve the URL of a single file"
            ) from None
        files = {name for name in names if name.lower().endswith(ALL_SUFFIXES)}
        below = {name[:-1] for name in names if name.endswith("/") and not name.startswith(".")}
        return sorted(files), sorted(below, reverse=True)

    @asynccontextmanager
    async def _answer(self, url: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The answer to a GET, after redirects within the server."""
        client = next(self._next)
        for _ in range(_MOST_REDIRECTS):
            async with client.stream("GET", url, headers=headers) as answer:
                if not answer.has_redirect_location:
                    if answer.headers.get("content-encoding", "identity").lower() != "identity":
                        raise Unreadable("the web server compresses its responses, so byte ranges cannot be used")
                    yield answer
                    return
                target = urljoin(url, answer.headers["location"])
            if urlsplit(target)[:2] != urlsplit(self._base)[:2]:
                host = "{0.scheme}://{0.netloc}".format(urlsplit(target)._replace(netloc=_without_user(target)))
                raise Unreadable(f"the web server redirects to {host}: redirects to other servers are not followed")
            url = target
        raise Unreadable("the web server redirects too often")


_WHOLE = "the web server does not support range requests: it ignores the header Range"


def _of_status(status: int, one: StoredObject | None, advice: str) -> FeedError:
    if status in (401, 403):
        error = Unreadable(f"the web server refuses access with status {status}. If it requires credentials, {advice}")
        error.__cause__ = refused().__cause__
        return error
    if status == 404:
        return missing()
    return of_status(status, one)


def _e_tag_of(answer: httpx.Response) -> str:
    """Written as in a `StoredObject`: some servers leave the quotes out."""
    return StoredObject.of("", 0, answer.headers.get("etag")).e_tag


def _range_of(answer: httpx.Response) -> tuple[int, int, int]:
    """First and last byte of an answer, and the size of the file."""
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
    if match is None:
        raise Unreadable("the web server sends no valid header Content-Range")
    return int(match[1]), int(match[2]), int(match[3])


def _without_user(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _named(listing: Any) -> list[str]:
    """The names in a listing as JSON, as nginx and Caddy write it; those of folders end with a slash."""
    names = []
    for item in listing:
        name = item["name"] if isinstance(item, dict) else None
        if not isinstance(name, str):
            raise ValueError
        is_folder = item.get("type") == "directory" or item.get("is_dir") is True
        name = name.rstrip("/")
        if name and "/" not in name and name not in (".", ".."):
            names.append(f"{name}/" if is_folder else name)
    return names


async def _linked(page: str, url: str) -> list[str]:
    """The names that a page links to, right below its URL; those of folders end with a slash."""
    links = _Links()
    base = urlsplit(url)
    above = unquote(base.path)
    names: list[str] = []
    for begin in range(0, len(page), _PARSED_AT_ONCE):
        links.feed(page[begin : begin + _PARSED_AT_ONCE])
        if len(links.rawdata) > _MOST_UNPARSED:
            raise ValueError("a tag, comment or script never ends")
        names += filter(None, (_name_below(link, url, base, above) for link in links.found))
        links.found.clear()
        # Requests for ranges go on meanwhile. What is not closed at the end is no link, so the parser is not closed.
        await asyncio.sleep(0)
    return names


def _name_below(link: str, url: str, base: SplitResult, above: str) -> str | None:
    """What a link of a page names right below its URL; None if it leads up, elsewhere or to the same page."""
    try:
        target = urlsplit(urljoin(url, link))
        path = unquote(target.path, errors="strict")
    except ValueError:
        return None
    if target[:2] != base[:2] or target.query or not path.startswith(above):
        return None
    name = path[len(above) :]
    inner = name.removesuffix("/")
    return name if inner and "/" not in inner and inner not in (".", "..") else None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _credentials() -> httpx.NetRCAuth | None:
    """Those of ``~/.netrc`` or of the file that ``NETRC`` names; None if there is none."""
    given = os.environ.get("NETRC")
    try:
        return httpx.NetRCAuth(given or os.path.expanduser("~/.netrc"))
    except netrc.NetrcParseError as error:
        raise BadParameter(f"{error.filename} cannot be used for credentials: {error.msg}") from None
    except OSError as error:
        if given is None and isinstance(error, (FileNotFoundError, PermissionError)):
            return None
        raise BadParameter(f"{given or '~/.netrc'} cannot be read for credentials: {error.strerror}") from None
