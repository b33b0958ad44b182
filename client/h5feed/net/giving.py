"""Gives weights to servers that lack them, in the middle of the request that needs them."""

from __future__ import annotations

from collections import Counter

from ..errors import WeightsUnknown
from ..weights import GivenWeights
from .balancing import Servers
from .exchange import Answer
from .names import Params
from .retries import error_of
from .servers import Server

_MOST_GIVEN = 2
"""How often a request gives weights to the same server. If it does not keep them, giving them again would not help."""


class Giving:
    """What one request can give to servers: the array of weights that its parameters carry, if any."""

    def __init__(self, params: Params | None, servers: Servers) -> None:
        self._servers = servers
        weights = (params or {}).get("weights")
        self._weights = weights if isinstance(weights, GivenWeights) else None
        self._given: Counter[str] = Counter()

    def help_after(self, answer: Answer, server: Server, deadline: float) -> None:
        """Give the server what its error response says that it lacks. After that, the same request may succeed.

        Raises
        ------
        FeedError
            That of the response, if this does not help, or the server refuses the weights.
        httpx.TransportError
        """
        several, weights = len(self._servers) > 1, self._weights
        error = error_of(answer, server, several=several)
        if not isinstance(error, WeightsUnknown) or weights is None or self._given[server.name] >= _MOST_GIVEN:
            raise error
        self._given[server.name] += 1
        answer = server.send(
            "POST",
            weights.target,
            "application/json",
            content=weights.values.tobytes(),
            deadline=deadline,
            more={"content-type": "application/octet-stream"},
        )
        if answer.status != 200:
            raise error_of(answer, server, several=several)
