"""Logs requests, if enabled."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..sharing.caller import CALLER
from ..sharing.logs import FIELDS, BackgroundHandler, JsonLines, LogFormat
from ..sharing.metrics import PHASES as PHASE_NAMES
from ..sharing.request_id import REQUEST_ID
from .counting import PHASES
from .peer import peer_of
from .redaction import without_named_secrets, without_secrets

logger = logging.getLogger("h5feed.access")


class AccessLog:
    """Outermost ASGI middleware; writes one line per request to standard output.

    Each line has the client's address, the request, the status (``-`` if none was sent), ``gone`` if the client
    disconnected early, the bytes of the body, the duration in milliseconds, for batches the milliseconds of each phase,
    the caller if it is not the address, and the id of the request. As JSON, the same are fields.

    Parameters
    ----------
    address : callable
        Tells the address of the client.
    form : str
        ``pretty`` or ``json``.
    """

    def __init__(self, app: ASGIApp, address: Callable[[Scope], str], form: LogFormat = "pretty") -> None:
        self._app = app
        self._address = address
        handler = BackgroundHandler(sys.stdout)
        handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        nbytes = 0

        async def noting(message: Message) -> None:
            nonlocal status, nbytes
            status = message.get("status", status)
            nbytes += len(message.get("body", b""))
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - began
            peer = peer_of(scope)
            if status is None and peer is not None and peer.has_begun():
                # A thread wrote the answer itself; only whole batches are.
                status = 200
            fields: dict[str, Any] = {
                "client": self._address(scope),
                "caller": CALLER.get() or None,
                "method": scope["method"],
                "path": _shown(scope["raw_path"]),
                "query": _shown(without_named_secrets(scope["query_string"])),
                "status": status,
                "gone": peer is not None and not peer.has_all(),
                "bytes": nbytes if peer is None else peer.sent_bytes(),
                "duration_ms": round(seconds * 1e3, 3),
            }
            phases = scope.get("extensions", {}).get(PHASES)
            if phases is not None:
                named = zip(PHASE_NAMES, phases[1:], strict=True)
                fields["phases_ms"] = {name: round(spent * 1e3, 3) for name, spent in named}
            logger.info("%s", _pretty(fields), extra={FIELDS: fields})


def _shown(text: bytes) -> str:
    """A part of a URL on one line: it may hold any byte, and none may look like another line."""
    return without_secrets(text.decode("latin-1").encode("unicode_escape").decode("ascii"))


def _pretty(fields: dict[str, Any]) -> str:
    url = fields["path"] + ("?" + fields["query"] if fields["query"] else "")
    line = f'{fields["client"]} "{fields["method"]} {url}" {fields["status"] or "-"}'
    line += f"{' gone' if fields['gone'] else ''} {fields['bytes']} B {fields['duration_ms']:.1f} ms"
    if "phases_ms" in fields:
        line += f" ({', '.join(f'{name} {spent:.1f}' for name, spent in fields['phases_ms'].items())})"
    if fields["caller"] not in (None, fields["client"]):
        line += f" by {fields['caller']}"
    return f"{line} {REQUEST_ID.get() or '-'}"
