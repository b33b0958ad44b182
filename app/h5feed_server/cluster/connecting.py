"""The connection to a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

from h5feed.errors import BadParameter, FeedError

AUTO = "auto"
"""The address of the cluster that this machine is a node of."""

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]):(?P<port>[0-9]{1,5})")
_CONNECT_SECONDS = 10.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect this process to a cluster for the time of the context, which gets the module ``ray``.

    All that the process starts in the cluster ends with the context.

    Parameters
    ----------
    address : str
        ``auto``, or ``HOST:PORT`` of the head node.

    Raises
    ------
    BadParameter
        Ray is not installed, or the address is not one.
    FeedError
        There is no cluster, or it has another version of Python or Ray.
    """
    _check(address)
    try:
        import ray
    except ModuleNotFoundError:
        raise BadParameter("--ray needs Ray: pip install 'h5feed-server[ray]'") from None
    if ray.is_initialized():
        raise FeedError("this process is already connected to a Ray cluster")
    try:
        # What Ray prints of its own processes fills pages: what matters to us is in the errors that it raises.
        ray.init(address=address, namespace="h5feed", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FeedError(f"--ray {address}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Refuse what Ray would misunderstand, or would wait for in vain for a minute."""
    if address == AUTO:
        return
    match = _ADDRESS.fullmatch(address)
    if match is None:
        other = ": Ray Client is not supported, run this on a node of the cluster" if "://" in address else ""
        raise BadParameter(f"--ray {address} is neither {AUTO!r} nor HOST:PORT of the head node{other}")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise FeedError(f"--ray {address}: no cluster listens there ({getattr(error, 'strerror', error)})") from None
