"""How a client makes sure that a Unix socket belongs to the server that it already talks to over TCP.

1. Over TCP, `OFFER_PATH` returns the path of the socket, a ticket, and a secret that belongs to the ticket.
2. Over the socket, the client sends the ticket and a nonce of its own to `PROOF_PATH`, without a token.
3. The response contains `proof_of` the nonce, which only a process that can derive the secret from the ticket knows.
"""

from __future__ import annotations

import hmac

OFFER_HEADER = "h5feed-local"
"""Header of responses to clients that may ask for `OFFER_PATH`. Without it, nothing is asked."""

OFFER_PATH = "/v1/local"
PROOF_PATH = "/v1/local/proof"

MAX_NONCE = 128
"""Characters."""

MAX_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket: ``sun_path`` on Linux, without its final zero."""


def proof_of(secret: bytes, instance: str, nonce: str) -> str:
    """HMAC-SHA256 of the instance and the nonce, in hexadecimal."""
    return hmac.digest(secret, f"h5feed local\0{instance}\0{nonce}".encode(), "sha256").hex()
