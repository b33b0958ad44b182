"""The command ``h5feed-server build``."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from h5feed.errors import BadParameter, FeedError
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.table import Table
from rich.text import Text

from .crew import Crew
from .dry_run import Preview, preview
from .options import BuildOptions, read_options
from .progress import Progress
from .report import Report
from .run import build

_LINE_SECONDS = 10.0
"""Where no terminal shows a bar, a line is printed so often."""

LEFT_OUT = 3
"""Exit code of a build that has made its file, but has left something of its source out."""

_FLAGS = {
    "overwrite=True": "--overwrite",
    "exact=True": "--exact",
    "stratify=False": "--no-stratify",
    "split_shuffle=False": "--split-by-position",
}
"""Those that take no value."""

_NAMES = [item.name for item in fields(BuildOptions)]

_OPTION = re.compile(
    rf"(?<![\w'\"/.-])(?:{'|'.join(_FLAGS)}|(?:{'|'.join(_NAMES)})(?==)"
    rf"|(?:{'|'.join(name for name in _NAMES if '_' in name)})(?![\w'\"]))"
)
"""Names of options: before a value, and those that are no words of the language."""

_PHASES = {
    "fetch": "copying the source",
    "rows": "reading rows",
    "layout": "writing the final layout",
    "check": "checking the files",
    "upload": "uploading",
}

_IN_BYTES = ("fetch", "check", "upload")

_SHOWN = 10
"""Rows that are left out, and classes, that are listed."""


def run_build(arguments: argparse.Namespace, crew: Crew | None = None) -> int:
    """Run the command; returns the exit code. `crew` does the work; default: threads of this process."""
    given = _given(arguments)
    try:
        return _run(arguments, BuildOptions(**given), crew)
    except FeedError as error:
        raise type(error)(_in_flags(error.detail)) from error.__cause__


def _run(arguments: argparse.Namespace, options: BuildOptions, crew: Crew | None) -> int:
    # Pillow's, of odd metadata: what makes an image useless is told in our own words.
    warnings.simplefilter("ignore")
    console = Console(stderr=True, markup=False, highlight=False)
    if arguments.dry_run:
        previewed = preview(arguments.source, arguments.output, options)
        print_preview(previewed, Console(markup=False, highlight=False))
        return _code(previewed.left_out, options, console)
    try:
        with _Shown(console) as shown:
            report = build(arguments.source, arguments.output, options, on_progress=shown, crew=crew)
    except KeyboardInterrupt:
        console.print("interrupted: to resume, run the same command again", style="bold")
        return 130
    _print_report(report, Console(markup=False, highlight=False))
    return _code(report.left_out, options, console)


def _code(left_out: Mapping[str, str], options: BuildOptions, console: Console) -> int:
    if not left_out or options.allow_missing:
        return 0
    console.print(
        f"left out: {len(left_out):,}, so the exit code is {LEFT_OUT}; to accept this, pass --allow-missing",
        soft_wrap=True,
    )
    return LEFT_OUT


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options from the command line and from the file it names."""
    known = {item.name for item in fields(BuildOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in known and value is not None}
    if "rename" in given:
        pairs = [pair.partition("=") for pair in given["rename"]]
        bad = next((old for old, _, new in pairs if not new), None)
        if bad is not None:
            raise BadParameter(f"--rename {bad} must be OLD=NEW")
        given["rename"] = {old: new for old, _, new in pairs}
    return {**(read_options(arguments.config) if arguments.config else {}), **given}


def _in_flags(said: str) -> str:
    """A message about `BuildOptions`, reworded for the command line."""
    return _OPTION.sub(lambda match: _FLAGS.get(match[0]) or f"--{match[0].replace('_', '-')}", said)


class _Rate(ProgressColumn):
    """Rows or megabytes per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "", style="progress.data.speed")


class _Shown:
    """Progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._phase = ""
        self._last = (0.0, 0)

    def __enter__(self) -> _Shown:
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,}"),
                _Rate(),
                TextColumn("{task.fields[size]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        what = _PHASES[progress.phase]
        size = f"{progress.written / 1e6:,.0f} MB"
        if progress.phase in _IN_BYTES:
            # Whole megabytes are counted like rows.
            progress = Progress(progress.phase, progress.rows // 10**6, -(-progress.total // 10**6), progress.written)
            unit = "MB"
        else:
            unit = "rows"
        if self._bar is not None:
            if progress.phase != self._phase:
                self._task = self._bar.add_task(
                    what, total=progress.total, completed=progress.rows, size=size, unit=unit
                )
            self._bar.update(self._task, completed=progress.rows, size=size)
            self._phase = progress.phase
            return
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._last = progress.phase, (now, progress.rows)
            self._first = self._last
        elif now - self._last[0] >= _LINE_SECONDS:
            rate = (progress.rows - self._first[1]) / (now - self._first[0])
            left = (progress.total - progress.rows) / rate if rate else 0
            self._last = (now, progress.rows)
            self._console.print(
                f"{what}: {progress.rows:,} of {progress.total:,}, {rate:,.0f} {unit}/s, {size}, {left:,.0f} s left"
            )


def print_preview(previewed: Preview, console: Console) -> None:
    """Print what a build would produce."""
    for spec in previewed.fields:
        shape = "×".join(map(str, spec.shape)) or "one"
        console.print(f"{spec.name}: {sum(previewed.rows.values()):,} rows of {shape} {spec.dtype}")
    files = previewed.urls or tuple(map(str, previewed.files))
    console.print(f"files: {', '.join(files[:3])}{' …' if len(files) > 3 else ''}")
    console.print(f"size: {_size(previewed.nbytes)}; time: about {_duration(previewed.seconds)}")
    _print_splits(previewed.rows, previewed.classes, console)
    if previewed.method:
        console.print(f"splits: the same as those of scikit-learn's {previewed.method}")
    table = Table("compression", "size", "decoding per row", title="measured on a sample of your rows")
    for one in previewed.tried:
        table.add_row(one.compression, f"{one.share:.0%}", f"{one.decode_seconds * 1e3:.2f} ms")
    console.print(table)
    console.print(f"advice: {previewed.advice}")
    _print_notes(previewed.left_out, previewed.notes, console)
    console.print("nothing was written")


def _print_splits(rows: Mapping[str, int], classes: Mapping[str, Mapping[str, int]], console: Console) -> None:
    if not classes and list(rows) == [""]:
        return
    table = Table("class", *(split or "rows" for split in rows))
    for name in list(next(iter(classes.values()), {}))[:_SHOWN]:
        table.add_row(name, *(f"{classes[split][name]:,}" if name in classes[split] else "0" for split in rows))
    hidden = len(next(iter(classes.values()), {})) - _SHOWN
    if hidden > 0:
        table.add_row(f"… {hidden} more")
    table.add_row("all", *(f"{count:,}" for count in rows.values()), style="bold")
    console.print(table)


def _print_report(report: Report, console: Console) -> None:
    rows = sum(report.rows.values())
    _print_notes(report.left_out, report.notes, console)
    splits = ", ".join(f"{count:,} {split}" for split, count in report.rows.items() if split)
    files = report.urls or tuple(map(str, report.files))
    where = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    resumed = f", {report.resumed:,} of them by an earlier run" if report.resumed else ""
    console.print(
        f"built {where}: {rows:,} rows{f' ({splits})' if splits else ''}{resumed}, {_size(report.nbytes)}, "
        f"in {_duration(report.seconds)}",
        soft_wrap=True,
    )


def _print_notes(left_out: Mapping[str, str], notes: tuple[str, ...], console: Console) -> None:
    for note in notes:
        console.print(f"note: {_in_flags(note)}", soft_wrap=True)
    if left_out:
        console.print(f"left out: {len(left_out):,}", style="bold")
        for name, reason in list(left_out.items())[:_SHOWN]:
            console.print(f"  {name}: {_in_flags(reason)}", soft_wrap=True)
        if len(left_out) > _SHOWN:
            console.print(f"  … and {len(left_out) - _SHOWN:,} more")


def _size(nbytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
