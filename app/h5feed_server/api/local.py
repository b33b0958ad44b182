"""Names the server's Unix socket to clients on the same machine, which is faster than TCP.

Only requests that come directly from a program on this machine get a response. See `h5feed.handshake`.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from h5feed.errors import BadParameter, PageNotFound
from h5feed.handshake import MAX_NONCE, OFFER_HEADER, OFFER_PATH, PROOF_PATH
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..sharing.local_socket import TICKET_SECONDS, LocalSocket
from .problem_responses import problems
from .response_models import LocalOffer, LocalProof, answers

router = APIRouter(tags=["local"])

_NO_STORE = {"cache-control": "no-store"}

_OF_PROXIES = frozenset({b"forwarded", b"via", b"x-real-ip", b"x-proxycontextpath"})
_OF_PROXIES_BEGIN = b"x-forwarded"
"""Headers that only proxies send, trusted or not."""

_HINTED = "/v1/datasets"


@router.get(
    OFFER_PATH, summary="The Unix socket for clients on this machine", **answers(LocalOffer, problems(PageNotFound))
)
async def get_local(request: Request) -> Response:
    """Responds only to requests that come over the loopback address, without TLS and without a proxy; otherwise, or if
    the server has no Unix socket, with 404. A client that does not find its own address and port in `client` is behind
    a relay, and must not use the socket. Nor must it before the socket has returned the right proof.
    """
    local: LocalSocket | None = request.app.state.local
    if local is None:
        raise PageNotFound("this server has no Unix socket: H5FEED_UDS names one")
    client = request.client
    if client is None or not is_direct(request.scope):
        raise PageNotFound("only requests that come directly from this machine, over the loopback address, use it")
    ticket, secret = local.ticket()
    offer = {
        "socket": local.path,
        "instance": local.instance,
        "uid": local.uid,
        "client": f"[{client.host}]:{client.port}" if ":" in client.host else f"{client.host}:{client.port}",
        "ticket": ticket,
        "secret": secret.hex(),
        "seconds": TICKET_SECONDS,
    }
    return JSONResponse(offer, headers=_NO_STORE)


@router.get(
    PROOF_PATH, summary="The proof that a Unix socket is this server's", **answers(LocalProof, problems(PageNotFound))
)
async def get_local_proof(
    request: Request,
    ticket: Annotated[str, Query(max_length=64, description="The `ticket` of an offer, which expires in seconds.")],
    nonce: Annotated[
        str, Query(max_length=MAX_NONCE, description="Random text that the client has never sent before.")
    ],
) -> Response:
    """Responds only over the Unix socket, and without a token, because a client sends its token only after the proof.
    `proof` is the HMAC-SHA256, in hexadecimal, of `h5feed local`, the instance and the nonce, joined by zero bytes. Its
    key is the `secret` of the offer.
    """
    local: LocalSocket | None = request.app.state.local
    if local is None or not _is_unix(request.scope):
        raise PageNotFound("only requests over the server's Unix socket get a proof")
    proof = local.proof(ticket, nonce)
    if proof is None:
        raise BadParameter(f"ticket={ticket!r} is not valid, or has expired: get another one from {OFFER_PATH}")
    return JSONResponse({"instance": local.instance, "proof": proof}, headers=_NO_STORE)


class LocalHint:
    """ASGI middleware that tells clients on this machine that there is a Unix socket, by a header.

    Clients ask for the socket only if they see the header, so that servers which have none are not asked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_HINTED) or not is_direct(scope):
            await self._app(scope, receive, send)
            return

        async def hinting(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (OFFER_HEADER.encode(), b"1")]
            await send(message)

        await self._app(scope, receive, hinting)


def is_direct(scope: Scope) -> bool:
    """Whether a request comes from a program on this machine, over TCP, without TLS, and as far as the headers show
    without a proxy.
    """
    client, server = scope.get("client"), scope.get("server")
    if scope["scheme"] != "http" or client is None or server is None or server[1] is None:
        return False
    if not (_is_loopback(client[0]) and _is_loopback(server[0])):
        return False
    return not any(name in _OF_PROXIES or name.startswith(_OF_PROXIES_BEGIN) for name, _ in scope["headers"])


def _is_unix(scope: Scope) -> bool:
    server = scope.get("server")
    return scope.get("client") is None and server is not None and server[1] is None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
