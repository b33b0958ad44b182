"""Tables as text and HTML: a header, and rows whose first column is a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal


def titled_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table with a title above it. All arguments are escaped."""
    return f"<p>{escape(title)}</p>{html_table(header, rows)}"


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], align: Literal["left", "right"] = "left"
) -> str:
    """An HTML table. All arguments are escaped."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>'
        + "".join(f'<td style="text-align: {align}">{escape(str(cell))}</td>' for cell in others)
        + "</tr>"
        for name, *others in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table including its header. The first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip() for name, *others in table]
