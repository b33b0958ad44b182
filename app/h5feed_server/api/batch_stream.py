"""Responses with batches: each block is read while the previous one is being sent."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastapi.responses import Response
from h5feed.buffers import PoolExhausted
from h5feed.errors import BadParameter, FeedError, TooLarge
from h5feed.wire import MEDIA_TYPE, WAIT_HEADER
from starlette.types import Receive, Scope, Send

from ..batches.pieces import PiecesPlan
from ..batches.plan import BatchPlan
from ..batches.row_ids import RowIdsPlan
from ..catalog.inspections import NotYet
from ..jobs.registry import InProgress
from ..services import Services
from ..sharing.caller import CALLER
from ..sharing.metrics import pack_batches
from ..sharing.slots import QueueFull
from .binary import KEPT, Bytes, is_tagged, not_modified, url_headers
from .counting import PHASES
from .dependencies import in_thread
from .naming import names_headers
from .peer import NO_DESCRIPTORS, Peer, Writer, peer_of, refusal
from .queries import BatchQuery, OneBatchQuery, PlanQuery

logger = logging.getLogger(__name__)

AnyPlan = BatchPlan | PiecesPlan | RowIdsPlan

BLOCK_BYTES = 4 << 20
"""Bytes: small batches are put together up to this much and sent by one write."""

MAX_BLOCKS = 4096
"""Bound on what one request may ask for."""

_KEPT = KEPT.format("tensors.safetensors")
"""The same for all: a name of its own would cost each batch time."""

_DIRECT_SECONDS = 1.0
"""After this, an answer that a thread sends itself goes on through the event loop: others want the thread."""


def plan_of(services: Services, name: str, query: PlanQuery) -> BatchPlan:
    """The plan for a query."""
    return services.batcher.plan(name, query.spec, query.batch_size, query.revision)


def body_plan_of(services: Services, name: str, query: BatchQuery, scope: Scope) -> AnyPlan:
    """The plan for a query of batches, whose bodies are as asked for by the request of this scope."""
    plan = plan_of(services, name, query)
    if query.body == "tensors":
        return plan
    if query.body == "rows":
        return RowIdsPlan(plan, partial(services.batcher.splitter.windows, plan.dataset, plan.order.spec))
    if plan.order.packed is not None:
        raise BadParameter(f"body={query.body} cannot be used with pack: leave it out")
    # Others get no descriptors, and what identifies the files is not to leave this machine.
    peer = peer_of(scope)
    refused = None
    if query.body == "places":
        refused = NO_DESCRIPTORS if services.settings.descriptors == "off" else refusal(peer)
    return PiecesPlan(
        plan,
        services.catalog.root,
        named=query.body == "places" and refused is None,
        unnamed="" if refused is None else f"{refused}; ",
        compresses=query.compress is not None,
    )


def part_of(plan: AnyPlan, index: int, query: OneBatchQuery | None) -> tuple[int, int] | None:
    """The rows of batch `index` that are wanted; None for all.

    Raises
    ------
    BatchOutOfRange, BadParameter
    """
    if query is None or query.is_whole:
        return None
    if not isinstance(plan, BatchPlan):
        raise BadParameter(f"from_row and to_row divide bodies of tensors only: leave out body={query.body}")
    if plan.order.packed is not None:
        raise BadParameter("from_row and to_row cannot be used with pack: use a smaller batch_size")
    first, stop = query.from_row, plan.grid.size(index) if query.to_row is None else query.to_row
    plan.check_part(index, first, stop)
    return first, stop


def filled(services: Services, plan: AnyPlan, start: int, stop: int, part: tuple[int, int] | None = None) -> Bytes:
    """Batches start … stop-1 in a leased buffer, or rows of one of them: see `BatchPlan.filled`.

    Raises
    ------
    PoolExhausted
        There is no room for it now.
    SourceUnavailable
        Too many threads hang at this dataset.
    """
    # Each block has a thread of its own, and the plan of a stream is made once.
    services.catalog.hanging.check(plan.dataset.name)
    if not isinstance(plan, BatchPlan):
        return plan.filled(start, stop, services.pool.lease)
    return plan.filled(start, stop, services.pool.lease, part)


@dataclass
class _Begun:
    """A response whose first bytes have been read, or sent.

    Attributes
    ----------
    rows : int
        Of the batches.
    began : float
        When the thread began to work, by ``time.perf_counter``.
    plan_seconds, read_seconds, send_seconds : float
        Time spent in each phase so far.
    unsent : memoryview
        What is read and not sent.
    following : list of (int, int)
        Batches of the blocks that are not read yet.
    nbytes : int
        Of the whole body, as far as that is known.
    """

    plan: AnyPlan
    headers: dict[str, str]
    unsent: memoryview
    following: list[tuple[int, int]]
    rows: int
    began: float
    plan_seconds: float
    read_seconds: float = 0.0
    send_seconds: float = 0.0
    nbytes: int = 0

    def raw_headers(self, media_type: str) -> list[tuple[bytes, bytes]]:
        """The headers in terms of ASGI."""
        headers = {**self.headers, "content-type": media_type}
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


class BatchStream(Response):
    """Batches start … stop-1 of an order.

    Errors in the request or in the first block become an error response. An error after that closes the connection; the
    client notices because the body is shorter than announced.

    Parameters
    ----------
    plan : callable
        Makes the plan, in a thread.
    path, items
        Of the URL, for the ETag; see `url_headers`.
    if_none_match : str
        Header of that name.
    media_type : str
        To send it as.
    part : OneBatchQuery, optional
        Which rows to send of the only batch.
    """

    def __init__(
        self,
        services: Services,
        plan: Callable[[], AnyPlan],
        start: int,
        stop: int,
        *,
        path: str,
        items: Sequence[str],
        if_none_match: str = "",
        media_type: str = MEDIA_TYPE,
        part: OneBatchQuery | None = None,
    ) -> None:
        # Nothing is known of headers and body before the plan is: the base class is given none.
        self.background = None
        self._media_type = media_type
        self._services = services
        self._plan = plan
        self._window = start, stop
        self._url = path, items
        self._if_none_match = if_none_match
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = peer_of(scope)
        writer = peer.direct() if peer else None
        since = time.perf_counter()
        try:
            begun = await in_thread(self._services, partial(self._begin, writer))
        except BaseException as error:
            if writer is not None:
                writer.revoke()
                if writer.started and isinstance(error, Exception):
                    self._services.metrics.add("responses_cut_total")
                    _report(error)
                    return
            raise
        if isinstance(begun, Response):
            await begun(scope, receive, send)
            return
        start, stop = self._window
        seconds, waits = time.perf_counter() - since, _waits(scope)
        self._services.traffic.note_batches(
            CALLER.get(), stop - start, begun.nbytes, seconds, self._url[0], waits[:2] if waits and waits[1] else None
        )
        if writer is not None and writer.started:
            head = writer.take_back()
            if head:
                await send({"type": "http.response.body", "body": head, "more_body": True})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": begun.raw_headers(self._media_type)})
        try:
            await self._send_rest(begun, peer, send)
        finally:
            queue, read, sent = begun.began - since, begun.read_seconds, begun.send_seconds
            scope.setdefault("extensions", {})[PHASES] = since, queue, begun.plan_seconds, read, sent
            metrics = self._services.metrics
            endpoint = metrics.catalogue.batches[scope["path"].endswith("/batches")]
            batches, (waited, told, read_there) = stop - start, waits or (0.0, 0.0, 0)
            if read_there:
                metrics.add("client_read_bytes_total", amount=read_there)
            phases = queue, begun.plan_seconds, read, sent
            metrics.note_batches(pack_batches(endpoint, batches, begun.rows, begun.nbytes, *phases, waited, told))

    async def _send_rest(self, begun: _Begun, peer: Peer | None, send: Send) -> None:
        block = begun.unsent
        del begun.unsent
        mark = time.perf_counter()
        while begun.following:
            if peer is not None and peer.is_gone():
                return
            start, stop = begun.following.pop(0)
            read = partial(filled, self._services, begun.plan, start, stop)
            # Read while the one before is on its way.
            patience = self._services.settings.read_timeout
            reading = asyncio.ensure_future(in_thread(self._services, read, patience))
            try:
                # Returns when the block before has left, or the peer is gone.
                await send({"type": "http.response.body", "body": block, "more_body": True})
                del block
                now = time.perf_counter()
                begun.send_seconds += now - mark
                block = memoryview(await reading)
                mark = time.perf_counter()
                begun.read_seconds += mark - now
            except Exception as error:
                _report(error)
                self._services.metrics.add("responses_cut_total")
                if peer is not None:
                    # Closing would wait until all is sent, to a peer that may take nothing.
                    peer.abort()
                return
            finally:
                reading.cancel()
                reading.add_done_callback(lambda late: late.cancelled() or late.exception())
        await send({"type": "http.response.body", "body": block, "more_body": False})
        begun.send_seconds += time.perf_counter() - mark

    def _begin(self, writer: Writer | None) -> _Begun | Response:
        """Read the first block and send what the client accepts at once."""
        try:
            begun = self._begin_with(writer)
        except (PoolExhausted, InProgress, NotYet, QueueFull):
            # Nothing is sent yet: this will be called again, with the same writer.
            raise
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        if writer is not None:
            writer.close()
        return begun

    def _begin_with(self, writer: Writer | None) -> _Begun | Response:
        began = time.perf_counter()
        services = self._services
        plan = self._plan()
        nbytes: int | None = plan.nbytes(*self._window)
        part = part_of(plan, self._window[0], self._part)
        blocks = _blocks(plan, *self._window)
        private = services.is_guarded
        headers = url_headers(*self._url, plan.revisions, "safetensors", private=private, may_pin=plan.is_pinned)
        headers = names_headers(plan.dataset, headers)
        if is_tagged(self._if_none_match, headers):
            return not_modified(headers)
        headers["content-disposition"] = _KEPT
        mark = time.perf_counter()
        rows = plan.count_rows(*self._window)
        if part is not None:
            nbytes, rows = None, part[1] - part[0]
        if plan.ragged:
            # The length of text is known when it is read: of several blocks, not before the last.
            nbytes = None
            if len(blocks) > 1 and writer is not None:
                writer.close()
                writer = None
        begun = _Begun(plan, headers, memoryview(b""), blocks, rows, began, mark - began)

        while blocks:
            try:
                block = memoryview(filled(services, plan, *blocks[0], part))
            except PoolExhausted:
                if "server-timing" not in headers:
                    raise
                break
            blocks.pop(0)
            now = time.perf_counter()
            begun.read_seconds += now - mark
            if "server-timing" not in headers:
                # Only what is known when the first bytes leave.
                plan_ms, read_ms = begun.plan_seconds * 1e3, begun.read_seconds * 1e3
                headers["server-timing"] = f"plan;dur={plan_ms:.2f}, read;dur={read_ms:.2f}"
                if nbytes is None and not blocks:
                    nbytes = len(block)
                begun.nbytes = nbytes or len(block)
                if nbytes is not None:
                    headers["content-length"] = str(nbytes)
                if writer is not None and nbytes is not None:
                    writer.start(begun.raw_headers(self._media_type), nbytes)
            begun.unsent = block[writer.write(block) :] if writer is not None else block
            mark = time.perf_counter()
            begun.send_seconds += mark - now
            if writer is None or writer.stalled or mark - began > _DIRECT_SECONDS:
                break
            # The buffer may be filled anew.
            del block
            begun.unsent = memoryview(b"")
        return begun


def _blocks(plan: AnyPlan, start: int, stop: int) -> list[tuple[int, int]]:
    """Batches start … stop-1, which are known to be there, by the blocks that they are read in."""
    if plan.one_block:
        return [(start, stop)]
    per_block = max(1, BLOCK_BYTES // plan.full.nbytes)
    starts = range(start, stop, per_block)
    if len(starts) > MAX_BLOCKS:
        raise TooLarge(f"batches {start} … {stop - 1} are too many for one request: ask for at most {per_block}")
    return [(first, min(first + per_block, stop)) for first in starts]


def _report(error: Exception) -> None:
    """Log why a response was aborted; the client only sees that it is too short."""
    if isinstance(error, ConnectionError):
        return
    if isinstance(error, FeedError):
        logger.error("response aborted: %s: %s", error.code, error.detail)
    else:
        logger.error("response aborted", exc_info=error)


def _waits(scope: Scope) -> tuple[float, float, int] | None:
    """The seconds that the caller's loop waited, of how many, and the bytes it read from files, if it tells them."""
    for name, value in scope["headers"]:
        if name == _WAIT_HEADER:
            match = _WAITS.fullmatch(value)
            if match is None:
                return None
            seconds = float(match[2])
            return min(float(match[1]), seconds), seconds, int(match[3] or 0)
    return None


_WAIT_HEADER = WAIT_HEADER.encode()
_WAITS = re.compile(rb"waited=([0-9]{1,7}\.[0-9]{1,3}), of=([0-9]{1,7}\.[0-9]{1,3})(?:, read=([0-9]{1,15}))?")
