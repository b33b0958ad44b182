"""Statistics of a split, computed by the server. They print as tables in terminals and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BadParameter
from .pictures import Picture, PlotKind
from .suggestions import no_field

Plot = Callable[[str | None, PlotKind | None], Picture]
"""Draws a plot of a field, or of the one that suits; of a kind, or of the one that suits."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 32
"""Width of a histogram in characters."""

_CLASSES_SHOWN = 20
_NAME_LENGTH = 40

_BAR = '<div style="background:#4477aa;height:.8em;width:{:.2f}em"></div>'


class FieldStats(Mapping[str, Any]):
    """Statistics of one field: a mapping with the server's response, see ``GET …/stats`` in the HTTP API.

    Attributes
    ----------
    field, split : str
    rows : int
    mean, std, variance : float, or (channels,) float64
        Per channel, in stored order, if the field has channels or is a vector of features. Suitable for
        ``keras.layers.Normalization(mean=stats.mean, variance=stats.variance)``.
    """

    def __init__(self, answer: Mapping[str, Any], plot: Plot) -> None:
        self._answer = answer
        self._plot = plot
        self.field: str = answer["field"]
        self.split: str = answer["split"]
        self.rows: int = answer["rows"]

    def __getitem__(self, key: str) -> Any:
        return self._answer[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answer)

    def __len__(self) -> int:
        return len(self._answer)

    @property
    def mean(self) -> float | npt.NDArray[np.float64]:
        return self._per_channel("mean")

    @property
    def std(self) -> float | npt.NDArray[np.float64]:
        return self._per_channel("std")

    @property
    def variance(self) -> float | npt.NDArray[np.float64]:
        return self.std**2

    @property
    def class_weight(self) -> dict[int, float]:
        """Balanced weights for ``model.fit(class_weight=…)``: rows / (classes · rows of the class).

        Raises
        ------
        BadParameter
            The field does not hold integer classes.
        """
        classes = self._answer["classes"]
        if not classes or not all(isinstance(entry["value"], int) for entry in classes):
            raise BadParameter(f"{self.field!r} does not hold integer classes: its role is {self['role']}")
        return {entry["value"]: entry["weight"] for entry in classes if entry["rows"]}

    def plot(self, kind: PlotKind | None = None) -> Picture:
        """A plot of this field, drawn by the server; by default a histogram. Notebooks display it.

        Parameters
        ----------
        kind : {"histogram", "classes", "mean_image"}, optional
            ``classes``: the share of each class, if the field is the label.

        Raises
        ------
        UnsupportedField, BadParameter
            The field has no such plot.
        """
        return self._plot(self.field, kind)

    def _per_channel(self, key: str) -> float | npt.NDArray[np.float64]:
        channels = self._answer["channels"]
        numbers = [channel[key] for channel in channels] if channels else self._answer[key]
        if numbers is None:
            raise BadParameter(f"{self.field!r} has no {key}: it contains no finite numbers")
        array = np.asarray(numbers, np.float64)
        return array if array.ndim else float(array)

    @property
    def title(self) -> str:
        """The field, its dtype, shape and role, the split and its rows."""
        return f"{self.field}  {self['dtype']}{self['shape']}, {self['role']}, split {self.split}, {self.rows:,} rows"

    def numbers(self) -> list[tuple[str, ...]]:
        """A header, a row for all values, and a row per channel, as text with a histogram. Empty without numbers."""
        if not self["count"]:
            return []
        header = ("", "mean", "std", "min", "max", "zeros", "NaN", "inf", "histogram")
        return [header, *(self._row(part) for part in self._parts())]

    def listed(self) -> list[tuple[str, int, float]]:
        """Name, rows and share of the first classes, or of the most frequent values if any occurs twice."""
        entries = self["classes"] or self["values"] or []
        if not self["classes"] and len(entries) > 1 and entries[0]["rows"] == 1:
            return []
        return [(_label(entry), entry["rows"], entry["share"]) for entry in entries[:_CLASSES_SHOWN]]

    def hidden(self) -> str:
        """A line with the total number of classes or values, if not all are listed."""
        entries = self["classes"] or self["values"] or []
        there = len(entries) if self["classes"] else self["distinct"]
        if there == len(self.listed()) or not entries:
            return ""
        return f"… {'very many' if there is None else f'{there:,}'} in total"

    def __repr__(self) -> str:
        lines = [self.title, *_aligned(self.numbers())]
        if self["lengths"] and self["lengths"]["count"]:
            lengths = self["lengths"]
            lines.append(f"lengths {lengths['min']} … {lengths['max']}, mean {_short(lengths['mean'])}")
        listed = self.listed()
        most = max((share for _, _, share in listed), default=0) or 1
        bars = [
            (name, f"{rows:,}", f"{share:.1%}", "█" * round(_COLUMNS * share / most)) for name, rows, share in listed
        ]
        lines += _aligned(bars)
        if hidden := self.hidden():
            lines.append(hidden)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.field)}</b>{escape(self.title.removeprefix(self.field))}</p>"]
        if numbers := self.numbers():
            rows = [
                (*map(escape, row[:-1]), _svg(part["histogram"]))
                for row, part in zip(numbers[1:], self._parts(), strict=True)
            ]
            parts.append(_html_table(numbers[0], rows))
        if listed := self.listed():
            most = max(share for _, _, share in listed) or 1
            bars = [
                (escape(name), f"{rows:,}", f"{share:.1%}", _BAR.format(12 * share / most))
                for name, rows, share in listed
            ]
            parts.append(_html_table(("class" if self["classes"] else "value", "rows", "share", ""), bars))
        if hidden := self.hidden():
            parts.append(f"<p>{escape(hidden)}</p>")
        return "".join(parts)

    def _parts(self) -> list[Mapping[str, Any]]:
        """Statistics of all values, then of each channel."""
        return [{**self._answer, "name": "all"}, *(self["channels"] or ())]

    def _row(self, part: Mapping[str, Any]) -> tuple[str, ...]:
        numbers = (_short(part[key]) for key in ("mean", "std", "min", "max"))
        counts = (f"{part['zero_share']:.1%}", f"{part['nan']:,}", f"{part['inf']:,}")
        return (part["name"], *numbers, *counts, sparkline(part["histogram"]))


class Stats(Mapping[str, FieldStats]):
    """Statistics of the fields of a dataset in one split, by field name."""

    def __init__(self, answer: Any, plot: Plot) -> None:
        self.split: str = answer["split"]
        self.rows: int = answer["rows"]
        self.revision: str = answer["revision"]
        self._plot = plot
        self._fields = {name: FieldStats(found, plot) for name, found in answer["fields"].items()}

    def __getitem__(self, name: str) -> FieldStats:
        try:
            return self._fields[name]
        except KeyError:
            raise no_field(name, self._fields, "no statistics of") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def plot(self, field: str | None = None, kind: PlotKind | None = None) -> Picture:
        """A plot, drawn by the server. Notebooks display it.

        Parameters
        ----------
        field : str, optional
            Default: the label for ``classes``, else the first input that suits.
        kind : {"classes", "histogram", "mean_image"}, optional
            ``classes``: the share of each class, in each split if these are the statistics of all rows. Default:
            ``classes`` if no field is named and the label has some, else ``histogram``.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
            There is no such plot.
        """
        return self._plot(field, kind)

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self._fields.values())) or "no readable fields"

    def _repr_html_(self) -> str:
        return "".join(field._repr_html_() for field in self._fields.values())


def sparkline(histogram: Mapping[str, Sequence[Any]] | None) -> str:
    """A histogram as one line of text."""
    bars = _coarse(histogram)
    most = max(bars, default=0)
    return "".join(_BLOCKS[-(-count * len(_BLOCKS) // most) - 1] if count else " " for count in bars)


def _coarse(histogram: Mapping[str, Sequence[Any]] | None) -> list[int]:
    """Counts of at most `_COLUMNS` bins."""
    if not histogram:
        return []
    counts = np.asarray(histogram["counts"], np.int64)
    step = -(-len(counts) // _COLUMNS)
    sums: list[int] = np.add.reduceat(counts, np.arange(0, len(counts), step)).tolist()
    return sums


def _svg(histogram: Mapping[str, Sequence[Any]] | None) -> str:
    bars = _coarse(histogram)
    most = max(bars, default=0) or 1
    shapes = "".join(
        f'<rect x="{4 * place}" y="{20 - 20 * count / most:.1f}" width="3.5" height="{20 * count / most:.1f}"/>'
        for place, count in enumerate(bars)
        if count
    )
    return f'<svg width="{4 * len(bars)}" height="20" fill="#4477aa" role="img" aria-label="histogram">{shapes}</svg>'


def _label(entry: Mapping[str, Any]) -> str:
    name = entry.get("name")
    text = str(entry["value"]) if name is None else f"{entry['value']} {name}"
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH - 1]}…"


def _short(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**9 else f"{value:.5g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align columns: the first and last are left-aligned, the others are right-aligned."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
