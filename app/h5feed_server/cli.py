"""The command ``h5feed-server``."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h5feed.errors import FeedError
from pydantic import ValidationError

from . import __version__
from .build.arguments import add_build
from .settings import Settings

_TOKEN_BYTES = 24
_TOKEN = re.compile(r"[\w-]{32}", re.ASCII)
"""What so many random bytes look like."""

_EXAMPLES = """examples:
  h5feed-server demo                              train on real digits through a real server, in a minute
  h5feed-server build pets/ -o data/pets.h5       make an HDF5 file of a folder of images
  h5feed-server inspect data/pets.h5              what is in it, how it will be served, what would make it faster
  h5feed-server serve ./data                      serve the HDF5 files below ./data on http://127.0.0.1:8000
  h5feed-server serve ./data --workers 2          with two processes
  h5feed-server serve ./data --uds /run/h5feed.sock
  h5feed-server serve ./data --host 0.0.0.0       to other machines; a token is made and printed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="h5feed-server",
        description="Serves training batches from HDF5 files over HTTP.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"h5feed-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_build(commands)
    inspect = commands.add_parser(
        "inspect", help="say what is in an HDF5 file, how it will be served, and what would make it faster"
    )
    inspect.add_argument("file", metavar="FILE", type=Path)
    demo = commands.add_parser("demo", help="pack scikit-learn's digits, serve them, train a Keras model over HTTP")
    demo.add_argument("--epochs", type=int, default=8, help="passes over the training split (default 8)")
    demo.add_argument("--workers", type=int, default=1, help="server processes (default 1)")
    options = parser.parse_args(argv)
    # What is wrong with its file `inspect` says itself; the others of its dataset are not what it was asked about.
    level = logging.ERROR if options.command == "inspect" else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if options.command == "demo":
            from .demo import run_demo

            return run_demo(epochs=options.epochs, workers=options.workers)
        if options.command == "build":
            from .build.command import run_build

            return run_build(options)
        if options.command == "inspect":
            from rich.console import Console

            from .inspection import inspect_file

            return inspect_file(options.file, Console())
        return _serve(options)
    except FeedError as error:
        print(f"h5feed-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a folder of HDF5 files",
        description="Serves the HDF5 files below a folder. Every option can also be set as H5FEED_NAME in the "
        "environment, with more beside: see docs/settings.md.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("data_dir", metavar="DIR", type=Path, help="folder of HDF5 files; it is only read")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port (default 8000; 0 takes a free one)")
    serve.add_argument("--uds", metavar="PATH", help="listen on this Unix socket instead")
    serve.add_argument("--workers", type=int, help="processes (default 1)")
    serve.add_argument(
        "--cache-dir", type=Path, help="folder for layouts, digests and splits (default ~/.cache/h5feed)"
    )
    serve.add_argument("--public", action="store_true", default=None, help="other addresses than loopback, no tokens")
    serve.add_argument("--tls-cert", metavar="PEM", help="certificate: serve https")
    serve.add_argument("--tls-key", metavar="PEM", help="its key")


def _serve(options: argparse.Namespace) -> int:
    given = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for item in error.errors():
            print(f"h5feed-server: {'.'.join(map(str, item['loc']))}: {item['msg']}", file=sys.stderr)
        return 2
    if not settings.data_dir.is_dir():
        what = "is a file: give the folder it lies in" if settings.data_dir.is_file() else "does not exist"
        print(f"h5feed-server: {settings.data_dir} {what}", file=sys.stderr)
        return 2
    if (options.tls_cert is None) != (options.tls_key is None):
        print("h5feed-server: --tls-cert and --tls-key go together", file=sys.stderr)
        return 2
    generated = not (settings.tokens or settings.public or settings.uds or _is_loopback(settings.host))
    if generated:
        settings = settings.model_copy(update={"tokens": _kept_token(settings.cache_dir)})

    from .listening import listen
    from .serving import Supervisor, Tls

    try:
        listener = listen(settings)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        print(f"h5feed-server: cannot listen on {where}: {error.strerror}", file=sys.stderr)
        return 1
    tls = Tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    if settings.uds:
        address = f"unix://{os.path.abspath(settings.uds)}"
    else:
        host, port = listener.getsockname()[:2]
        address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def announce() -> None:
        print(f"h5feed serves {settings.data_dir} at {address}", flush=True)
        if not settings.uds:
            print(f"browse it at {address}/docs", flush=True)
        if generated:
            print(f"token: {settings.tokens}   (kept in the cache folder; H5FEED_TOKENS sets your own)", flush=True)

    return Supervisor(settings, listener, announce, tls).run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _kept_token(cache_dir: Path) -> str:
    """The generated token, the same after a restart."""
    file = cache_dir / "token"
    # Anything else is what a disk or a crash has left of one; to read what is no file may wait for ever.
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
        os.replace(unfinished, file)
    except OSError as error:
        print(f"h5feed-server: the token cannot be kept: {error.strerror}", file=sys.stderr)
    return token


if __name__ == "__main__":
    sys.exit(main())
