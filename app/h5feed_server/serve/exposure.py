"""Who can reach the server, and at which address."""

from __future__ import annotations

import ipaddress

from ..settings import Settings


def is_open(settings: Settings) -> bool:
    """Whether other machines could read everything without the operator having allowed it."""
    if settings.is_guarded or settings.public or not settings.has_port:
        return False
    # A container listens on all of its addresses; what counts is where its port is published.
    host, _ = published_on(settings) or (settings.host, settings.port)
    return not _is_loopback(host)


def local_address(host: str, port: int) -> str:
    """``HOST:PORT`` by which this machine reaches a server that listens there."""
    if is_every_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_every_address(host: str) -> bool:
    """Whether it stands for all addresses of a machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


def published_on(settings: Settings) -> tuple[str, int] | None:
    """Address and port under which a container's port is published; None: it is none, or nobody has said."""
    host, _, port = settings.published_on.rpartition(":")
    return (host.strip("[]"), int(port)) if port else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
