"""The Unix socket that the server names to clients on its own machine, and how it proves that the socket is its own.

The supervisor creates it before the workers are forked, so that any worker can respond to a ticket of another one. See
`h5feed.handshake`.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass, field

from h5feed.handshake import proof_of

TICKET_SECONDS = 5.0
"""How long a ticket is valid."""

_TICKET = re.compile(r"[0-9a-f]{32}\.([0-9]{1,15})")


@dataclass(frozen=True)
class LocalSocket:
    """A Unix socket on which the server listens.

    Attributes
    ----------
    path : str
        Absolute.
    instance : str
        Random id of this run of the server.
    uid : int
        User that runs the server.
    """

    path: str
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    uid: int = field(default_factory=os.geteuid)
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def ticket(self) -> tuple[str, bytes]:
        """A new ticket and its secret."""
        # The monotonic clock is the same in all processes of a machine, and nobody sets it.
        ticket = f"{secrets.token_hex(16)}.{int((time.monotonic() + TICKET_SECONDS) * 1000)}"
        return ticket, self._secret(ticket)

    def proof(self, ticket: str, nonce: str) -> str | None:
        """See `h5feed.handshake.proof_of`; None if the ticket is invalid or has expired."""
        match = _TICKET.fullmatch(ticket)
        left = int(match[1]) / 1000 - time.monotonic() if match else -1.0
        if not 0 <= left <= TICKET_SECONDS:
            return None
        return proof_of(self._secret(ticket), self.instance, nonce)

    def _secret(self, ticket: str) -> bytes:
        return hmac.digest(self._key, f"ticket\0{ticket}".encode(), "sha256")
