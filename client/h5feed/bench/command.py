"""The ``h5feed bench`` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..feed import Feed, connect
from .arguments import check_together
from .asked import Asked
from .feeding import feed_accelerators, feeding_text
from .findings import Findings
from .observe import Observer
from .phases import Bench, Report
from .report import as_json, as_text, print_rich
from .workloads import WORKLOADS


def run(feed: Feed, options: argparse.Namespace, split_options: Mapping[str, Any]) -> int:
    """Measure and print; return the exit code."""
    check_together(options)
    order = dict(split_options)
    if options.fields is not None:
        order["fields"] = [name for name in options.fields.split(",") if name]
    if options.window is not None:
        order["window"] = options.window
    if options.workload is not None:
        return _feed(feed, options, order)
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
        print("h5feed: the benchmark failed; the results above are incomplete:", file=sys.stderr)
        raise bench.failure
    if findings.interrupted:
        print("h5feed: interrupted; the results above are incomplete", file=sys.stderr)
        return 130
    return 0


def _feed(feed: Feed, options: argparse.Namespace, order: Mapping[str, Any]) -> int:
    """Let accelerators of a workload train; return the exit code, 1 if they were not busy enough."""
    with _progress() as report:
        found = feed_accelerators(
            feed[options.dataset],
            WORKLOADS[options.workload],
            options.accelerators,
            split=options.split,
            options=order,
            token=options.token,
            deadline=options.deadline,
            seconds=options.seconds,
            server_memory=options.server_memory,
            report=report,
        )
    if options.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        print(feeding_text(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100))
    return 0 if found.passed(found.trials[0]) else 1


def _print(findings: Findings) -> None:
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console

            print_rich(findings, Console(highlight=False))
            return
    print(as_text(findings, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100))


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar on a terminal if `rich` is installed, otherwise one line per phase."""
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
