"""A server that is far away: behind an HTTP proxy, under a name that nobody else knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from .proxies import ForwardProxy

NAME = "feed.example"
"""The server has to accept it: ``H5FEED_ALLOWED_HOSTS``."""


@contextlib.contextmanager
def far_away(port: int) -> Iterator[str]:
    """The URL of the server on this port, for clients that are made meanwhile."""
    proxy = ForwardProxy({f"{NAME}:{port}": port})
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("http_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "NO_PROXY"):
            patch.delenv(variable, raising=False)
        patch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield f"http://{NAME}:{port}"
    proxy.close()
