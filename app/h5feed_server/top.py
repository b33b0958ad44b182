"""The command ``top``: shows the activity of a server in a terminal."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

SECONDS = 1.0
"""Interval between two frames."""

_TIMEOUT = 10.0
_MOST_LINES = 10
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Unreachable(Exception):
    """The server does not respond as expected; the message gives the reason."""


def run_top(url: str, token: str | None, *, once: bool, console: Console) -> int:
    """Show frames until Ctrl-C or q; returns the exit code.

    Parameters
    ----------
    url : str
        ``http://…``, ``https://…`` or ``unix:///path``.
    token : str, optional
    once : bool
        Show a single frame.
    """
    token = (token or "").strip()
    try:
        frame = _frame(url, _ask(url, token))
    except Unreachable as error:
        print(f"h5feed-server: {error}", file=sys.stderr)
        return 1
    if once or not console.is_terminal:
        console.print(frame)
        return 0
    with _keys() as pressed, Live(frame, console=console, screen=True, auto_refresh=False) as live:
        try:
            while not pressed(SECONDS):
                try:
                    frame = _frame(url, _ask(url, token))
                except Unreachable as error:
                    # It may be restarting.
                    frame = Group(Text(f"{error}; trying again", style="red"))
                live.update(frame, refresh=True)
        except KeyboardInterrupt:
            return 130
    return 0


def _ask(url: str, token: str) -> dict[str, Any]:
    if not all(" " <= char <= "~" for char in token):
        raise Unreachable("the token must contain only printable ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Unreachable(f"invalid server URL {url!r}: {error}") from None
    connection: http.client.HTTPConnection
    if parts.scheme == "unix":
        connection = _UnixConnection(unquote(parts.path))
    elif parts.scheme == "https" and parts.hostname:
        connection = http.client.HTTPSConnection(parts.hostname, port, timeout=_TIMEOUT)
    elif parts.scheme == "http" and parts.hostname:
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=_TIMEOUT)
    else:
        raise Unreachable(f"invalid server URL {url!r}: use http://host:8000, https://host or unix:///path/to.sock")
    prefix = "" if parts.scheme == "unix" else parts.path.rstrip("/")
    try:
        headers = {"accept": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
        connection.request("GET", f"{prefix}/feed?format=json", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"no response from {url}: {error}") from None
    finally:
        connection.close()
    if answer.status == 401:
        raise Unreachable(f"{url} requires a valid token: pass --token or set H5FEED_TOKEN")
    try:
        content = json.loads(body)
        if answer.status != 200:
            raise Unreachable(f"error from {url}: {content['detail']}")
        if not {"now", "each_worker", "callers", "slowest"} <= content.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unreachable(f"the response from {url}/feed is not from an h5feed server of this version") from None
    return dict(content)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextmanager
def _keys() -> Iterator[Any]:
    """Yields a function that waits for a number of seconds, and returns True early if q is pressed."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> bool:
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(readable) and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q")

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _frame(url: str, data: Mapping[str, Any]) -> Group:
    now, totals = data["now"], data["totals"]
    hits = data["found_in_memory"]
    summary = (
        f"{now['batches_per_second']:,.1f} batches/s   {_size(now['bytes_per_second'])}/s   "
        f"{now['requests_per_second']:,.1f} requests/s   {now['callers']} clients   "
        f"found in memory {'–' if hits is None else f'{hits:.0%}'}   "
        f"in flight {_size(data['in_flight_bytes_of_all'])} of {_size(data['in_flight_limit_of_all'])}   "
        f"{totals['errors']:,} errors"
    )
    return Group(
        Text(f"{url}   {time.strftime('%H:%M:%S')}", style="bold"),
        Text(summary),
        _workers(data["each_worker"]),
        _callers(data["callers"]),
        _slowest(data["slowest"]),
    )


def _workers(workers: list[dict[str, Any]]) -> Table:
    columns = (
        "worker",
        "pid",
        "memory",
        "connections",
        "in flight",
        "busy threads",
        "requests",
        "batches",
        "cache hits",
    )
    table = _table("Workers", *columns)
    for one in workers:
        share = "–" if one["cache_hits"] is None else f"{one['cache_hits']:.0%}"
        table.add_row(
            str(one["worker"]),
            str(one["pid"]),
            _size(one["resident_bytes"]),
            f"{one['connections']:,}",
            _size(one["in_flight_bytes"]),
            f"{one['busy_threads']:,}",
            f"{one['requests']:,}",
            f"{one['batches']:,}",
            share,
        )
    return table


def _callers(callers: list[dict[str, Any]]) -> Table:
    table = _table("Clients in the last minute", "caller", "batches", "bytes", "waited for data")
    for one in callers[:_MOST_LINES]:
        waited = "–" if one["waited"] is None else f"{one['waited']:.0%}"
        table.add_row(_shown(one["name"]), f"{one['batches']:,}", _size(one["bytes"]), waited)
    return table


def _slowest(slowest: list[dict[str, Any]]) -> Table:
    table = _table("Slowest requests in the last ten minutes", "ms", "s ago", "request")
    for one in slowest[:_MOST_LINES]:
        table.add_row(f"{1000 * one['seconds']:,.0f}", f"{max(0, one['ago']):,.0f}", _shown(one["what"]))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        is_text = name in ("caller", "request")
        table.add_column(name, justify="left" if is_text else "right", overflow="ellipsis", no_wrap=True)
    return table


def _shown(text: str) -> str:
    """Without control characters, which the terminal would interpret."""
    return escape("".join(char if char.isprintable() else "?" for char in text))


def _size(nbytes: float) -> str:
    power = 0
    while nbytes >= 1000 and power < len(_UNITS) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return f"{nbytes:,.{min(power, 1)}f} {_UNITS[power]}"
