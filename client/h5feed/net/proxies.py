"""Proxies from the environment: ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``.

As in Go's standard library, this machine is never asked for through a proxy, and ``NO_PROXY`` may contain networks such
as ``10.0.0.0/8``.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import urllib.request
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ..errors import BadParameter

_DEFAULT_PORT = 80
"""As of any http URL."""

_NO_URL = "is not a URL such as http://proxy.example.org:3128"


@dataclass(frozen=True)
class Proxy:
    """A proxy that speaks HTTP.

    Attributes
    ----------
    host, port
    authorization : bytes
        The line of its header, with the end of the line; empty if it wants none.
    shown : str
        For messages: without user name and password, with the variable that names it.
    """

    host: str
    port: int
    authorization: bytes
    shown: str


def proxy_for(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy through which the environment wants a server asked; None for none.

    Raises
    ------
    BadParameter
        The variable names a proxy of another kind, or is no URL.
    """
    proxies = urllib.request.getproxies_environment()
    kind = scheme if proxies.get(scheme) else "all"
    url = proxies.get(kind)
    if not url or _is_local(host) or _is_excluded(host, port, proxies.get("no", "")):
        return None
    variable = f"{kind}_proxy"
    variable = variable if os.environ.get(variable) else variable.upper()
    return _parsed(url, variable)


def _parsed(url: str, variable: str) -> Proxy:
    try:
        # Many write HOST:PORT.
        parts = urlsplit(url if "://" in url else f"http://{url}")
    except ValueError:
        # Its message may contain the password.
        raise BadParameter(f"{variable} {_NO_URL}") from None
    if parts.scheme != "http":
        raise BadParameter(
            f"{variable} names a proxy of the kind {parts.scheme!r}, but only http:// proxies are supported: use "
            "one, or name the server in NO_PROXY"
        )
    try:
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise BadParameter(f"{variable} {_NO_URL}")
    authorization = b""
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        authorization = b"Proxy-Authorization: Basic %b\r\n" % base64.b64encode(user)
    return Proxy(parts.hostname, port, authorization, f"{parts.hostname}:{port} ({variable})")


def _is_local(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def _is_excluded(host: str, port: int, excluded: str) -> bool:
    address = _address(host)
    for item in excluded.lower().split(","):
        item = item.strip()
        if item == "*":
            return True
        if "/" in item:
            try:
                if address is not None and address in ipaddress.ip_network(item, strict=False):
                    return True
            except ValueError:
                pass
            continue
        name, _, only_port = item.rpartition(":") if _address(item) is None and ":" in item else (item, "", "")
        name = name.strip("[]").removeprefix("*").lstrip(".")
        if only_port and only_port != str(port):
            continue
        if name and (host == name or host.endswith(f".{name}")):
            return True
    return False


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
