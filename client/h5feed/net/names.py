"""Provisional names of revisions: which server gave each, and what its content is called; see `h5feed.revisions`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from ..errors import BadParameter
from ..revisions import is_provisional, names_in
from .servers import Server

Params = Mapping[str, str | tuple[str, ...]]
"""Of a query; a tuple is a parameter that is given several times."""

_MOST_KNOWN = 10_000
"""Maximum number of names. Beyond it, the oldest are forgotten."""


@dataclass
class _Known:
    server: Server
    content: str | None


class Names:
    """The provisional names that the servers of one client have told; safe to use from any thread."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def learn(self, header: str | None, server: Server) -> None:
        """Remember what a response of `server` tells in the header of this kind."""
        if (names := names_in(header)) is not None:
            self.add(names[0], server, names[1])

    def add(self, provisional: str, server: Server, content: str | None) -> None:
        """Remember a name that `server` gave."""
        known = self._known.get(provisional)
        if known is None:
            while len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)), None)
            self._known[provisional] = _Known(server, content)
        elif known.content is None:
            known.content = content

    def server_of(self, provisional: str) -> Server | None:
        """The server that gave a name; None if that is not known."""
        known = self._known.get(provisional)
        return None if known is None else known.server

    def current(self, revision: str) -> str:
        """The name by content that a provisional one is known to stand for; other names are returned as they are."""
        known = self._known.get(revision)
        return revision if known is None or known.content is None else known.content

    def are_same(self, one: str, other: str) -> bool:
        """Whether two names are known to stand for the same data."""
        return one == other or self.current(one) == self.current(other)


class Aim:
    """What one request asks for, and which servers can answer it.

    With a provisional name, that is only the server that gave it: the request waits for this server. As soon as the
    content is known, it asks for that, and all servers can answer.

    Attributes
    ----------
    target : str
        Path and query.
    among : sequence of Server
        The servers that can answer; empty if all can.
    """

    def __init__(self, names: Names, servers: Iterable[Server], path: str, params: Params | None) -> None:
        self._names = names
        self._servers = servers
        self._path = path
        self._params = params or {}
        revision = self._params.get("revision")
        self._provisional = revision if isinstance(revision, str) and is_provisional(revision) else None
        self.among: Sequence[Server] = ()
        self.target = self._target(self._params)

    @property
    def is_provisional(self) -> bool:
        """Whether it asks for a provisional name."""
        return self._provisional is not None

    def take(self) -> None:
        """Update the attributes before an attempt."""
        if self._provisional is None:
            return
        current = self._names.current(self._provisional)
        if current != self._provisional:
            self.target, self.among = self._target({**self._params, "revision": current}), ()
            self._provisional = None
        elif (giver := self._names.server_of(self._provisional)) is not None:
            self.among = (giver,)

    def has_others_than(self, server: Server) -> bool:
        """Whether another server may have given the name, which this one does not know. If so, they are asked next."""
        if self._provisional is None or self._names.server_of(self._provisional) is not None:
            return False
        others = [other for other in self.among or self._servers if other is not server]
        self.among = others or self.among
        return bool(others)

    def _target(self, params: Params) -> str:
        # Encoded here, because httpx would parse and rebuild the URL for every part.
        try:
            return f"{self._path}?{urlencode(params, doseq=True)}" if params else self._path
        except UnicodeEncodeError as error:
            raise not_text(error) from None


def not_text(error: UnicodeEncodeError) -> BadParameter:
    """The error to raise for text that cannot be encoded."""
    begin = max(0, error.start - 40)
    return BadParameter(f"{error.object[begin : error.end]!r} is not text: it contains half of a surrogate pair")
