"""What a server offers an answer beside ASGI: a way past its event loop, and what it knows of who waits.

A server that has nothing of it, as any other ASGI server, is served by plain ASGI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.types import Scope

PEER = "h5feed.peer"
"""Key in the scope's extensions: the `Peer` of this request, from servers that have one."""


class Writer(Protocol):
    """One answer, written by a thread.

    The thread calls `start`, `write` and, last, `close`; the event loop calls `take_back` when the thread has ended, or
    `revoke` when the thread has failed or cannot be waited for.

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
        """Begin an answer of `nbytes`, with status 200.

        Raises
        ------
        ConnectionAbortedError
            Nobody waits for this answer any more.
        """

    def write(self, data: memoryview) -> int:
        """Send what the peer takes of `data`; returns how many bytes that were."""

    def close(self) -> None:
        """Let go of the socket. For the thread alone: under it, a closed descriptor might be another's soon."""

    def take_back(self) -> bytes:
        """End the direct way: the server goes on with what is unsent, beginning with the bytes returned."""

    def revoke(self) -> None:
        """Give up: an answer that has not begun will not, one that has is cut off."""


class Peer(Protocol):
    """Who waits for the answer to one request."""

    def direct(self) -> Writer | None:
        """A way past the event loop; None where the answer must go through it."""

    def is_gone(self) -> bool:
        """Whether nobody waits any more."""

    def has_begun(self) -> bool:
        """Whether anything of the answer was sent."""

    def has_all(self) -> bool:
        """Whether all of the answer was handed to the system, or waits for it to be taken."""

    def counts_for(self, caller: str) -> bool:
        """Told whose connection it is; returns whether an answer before was taken, all of it (see `callers`)."""

    def abort(self) -> None:
        """End the connection, whatever is unsent."""


def peer_of(scope: Scope) -> Peer | None:
    """What the server offers for this request."""
    peer: Peer | None = scope.get("extensions", {}).get(PEER)
    return peer
