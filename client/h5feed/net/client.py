"""Requests to one or more servers: retries, deadlines, and errors as classes. Knows URLs and bodies, not datasets."""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool
from ..environment import is_set
from ..errors import (
    BadAnswer,
    BadParameter,
    ConnectionFailed,
    FeedError,
    RevisionChanged,
    Transient,
    Unauthorized,
)
from ..forks import tell_after_fork
from ..revisions import HEADER as PROVISIONAL_HEADER
from ..schema import read_json
from ..version import __version__
from ..wire import MEDIA_TYPE, WAIT_HEADER
from .balancing import ReplicaStats, Servers
from .cancellation import Attempt, Cancellation
from .certificates import Cert, Verify, context_of
from .concurrency import Link
from .descriptors import BytesRead, NoDescriptor, PassedFiles
from .embedded import START_SECONDS, Embedded, check_arguments, path_of
from .exchange import MAX_PLAIN_BYTES, Answer, BodyCut, Places
from .giving import Giving
from .hedging import Hedging, NoOther, Race
from .http import httpx, timeout_of
from .jobs import InProgress
from .local import is_wanted
from .names import Aim, Names, Params, not_text
from .placement import check_placement
from .refreshing import SOON_SECONDS
from .retries import FailedAttempts, final_error, reason_of
from .server_list import PREFIX as LIST_PREFIX
from .servers import LOOK_SECONDS, Hooks, Server
from .spans import spans
from .token import ClientToken
from .trace import WAITING, enter, received, retried, waits_to_tell

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT: httpx.Timeout = httpx.Timeout(60.0, connect=10.0)
"""Timeout in seconds for one step of a request: connecting, sending, or waiting for more data."""

DEFAULT_DEADLINE = 120.0
"""Maximum duration of a request in seconds, including retries."""

POOL_BYTES = 256 << 20
"""Maximum size of the recycled buffers of one client, in bytes. Beyond it, new memory is allocated."""

NO_STORE = {"cache-control": "no-store"}
"""Header of requests for rows that another server owns: what they read would only displace what the server owns."""

_COMPARE_SECONDS = 10.0
"""Timeout for asking another server whether it has a revision that one server lacks."""

_SILENT_SECONDS, _BETWEEN_WARNINGS = 3.0, 30.0
"""A warning is logged if a request waits longer than the first, and repeated after the second."""

_BETWEEN_URLS = re.compile(r",\s*(?=[a-z+]+://)")
"""A comma may also be part of a path."""

logger = logging.getLogger("h5feed")


class Client:
    """The connections to one or more servers with the same data.

    Parameters
    ----------
    url : str or path, optional
        ``http://…``, ``https://…`` or ``unix:///path/to.sock``, or several separated by commas; ``servers+http://…``
        for a list of servers; or a folder or file, for which a server is started. Default ``$H5FEED_URL``, else port
        8000 on this machine.
    token : str, optional
        Sent as ``Authorization: Bearer``; default ``$H5FEED_TOKEN``, else the content of ``$H5FEED_TOKEN_FILE``.
    timeout : float or httpx.Timeout
        Seconds for one step of a request.
    deadline : float
        Seconds for a whole request. Broken connections and temporary errors (429, 502, 503, 504) are retried until
        then, with jittered back-off, on another server if there is one.
    verify : ssl.SSLContext, bool or path
        How to verify ``https`` certificates; a path is a PEM file of those to trust.
    cert : path or pair of paths, optional
        PEM file with the client's certificate and key, or one file for each.
    headers, event_hooks, auth
        Passed to `httpx.Client`.
    local : bool, optional
        Whether to use the Unix socket that a server at a loopback URL offers; default ``$H5FEED_LOCAL``, else True.
    placement : str, optional
        ``"cache"``: loops request rows from the servers that own them, see `h5feed.net.placement`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        deadline: float = DEFAULT_DEADLINE,
        verify: Verify = True,
        cert: Cert | None = None,
        headers: Mapping[str, str] | None = None,
        event_hooks: Hooks | None = None,
        auth: httpx.Auth | tuple[str, str] | None = None,
        local: bool | None = None,
        placement: str | None = None,
    ) -> None:
        check_placement(placement)
        given = url or os.environ.get("H5FEED_URL") or DEFAULT_URL
        path = path_of(given)
        # The arguments, to create a copy in another process: see `__reduce__`.
        self._made_with: dict[str, Any] = {
            # Absolute, because the other process may have another current folder.
            "url": path or url,
            "token": token,
            "timeout": timeout,
            "deadline": deadline,
            "verify": verify,
            "cert": cert,
            "headers": headers,
            "event_hooks": event_hooks,
            "auth": auth,
            "local": local,
            "placement": placement,
        }
        self.placement = placement
        if path is not None:
            check_arguments(
                path, token=token, verify=None if verify is True else verify, cert=cert, auth=auth, local=local
            )
        self._token = ClientToken(token, is_wanted=path is None)
        self._sends_token = "authorization" not in map(str.lower, headers or ())
        self.deadline = deadline
        self.pool = BufferPool(POOL_BYTES)
        tls = context_of(verify, cert)
        wants_local = is_wanted(local)
        # Refused now, instead of by each read.
        is_set("H5FEED_IO_URING", True)
        embedded = None if path is None else Embedded(path)
        urls = [url.strip() for url in _BETWEEN_URLS.split(str(given))] if path is None else [str(path)]
        sent = {
            "user-agent": f"h5feed/{__version__}",
            "accept-encoding": "identity",
            **({"authorization": f"Bearer {self._token.text}"} if self._token.text else {}),
            **(headers or {}),
        }

        # Not a method: what the finalizer refers to must not keep this client alive.
        def maker(of: str) -> Callable[[str | None], Server]:
            return lambda address: Server(
                of,
                headers=sent,
                timeout=timeout,
                verify=tls,
                event_hooks=event_hooks,
                auth=auth,
                local=wants_local,
                embedded=embedded,
                address=address,
            )

        lists = [url.removeprefix(LIST_PREFIX) for url in dict.fromkeys(urls) if url.startswith(LIST_PREFIX)]
        servers = [url for url in dict.fromkeys(urls) if not url.startswith(LIST_PREFIX)]
        self._servers = Servers(servers, maker, lists)
        self._connect_seconds = timeout_of(timeout).connect or DEFAULT_DEADLINE
        self._hedging = Hedging()
        self.url = self._servers.url
        self.names = Names()
        """The provisional names of revisions that the servers have told."""
        self.spans = spans()
        """Makes the spans of traces; None if they are not wanted."""
        self.files = PassedFiles()
        """Descriptors that the server has passed."""
        self.bytes_read = BytesRead()
        self._link: Link | None = None
        self._warned_at = -math.inf
        self._finalizer = weakref.finalize(self, self._servers.close)
        tell_after_fork(self)
        if embedded is not None:
            embedded.ensure(time.monotonic() + START_SECONDS)

    def with_pool(self, pool: BufferPool) -> Client:
        """The same client, with the same connections, that receives into the buffers of `pool`."""
        other = Client.__new__(Client)
        # It keeps this one alive: the connections are closed when this one is collected.
        other.__dict__.update(self.__dict__, pool=pool, _origin=self)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, including the token. The copy opens its own connections."""
        return partial(Client, **self._made_with), ()

    def json(
        self, path: str, params: Params | None = None, *, deadline: float | None = None, is_job: bool = False
    ) -> Any:
        """GET a JSON response. `deadline` overrides that of the client, in seconds.

        Raises
        ------
        InProgress
            With `is_job`: the server is still computing the response.
        """
        answer = self._request("GET", path, params, "application/json", within=deadline, is_job=is_job)
        return self._json_of(answer, path)

    def body(
        self,
        path: str,
        params: Params | None = None,
        *,
        max_bytes: int,
        json: Any = None,
        cancelled: threading.Event | None = None,
        within: float | None = None,
        raise_cut: bool = False,
        is_job: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """GET a binary response (with `json`: POST), as one (bytes,) uint8 array from the recycled buffers.

        A body of more than `max_bytes` is refused. `cancelled` stops retries and, if it is a `Cancellation`, aborts the
        request. `within` are the seconds that it may take; default: the client's deadline. With `raise_cut`, a
        truncated body is not retried but raised as `exchange.BodyCut`, which holds the part that arrived.

        Raises
        ------
        InProgress
            With `is_job`: the server is still computing the response.
        """
        answer = self._request(
            "GET" if json is None else "POST",
            path,
            params,
            MEDIA_TYPE,
            json=json,
            cancelled=cancelled,
            raise_cut=raise_cut,
            pool=self.pool,
            max_bytes=max_bytes,
            within=within,
            is_job=is_job,
        )
        if answer.status == 202:
            self._json_of(answer, path)
        self._check_binary(answer, path)
        if answer.body is None:
            # A proxy removed the Content-Length: slower, and limited to `transport.MAX_PLAIN_BYTES`.
            received(len(answer.content))
            return np.frombuffer(bytearray(answer.content), np.uint8)
        received(len(answer.body))
        return answer.body

    @property
    def is_local(self) -> bool:
        """Whether there is one server, on this machine, which may pass descriptors."""
        return len(self._servers) == 1 and next(iter(self._servers)).is_local

    @property
    def is_near(self) -> bool:
        """Whether all servers are on this machine."""
        return len(self._servers) > 0 and all(server.is_near for server in self._servers)

    def descriptor(self, path: str, params: Params) -> int:
        """GET a file descriptor. It is not retried: there is another way to get the rows.

        Raises
        ------
        NoDescriptor
            The server passes none. With `retry_after` if it does not answer, or is overloaded.
        """
        with self._servers.one() as server:
            try:
                status, content, descriptor = server.receive_descriptor(f"{path}?{urlencode(params)}")
            except (OSError, http.client.HTTPException) as error:
                raise NoDescriptor(f"{server.url} passes no descriptor: {error}", retry_after=1) from None
        if descriptor is None or status != 200:
            if descriptor is not None:
                os.close(descriptor)
            said = content[:200].decode("utf-8", "replace")
            detail = f"{server.url} passes no descriptor, but status {status}: {said}"
            raise NoDescriptor(detail, retry_after=1 if status == 429 or status >= 500 else None)
        return descriptor

    def owners(self) -> list[Server]:
        """The servers that own rows now: see `h5feed.net.placement`."""
        return self._servers.owners()

    def receive(
        self,
        path: str,
        params: Params,
        places: Places,
        *,
        max_bytes: int,
        json: Any = None,
        cancelled: threading.Event | None = None,
        owner: Server | None = None,
    ) -> None:
        """GET a binary response (with `json`: POST) of up to `max_bytes` into `places`; `cancelled` is that of `body`.

        The `owner` is asked first, unless it is left out. Others are asked if it fails or stays silent, and are told
        not to cache the rows.
        """
        answer = self._request(
            "GET" if json is None else "POST",
            path,
            params,
            MEDIA_TYPE,
            json=json,
            cancelled=cancelled,
            pool=places,
            max_bytes=max_bytes,
            owner=owner,
        )
        self._check_binary(answer, path)
        if answer.body is None:
            # As in `body`.
            content = np.frombuffer(answer.content, np.uint8)
            received(len(content))
            done = 0
            for place in places.places(len(content)):
                place[...] = content[done : done + len(place)]
                done += len(place)
            return
        received(int(answer.header("content-length") or 0))

    def _check_binary(self, answer: Answer, path: str) -> None:
        if answer.header("content-type") != MEDIA_TYPE:
            raise BadAnswer(f"the response of {self.url}{path} is not {MEDIA_TYPE}: is it an h5feed server?")

    def content(self, path: str, params: Params, media_type: str, *, is_job: bool = False) -> bytes:
        """GET a response of another media type, up to `transport.MAX_PLAIN_BYTES`.

        Raises
        ------
        InProgress
            With `is_job`: the server is still computing the response.
        """
        answer = self._request("GET", path, params, media_type, is_job=is_job)
        if answer.status == 202:
            self._json_of(answer, path)
        if answer.header("content-type") != media_type:
            raise BadAnswer(f"the response of {self.url}{path} is not {media_type}: is it an h5feed server?")
        received(len(answer.content))
        return answer.content

    def check_there(self) -> None:
        """Raise `ConnectionFailed` if no server listens at any of the addresses."""
        refused = []
        self._look_up(time.monotonic() + min(LOOK_SECONDS, self.deadline))
        for server in self._servers:
            try:
                server.send("GET", "/healthz", "*/*", deadline=time.monotonic() + min(LOOK_SECONDS, self.deadline))
                return
            except httpx.ConnectError as error:
                if (final := final_error(error, server)) is not None:
                    raise final from None
                through = f" through the proxy {server.proxy}" if server.proxy else ""
                refused.append(f"{server.name}{through} ({reason_of(error)})")
            except (httpx.TransportError, FeedError):
                return
        raise ConnectionFailed(f"could not connect to {', '.join(refused)}. Is the server running and reachable?")

    @property
    def link(self) -> Link:
        """What streams have learnt about the link to the servers."""
        if self._link is None:
            nearest = min((server.round_trip for server in self._servers), default=math.inf)
            self._link = Link.of(nearest, max(1, len(self._servers)))
        return self._link

    @property
    def via(self) -> dict[str, str]:
        """How each server is reached: over which Unix socket, or over TCP and why not over a Unix socket."""
        return {server.url: server.via() for server in self._servers}

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        """What each server has done so far, and which are left out."""
        return self._servers.stats()

    def close(self) -> None:
        """Close all connections. This also happens when the client is garbage collected."""
        self.files.clear()
        self._finalizer()

    def after_fork(self) -> None:
        """In a forked child: leave the connections to the parent, and forget its requests in flight."""
        self.files.after_fork()
        self.bytes_read.after_fork()
        self._servers.after_fork()
        self._hedging.after_fork()

    def _report(self, path: str) -> dict[str, str]:
        """The header of a request for batches that tells of waits, and of rows that needed no request."""
        # What is told with a request for rows is lost: the server reads it with requests for batches.
        waits = None if path.endswith("/rows") else waits_to_tell()
        if path.endswith("/batches") and (read := self.bytes_read.take()):
            waits = f"{waits or 'waited=0.000, of=0.000'}, read={read}"
        return {WAIT_HEADER: waits} if waits else {}

    def _json_of(self, answer: Answer, path: str) -> Any:
        """Parse a JSON response.

        Raises
        ------
        InProgress
            The server is still computing the response.
        """
        try:
            content = read_json(answer.content)
        except ValueError as error:
            said = answer.header("content-type") or "nothing"
            raise BadAnswer(
                f"the response of {self.url}{path} is not JSON but {said[:80]} ({error}): is it an h5feed server?"
            ) from None
        if answer.status == 202:
            raise InProgress.of(content)
        return content

    def _request(
        self,
        method: str,
        path: str,
        params: Params | None,
        accept: str,
        *,
        json: Any = None,
        cancelled: threading.Event | None = None,
        raise_cut: bool = False,
        pool: BufferPool | Places | None = None,
        max_bytes: int = MAX_PLAIN_BYTES,
        within: float | None = None,
        is_job: bool = False,
        owner: Server | None = None,
    ) -> Answer:
        """Send one request and retry it until it succeeds, fails permanently, or the deadline passes."""
        began = time.monotonic()
        deadline = began + (self.deadline if within is None else within)
        aim = Aim(self.names, self._servers, path, params)
        cancelled = cancelled or threading.Event()
        more = self._report(path) if accept == MEDIA_TYPE else {}
        attempts: FailedAttempts | None = None
        refused: set[str] = set()
        giving = Giving(params, self._servers)
        enter(WAITING)
        while True:
            aim.take()
            self._look_up(deadline, cancelled)
            token = self._token.text
            with self._servers.one(aim.among, owner if attempts is None else None) as server:
                asked_at = time.monotonic()
                try:
                    # What is asked of a provisional name only one server knows; what takes long anyway is no sign.
                    may_hedge = not (aim.is_provisional or is_job)
                    answer, server = self._ask(
                        server,
                        method,
                        aim.target,
                        accept,
                        may_hedge=may_hedge,
                        json=json,
                        pool=pool,
                        max_bytes=max_bytes,
                        deadline=deadline,
                        cancelled=cancelled if isinstance(cancelled, Cancellation) else None,
                        more=more if owner in (None, server) else more | NO_STORE,
                        hedged={} if owner is None else NO_STORE,
                    )
                    # 202 means that the server is still working.
                    if answer.status == 200 or (answer.status == 202 and is_job):
                        if pool is None or aim.is_provisional:
                            self.names.learn(answer.header(PROVISIONAL_HEADER), server)
                        return answer
                    giving.help_after(answer, server, deadline)
                    continue
                except UnicodeEncodeError as error:
                    raise not_text(error) from None
                except Transient as error:
                    failure: FeedError = error
                except RevisionChanged as error:
                    self._servers.answered(server)
                    if aim.has_others_than(server):
                        continue
                    raise self._differing(server, aim, method, accept, json, max_bytes, error) from None
                except FeedError as error:
                    self._servers.answered(server)
                    refused.add(token)
                    if not isinstance(error, Unauthorized) or not self._has_new_token(refused):
                        raise
                    continue
                except httpx.TransportError as error:
                    failure = self._connection_failure(error, server)
                    if raise_cut and isinstance(error, BodyCut) and not cancelled.is_set():
                        self._servers.failed(server, asked_at, str(failure))
                        raise
            if not cancelled.is_set():
                self._servers.failed(server, asked_at, str(failure), failure.retry_after or 0.0)
            attempts = attempts or FailedAttempts()
            failure = attempts.add(server.name, failure, deadline)
            self._wait_to_retry(attempts, server, failure, began, deadline, cancelled, aim.among or [*self._servers])

    def _look_up(self, deadline: float, cancelled: threading.Event | None = None) -> None:
        """Look up lists of servers and host names, if it is time to. Waits until there is a server.

        Raises
        ------
        FeedError
            A list has named no server before the deadline, or cannot be read.
        """
        cancelled = cancelled or threading.Event()
        while True:
            self._servers.look_up(min(self._connect_seconds, deadline - time.monotonic()))
            error = self._servers.missing
            if error is None:
                return
            may_pass = isinstance(error, Transient) or type(error) is ConnectionFailed
            if isinstance(error, Unauthorized):
                may_pass = self._has_new_token({self._token.text})
            # A little longer than until the next look-up is due.
            wait = 1.1 * SOON_SECONDS
            if not may_pass or time.monotonic() + wait >= deadline or cancelled.wait(wait):
                raise error

    def _ask(
        self,
        server: Server,
        method: str,
        target: str,
        accept: str,
        *,
        may_hedge: bool,
        pool: BufferPool | Places | None,
        cancelled: Cancellation | None,
        more: Mapping[str, str],
        hedged: Mapping[str, str],
        **limits: Any,
    ) -> tuple[Answer, Server]:
        """Send a request once, and to another server if this one stays silent; returns the answer and who gave it.

        `more` are headers of the first request, `hedged` those of the second.

        Raises
        ------
        httpx.TransportError
            Of the first server, if the other has no complete answer yet.
        """
        send = server.send if self.spans is None else self.spans.sender(server)
        if not may_hedge or len(self._servers) < 2:
            began = time.monotonic()
            answer = send(method, target, accept, pool=pool, cancelled=cancelled, more=more, **limits)
            self._count(server, answer, time.monotonic() - began)
            return answer, server

        def ask_another(attempt: Attempt) -> tuple[Answer, Server] | None:
            with self._servers.another(server) as other:
                if other is None:
                    raise NoOther
                # Not to the places: the first attempt may still write there.
                into = pool if pool is None or isinstance(pool, BufferPool) else self.pool
                answer = other.send(method, target, accept, pool=into, cancelled=attempt, more=hedged, **limits)
                if answer.status != 200 or attempt.is_set():
                    return None
                self._count(other, answer, time.monotonic() - attempt.began_at)
                self._hedging.answered(attempt)
                return answer, other

        race = Race(cancelled, ask_another)
        try:
            with self._hedging.watch(race):
                answer = send(method, target, accept, pool=pool, cancelled=race.first, more=more, **limits)
        except httpx.TransportError:
            won = race.end()
            if won is None:
                raise
        else:
            # If the other was first, this attempt was cut off, even if its answer seems to be complete.
            won = race.end()
        finally:
            race.end()
        if won is None:
            self._count(server, answer, time.monotonic() - race.first.began_at)
            self._hedging.answered(race.first)
            return answer, server
        if race.was_silent >= self._hedging.delay:
            self._servers.failed(server, race.first.began_at, f"nothing arrived for {race.was_silent:.2f} s")
        answer, other = won
        if pool is not None and not isinstance(pool, BufferPool):
            done = 0
            body = np.frombuffer(answer.content, np.uint8) if answer.body is None else answer.body
            for place in pool.places(len(body)):
                place[...] = body[done : done + len(place)]
                done += len(place)
            answer = replace(answer, body=body[:0], content=b"")
        return answer, other

    def _count(self, server: Server, answer: Answer, seconds: float) -> None:
        """Report an answer that came after `seconds`. Others than 200 and 202 may still become failures."""
        if answer.status in (200, 202):
            # A body that went to places is not here.
            nbytes = 0 if answer.body is None else len(answer.body) or int(answer.header("content-length") or 0)
            self._servers.answered(server, nbytes, seconds)

    def adopt_name(self, provisional: str, name: str, content: str | None) -> None:
        """Remember a provisional name that the server with this name gave to another client of the same servers."""
        for server in self._servers:
            if server.name == name:
                self.names.add(provisional, server, content)

    def _has_new_token(self, refused: set[str]) -> bool:
        """Whether the token's file contains one by now that was not refused, which is sent from now on."""

        return self._sends_token and self._token.is_new(refused, self._servers.authorize)

    def _connection_failure(self, error: httpx.TransportError, server: Server) -> ConnectionFailed:
        """The error for an incomplete response, if a retry may help.

        Raises
        ------
        BadParameter, BadAnswer, ConnectionFailed
            A retry would not help.
        """
        if isinstance(error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)):
            raise BadParameter(f"the request cannot be sent: {error}") from None
        if (final := final_error(error, server)) is not None:
            self._servers.answered(server)
            raise final from None
        return ConnectionFailed(str(error))

    def _wait_to_retry(
        self,
        attempts: FailedAttempts,
        server: Server,
        failure: FeedError,
        began: float,
        deadline: float,
        cancelled: threading.Event,
        among: Sequence[Server],
    ) -> None:
        """Wait before the next attempt of a request that was started at `began`, which these servers can answer.

        Raises
        ------
        FeedError
            There is no time for another attempt, or the request was cancelled.
        """
        wait = attempts.backoff()
        if self._servers.others_awake(server, among):
            # Try each server once without waiting. If all fail, the request itself may be the problem.
            wait = 0.0 if attempts.count < len(among) else wait
        else:
            wait = max(wait, failure.retry_after or 0.0)
        retried()
        if time.monotonic() - began > _SILENT_SECONDS and not cancelled.is_set():
            self._warn(failure, server, deadline)
        if time.monotonic() + wait >= deadline or cancelled.wait(wait):
            raise self._given_up(attempts, wait, among)

    def _warn(self, failure: FeedError, server: Server, deadline: float) -> None:
        """Warn that a request is still waiting, once for all threads."""
        now = time.monotonic()
        if now - self._warned_at > _BETWEEN_WARNINGS:
            self._warned_at = now
            logger.warning("%s: %s; retrying for up to %d s", server.name, failure, max(0, deadline - now))

    def _given_up(self, attempts: FailedAttempts, wait: float, among: Sequence[Server]) -> FeedError:
        """The error to raise for the failures of all servers that can answer."""
        failures = attempts.failures
        last = list(failures.values())[-1]
        kinds = {type(failure) for failure in failures.values()}
        if len(among) == 1:
            url = among[0].name
            error = last
            if isinstance(last, ConnectionFailed):
                error = ConnectionFailed(
                    f"no complete response from {url}: {last}. Is the server running and reachable?"
                )
        else:
            said = [
                f"{server.name} ({failures.get(server.name, 'skipped after an earlier failure')})" for server in among
            ]
            kind = kinds.pop() if len(kinds) == 1 else ConnectionFailed
            error = kind(
                f"no complete response from any of {len(said)} servers: {'; '.join(said)}. Is one of them running and "
                "reachable?",
                retry_after=last.retry_after,
                request_id=last.request_id,
            )
        error.add_note(f"Gave up after {attempts.count} attempts within the deadline of {self.deadline:g} s.")
        if len(among) < len(self._servers):
            error.add_note("No other server was asked: only this one knows the provisional revision of the data.")
        if wait > self.deadline:
            error.add_note(f"The server asked to wait for {wait:g} s, which is longer.")
        return error

    def _differing(
        self, server: Server, aim: Aim, method: str, accept: str, json: Any, max_bytes: int, error: RevisionChanged
    ) -> RevisionChanged:
        """The error to raise if a server lacks a revision: another server may still have it."""
        for other in () if aim.is_provisional else self._servers:
            if other is server:
                continue
            with contextlib.suppress(httpx.TransportError):
                deadline = time.monotonic() + _COMPARE_SECONDS
                answer = other.send(
                    method, aim.target, accept, json=json, pool=self.pool, max_bytes=max_bytes, deadline=deadline
                )
                if answer.status == 200:
                    return RevisionChanged(
                        f"{server.name} and {other.name} do not serve the same data: {other.name} has the requested "
                        f"revision, but {error.detail} Give both the same files, or connect to one of them.",
                        request_id=error.request_id,
                    )
        return error
