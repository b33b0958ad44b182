"""The ``h5feed`` command: inspect the datasets of a server and download rows.

What it needs to do so is imported after its arguments are found to be right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import CommandParser
from .bench import arguments as bench
from .version import __version__

_EXAMPLES = {
    "ls": """\
  h5feed ls http://gpu-box:8000
  h5feed ls http://gpu-box:8000 --wait
  h5feed ls http://gpu-box:8000 --json | jq -r '.[].name'
""",
    "info": """\
  h5feed info http://gpu-box:8000 digits
  h5feed info http://gpu-box:8000 digits --val 0.1 --test 0.1
  h5feed info http://gpu-box:8000 digits --folds 5 --fold 0 --group patient
""",
    "stats": """\
  h5feed stats http://gpu-box:8000 digits --split train --val 0.1 --test 0.1
  h5feed stats http://gpu-box:8000 digits --where "labels in 3, 5"
  h5feed stats http://gpu-box:8000 digits --field images --means > means.json
""",
    "get": """\
  h5feed get http://gpu-box:8000 digits --rows 5,1,9 -o rows.npz
  h5feed get http://gpu-box:8000 digits --rows 0,1,2 --fields images -o images.npy
  h5feed get http://gpu-box:8000 digits --split train --test 0.1 --batch 0 --batch-size 64 --shuffle -o batch.npz
""",
    "bench": bench.EXAMPLES,
}

_URL = (
    "http://host:8000, https://host or unix:///path/to.sock; "
    "several servers with the same data: http://a:8000,http://b:8000; "
    "or a folder or file on this machine: data/"
)

WAIT_SECONDS = 600.0
"""Default timeout of ``ls --wait``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        from .commands import run

        return run(options)
    except KeyboardInterrupt:
        return 130


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="h5feed",
        description="Inspect the datasets of an h5feed server and download rows.",
        epilog="URL: " + _URL.replace("; ", ";\n     ") + "\n\nexamples:\n" + "".join(map(_first, _EXAMPLES.values())),
    )
    parser.add_argument("--version", action="version", version=f"h5feed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, description: str | None = None) -> CommandParser:
        command = commands.add_parser(name, help=about, description=description, epilog=f"examples:\n{_EXAMPLES[name]}")
        command.add_argument("url", metavar="URL", help=_URL)
        token = command.add_mutually_exclusive_group()
        token.add_argument(
            "--token", help="bearer token (default $H5FEED_TOKEN); other users see it in lists of processes"
        )
        token.add_argument("--token-file", metavar="FILE", help="file with the token (default $H5FEED_TOKEN_FILE)")
        command.add_argument(
            "--deadline", type=float, default=30.0, help="timeout in seconds, including retries (default 30)"
        )
        return command

    ls = add("ls", "list the datasets")
    ls.add_argument("--json", action="store_true", help="print JSON")
    ls.add_argument(
        "--wait",
        metavar="S",
        type=float,
        nargs="?",
        const=WAIT_SECONDS,
        help=f"wait until the server is up and has inspected all files, at most S seconds (default {WAIT_SECONDS:g})",
    )
    info = add("info", "show the fields, classes and splits of a dataset")
    info.add_argument("dataset", metavar="DATASET")
    info.add_argument("--json", action="store_true", help="print JSON")
    stats = add("stats", "show mean, standard deviation, histogram, classes … of a split")
    stats.add_argument("dataset", metavar="DATASET")
    stats.add_argument("--split", default="all", help="all, train, val or test (default all)")
    stats.add_argument("--field", metavar="NAME", help="only this field (default all)")
    stats.add_argument("--timeout", type=float, help="seconds to wait for the result (default 3600)")
    shape = stats.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--means", action="store_true", help='print only channel means, as {"R": …, "G": …, "B": …}')
    get = add("get", "download rows or one batch to a file")
    get.add_argument("dataset", metavar="DATASET")
    get.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help=".npz, or .npy for one field")
    get.add_argument("--rows", metavar="IDS", help="comma-separated row ids")
    get.add_argument("--batch", metavar="N", type=int, default=0, help="index of the batch (default 0)")
    get.add_argument("--batch-size", metavar="N", type=int, default=32, help="rows per batch (default 32)")
    get.add_argument("--split", default="all", help="all, train, val or test (default all)")
    get.add_argument("--shuffle", action="store_true", help="shuffle the rows")
    get.add_argument("--window", metavar="N", type=int, help="with --shuffle: shuffle chunks, and rows in windows of N")
    get.add_argument("--seed", type=int, default=0, help="random seed of the order (default 0)")
    get.add_argument("--epoch", type=int, default=0, help="epoch number (default 0)")
    get.add_argument("--fields", metavar="NAMES", help="comma-separated field names (default: inputs and labels)")
    benchmark = add("bench", "measure how fast batches arrive, and what would make it faster", bench.ABOUT)
    bench.add_arguments(benchmark)
    for command in (info, stats, get, benchmark):
        command.add_argument("--val", type=_share, help="size of the validation split: a fraction or a number of rows")
        command.add_argument("--test", type=_share, help="size of the test split: a fraction or a number of rows")
        command.add_argument("--folds", metavar="K", type=int, help="cross-validation: val is one of K folds")
        command.add_argument("--fold", metavar="N", type=int, help="index of the fold that is val (default 0)")
        command.add_argument("--group", metavar="FIELD", help="keep rows with equal values of this field together")
        command.add_argument("--split-seed", type=int, help="random seed of the splits (default 42)")
        command.add_argument("--stratify", metavar="FIELD", help="field to stratify by, or none")
        command.add_argument(
            "--where",
            metavar="CONDITION",
            action="append",
            help="only rows that meet it, such as 'label in cat, dog' or 'width >= 200'; may be repeated",
        )
    return parser


def _first(examples: str) -> str:
    return examples.splitlines(keepends=True)[0]


def _share(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


if __name__ == "__main__":
    sys.exit(main())
