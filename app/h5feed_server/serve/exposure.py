"""Who can reach the server, at which address, and the token that is generated if none is set."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path

from ..settings import Settings

_TOKEN_BYTES = 24
_TOKEN = re.compile(r"[\w-]{32}", re.ASCII)
"""What so many random bytes look like."""


def is_open(settings: Settings) -> bool:
    """Whether other machines could read everything without the operator having allowed it."""
    if settings.token_list or settings.public or not settings.has_port:
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


def kept_token(cache_dir: Path) -> str:
    """The generated token; it stays the same across restarts."""
    file = cache_dir / "token"
    # Anything else is what a crash has left of one, or somebody's own; to read what is no file may wait for ever.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if file.is_file() and _TOKEN.fullmatch(kept := file.read_text("ascii").strip()):
            return kept
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an empty token would let everybody in. `mkstemp` makes it readable by its owner only.
        descriptor, unfinished = tempfile.mkstemp(dir=cache_dir, prefix=".token-")
        with open(descriptor, "w") as stream:
            stream.write(token)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.lexists(file):
            os.replace(file, aside := cache_dir / "token.old")
            print(
                f"h5feed-server: {file} did not contain a valid token; it was renamed to {aside.name}", file=sys.stderr
            )
        os.replace(unfinished, file)
    except OSError as error:
        print(f"h5feed-server: the token cannot be saved: {error.strerror}", file=sys.stderr)
    return token
