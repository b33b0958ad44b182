"""Who can reach the server, and at which address."""

from __future__ import annotations

import ipaddress

from ..settings import Settings


def is_open(settings: Settings) -> bool:
    """Whether other machines could read everything, although the operator has not allowed it."""
    if settings.is_guarded or settings.public or not settings.has_port:
        return False
    # A container listens on all of its addresses, so the address at which its port is published counts.
    host, _ = published_on(settings) or (settings.host, settings.port)
    return not is_loopback(host)


def local_address(host: str, port: int) -> str:
    """``HOST:PORT`` at which this machine reaches a server with this listening address."""
    if is_every_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_every_address(host: str) -> bool:
    """Whether this host means all addresses of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


def published_on(settings: Settings) -> tuple[str, int] | None:
    """Address and port at which a container's port is published; None if unknown or not in a container."""
    host, _, port = settings.published_on.rpartition(":")
    return (host.strip("[]"), int(port)) if port else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this listening address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
