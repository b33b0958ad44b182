"""The command ``h5feed-server serve``."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import ssl
import stat
import sys
from functools import partial
from pathlib import Path

from h5feed.errors import BadParameter, FeedError
from pydantic import ValidationError

from ..settings import Settings, default_cache_dir, explain, unknown_variables, variables_of
from ..sharing.logs import LogFormat, begin_logs, say
from ..tokens.generated import kept_token
from ..tokens.keyring import Keyring
from ..tokens.token_file import TokenFileError
from .embedded import Embedding
from .exposure import is_every_address, is_open, local_address, published_on


def run_serve(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises
    ------
    FeedError
    ValidationError
        Settings are wrong.
    """
    embedding = None
    if options.registry_port is not None:
        print("h5feed-server: --registry-port needs --ray", file=sys.stderr)
        return 2
    if options.embedded is not None:
        embedding = Embedding(options.embedded)
        embedding.detach()
        options.uds = embedding.socket
    if options.allowed_hosts is not None:
        options.allowed_hosts = ",".join(options.allowed_hosts)
    settings, is_generated, is_stored = settings_of(options)
    begin_logs(settings.log_format)
    for line in unknown_variables(os.environ):
        print(f"h5feed-server: {line}", file=sys.stderr)
    if (wrong := _is_wrong(settings, options)) is not None:
        print(f"h5feed-server: {wrong}", file=sys.stderr)
        return 2
    if is_generated and not is_stored and not sys.stdout.isatty():
        print(
            "h5feed-server: the server created a token, but can neither store it in the cache folder nor print it to a "
            "terminal: set H5FEED_TOKENS, pass --token-file, or pass a writable --cache-dir",
            file=sys.stderr,
        )
        return 1
    try:
        keyring = Keyring(settings.token_list, settings.token_file)
    except TokenFileError as error:
        print(f"h5feed-server: --token-file {settings.token_file}: {error}", file=sys.stderr)
        return 2

    from ..sharing.local_socket import LocalSocket
    from .listening import listen
    from .logged_once import LoggedOnce
    from .own_socket import own_socket
    from .supervisor import Supervisor
    from .worker import Tls

    try:
        listeners = listen(settings)
    except OSError as error:
        print(f"h5feed-server: cannot listen on {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    tls = Tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    port = listeners[0].getsockname()[1] if settings.has_port else 0
    local = None if settings.uds is None else LocalSocket(os.path.abspath(settings.uds))
    if (own := own_socket(settings, port, is_tls=tls is not None)) is not None:
        listeners.append(own[0])
        local = LocalSocket(own[1])
    once = LoggedOnce("h5feed_server.catalog")
    for handler in logging.getLogger().handlers:
        handler.addFilter(once)

    def announce() -> None:
        if not keyring.tokens and keyring.is_guarding:
            print(
                f"h5feed-server: {settings.token_file} has no tokens, so nobody can connect: create one with "
                f"`h5feed-server token create NAME --token-file {shlex.quote(str(settings.token_file))}`",
                file=sys.stderr,
            )
        _announce(settings, port, is_tls=tls is not None)
        if is_generated and settings.has_port:
            announce_token(settings, settings.log_format, is_stored=is_stored)

    reread = partial(_reread, options, settings, keyring)
    return Supervisor(settings, listeners, announce, keyring, tls, reread, local, embedding).run()


def settings_of(options: argparse.Namespace, *, generates: bool = True) -> tuple[Settings, bool, bool]:
    """The settings, whether a token was generated because other machines can connect, and whether this token is stored.

    With `generates` false, no token is.

    Raises
    ------
    ValidationError
    FeedError
        ``--env-file`` cannot be read, or contains an unknown setting.
    """
    given = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    settings = Settings(**{**variables_of(options.env_file), **given}).for_file()
    is_generated, is_stored = generates and is_open(settings), False
    if is_generated:
        token, is_stored = kept_token(settings.cache_dir)
        settings = settings.model_copy(update={"tokens": token})
    return settings, is_generated, is_stored


def _is_wrong(settings: Settings, options: argparse.Namespace) -> str | None:
    """Why the server cannot start with these settings; None if it can."""
    if settings.store is not None:
        from ..storage.objects.store import check

        check(settings.store)
    elif (what := _is_no_folder(settings.data_dir)) is not None:
        return f"{settings.source} {what}"
    certificate, key = options.tls_cert, options.tls_key
    if (certificate is None) != (key is None):
        return "--tls-cert and --tls-key must be given together"
    if certificate is not None and (why := is_no_certificate(certificate, key)) is not None:
        return f"--tls-cert {certificate} with --tls-key {key}: {why}"
    return None


def _reread(options: argparse.Namespace, started_with: Settings, keyring: Keyring) -> tuple[Settings, Keyring] | None:
    """Settings and tokens for the new workers at SIGHUP. If they cannot be used, prints the reason and returns None."""
    try:
        if options.env_file is not None and options.env_file.exists() and not options.env_file.is_file():
            # What comes through a pipe comes once: now it is empty, or to open it would take for ever.
            raise BadParameter(f"--env-file {options.env_file}: it is not a regular file and cannot be read again")
        settings, *_ = settings_of(options)
        wrong = _is_wrong(settings, options)
        if wrong is None and started_with.is_guarded and not settings.is_guarded:
            # Of a file that is being written, or was lost.
            wrong = "there are no tokens any more: to let everybody in, restart the server"
        if (settings.tokens, settings.token_file) != (started_with.tokens, started_with.token_file):
            keyring = Keyring(settings.token_list, settings.token_file)
    except ValidationError as error:
        explain(error, vars(options))
        return None
    except (FeedError, TokenFileError) as error:
        wrong = str(error)
    if wrong is not None:
        print(f"h5feed-server: {wrong}", file=sys.stderr)
        return None
    for name in ("host", "port", "uds", "socket_mode", "socket_group", "uds_mode", "local", "log_format"):
        kept = getattr(started_with, name)
        if getattr(settings, name) != kept:
            print(f"h5feed-server: {name} stays {kept!r} until the server is restarted", file=sys.stderr)
            settings = settings.model_copy(update={name: kept})
    return settings, keyring


def _announce(settings: Settings, port: int, *, is_tls: bool) -> None:
    """Print the address of the server; it is the last word of the first line."""
    form, scheme = settings.log_format, "https" if is_tls else "http"
    socket_url = settings.uds and f"unix://{os.path.abspath(settings.uds)}"
    if not settings.has_port:
        say(form, f"h5feed serves {settings.source} at {socket_url}")
        return
    host, port = published_on(settings) or (settings.host, port)
    address = f"{scheme}://{local_address(host, port)}"
    say(form, f"h5feed serves {settings.source} at {address}")
    if socket_url:
        say(form, f"and on the Unix socket {socket_url}")
    say(form, f"browse it at {address}/")
    if is_every_address(host):
        say(form, f"from other machines, use this machine's name or address and port {port}")


def announce_token(settings: Settings, form: LogFormat, *, is_stored: bool) -> None:
    """Print the generated token to a terminal. Elsewhere, print how to get it, because a log has more readers."""
    show = f"`h5feed-server token show{_cache_option(settings)}`"
    own = "To use your own tokens, pass --token-file; to serve without tokens, set H5FEED_PUBLIC=1"
    if form == "pretty" and sys.stdout.isatty():
        say(form, f"token: {settings.tokens}   (pass it to clients as token=, H5FEED_TOKEN or H5FEED_TOKEN_FILE)")
        say(form, f"{show} shows it again. {own}" if is_stored else own)
    else:
        say(form, f"clients need a token: {show} prints it. {own}")


def _cache_option(settings: Settings) -> str:
    """The option that another command needs to find the server's cache folder; empty if it needs none."""
    is_default = settings.cache_dir == default_cache_dir()
    set_by_variable = os.environ.get("H5FEED_CACHE_DIR") == str(settings.cache_dir)
    return "" if is_default or set_by_variable else f" --cache-dir {shlex.quote(os.path.abspath(settings.cache_dir))}"


def is_no_certificate(certificate: str, key: str) -> str | None:
    """Why these files cannot be used for HTTPS; None if they can."""
    try:
        # Without a password function, OpenSSL would prompt for the password of an encrypted key.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=str)
    except ssl.SSLError as error:
        return (
            f"expected a certificate and its key as PEM files without a password ({error.reason or 'not a PEM file'})"
        )
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_no_folder(path: Path) -> str | None:
    """Why this path is not a folder; None if it is, or cannot be checked now, which the catalogue reports."""
    try:
        return None if stat.S_ISDIR(os.stat(path).st_mode) else "is neither a folder nor a file"
    except OSError as error:
        return "does not exist" if error.errno in (errno.ENOENT, errno.ENOTDIR) else None
