"""What the ``h5feed`` command does."""

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

from .batch import Batch
from .bench import command as bench
from .errors import BadParameter, FeedError
from .feed import Feed, connect
from .net import jobs
from .net.token import token_in
from .stats import FieldStats, Stats
from .wire import write_npz

_LOOK_SECONDS = 0.5
"""Time between two polls; the server also holds the request while it scans."""

_SPLIT_OPTIONS = ("val", "test", "folds", "fold", "group", "stratify", "split_seed", "where")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
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


def _hashed(info: Mapping[str, Any]) -> str:
    """What to say of a revision that is provisional; empty if it is not."""
    hashing = info.get("hashing")
    return f" (provisional: {hashing['done'] / max(1, hashing['total']):.0%} hashed)" if hashing else ""


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
    print(f"{dataset.name}: {dataset.rows} rows, revision {dataset.revision}{_hashed(dataset.info)}")
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
    timeout = jobs.TIMEOUT if options.timeout is None else options.timeout
    dataset = feed[options.dataset]
    with _progress("computing statistics") as progress:
        stats = dataset.stats(options.split, field=field, timeout=timeout, progress=progress, **wanted)
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
