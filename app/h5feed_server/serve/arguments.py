"""Command-line arguments of ``h5feed-server serve``, in a module that imports little."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from ..sharing.logs import LogFormat

_EXAMPLES = """examples:
  h5feed-server serve ./data                      at http://127.0.0.1:8000, for this machine only
  h5feed-server serve ./data --workers 2          with two worker processes
  h5feed-server serve s3://bucket/prefix          from an object store; needs h5feed-server[object-store]
  h5feed-server serve ./data --uds /run/h5feed.sock
  h5feed-server serve ./data --host 0.0.0.0       for other machines; creates a token
  h5feed-server serve ./data --host 0.0.0.0 --token-file tokens    see `h5feed-server token`
  H5FEED_TOKENS=$TOKEN h5feed-server serve ./data --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
  h5feed-server serve /nfs/data --ray auto        on each node of a Ray cluster; needs h5feed-server[ray]
"""


def add_serve(commands: Any) -> None:
    """Add the command to the parser."""
    serve = commands.add_parser(
        "serve",
        help="serve a folder of HDF5 files",
        description="Serves the HDF5 files below a folder. All options except --env-file, --embedded, --ray,\n"
        "--registry-port, --tls-cert and --tls-key can also be set as environment variables, such as\n"
        "H5FEED_PORT. docs/reference/settings.md lists these and further settings.",
        epilog=_EXAMPLES,
    )
    serve.add_argument(
        "data_dir",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="folder of HDF5 files, a single file, or the URL of an object store or web server, such as "
        "s3://bucket/prefix; never written to (default $H5FEED_DATA_DIR, else data)",
    )
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000; 0 picks a free one)")
    serve.add_argument(
        "--uds",
        metavar="PATH",
        help="Unix socket to listen on, instead of a port; with --host or --port, the server listens on both",
    )
    serve.add_argument(
        "--socket-mode",
        metavar="MODE",
        help="permissions of the Unix socket, such as 0666 (default: given by the umask, or 0660 with --socket-group)",
    )
    serve.add_argument("--socket-group", metavar="GROUP", help="name or number of the group of the Unix socket")
    serve.add_argument("--uds-mode", metavar="MODE", help="older name of --socket-mode")
    serve.add_argument(
        "--root-path", metavar="PREFIX", help="path prefix under which a reverse proxy publishes the server"
    )
    serve.add_argument(
        "--env-file",
        metavar="FILE",
        type=Path,
        help="file with settings, one H5FEED_NAME=VALUE per line; read again at SIGHUP",
    )
    serve.add_argument("--workers", type=int, help="number of worker processes (default 1)")
    serve.add_argument(
        "--cache-dir", type=Path, help="folder for layouts, digests and splits (default ~/.cache/h5feed)"
    )
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with tokens, managed by `h5feed-server token`; read again when it changes",
    )
    serve.add_argument("--public", action="store_true", default=None, help="require no token, even from other machines")
    serve.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        dest="allowed_hosts",
        help="host name that a server without tokens accepts, in addition to this machine's host name; can be repeated",
    )
    serve.add_argument(
        "--follow-links",
        action="store_true",
        default=None,
        help="follow symbolic links that lead out of DIR",
    )
    serve.add_argument(
        "--access-log", action="store_true", default=None, help="print a line for each request to standard output"
    )
    serve.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        help="format of the log: text, or JSON with one object per line (default pretty)",
    )
    serve.add_argument(
        "--embedded",
        metavar="FOLDER",
        help="run in the background, with the Unix socket, locks and log in FOLDER, until no client is left; "
        "h5feed.connect('DIR') does this",
    )
    serve.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run a server on each node of a Ray cluster. ADDRESS is auto on a node of the cluster, or HOST:PORT of "
        "its head node; clients connect to servers+http://HOST:8001. See docs/how-to/ray.md",
    )
    serve.add_argument(
        "--registry-port",
        metavar="PORT",
        type=int,
        help="with --ray, port of the list of servers on this machine (default 8001; 0 picks a free one)",
    )
    serve.add_argument("--tls-cert", metavar="PEM", help="certificate file, to serve HTTPS")
    serve.add_argument("--tls-key", metavar="PEM", help="key file of the certificate")
