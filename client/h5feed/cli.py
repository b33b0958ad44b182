"""The ``h5feed`` command: inspect the datasets of a server and download rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import CommandParser
from .batch import Batch
from .bench import command as bench
from .errors import BadParameter, FeedError
from .feed import Feed, connect
from .net import jobs
from .net.token import token_in
from .stats import FieldStats, Stats
from .version import __version__
from .wire import write_npz

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
    "several servers with the same data: http://a:8000,http://b:8000"
)

WAIT_SECONDS = 600.0
"""Default timeout of ``ls --wait``."""

_LOOK_SECONDS = 0.5
"""Time between two polls; the server also holds the request while it scans."""

_SPLIT_OPTIONS = ("val", "test", "folds", "fold", "group", "stratify", "split_seed", "where")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        wait = getattr(options, "wait", None)
        if options.token_file is not None:
            options.token = token_in(options.token_file, "--token-file ")
        with connect(options.url, token=options.token, deadline=max(options.deadline, wait or 0.0)) as feed:
            if wait is None:
                feed.check_there()
            commands = {"ls": _ls, "info": _info, "stats": _stats, "get": _get, "bench": _bench}
            return commands[options.command](feed, options) or 0
    except FeedError as error:
        print(f"h5feed: {_as_options(str(error), options)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"h5feed: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
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
    stats.add_argument("--timeout", type=float, default=jobs.TIMEOUT, help="seconds to wait for the result")
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


def _split_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _SPLIT_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def _as_options(message: str, options: argparse.Namespace) -> str:
    """The message with ``--test`` for ``test=`` and ``--batch-size 0`` for ``batch_size=0``."""

    def dashed(match: re.Match[str]) -> str:
        name, value = match.groups()
        return f"--{name.replace('_', '-')}{value and ' ' + value}" if hasattr(options, name) else match[0]

    return re.sub(r"\b([a-z_]+)=([^\s,.;:)]*)", dashed, message)


def _ls(feed: Feed, options: argparse.Namespace) -> int:
    entries, until = feed.datasets(), time.monotonic() + (options.wait or 0.0)
    while waiting := [entry["name"] for entry in entries if entry["status"] == "preparing"]:
        if time.monotonic() >= until:
            break
        time.sleep(_LOOK_SECONDS)
        entries = feed.datasets()
    _print_entries(entries, options)
    if waiting and options.wait is not None:
        print(f"h5feed: {len(waiting)} of {len(entries)} datasets not ready after {options.wait:g} s", file=sys.stderr)
        return 1
    return 0


def _print_entries(entries: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(entries, indent=2))
        return
    rows = [("DATASET", "ROWS", "FIELDS", "STATUS")]
    for entry in entries:
        fields = ", ".join(f"{f['name']} {f['dtype']}{f['shape']}" for f in entry["fields"] if f["readable"])
        status = entry["status"] if entry["reason"] is None else f"{entry['status']}: {entry['reason']}"
        rows.append((entry["name"], "-" if entry["rows"] is None else str(entry["rows"]), fields, status))
    _print_table(rows)


def _info(feed: Feed, options: argparse.Namespace) -> None:
    dataset = feed[options.dataset]
    wanted = _split_options(options)
    splits = None
    if wanted:
        with _progress("computing splits") as progress:
            splits = dataset.splits(progress=progress, **wanted)
    if options.json:
        print(json.dumps(dataset.info | ({"splits": splits} if splits else {}), indent=2))
        return
    print(f"{dataset.name}: {dataset.rows} rows, revision {dataset.revision}")
    rows = [("FIELD", "ROLE", "SAMPLE", "CHUNKS", "FILTERS", "WHY")]
    for field in dataset.info["fields"]:
        sample = f"{field['dtype']}{field['shape']}"
        why = field["role_reason"] if field["readable"] else f"not served: {field['reason']}"
        chunks = "-" if field["chunks"] is None else "×".join(map(str, field["chunks"]))
        rows.append((field["name"], field["role"], sample, chunks, ", ".join(field["filters"]) or "-", why))
    _print_table(rows)
    if dataset.class_names:
        print(f"classes: {', '.join(dataset.class_names)}")
    if dataset.info["native_splits"]:
        stored = ", ".join(f"{split['name']} {split['rows']}" for split in dataset.info["native_splits"])
        drawn = dataset.info["splits_drawn"]
        print(f"stored splits: {stored}{f' ({_drawn_with(drawn)})' if drawn else ''}")
    for note in dataset.info["notes"]:
        print(f"note: {note}")
    if splits:
        print(f"\n{splits}")


def _drawn_with(record: Mapping[str, Any]) -> str:
    """The options that produced the stored splits."""
    given = {name: record[name] for name in ("test", "val") if record[name] is not None}
    if record["split_shuffle"]:
        given |= {"split_seed": record["split_seed"], "stratify": record["stratified_by"] or "none"}
    else:
        given["split_shuffle"] = "false"
    return "drawn with " + ", ".join(f"{name}={value}" for name, value in given.items())


def _stats(feed: Feed, options: argparse.Namespace) -> None:
    wanted, field = _split_options(options), options.field
    dataset = feed[options.dataset]
    with _progress("computing statistics") as progress:
        stats = dataset.stats(options.split, field=field, timeout=options.timeout, progress=progress, **wanted)
    if options.means:
        fields = [stats] if isinstance(stats, FieldStats) else list(stats.values())
        with_channels = [each for each in fields if each["channel_means"]]
        if len(with_channels) != 1:
            names = ", ".join(each.field for each in with_channels) or "none"
            raise BadParameter(f"--means needs exactly one field with colours, found {names}: choose one with --field")
        print(json.dumps(with_channels[0]["channel_means"]))
    elif options.json:
        whole = dict(stats) if isinstance(stats, FieldStats) else {name: dict(each) for name, each in stats.items()}
        print(json.dumps(whole, indent=2))
    else:
        _print_stats(stats)


def _print_stats(stats: Stats | FieldStats) -> None:
    """A table with bars, in colour on a terminal if `rich` is installed."""
    if not sys.stdout.isatty():
        print(stats)
        return
    try:
        from rich.console import Console

        from .stats_table import tables
    except ModuleNotFoundError:
        print(stats)
        return

    console = Console()
    for table in tables([stats] if isinstance(stats, FieldStats) else list(stats.values())):
        console.print(table)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[jobs.Progress | None]:
    """Show the progress on a terminal, in a line that is erased at the end."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(done: int, total: int) -> None:
        share = f"{done / total:4.0%}" if total else "starting"
        print(f"\r\033[K{what}: {share}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\033[K", end="", file=sys.stderr)


def _bench(feed: Feed, options: argparse.Namespace) -> int:
    return bench.run(feed, options, _split_options(options))


def _get(feed: Feed, options: argparse.Namespace) -> None:
    if options.output.suffix not in (".npz", ".npy"):
        raise BadParameter(f"{options.output} must end in .npz, or in .npy for a single field")
    dataset = feed[options.dataset]
    fields = None if options.fields is None else [name for name in options.fields.split(",") if name]
    if options.rows is not None:
        try:
            rows = [int(row) for row in options.rows.split(",")]
        except ValueError:
            raise BadParameter(f"--rows {options.rows} must be comma-separated row ids such as 5,1,9") from None
        batch = dataset.take(rows, fields=fields)
    else:
        order: dict[str, Any] = {**_split_options(options), "seed": options.seed, "epoch": options.epoch}
        if options.window is not None:
            order["window"] = options.window
        if fields is not None:
            order["fields"] = fields
        # Only a plan warns that stored splits are replaced.
        dataset.plan(options.split, batch_size=options.batch_size, shuffle=options.shuffle, **order)
        batch = dataset.batch(
            options.batch, split=options.split, batch_size=options.batch_size, shuffle=options.shuffle, **order
        )
    _write(batch, options.output)
    print(f"{options.output}: {batch!r}")


def _write(batch: Batch, output: Path) -> None:
    if output.suffix == ".npz":
        arrays: dict[str, Any] = {**batch, "__rows__": batch.rows}
        with open(output, "wb") as stream:
            write_npz(stream, arrays)
    elif len(batch) == 1:
        np.save(output, next(iter(batch.values())))
    else:
        raise BadParameter(f"{output} can hold only one array, not {len(batch)} fields: choose one with --fields")


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
