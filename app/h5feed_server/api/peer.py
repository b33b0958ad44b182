"""What our own server offers an endpoint beyond ASGI: a way to write to the socket from a thread, and the client's
state.

Other ASGI servers offer none of it; plain ASGI is used there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.types import Scope

PEER = "h5feed.peer"
"""Key in the scope's extensions: the `Peer` of this request, from servers that have one."""

NO_DESCRIPTORS = "this server passes no descriptors (H5FEED_DESCRIPTORS=off)"


class Writer(Protocol):
    """One response, written by a thread.

    The thread calls `start`, `write` and finally `close`. The event loop calls `take_back` when the thread has
    finished, or `revoke` if it failed or took too long.

    Attributes
    ----------
    started : bool
        Whether an answer has begun.
    stalled : bool
        The peer does not keep up: `write` keeps away from the socket from now on.
    """

    started: bool
    stalled: bool

    def start(self, headers: Sequence[tuple[bytes, bytes]], nbytes: int) -> None:
        """Begin a response of `nbytes`, with status 200.

        Raises
        ------
        ConnectionAbortedError
            Nobody waits for this answer any more.
        """

    def write(self, data: memoryview, descriptor: int | None = None) -> int:
        """Send what the client accepts of `data`; returns the number of bytes sent.

        A `descriptor` is passed with the first bytes of the response. Only to local clients.
        """

    def close(self) -> None:
        """Release the socket. Only the thread may call this: after closing, the descriptor number could belong to
        another connection.
        """

    def take_back(self) -> bytes:
        """Stop writing directly: the event loop sends the rest, beginning with the bytes returned."""

    def revoke(self) -> None:
        """Give up: a response that has not begun never will; one that has is aborted."""


class Peer(Protocol):
    """The client that waits for one response."""

    def direct(self) -> Writer | None:
        """A writer for this response; None if it must go through the event loop."""

    def is_local(self) -> bool:
        """Whether the client is connected to the Unix socket."""

    def is_gone(self) -> bool:
        """Whether the client has disconnected."""

    def has_begun(self) -> bool:
        """Whether any part of the response was sent."""

    def has_all(self) -> bool:
        """Whether the whole response was handed to the operating system or is waiting to be accepted by it."""

    def sent_bytes(self) -> int:
        """Bytes of the response's body that were handed to the operating system, or wait to be."""

    def counts_for(self, caller: str) -> bool:
        """Assign the connection to a caller; returns whether the client has accepted an earlier response completely
        (see `identity`).
        """

    def abort(self) -> None:
        """Close the connection, whatever has not been sent."""


def peer_of(scope: Scope) -> Peer | None:
    """The peer of a request, if the server offers one."""
    peer: Peer | None = scope.get("extensions", {}).get(PEER)
    return peer


def refusal(peer: Peer | None) -> str | None:
    """Why this client gets no descriptors, whatever the settings say; None if it may get them."""
    if peer is None:
        return "only a server started with `h5feed-server serve` passes descriptors"
    return None if peer.is_local() else "descriptors are passed only over the server's Unix socket, not over TCP"
