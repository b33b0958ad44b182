"""The command ``h5feed-server``. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from h5feed.arguments import CommandParser
from h5feed.bench.workloads import WORKLOADS
from h5feed.errors import FeedError

from . import __version__
from .builder.arguments import add_build
from .serve.arguments import add_serve
from .tokens.arguments import add_token

_EXAMPLES = """examples:
  h5feed-server demo                              serve real digits and train on them, in a minute
  h5feed-server build pets/ -o data/pets.h5       build an HDF5 file from a folder of images
  h5feed-server inspect data/pets.h5              show what is in it, how it will be served, how to make it faster
  h5feed-server serve ./data                      serve the HDF5 files below ./data at http://127.0.0.1:8000
  h5feed-server token create alice --token-file tokens      create a token for a user
  h5feed-server COMMAND --help                    show the options and examples of a command
"""

_INSPECT_EXAMPLES = """examples:
  h5feed-server inspect data/pets.h5
"""

_TOP_EXAMPLES = """examples:
  h5feed-server top                               the server on this machine
  H5FEED_TOKEN=$TOKEN h5feed-server top http://gpu-box:8000
  h5feed-server top unix:///run/h5feed.sock --once
"""

_WORKLOAD_EXAMPLES = """examples:
  h5feed-server workload retinanet -o data/retinanet.h5 --samples 5000
  h5feed-server serve data
  h5feed bench http://127.0.0.1:8000 retinanet --workload retinanet --accelerators 4
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
    add_serve(commands)
    add_token(commands)
    add_build(commands)
    inspect = commands.add_parser(
        "inspect",
        help="show what is in an HDF5 file, how it will be served, and how to make it faster",
        epilog=_INSPECT_EXAMPLES,
    )
    inspect.add_argument("file", metavar="FILE", type=Path)
    top = commands.add_parser(
        "top", help="show the activity of a server until you press q or Ctrl-C", epilog=_TOP_EXAMPLES
    )
    top.add_argument(
        "url", metavar="URL", nargs="?", help="address of the server (default $H5FEED_URL, else http://127.0.0.1:8000)"
    )
    top.add_argument("--token", help="token of the server (default $H5FEED_TOKEN)")
    top.add_argument("--once", action="store_true", help="show it once and exit")
    demo = commands.add_parser(
        "demo", help="pack scikit-learn's digits, serve them, train a Keras model over HTTP", epilog=_DEMO_EXAMPLES
    )
    demo.add_argument("--epochs", type=int, default=8, help="passes over the training split (default 8)")
    demo.add_argument("--workers", type=int, default=1, help="server processes (default 1)")
    demo.add_argument("--keep", metavar="DIR", type=Path, help="keep digits.h5 in this folder (default: delete it)")
    workload = commands.add_parser(
        "workload",
        help="build data for `h5feed bench --workload`",
        description="Writes random samples of the sizes that a training workload of MLPerf Storage has.",
        epilog=_WORKLOAD_EXAMPLES,
    )
    workload.add_argument("name", metavar="NAME", choices=sorted(WORKLOADS), help=", ".join(sorted(WORKLOADS)))
    workload.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="HDF5 file to write")
    workload.add_argument("--samples", metavar="N", type=int, required=True, help="number of samples")
    options = parser.parse_args(argv)
    # `inspect` reports problems with its file itself. Warnings about other files of the dataset would only distract.
    level = logging.ERROR if options.command == "inspect" else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if options.command == "demo":
            from .demo import run_demo

            return run_demo(epochs=options.epochs, workers=options.workers, keep=options.keep)
        if options.command == "build":
            return _build(options)
        if options.command == "token":
            from .tokens.commands import run_token

            return run_token(options)
        if options.command == "workload":
            from .workload import write_workload

            print(write_workload(WORKLOADS[options.name], options.samples, options.output))
            return 0
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
    except FeedError as error:
        print(f"h5feed-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _build(options: argparse.Namespace) -> int:
    if options.ray is not None and not options.dry_run:
        from .cluster.building import run_build_on_cluster

        return run_build_on_cluster(options)
    from .builder.command import run_build

    return run_build(options)


def _serve(options: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from .settings import explain

    try:
        if options.ray is not None:
            from .cluster.serving import run_serve_on_cluster

            return run_serve_on_cluster(options)
        from .serve.command import run_serve

        return run_serve(options)
    except ValidationError as error:
        explain(error, vars(options))
        return 2


if __name__ == "__main__":
    sys.exit(main())
