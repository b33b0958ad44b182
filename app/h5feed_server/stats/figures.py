"""Plots of statistics, as PNG or SVG, with alternative text. Needs matplotlib, which no other module imports."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..sharing.slots import Slots
from .pictures import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PlotFormat = Literal["png", "svg"]

MAX_BARS = 40
"""Maximum number of classes drawn. If there are more, the most frequent are drawn."""

MAX_PANELS = 16
"""Maximum number of features of a flat sample drawn."""

_NAMED = 12
"""Maximum number of classes or channels listed in the alternative text."""

_DOTS = 110
"""Resolution, in dots per inch."""

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which is colour-blind safe."""

_CHANNEL_COLOURS = {"R": "#d62f2f", "G": "#2f9e44", "B": "#2f6fd6", "A": "#777777"}

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    # Show names literally: "$" would start a formula.
    "text.parse_math": False,
    # Makes the bytes of an SVG reproducible.
    "svg.hashsalt": "h5feed",
}

_PATIENCE_SECONDS = 20.0
"""How long a request waits for its turn to draw."""

# matplotlib's settings and font caches are global to the process, so only one thread draws at a time.
_drawing = Slots(1, _PATIENCE_SECONDS, "the threads that draw plots")


def draw_classes(
    dataset: str, splits: Mapping[str, Mapping[str, Any]], where: str, form: PlotFormat | None
) -> tuple[bytes, str]:
    """Draw the share of each class in each split, as horizontal bars.

    Parameters
    ----------
    dataset : str
        Its name, for the title.
    splits : mapping of str to mapping
        ``rows`` and ``classes`` of each split, as in the API's responses.
    where : str
        The filter, as `FilteredSpec.where_text` has it.
    form : str or None
        None: only the text, no picture.

    Returns
    -------
    picture : bytes
        Empty if `form` is None.
    alt : str
        Alternative text with the same content.

    Raises
    ------
    Overloaded, QueueFull
        Other threads are drawing.
    """
    total: dict[str, int] = {}
    for split in splits.values():
        for entry in split["classes"]:
            total[_name(entry)] = total.get(_name(entry), 0) + entry["rows"]
    names = list(total)
    if len(names) > MAX_BARS:
        names = sorted(names, key=lambda name: -total[name])[:MAX_BARS]
    shares = {split: {_name(entry): entry["share"] for entry in report["classes"]} for split, report in splits.items()}
    said = [
        f"{split}, {report['rows']:,} rows: {_listed([f'{name} {shares[split].get(name, 0):.1%}' for name in names])}"
        for split, report in splits.items()
    ]
    shown = f", {len(names)} of {len(total)} classes" if len(names) < len(total) else ""
    alt = f"Class balance of {dataset}{where}{shown}. {'; '.join(said)}."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        thickness = 0.8 / len(splits)
        places = np.arange(len(names))
        for number, (split, report) in enumerate(splits.items()):
            axes.barh(
                places + (number - (len(splits) - 1) / 2) * thickness,
                [100 * shares[split].get(name, 0) for name in names],
                thickness * 0.92,
                color=_COLOURS[number % len(_COLOURS)],
                label=f"{split} ({report['rows']:,} rows)",
            )
        axes.set_yticks(places, [cut(name) for name in names])
        axes.invert_yaxis()
        axes.margins(y=0.02)
        axes.set_xlabel("share of the split's rows, %")
        axes.set_title(f"{dataset}: class balance{cut(where, 60)}{shown}")
        figure.legend(loc="outside lower left", ncols=4, frameon=False)

    height = 1.3 + len(names) * max(0.26, 0.13 * len(splits))
    return _render(draw, (6.4, height), alt, form), alt


def draw_histogram(dataset: str, report: Mapping[str, Any], where: str, form: PlotFormat | None) -> tuple[bytes, str]:
    """Draw the histogram of a field, per channel. Other arguments, results and errors are those of `draw_classes`.

    Parameters
    ----------
    report : mapping
        The API's response for the field, with a histogram.
    """
    parts: Sequence[Mapping[str, Any]] = report["channels"] or [{**report, "name": "all values"}]
    parts = [part for part in parts if part["histogram"]]
    said = _listed(
        [
            f"{part['name']}: mean {_number(part['mean'])}, standard deviation {_number(part['std'])}, "
            f"range {_number(part['min'])} to {_number(part['max'])}"
            for part in parts
        ],
        "; ",
    )
    split = f"split {report['split']}"
    title = f"{dataset}: {report['field']}, {split}{cut(where, 60)}"
    alt = f"Histogram of {report['field']} of {dataset}, {split}{where}, {report['rows']:,} rows. {said}."
    coloured = all(part["name"] in _CHANNEL_COLOURS for part in parts)
    panels = parts[:MAX_PANELS]
    columns = 1 if coloured else min(4, len(panels))
    lines = 1 if coloured else -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
        for number, part in enumerate(panels):
            axes = grid[0 if coloured else number]
            colour = _CHANNEL_COLOURS.get(part["name"], _COLOURS[0])
            edges, counts = _smooth(part["histogram"]["edges"], part["histogram"]["counts"])
            label = f"{part['name']}  mean {_number(part['mean'])}, std {_number(part['std'])}"
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.3 if coloured else 0.75, label=label)
            if coloured:
                axes.stairs(counts, edges, color=colour, linewidth=1)
            elif len(panels) > 1:
                axes.set_title(label, fontsize=8)
            if _is_steep(counts):
                axes.set_yscale("log")
                # By default, these are formulas.
                axes.yaxis.set_major_formatter(lambda count, place: f"{count:g}")
            axes.margins(x=0.01)
        for axes in grid[len(panels) if not coloured else 1 :]:
            axes.set_axis_off()
        grid[0].set_ylabel("values")
        more = f" ({len(panels)} of {len(parts)} features)" if len(panels) < len(parts) else ""
        figure.suptitle(title + more, x=0.01, ha="left", fontsize=10)
        if coloured or len(panels) == 1:
            figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)

    size = (6.4, 3.4) if coloured or len(panels) == 1 else (2.4 * columns + 0.6, 1.9 * lines + 0.5)
    return _render(draw, size, alt, form), alt


def draw_picture(title: str, pixels: Pixels, alt: str, form: PlotFormat | None, lines: Sequence[str] = ()) -> bytes:
    """Draw a picture, pixel by pixel, below a title. Errors are those of `draw_classes`.

    Parameters
    ----------
    title : str
    pixels : (height, width, 1, 3 or 4) uint8
    alt : str
        Alternative text.
    form : str or None
        None: draw nothing and return empty bytes.
    lines : sequence of str
        Names of the picture's lines, which have equal heights. They are written to the left of the lines.
    """
    height, width = pixels.shape[:2]

    def draw(figure: Figure) -> None:
        left = margins[0]
        box = (left / total[0], 0.08 / total[1], width / _DOTS / total[0], height / _DOTS / total[1])
        axes: Axes = figure.add_axes(box)
        axes.imshow(pixels, interpolation="none", aspect="auto")
        axes.set_axis_off()
        figure.text(0.08 / total[0], 1 - 0.08 / total[1], title, va="top", fontsize=10)
        for number, name in enumerate(lines):
            middle = (0.08 + (1 - (number + 0.5) / len(lines)) * height / _DOTS) / total[1]
            figure.text((left - 0.08) / total[0], middle, cut(name), ha="right", va="center")

    longest = max((len(cut(name)) for name in lines), default=0)
    margins = (0.16 + 0.075 * longest if lines else 0.08, 0.34)
    total = (max(margins[0] + width / _DOTS + 0.08, 0.2 + 0.085 * len(title)), margins[1] + height / _DOTS + 0.08)
    return _render(draw, total, alt, form, constrained=False)


def _render(
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    alt: str,
    form: PlotFormat | None,
    *,
    constrained: bool = True,
) -> bytes:
    """Render a figure, with `alt` as alternative text in the file.

    Parameters
    ----------
    draw : callable
        Draws into the empty figure.
    size : (float, float)
        Width and height in inches.
    form : str or None
        None: draw nothing and return empty bytes.
    constrained : bool
        Use matplotlib's constrained layout.

    Raises
    ------
    Overloaded, QueueFull
        Other threads are drawing.
    """
    if form is None:
        return b""
    with _drawing.acquire():
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            # A name may be in a script that matplotlib has no font for. Viewers of an SVG use their own fonts.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure = Figure(figsize=size, dpi=_DOTS, layout="constrained" if constrained else None)
            draw(figure)
            stream = io.BytesIO()
            # Leave out the date and the version, so that the same figure gives the same bytes.
            metadata: dict[str, Any] = {"Date": None} if form == "svg" else {"Software": None, "Description": alt}
            figure.savefig(stream, format=form, metadata=metadata)
    return _described(stream.getvalue(), alt) if form == "svg" else stream.getvalue()


def _described(svg: bytes, alt: str) -> bytes:
    """Add alternative text to an SVG, for screen readers."""
    text = escape(alt, quote=True)
    element = re.search(r"<svg\b[^>]*>", svg.decode())
    assert element is not None
    opening = element[0][:-1] + f' role="img" aria-label="{text}"><title>{text}</title>'
    return svg.decode().replace(element[0], opening, 1).encode()


def _is_steep(counts: Sequence[int]) -> bool:
    """Whether one bin is so high that the others would be invisible next to it."""
    there = sorted(count for count in counts if count)
    return len(there) > 2 and there[-1] > 20 * there[len(there) // 2]


def _smooth(edges: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[int]]:
    """Merge bins in pairs if there are few values or few distinct ones, which would show only noise or thin lines."""
    edges, counts = list(map(float, edges)), list(counts)
    while len(counts) > 32 and (sum(counts) < 50 * len(counts) or 2 * np.count_nonzero(counts) < len(counts)):
        if len(counts) % 2:
            counts.append(0)
            edges.append(2 * edges[-1] - edges[-2])
        edges, counts = edges[::2], [first + second for first, second in zip(counts[::2], counts[1::2], strict=True)]
    return edges, counts


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["value"]) if entry.get("name") is None else str(entry["name"])


def cut(text: str, chars: int = 24) -> str:
    """The text, or its beginning if it is longer than that."""
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return separator.join(items[:_NAMED]) + more
