"""The command ``h5feed bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..feed import Feed, connect
from .asked import MAX_BYTES, SECONDS, Asked
from .findings import Findings
from .observe import Observer
from .phases import Bench, Report
from .report import as_json, as_text, print_rich

EXAMPLES = """\
  h5feed bench http://gpu-box:8000 photos
  h5feed bench http://gpu-box:8000 photos --split train --test 0.1 --batch-size 32 --step-ms 50
  h5feed bench http://a:8000,http://b:8000 photos --seconds 60 --cache ~/.cache/rows
  h5feed bench http://gpu-box:8000 photos --json > bench.json
"""

ABOUT = """Reads shuffled batches as training does, for a while, and says what the link and
the server can feed, what bounds it, and which options would change that.
Nothing is kept but the rows in the folder of --cache."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command, but for those of splits."""
    command.add_argument("dataset", metavar="DATASET")
    command.add_argument("--split", default="all", help="all, train, val or test (default all)")
    command.add_argument("--batch-size", metavar="N", type=int, default=64, help="rows of a batch (default 64)")
    command.add_argument("--fields", metavar="NAMES", help="comma-separated field names (default inputs and labels)")
    command.add_argument("--window", metavar="N", type=int, help="shuffle among so many rows, by whole chunks")
    command.add_argument("--step-ms", metavar="MS", type=float, help="time of a training step: how busy will it be?")
    command.add_argument("--cache", metavar="FOLDER", help="measure a row cache in this folder too")
    command.add_argument("--seconds", metavar="S", type=float, default=SECONDS, help="in all, about (default 20)")
    command.add_argument(
        "--max-bytes",
        metavar="BYTES",
        type=size,
        default=MAX_BYTES,
        help="to fetch in all, such as 500MB (default 16GB)",
    )
    command.add_argument("--json", action="store_true", help="as JSON")


def size(text: str) -> int:
    """Bytes of ``500MB``, ``64MiB`` or ``1000000``."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmg]i?|)b?", text.strip().lower())
    try:
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes such as 500MB or 2GiB")


def run(feed: Feed, options: argparse.Namespace, split_options: Mapping[str, Any]) -> int:
    """Measure and print; returns the exit code."""
    order = dict(split_options)
    if options.fields is not None:
        order["fields"] = [name for name in options.fields.split(",") if name]
    if options.window is not None:
        order["window"] = options.window
    asked = Asked(
        options.split,
        options.batch_size,
        order,
        options.seconds,
        options.max_bytes,
        None if options.step_ms is None else options.step_ms / 1e3,
        options.cache,
    )
    observer = Observer()
    dataset = feed[options.dataset]
    with (
        connect(options.url, token=options.token, deadline=options.deadline, event_hooks=observer.hooks) as second,
        _progress() as report,
    ):
        bench = Bench(dataset, second[options.dataset], observer, asked, report)
        findings = bench.run()
    if options.json:
        print(json.dumps(as_json(findings), indent=2, ensure_ascii=False))
    else:
        _print(findings)
    if bench.failure is not None:
        print("h5feed: this is what was found until then:", file=sys.stderr)
        raise bench.failure
    if findings.interrupted:
        print("h5feed: interrupted: this is what was found until then", file=sys.stderr)
        return 130
    return 0


def _print(findings: Findings) -> None:
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console

            print_rich(findings, Console(highlight=False))
            return
    print(as_text(findings, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100))


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A bar where somebody looks and `rich` is installed; else a line for each phase."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield _line_for_each()
        return
    if not sys.stderr.isatty():
        yield _line_for_each()
        return
    from rich.console import Console

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("connecting", total=1.0, now="")

        def show(phase: str, done: float, rows_per_second: float) -> None:
            now = f"{rows_per_second:,.0f} rows/s" if rows_per_second else ""
            progress.update(task, description=phase, completed=done, now=now)

        yield show


def _line_for_each() -> Report:
    last = ""

    def show(phase: str, done: float, rows_per_second: float) -> None:
        nonlocal last
        if phase != last:
            last = phase
            print(f"{done:4.0%}  {phase}", file=sys.stderr, flush=True)

    return show


__all__ = ["ABOUT", "EXAMPLES", "add_arguments", "run"]
