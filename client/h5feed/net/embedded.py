"""A server in the background, which `connect("data/")` starts for a folder or a file. All processes of a user share it.

Every such server has a folder below `runtime_folder`, named after what it serves, its version and its settings:

- ``clients``: every client holds a shared lock on it. The server ends when nobody does (see the server's
  ``serve/embedded.py``). The system releases the locks of processes that are killed.
- ``starting``: who holds this lock may start the server.
- ``server``: the server holds this lock as long as it runs.
- ``server.sock``, ``server.log``: the Unix socket and the log.

A client takes its lock before it looks for the socket. The server removes the socket while it holds that lock
exclusively, so a client either finds a server that stays, or starts a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadParameter, ConnectionFailed, FeedError
from ..forks import tell_after_fork
from ..runtime_folder import make_private, runtime_folder
from ..suggestions import did_you_mean
from ..version import __version__
from .cancellation import Cancellation
from .exchange import Answer
from .http import httpx
from .transport import FeedTransport

START_SECONDS = 60.0
"""How long the server may take to start."""

_LOCK_SECONDS = 15.0
"""How long a server that ends may hold the locks."""

_LOOK_SECONDS = 0.02
_CONNECT_SECONDS = 2.0

_TOLD_BYTES = 2000
"""Bytes of the log in an error message."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:unix|https?):")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")

_SERVER = "h5feed_server"

_NOT_INHERITED = frozenset(
    f"H5FEED_{name}"
    for name in (
        *("URL", "TOKEN", "TOKENS", "TOKEN_FILE", "DATA_DIR", "HOST", "PORT", "UDS", "UDS_MODE", "SOCKET_MODE"),
        *("SOCKET_GROUP", "LOCAL", "PUBLIC", "PUBLISHED_ON", "ALLOWED_HOSTS", "TRUSTED_PROXIES", "ROOT_PATH"),
    )
)
"""Settings of another server, or of clients. All others also apply to the server that is started."""

_PATHS = ("H5FEED_CACHE_DIR",)


def path_of(given: str | os.PathLike[str]) -> Path | None:
    """The folder or file that `given` names, resolved; None if it is a URL.

    A str is a URL if it begins with a scheme, such as ``http://``. All other str, and all other paths, name files.

    Raises
    ------
    BadParameter
        There is no such folder or file.
    """
    text = os.fsdecode(given)
    if isinstance(given, str) and _URL.match(text.lstrip()):
        return None
    path = Path(os.path.realpath(os.path.expanduser(text)))
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise BadParameter(f"{text!r} is neither a folder nor a file")
    rest = "a server is named by its URL: http://host:8000, https://host or unix:///path/to.sock"
    if _ADDRESS.fullmatch(text):
        raise BadParameter(f"there is no folder or file {text!r}: did you mean 'http://{text}'? {_capital(rest)}")
    raise BadParameter(f"there is no folder or file {text!r}: {_similar(text, rest)}")


def check_arguments(path: Path, **given: object) -> None:
    """Raise `BadParameter` if an argument of `connect` that has no effect for a path is not None."""
    for name, value in given.items():
        if value is not None:
            raise BadParameter(
                f"{name}= is for the URL of a server, but {str(path)!r} is a {'folder' if path.is_dir() else 'file'}, "
                "for which h5feed starts a server in the background"
            )


class Embedded:
    """The server of one folder or file.

    Parameters
    ----------
    path : Path
        Resolved.

    Raises
    ------
    BadParameter
        h5feed-server is not installed.
    ConnectionFailed
        There is no folder for its socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: int | None = None
        version = _version_of_server(path)
        self._environment = _environment()
        settings = sorted(item for item in self._environment.items() if item[0].startswith("H5FEED_"))
        key = repr((str(path), path.is_dir(), __version__, version, settings))
        try:
            self._folder = runtime_folder() / f"own-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        except OSError as error:
            raise ConnectionFailed(f"no server can be started for {path}: {error}") from None
        self.socket = str(self._folder / "server.sock")
        self._log = self._folder / "server.log"
        self._lock = threading.Lock()
        tell_after_fork(self)

    def __del__(self) -> None:
        # A client that is used after `close` has locked again.
        self.close()

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released. The file lock is shared."""
        self._lock = threading.Lock()

    def ensure(self, deadline: float, cancelled: Cancellation | None = None) -> None:
        """Start the server unless it runs, and keep it running until `close`.

        Raises
        ------
        ConnectionFailed
            It does not start before the deadline, or the request was `cancelled`.
        """
        wait = _Wait(f"the server for {self.path} did not start in time; its log is {self._log}", deadline, cancelled)
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            wait.step(0.0)
        try:
            self._hold(wait)
            if self._answers():
                return
            with _exclusive(self._folder / "starting", wait):
                if not self._answers():
                    self._start(wait)
        except OSError as error:
            raise ConnectionFailed(f"the server for {self.path} cannot be started: {error}") from None
        finally:
            self._lock.release()

    def keep(self) -> None:
        """Keep the server running until `close`, if it runs."""
        if self._held is None:
            self.ensure(time.monotonic() + START_SECONDS)

    def close(self) -> None:
        """Let the server end, unless somebody else uses it."""
        held, self._held = self._held, None
        if held is not None:
            # Not unlocked: a forked process may share the lock.
            os.close(held)

    def _hold(self, wait: _Wait) -> None:
        import fcntl

        path = self._folder / "clients"
        while True:
            make_private(self._folder)
            if self._held is not None:
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._held), os.stat(path)):
                        return
                # Somebody has deleted the folder.
                self.close()
            self._held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while not _try_lock(self._held, fcntl.LOCK_SH):
                    wait.step()
            except BaseException:
                self.close()
                raise

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            try:
                probe.connect(self.socket)
            except OSError:
                return False
        return True

    def _start(self, wait: _Wait) -> None:
        """Start the server, which detaches itself; call with the lock ``starting`` held."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._log, f"{self._log}.1")
        # Nothing of the current folder: it may contain modules with the names of others.
        command = [sys.executable, "-P", "-m", f"{_SERVER}.cli", "serve", str(self.path), "--embedded"]
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [*command, str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environment,
                start_new_session=True,
            )
        try:
            # It detaches itself. Until then, a server may answer whose starter was killed.
            while process.poll() is None and not self._answers():
                wait.step()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        while not self._answers():
            # The server takes its lock before it detaches itself, so nobody holds it if the server has ended.
            if (process.returncode or self._is_over()) and not self._answers():
                raise ConnectionFailed(f"the server for {self.path} did not start: {self._last_words()}")
            wait.step()

    def _is_over(self) -> bool:
        import fcntl

        descriptor = os.open(self._folder / "server", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return _try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def _last_words(self) -> str:
        """The end of the log, and where it is."""
        try:
            with open(self._log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TOLD_BYTES))
                said = file.read(_TOLD_BYTES).decode("utf-8", "replace").strip()
        except OSError as error:
            return f"its log {self._log} cannot be read ({error.strerror})"
        lines = "\n".join(said.splitlines()[-8:]) or "its log is empty"
        return f"{lines}\n(the end of {self._log})"


class EmbeddedTransport(FeedTransport):
    """Connections to a server in the background, which is started again if it has ended."""

    def __init__(self, server: Embedded) -> None:
        super().__init__(uds=server.socket)
        self._server = server

    def exchange(self, url: httpx.URL, request: bytes, **limits: Any) -> Answer:
        try:
            return super().exchange(url, request, **limits)
        except httpx.ConnectError:
            # Nothing was sent.
            deadline = min(limits["deadline"], time.monotonic() + START_SECONDS)
            try:
                self._server.ensure(deadline, limits.get("cancelled"))
            except FeedError as error:
                raise httpx.ConnectError(str(error)) from None
        return super().exchange(url, request, **limits)

    def close(self) -> None:
        super().close()
        self._server.close()

    def _connect(
        self, origin: tuple[str, str, int], timeout: float, cancelled: Cancellation | None = None
    ) -> socket.socket:
        # After `close`, a client can still be used.
        try:
            self._server.keep()
        except FeedError as error:
            raise OSError(str(error)) from None
        return super()._connect(origin, timeout, cancelled)


class _Wait:
    """Waiting with a deadline.

    Parameters
    ----------
    late : str
        What to say when it has passed.
    """

    def __init__(self, late: str, deadline: float, cancelled: Cancellation | None) -> None:
        self._late = late
        self._deadline = deadline
        self._cancelled = cancelled

    def step(self, seconds: float = _LOOK_SECONDS) -> None:
        """Wait a moment.

        Raises
        ------
        ConnectionFailed
        """
        if self._cancelled is not None and self._cancelled.is_set():
            raise ConnectionFailed("the request was cancelled")
        if time.monotonic() >= self._deadline:
            raise ConnectionFailed(self._late)
        time.sleep(seconds)


@contextlib.contextmanager
def _exclusive(path: Path, wait: _Wait) -> Iterator[None]:
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            wait.step()
        yield
    finally:
        # Also where a process that was forked meanwhile has the file open.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    import fcntl  # missing on Windows, where there is no server

    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _version_of_server(path: Path) -> str:
    if importlib.util.find_spec(_SERVER) is None or not sys.executable or not sys.platform.startswith("linux"):
        raise BadParameter(
            f"connect({str(path)!r}) starts a server in the background, which needs Linux and the package "
            f"h5feed-server: pip install h5feed-server=={__version__}. To use a server that runs, pass its URL, such "
            "as http://gpu-box:8000"
        )
    try:
        return importlib.metadata.version("h5feed-server")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _environment() -> dict[str, str]:
    """The environment of the server."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    for name in _PATHS:
        if environment.get(name):
            environment[name] = os.path.abspath(environment[name])
    if environment.get("PYTHONPATH"):
        folders = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))
    return environment


def _similar(text: str, rest: str) -> str:
    """Suggest a path with a similar name."""
    folder, name = os.path.split(text.rstrip("/"))
    try:
        names = sorted(entry.name for entry in os.scandir(os.path.expanduser(folder) or "."))
    except OSError:
        return rest
    # Without the folder, whose name would make everything in it similar.
    said = did_you_mean(name, names, rest)
    return said.replace("did you mean '", f"did you mean '{os.path.join(folder, '')}", 1)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
