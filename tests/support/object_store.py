"""Object stores on this machine: a real S3 server, a web server, and a proxy in front of them that can hold, cut and
count answers.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .server_process import ServerProcess
from .waiting import wait_until

SOURCES = ("folder", "store")
"""Where the same files are served from, see `served_from`."""

KEY, SECRET, REGION = "a-key", "a-secret", "eu-west-2"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def credentials(url: str) -> dict[str, str]:
    """Environment of a server that reads from the store at this address."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
    }


class StoreProcess:
    """An S3 or web server as a process of its own.

    Parameters
    ----------
    *command : str
        Begins it; ``{port}`` stands for the port.
    """

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        self._command = command
        self._environment = environment or {}
        self.port = free_port()
        self.start()

    def start(self) -> None:
        command = [part.format(port=self.port) for part in self._command]
        # Of this environment, unless it is a path.
        program = str(Path(sys.executable).parent / command[0])
        self._process = subprocess.Popen(
            [program, *command[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self._environment},
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the store has ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return credentials(self.url)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)


def serve_folder(folder: Path, *options: str) -> StoreProcess:
    """The subfolders of a folder as buckets, quickly; ignores conditions."""
    keys = ("--access-key", KEY, "--secret-key", SECRET, "--region", REGION)
    return StoreProcess("hadro", str(folder), "--port", "{port}", *keys, *options)


@contextlib.contextmanager
def served_from(source: str, folder: Path, scratch: Path, *options: str, **environment: str) -> Iterator[ServerProcess]:
    """A server of a folder, or of an object store with the same files.

    Parameters
    ----------
    source : str
        One of `SOURCES`.
    folder : Path
    scratch : Path
        Folder for the cache and the store.
    """
    if source == "folder":
        server = ServerProcess(folder, scratch / "cache", *options, **environment)
        yield server
        assert server.stop() == 0
        return
    pytest.importorskip("obstore")
    pytest.importorskip("hadro")
    copy_files(folder, scratch / "buckets" / "data")
    store = serve_folder(scratch / "buckets")
    try:
        server = ServerProcess("s3://data", scratch / "cache", *options, **store.environment, **environment)
        server.folder = folder
        yield server
        assert server.stop() == 0
    finally:
        store.stop()


def writable(folder: Path) -> StoreProcess:
    """The subfolders of a folder as buckets that can be written to; ignores conditions. The metadata of the objects are
    in hidden folders, and the parts of unfinished uploads in ``.nanio/multipart``.
    """
    keys = {"NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET}
    options = ("--host", "127.0.0.1", "--port", "{port}", "--region", REGION)
    return StoreProcess("nanio", "serve", "--data-dir", str(folder), *options, environment=keys)


def copy_files(folder: Path, target: Path) -> None:
    """What a bucket can hold of a folder: the files, but neither links nor pipes, and no hidden ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in path.parts):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def browse_folder(folder: Path) -> StoreProcess:
    """A folder by Caddy, which lists it as JSON, or as HTML to those who do not ask for JSON."""
    return StoreProcess("caddy", "file-server", "--root", str(folder), "--listen", "127.0.0.1:{port}", "--browse")


Answer = tuple[int, dict[str, str], bytes]
Behaviour = Callable[[str, str | None, Callable[[], Answer]], Answer]
WriteBehaviour = Callable[[str, str, Callable[[], Answer]], Answer | None]


def honest(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
    """Pass everything on."""
    return ask()


def obedient(method: str, path: str, ask: Callable[[], Answer]) -> Answer | None:
    """Pass every write on."""
    return ask()


class StoreProxy:
    """Stands in front of a store.

    Parameters
    ----------
    store : StoreProcess
    folder : Path
        Whose subfolders are its buckets: needed for `conditional` writes.

    Attributes
    ----------
    behave : callable
        ``behave(path, ranged, ask)`` returns the answer to a GET, which is the store's if it calls `ask`. `ranged` is
        the value of the header ``Range``.
    behave_written : callable
        ``behave_written(method, path, ask)`` does the same for PUT, POST and DELETE. None closes the connection instead
        of an answer.
    writes : list of (str, str, int)
        Method, path and bytes of each of these requests.
    ranges : int
        Number of answered requests for ranges.
    nbytes : int
        Bytes of these answers.
    heads, lists : int
        Number of requests for metadata, and for listings.
    conditional : bool
        Whether to heed the headers ``If-Match`` and ``If-None-Match: *``, which the store ignores.
    hides : frozenset of str
        Headers, in lower case, that the store does not get to see.
    """

    def __init__(self, store: StoreProcess, folder: Path = Path()) -> None:
        self._store = store
        self.folder = folder
        self.behave: Behaviour = honest
        self.behave_written: WriteBehaviour = obedient
        self.writes: list[tuple[str, str, int]] = []
        self.conditional = False
        self.hides: frozenset[str] = frozenset()
        self.ranges = self.nbytes = self.heads = self.lists = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                ranged = self.headers.get("Range")
                status, headers, body = proxy.behave(self.path, ranged, self._ask)
                if ranged is not None:
                    with proxy._lock:
                        proxy.ranges += 1
                        proxy.nbytes += len(body)
                with proxy._lock:
                    proxy.heads += self.command == "HEAD"
                    proxy.lists += "list-type=" in self.path
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                # What is shorter than it claims to be ends with the connection.
                self.close_connection = len(body) < int(headers.get("content-length", 0))

            do_HEAD = do_GET  # noqa: N815

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                with proxy._lock:
                    proxy.writes.append((self.command, self.path, len(body)))
                answer = proxy.behave_written(self.command, self.path, lambda: self._ask(body))
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_DELETE = do_PUT  # noqa: N815

            def _exists(self) -> bool:
                # The store compares no signatures of another method.
                return (proxy.folder / self.path.partition("?")[0].lstrip("/")).is_file()

            def _ask(self, sent: bytes | None = None) -> Answer:
                wanted = self.headers.get("If-None-Match")
                if proxy.conditional and wanted == "*" and self._exists():
                    return 412, {"content-length": "0"}, b""
                connection = http.client.HTTPConnection("127.0.0.1", proxy._store.port, timeout=60)
                # With the host that was signed.
                shown = {name: value for name, value in self.headers.items() if name.lower() not in proxy.hides}
                connection.request(self.command, self.path, body=sent, headers=shown)
                answer = connection.getresponse()
                body = answer.read()
                connection.close()
                hop = ("connection", "transfer-encoding", "keep-alive", "date", "server")
                headers = {name.lower(): value for name, value in answer.getheaders() if name.lower() not in hop}
                if self.command != "HEAD":
                    headers["content-length"] = str(len(body))
                wanted = self.headers.get("If-Match")
                if proxy.conditional and wanted not in (None, headers.get("etag", wanted)):
                    return 412, {"content-length": "0"}, b""
                return answer.status, headers, body

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return credentials(self.url)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
