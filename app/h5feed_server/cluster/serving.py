"""The command ``h5feed-server serve --ray``: a server on each node of a Ray cluster, and the list of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from h5feed.errors import BadParameter

from .. import __version__
from ..serve.command import announce_token, is_no_certificate, settings_of
from ..serve.exposure import is_every_address, is_loopback, local_address
from ..serve.listening import listen
from ..serve.worker import Tls
from ..settings import Settings, unknown_variables, variables_of
from ..sharing.logs import begin_logs, say
from ..tokens.keyring import Keyring
from ..tokens.token_file import TokenFileError
from .connecting import connected
from .node_actors import Lost, Node, NodeActors
from .node_server import STARTING, NodeServer, ServerState
from .server_list import ServerListPublisher

DEFAULT_PORT = 8001
"""Of the list of servers."""

START_SECONDS = 300.0
"""The command fails if no server runs this long after its start."""

_ATTEMPTS = 3
"""Servers that a node starts in vain before it counts as one that cannot."""

_LOOK_SECONDS = 1.0
_STOP_SECONDS = 12.0

_OF_THE_HEAD = frozenset({"data_dir", "published_on", "uds", "uds_mode", "socket_mode", "socket_group"})
"""Settings that are not passed on to the nodes. The first one is, as an argument."""


def run_serve_on_cluster(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises
    ------
    FeedError
    ValidationError
        Settings are wrong.
    """
    try:
        return _serve(options)
    except (BadParameter, TokenFileError) as error:
        print(f"h5feed-server: {error}", file=sys.stderr)
        return 2


def _serve(options: argparse.Namespace) -> int:
    for name in ("embedded", "uds"):
        if getattr(options, name) is not None:
            raise BadParameter(f"--{name} cannot be combined with --ray: clients reach the nodes over their ports")
    if options.allowed_hosts is not None:
        options.allowed_hosts = ",".join(options.allowed_hosts)
    settings, *_ = settings_of(options, generates=False)
    if settings.uds is not None:
        raise BadParameter("H5FEED_UDS cannot be combined with --ray: clients reach the nodes over their ports")
    if "host" not in settings.model_fields_set:
        # What serves a cluster serves other machines.
        options.host = "0.0.0.0"
    settings, is_generated, is_stored = settings_of(options)
    begin_logs(settings.log_format)
    for line in unknown_variables(os.environ):
        print(f"h5feed-server: {line}", file=sys.stderr)
    if is_generated and not is_stored:
        raise BadParameter(
            "the command created a token, but cannot store it in the cache folder: set H5FEED_TOKENS, pass "
            "--token-file, or pass a writable --cache-dir"
        )
    tls = _tls(options)
    keyring = Keyring(settings.token_list, settings.token_file)
    port = DEFAULT_PORT if options.registry_port is None else options.registry_port
    try:
        (listener,) = listen(settings.model_copy(update={"port": port}))
    except OSError as error:
        print(f"h5feed-server: cannot listen on {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    with contextlib.closing(listener), connected(options.ray) as ray, _stopping() as stop:
        published = ServerListPublisher(settings, keyring, listener, tls)
        with contextlib.closing(published):
            host = ray.util.get_node_ip_address() if is_every_address(settings.host) else settings.host
            url = f"{'https' if tls else 'http'}://{local_address(host, listener.getsockname()[1])}"
            servers = _Servers(ray, settings, _command(options, settings), environment_of(options, settings), published)

            def announce() -> None:
                say(settings.log_format, f"h5feed serves {settings.source} at servers+{url}")
                if is_generated:
                    announce_token(settings, settings.log_format, is_stored=is_stored)

            return servers.run(stop, announce)


def environment_of(options: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """The variables that give a server the settings of the command, wherever these come from.

    Tokens are passed in the environment as well, because everybody on a machine can see arguments.
    """
    fields = Settings.model_fields.keys() - _OF_THE_HEAD
    found = {name: value for name in fields if (value := os.environ.get(f"H5FEED_{name.upper()}"))}
    found |= {name: value for name, value in variables_of(options.env_file).items() if name in fields}
    flags = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    found |= {name: "1" if value is True else str(value) for name, value in flags.items()}
    if settings.tokens:
        found["tokens"] = settings.tokens
    for name in ("token_file", "cache_dir"):
        if name in found:
            found[name] = os.path.abspath(found[name])
    return {f"H5FEED_{name.upper()}": value for name, value in found.items()}


def url_of(host: str, node: Node, state: ServerState) -> str:
    """Where clients reach the server of a node.

    Parameters
    ----------
    host : str
        What it listens on.
    """
    parts = urlsplit(state.url)
    if is_every_address(host):
        # A certificate names a host, not its address.
        host = node.name if parts.scheme == "https" else node.address
    elif not is_loopback(host):
        host = node.address
    assert parts.port is not None
    return f"{parts.scheme}://{local_address(host, parts.port)}"


def _command(options: argparse.Namespace, settings: Settings) -> list[str]:
    """The arguments of a server."""
    source = str(settings.source) if settings.store is not None else os.path.abspath(settings.source)
    command = ["serve", source]
    if options.tls_cert:
        command += ["--tls-cert", os.path.abspath(options.tls_cert), "--tls-key", os.path.abspath(options.tls_key)]
    return command


def _tls(options: argparse.Namespace) -> Tls | None:
    certificate, key = options.tls_cert, options.tls_key
    if (certificate is None) != (key is None):
        raise BadParameter("--tls-cert and --tls-key must be given together")
    if certificate is None:
        return None
    if (why := is_no_certificate(certificate, key)) is not None:
        raise BadParameter(f"--tls-cert {certificate} with --tls-key {key}: {why}")
    return Tls(certificate, key)


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and SIGHUP set."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Servers:
    """The servers on the nodes, and what is known of them."""

    def __init__(
        self,
        ray: Any,
        settings: Settings,
        command: list[str],
        environment: Mapping[str, str],
        published: ServerListPublisher,
    ) -> None:
        self._ray, self._settings, self._published = ray, settings, published
        # A server takes no CPUs from the tasks of the cluster, or a node without free ones would have none.
        self._actors = NodeActors(ray, lambda node: (NodeServer, 0, (__version__, command, environment)))
        self._states: dict[str, tuple[Node, ServerState]] = {}

    def run(self, stop: threading.Event, announce: Any) -> int:
        """Keep a server on each node until `stop` is set; returns the exit code."""
        deadline = time.monotonic() + START_SECONDS
        is_announced = False
        try:
            while not stop.is_set():
                for node, report in self._actors.reports(_LOOK_SECONDS):
                    self._hear(node, report)
                self._published.urls = [url_of(self._settings.host, node, state) for node, state in self._ready()]
                if self._published.urls and not is_announced:
                    announce()
                    is_announced = True
                is_late = time.monotonic() > deadline and not any(state.url for _, state in self._states.values())
                if not is_announced and (is_late or self._is_hopeless()):
                    print("h5feed-server: no node can serve: see above", file=sys.stderr)
                    return 1
            return 0
        finally:
            self._published.urls = []
            self._stop()

    def _ready(self) -> list[tuple[Node, ServerState]]:
        return [(node, state) for node, state in self._states.values() if state.is_ready]

    def _is_hopeless(self) -> bool:
        """Whether every node has tried in vain."""
        tried = [self._states[node.id][1] for node in self._actors.nodes if node.id in self._states]
        return len(tried) == len(self._actors.nodes) > 0 and all(state.failures >= _ATTEMPTS for state in tried)

    def _hear(self, node: Node, report: ServerState | Lost) -> None:
        """Take a report, and say what has changed."""
        known = self._states.get(node.id)
        before = 0 if known is None else known[1].failures
        state = ServerState("", False, report.why, before + 1)
        if isinstance(report, ServerState):
            state = replace(report, lines=(), dropped=0)
            self._print(node, report)
        if isinstance(report, Lost) and report.has_left:
            self._states.pop(node.id, None)
            self._say(node, report.why, "WARNING")
            return
        self._states[node.id] = node, state
        if known is not None and (known[1].url, known[1].why) == (state.url, state.why):
            return
        if state.is_ready:
            self._say(node, f"the server is ready at {url_of(self._settings.host, node, state)}", "INFO")
        elif state.why == STARTING:
            self._say(node, "the server is starting", "INFO")
        else:
            self._say(node, f"the server is not ready: {state.why}", "WARNING")

    def _print(self, node: Node, state: ServerState) -> None:
        """Print what a server has printed."""
        if state.dropped:
            self._say(node, f"{state.dropped} lines of the log were dropped, because they were too many", "WARNING")
        for line in state.lines:
            if self._settings.log_format == "json":
                with contextlib.suppress(ValueError):
                    line = json.dumps({**json.loads(line), "node": node.address})
            else:
                line = f"node {node.address}: {line}"
            with contextlib.suppress(OSError):
                print(line, file=sys.stderr, flush=True)

    def _say(self, node: Node, text: str, level: str) -> None:
        say(self._settings.log_format, f"node {node.address}: {text}", sys.stderr, level=level)

    def _stop(self) -> None:
        """End all servers: those that can, after the responses in progress."""
        actors = [actor for node in self._actors.nodes if (actor := self._actors.actor(node)) is not None]
        with contextlib.suppress(Exception):
            self._ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=_STOP_SECONDS)
        self._actors.close()
