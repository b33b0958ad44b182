"""The command ``h5feed-server``."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import ssl
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from h5feed.arguments import CommandParser
from h5feed.errors import FeedError
from pydantic import ValidationError

from . import __version__
from .builder.arguments import add_build
from .serve.exposure import is_every_address, is_open, local_address, published_on
from .settings import Settings, default_cache_dir, unknown_variables, variables_of
from .sharing.logs import LogFormat, begin_logs, say
from .tokens.commands import add_token, run_token
from .tokens.generated import kept_token
from .tokens.keyring import Keyring
from .tokens.token_file import TokenFileError

_EXAMPLES = """examples:
  h5feed-server demo                              serve real digits and train on them, in a minute
  h5feed-server build pets/ -o data/pets.h5       build an HDF5 file from a folder of images
  h5feed-server inspect data/pets.h5              show what is in it, how it will be served, how to make it faster
  h5feed-server serve ./data                      serve the HDF5 files below ./data at http://127.0.0.1:8000
  h5feed-server token create alice --token-file tokens      create a token for those who may connect
  h5feed-server COMMAND --help                    show the options and examples of a command
"""

_SERVE_EXAMPLES = """examples:
  h5feed-server serve ./data                      at http://127.0.0.1:8000, for this machine only
  h5feed-server serve ./data --workers 2          with two worker processes
  h5feed-server serve ./data --uds /run/h5feed.sock
  h5feed-server serve ./data --host 0.0.0.0       for other machines; creates a token
  h5feed-server serve ./data --host 0.0.0.0 --token-file tokens    with tokens of `h5feed-server token create`
  H5FEED_TOKENS=$TOKEN h5feed-server serve ./data --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
"""

_INSPECT_EXAMPLES = """examples:
  h5feed-server inspect data/pets.h5
"""

_TOP_EXAMPLES = """examples:
  h5feed-server top                               of the server on this machine
  h5feed-server top http://gpu-box:8000 --token $TOKEN
  h5feed-server top unix:///run/h5feed.sock --once
"""

_DEMO_EXAMPLES = """examples:
  h5feed-server demo
  h5feed-server demo --epochs 2 --workers 2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        prog="h5feed-server",
        description="Serves training batches from HDF5 files over HTTP.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"h5feed-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_token(commands)
    add_build(commands)
    inspect = commands.add_parser(
        "inspect",
        help="show what is in an HDF5 file, how it will be served, and how to make it faster",
        epilog=_INSPECT_EXAMPLES,
    )
    inspect.add_argument("file", metavar="FILE", type=Path)
    top = commands.add_parser("top", help="show what a server does now, until Ctrl-C or q", epilog=_TOP_EXAMPLES)
    top.add_argument(
        "url", metavar="URL", nargs="?", help="address of the server (default $H5FEED_URL, else http://127.0.0.1:8000)"
    )
    top.add_argument("--token", help="token of the server (default $H5FEED_TOKEN)")
    top.add_argument("--once", action="store_true", help="show it once")
    demo = commands.add_parser(
        "demo", help="pack scikit-learn's digits, serve them, train a Keras model over HTTP", epilog=_DEMO_EXAMPLES
    )
    demo.add_argument("--epochs", type=int, default=8, help="passes over the training split (default 8)")
    demo.add_argument("--workers", type=int, default=1, help="server processes (default 1)")
    demo.add_argument("--keep", metavar="DIR", type=Path, help="keep digits.h5 in this folder (default: delete it)")
    options = parser.parse_args(argv)
    # What is wrong with its file `inspect` says itself; the others of its dataset are not what it was asked about.
    level = logging.ERROR if options.command == "inspect" else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if options.command == "demo":
            from .demo import run_demo

            return run_demo(epochs=options.epochs, workers=options.workers, keep=options.keep)
        if options.command == "build":
            from .builder.command import run_build

            return run_build(options)
        if options.command == "token":
            return _token(options)
        if options.command == "top":
            from rich.console import Console

            from .top import run_top

            url = options.url or os.environ.get("H5FEED_URL") or "http://127.0.0.1:8000"
            token = options.token or os.environ.get("H5FEED_TOKEN")
            return run_top(url, token, once=options.once, console=Console())
        if options.command == "inspect":
            from rich.console import Console

            from .inspection import inspect_file

            return inspect_file(options.file, Console())
        return _serve(options)
    except ValidationError as error:
        if error.title != Settings.__name__:
            raise
        _tell_settings(error, vars(options) if options.command in ("serve", "token") else {})
        return 2
    except FeedError as error:
        print(f"h5feed-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a folder of HDF5 files",
        description="Serves the HDF5 files below a folder. All options except those of TLS can also be set as\n"
        "environment variables, H5FEED_NAME. docs/reference/settings.md lists these and further settings.",
        epilog=_SERVE_EXAMPLES,
    )
    serve.add_argument(
        "data_dir",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="folder of HDF5 files; never written to (default $H5FEED_DATA_DIR, else data)",
    )
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000; 0 picks a free one)")
    serve.add_argument(
        "--uds",
        metavar="PATH",
        help="Unix socket to listen on; instead of a port, unless --host or --port is given, too",
    )
    serve.add_argument(
        "--uds-mode", metavar="MODE", help="permissions of the Unix socket, such as 0660 (default: as the umask says)"
    )
    serve.add_argument(
        "--root-path", metavar="PREFIX", help="path prefix under which a reverse proxy publishes the server"
    )
    serve.add_argument(
        "--env-file", metavar="FILE", type=Path, help="file of lines H5FEED_NAME=VALUE, read again at SIGHUP"
    )
    serve.add_argument("--workers", type=int, help="number of worker processes (default 1)")
    serve.add_argument(
        "--cache-dir", type=Path, help="folder for layouts, digests and splits (default ~/.cache/h5feed)"
    )
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with tokens, of `h5feed-server token create`; read again when it changes",
    )
    serve.add_argument(
        "--public", action="store_true", default=None, help="require no token, also on addresses of the network"
    )
    serve.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        dest="allowed_hosts",
        help="host name that a server without tokens accepts in addition to this machine's own; can be repeated",
    )
    serve.add_argument(
        "--follow-links",
        action="store_true",
        default=None,
        help="follow symbolic links that lead out of DIR",
    )
    serve.add_argument("--access-log", action="store_true", default=None, help="print a line for each request")
    serve.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        help="format of the log: lines to read, or JSON with one object per line (default pretty)",
    )
    serve.add_argument("--tls-cert", metavar="PEM", help="file with the certificate, to serve HTTPS")
    serve.add_argument("--tls-key", metavar="PEM", help="file with the key of the certificate")


def _serve(options: argparse.Namespace) -> int:
    if options.allowed_hosts is not None:
        options.allowed_hosts = ",".join(options.allowed_hosts)
    settings, is_generated, is_stored = _settings_of(options)
    begin_logs(settings.log_format)
    for line in unknown_variables(os.environ):
        print(f"h5feed-server: {line}", file=sys.stderr)
    if (wrong := _is_wrong(settings, options)) is not None:
        print(f"h5feed-server: {wrong}", file=sys.stderr)
        return 2
    if is_generated and not is_stored and not sys.stdout.isatty():
        print(
            "h5feed-server: nobody could find out the token, because it cannot be stored in the cache folder: set "
            "H5FEED_TOKENS, pass --token-file, or pass a --cache-dir that can be written to",
            file=sys.stderr,
        )
        return 1
    try:
        keyring = Keyring(settings.token_list, settings.token_file)
    except TokenFileError as error:
        print(f"h5feed-server: --token-file {settings.token_file}: {error}", file=sys.stderr)
        return 2

    from .serve.listening import listen
    from .serve.logged_once import LoggedOnce
    from .serve.supervisor import Supervisor
    from .serve.worker import Tls

    try:
        listeners = listen(settings)
    except OSError as error:
        print(f"h5feed-server: cannot listen on {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    tls = Tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    once = LoggedOnce("h5feed_server.catalog")
    for handler in logging.getLogger().handlers:
        handler.addFilter(once)
    port = listeners[0].getsockname()[1] if settings.has_port else 0

    def announce() -> None:
        if not keyring.tokens and keyring.is_guarding:
            print(
                f"h5feed-server: {settings.token_file} has no tokens, so nobody can connect: create one with "
                f"`h5feed-server token create NAME --token-file {shlex.quote(str(settings.token_file))}`",
                file=sys.stderr,
            )
        _announce(settings, port, is_tls=tls is not None)
        if is_generated and settings.has_port:
            _announce_token(settings, settings.log_format, is_stored=is_stored)

    return Supervisor(settings, listeners, announce, keyring, tls, lambda: _reread(options, settings, keyring)).run()


def _settings_of(options: argparse.Namespace) -> tuple[Settings, bool, bool]:
    """The settings; whether a token was generated because other machines could read everything, and whether that token
    is stored.

    Raises
    ------
    ValidationError
    FeedError
        The file of settings cannot be read, or names something that is no setting.
    """
    given = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    settings = Settings(**{**variables_of(options.env_file), **given})
    is_generated, is_stored = is_open(settings), False
    if is_generated:
        token, is_stored = kept_token(settings.cache_dir)
        settings = settings.model_copy(update={"tokens": token})
    return settings, is_generated, is_stored


def _is_wrong(settings: Settings, options: argparse.Namespace) -> str | None:
    """Why nothing can be served with these settings."""
    if (what := _is_no_folder(settings.data_dir)) is not None:
        return f"{settings.data_dir} {what}"
    certificate, key = options.tls_cert, options.tls_key
    if (certificate is None) != (key is None):
        return "--tls-cert and --tls-key must be given together"
    if certificate is not None and (why := _is_no_certificate(certificate, key)) is not None:
        return f"--tls-cert {certificate} with --tls-key {key}: {why}"
    return None


def _reread(options: argparse.Namespace, started_with: Settings, keyring: Keyring) -> tuple[Settings, Keyring] | None:
    """Settings and tokens for new workers, at SIGHUP; None, and a line that says why, if they cannot be."""
    try:
        settings, *_ = _settings_of(options)
        wrong = _is_wrong(settings, options)
        if (settings.tokens, settings.token_file) != (started_with.tokens, started_with.token_file):
            keyring = Keyring(settings.token_list, settings.token_file)
    except ValidationError as error:
        _tell_settings(error, vars(options))
        return None
    except (FeedError, TokenFileError) as error:
        wrong = str(error)
    if wrong is not None:
        print(f"h5feed-server: {wrong}", file=sys.stderr)
        return None
    for name in ("host", "port", "uds", "uds_mode", "log_format"):
        kept = getattr(started_with, name)
        if getattr(settings, name) != kept:
            print(f"h5feed-server: {name} stays {kept!r} until the server is restarted", file=sys.stderr)
            settings = settings.model_copy(update={name: kept})
    return settings, keyring


def _announce(settings: Settings, port: int, *, is_tls: bool) -> None:
    """Say where the server is, on standard output; its address is the last word of the first line."""
    form, scheme = settings.log_format, "https" if is_tls else "http"
    socket_url = settings.uds and f"unix://{os.path.abspath(settings.uds)}"
    if not settings.has_port:
        say(form, f"h5feed serves {settings.data_dir} at {socket_url}")
        return
    host, port = published_on(settings) or (settings.host, port)
    address = f"{scheme}://{local_address(host, port)}"
    say(form, f"h5feed serves {settings.data_dir} at {address}")
    if socket_url:
        say(form, f"and on the Unix socket {socket_url}")
    say(form, f"browse it at {address}/")
    if is_every_address(host):
        say(form, f"from other machines, use this machine's name or address and port {port}")


def _announce_token(settings: Settings, form: LogFormat, *, is_stored: bool) -> None:
    """How to get the generated token: to a terminal, it is printed; what is a log, more people read than have it."""
    show = f"`h5feed-server token show{_cache_option(settings)}`"
    own = "to use your own, pass --token-file; to use none, H5FEED_PUBLIC=1"
    if form == "pretty" and sys.stdout.isatty():
        say(form, f"token: {settings.tokens}   (for token=, H5FEED_TOKEN or H5FEED_TOKEN_FILE of clients)")
        say(form, f"{show} shows it again; {own}" if is_stored else own)
    else:
        say(form, f"clients need a token, which {show} prints; {own}")


def _cache_option(settings: Settings) -> str:
    """What tells another command the server's cache folder."""
    is_default = settings.cache_dir == default_cache_dir()
    set_by_variable = os.environ.get("H5FEED_CACHE_DIR") == str(settings.cache_dir)
    return "" if is_default or set_by_variable else f" --cache-dir {shlex.quote(os.path.abspath(settings.cache_dir))}"


def _token(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name, None) for name in ("token_file", "cache_dir")}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    return run_token(options, settings.token_file, settings.cache_dir)


def _is_no_certificate(certificate: str, key: str) -> str | None:
    """Why nobody can be served https with these files."""
    try:
        # A password is asked for by no worker.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=str)
    except ssl.SSLError as error:
        return f"not a certificate and its key, as PEM files without a password ({error.reason or error})"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_no_folder(path: Path) -> str | None:
    """Why there is nothing to serve, and will not be; what cannot be looked at now is for the catalogue to tell."""
    try:
        return None if stat.S_ISDIR(os.stat(path).st_mode) else "is a file: pass the folder that contains it"
    except OSError as error:
        return "does not exist" if error.errno in (errno.ENOENT, errno.ENOTDIR) else None


def _tell_settings(error: ValidationError, flags: Mapping[str, Any]) -> None:
    """A line for each setting that cannot be, by the name under which it was given."""
    for item in error.errors():
        name = str(item["loc"][0])
        if flags.get(name) is not None:
            flag = "allowed-host" if name == "allowed_hosts" else name.replace("_", "-")
            setting = f"--{flag} {item['input']}"
        else:
            # Who reads the log is not to learn the tokens.
            setting = f"H5FEED_{name.upper()}" + ("" if name == "tokens" else f"={item['input']}")
        print(f"h5feed-server: {setting}: {item['msg'].removeprefix('Value error, ')}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
