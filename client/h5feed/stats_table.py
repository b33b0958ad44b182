"""Statistics as `rich` tables: columns fit the terminal, bars are in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .stats import FieldStats

_BAR = 30
"""Length of the longest bar in characters."""

_COLOURS = {"R": "red", "G": "green", "B": "blue"}


def tables(fields: Sequence[FieldStats]) -> Iterator[RenderableType]:
    """For each field, its statistics per channel, and its classes or most frequent values."""
    for field in fields:
        yield Text(field.title, style="bold")
        numbers = field.numbers()
        if numbers:
            yield _numbers(numbers)
        listed = field.listed()
        if listed:
            yield _listed(listed, "class" if field["classes"] else "value")
        if field.hidden():
            yield Text(field.hidden(), style="dim")
        yield Text()


def _numbers(rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, name in enumerate(rows[0]):
        last = place == len(rows[0]) - 1
        # In a narrow terminal, only the histograms are cut off.
        width = None if last else max(len(row[place]) for row in rows)
        side: JustifyMethod = "left" if last or not place else "right"
        table.add_column(name, justify=side, min_width=width, no_wrap=True, overflow="crop")
    for *cells, histogram in rows[1:]:
        colour = _COLOURS.get(cells[0], "cyan")
        table.add_row(*(Text(cell) for cell in cells), Text(histogram, style=colour))
    return table


def _listed(rows: Sequence[tuple[str, int, float]], kind: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(kind)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    most = max(share for _, _, share in rows) or 1
    for name, count, share in rows:
        bar = Text("█" * round(_BAR * share / most), style="cyan")
        table.add_row(Text(name), f"{count:,}", f"{share:.1%}", bar)
    return table
