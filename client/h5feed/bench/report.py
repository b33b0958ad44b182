"""The results as text, as a table with bars, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..tables import text_lines
from .advice import Advice, advice_for, duration, is_fed, size_of
from .findings import Findings, Rate, expected_utilisation

if TYPE_CHECKING:
    from rich.console import Console

_HEAD = ("read as", "rows/s", "MB/s", "a batch")
_IN = " " * 6
_LEAST_BAR = 8
_LONGEST_BAR = 40
"""Minimum and maximum length of the longest bar, in characters; it depends on the width of the terminal."""

_BOUND = {
    "server": "reading and decoding on the server{share}",
    "batches": "the cost per batch: one big request arrives {big} over one connection, the batches {all}",
    "round trips": "the round trip: more concurrent requests still bring more rows",
    "sockets": "how fast both machines can send and receive, {all}{share}",
    "machine": "this machine: server and client are both on it, and read and decode {all}",
    "link": "the link, at {all}{share}",
}


def as_json(findings: Findings) -> dict[str, Any]:
    """The results, the verdict and the advice, as JSON-serialisable values."""
    return {
        **findings.as_json(),
        "verdict": verdict(findings),
        "advice": [{"option": each.option, "because": each.because} for each in advice_for(findings)],
    }


def heading(findings: Findings) -> str:
    """One sentence: the dataset, its rows, and the batches that were read."""
    size, row_bytes = findings.batch_size, findings.row_bytes
    return (
        f"{findings.dataset} at {findings.url}: {rows_of(findings.rows)} of {size_of(row_bytes)} "
        f"(split {findings.split}), shuffled batches of {size} ({size_of(row_bytes * size)})"
    )


def requests(findings: Findings) -> list[tuple[str, str]]:
    """Times of single requests, as (what, value)."""
    lines = []
    if findings.round_trip is not None:
        lines.append(("round trip", duration(findings.round_trip)))
    single = findings.single
    if single is not None:
        again = "" if single.again is None else f" ({duration(single.again)} when repeated)"
        lines.append(
            (
                f"one request of {rows_of(single.rows)}",
                f"{duration(single.seconds)} for {size_of(single.nbytes)}: {duration(single.reading)} reading on the "
                f"server{again}, {duration(single.transfer)} transfer",
            )
        )
    return lines


def rows_of(count: int) -> str:
    """1 row; 6,400 rows."""
    return f"{count:,} row{'s' if count != 1 else ''}"


def lines_of(findings: Findings) -> list[tuple[list[str], float]]:
    """A line per stream: its cells, and its rate as a fraction of the fastest."""
    rates = findings.rates()
    # Without the cache: next to a local disk, all links would look alike.
    most = max((rate.rows_per_second for rate in rates if rate is not findings.cached), default=0.0) or 1.0
    return [
        (
            [
                _label(findings, rate),
                f"{rate.rows_per_second:,.0f}" if rate.rows_per_second >= 10 else f"{rate.rows_per_second:.2g}",
                f"{rate.bytes_per_second / 1e6:,.{1 if rate.bytes_per_second < 1e8 else 0}f}",
                duration(_rows_of_batch(findings, rate) / rate.rows_per_second),
            ],
            min(1.0, rate.rows_per_second / most),
        )
        for rate in rates
    ]


def verdict(findings: Findings) -> list[str]:
    """Sentences: the shortest step that gets its batches in time, the utilisation, and what limits the rate."""
    lines = []
    each = findings.batch_seconds
    if each is None or findings.default is None:
        return ["The rate at which batches arrive could not be measured."]
    rows = min(findings.batch_size, findings.rows)
    lines.append(
        f"Training does not wait for data as long as a step of {rows_of(rows)} takes more than "
        f"{duration(each)} ({findings.default.rows_per_second:,.{0 if findings.default.rows_per_second >= 10 else 1}f} "
        "rows/s)."
    )
    if findings.training is not None:
        training = findings.training
        lines.append(
            f"With steps of {duration(training.step)}, the accelerator is busy {training.utilisation:.1%} of the time "
            f"(MLPerf Storage utilisation, measured over {training.steps:,} step{'s' * (training.steps != 1)})."
        )
    elif findings.step is not None:
        lines.append(
            f"With steps of {duration(findings.step)}, the accelerator would be busy "
            f"{expected_utilisation(findings.step, each):.1%} of the time (MLPerf Storage utilisation, computed)."
        )
    if findings.bound is not None:
        lines.append(f"The limit is {_bound(findings)}.")
    if not findings.interrupted and not advice_for(findings):
        lines.append(
            "Your steps are the limit: there is nothing to change."
            if is_fed(findings)
            else "None of the other options tried is clearly faster."
        )
    return lines


def _bound(findings: Findings) -> str:
    share = findings.server_share
    assert findings.default is not None and findings.bound is not None
    rate = max(each.bytes_per_second for each in (findings.default, *findings.fixed))
    text = _BOUND[findings.bound].format(
        share=f" (the server reads for {share:.0%} of the request time)" if share is not None else "",
        big=f"at {findings.alone_bytes_per_second / 1e6:,.0f} MB/s",
        all=f"{rate / 1e6:,.{1 if rate < 1e8 else 0}f} MB/s",
    )
    again = findings.speed_up_again
    if again is not None and findings.memory_helps:
        text += f"; rows in its memory arrive {again:.1f} times as fast"
    return text


def _label(findings: Findings, rate: Rate) -> str:
    if rate is findings.default:
        width = findings.width
        return f"read-ahead, chose {width} connection{'s' if width != 1 else ''}"
    return rate.what


def _rows_of_batch(findings: Findings, rate: Rate) -> int:
    # If smaller batches were measured instead, show the time of a full one.
    shrunk = rate.batch_size == findings.measured_batch
    return min(findings.batch_size if shrunk else rate.batch_size, findings.rows)


def as_text(findings: Findings, width: int = 80) -> str:
    """The whole report as plain text."""
    parts = [*textwrap.wrap(heading(findings), width), ""]
    parts += [line for what, value in requests(findings) for line in _hanging(f"{what}: ", value, width)]
    rows = lines_of(findings)
    if rows:
        lines = text_lines([_HEAD, *(cells for cells, _ in rows)])
        longest = max(map(len, lines))
        bar = min(_LONGEST_BAR, width - longest - 2)
        parts += ["", lines[0]]
        for line, (_, share) in zip(lines[1:], rows, strict=True):
            full = "█" * round(bar * share) if bar >= _LEAST_BAR else ""
            parts.append(f"{line.ljust(longest)}  {full}".rstrip())
    parts += ["", *(line for sentence in verdict(findings) for line in textwrap.wrap(sentence, width))]
    parts += [line for note in findings.notes for line in _hanging("note: ", note, width)]
    advice = advice_for(findings)
    if advice:
        parts += ["", "What would help"]
        for each in advice:
            parts += [
                f"  {each.option}",
                *textwrap.wrap(each.because, width, initial_indent=_IN, subsequent_indent=_IN),
            ]
    return "\n".join(parts)


def _hanging(begin: str, text: str, width: int) -> Iterator[str]:
    yield from textwrap.wrap(begin + text, width, subsequent_indent="  ")


def print_rich(findings: Findings, console: Console) -> None:
    """Print the report in colour, as wide as the terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console.print(Text(heading(findings), style="bold"))
    console.print()
    single = Table(box=None, pad_edge=False, show_header=False)
    single.add_column(no_wrap=True, style="dim")
    single.add_column()
    for what, value in requests(findings):
        single.add_row(Text(what), Text(value))
    console.print(single)
    rows = lines_of(findings)
    if rows:
        console.print()
        console.print(_rich_table(rows, console.width))
    console.print()
    for number, sentence in enumerate(verdict(findings)):
        console.print(Text(sentence, style="bold green" if not number and findings.default else ""))
    for note in findings.notes:
        console.print(Text(f"note: {note}", style="dim"))
    advice: Sequence[Advice] = advice_for(findings)
    if advice:
        console.print()
        console.print(Text("What would help", style="bold"))
        for each in advice:
            console.print(Text(f"  {each.option}", style="cyan"))
            console.print(Padding(Text(each.because), (0, 0, 0, len(_IN)), expand=False))


def _rich_table(rows: Sequence[tuple[list[str], float]], width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(_HEAD[0], no_wrap=True)
    for name in _HEAD[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="crop")
    widths = [max(len(_HEAD[place]), *(len(cells[place]) for cells, _ in rows)) for place in range(4)]
    bar = min(_LONGEST_BAR, width - sum(widths) - 8)
    for number, (cells, share) in enumerate(rows):
        full = "█" * round(bar * share) if bar >= _LEAST_BAR else ""
        table.add_row(*map(Text, cells), Text(full, style="cyan" if number else "green"))
    return table
