"""Samples that are no photographs as pictures: signals as lines, points as dots, numbers as colours, masks over images.

What is drawn has no background of its own, and suits a light page as well as a dark one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from .pictures import Pixels

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""

MAX_LINES = 12
"""Channels of a signal that are drawn."""

MAX_DOTS = 4000
"""Points of a sample that are drawn, evenly spread over all of them."""

_MARGIN = 4
_LABEL_WIDTH, _LABEL_HEIGHT = 58, 16
"""Pixels beside and below a labelled drawing."""

_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)
"""Colours of matplotlib's scale of that name, evenly spaced."""

_OPACITY = 0.55
"""Of a mask over an image."""

_INK = "#808080"


def lines(
    values: npt.NDArray[Any], width: int, height: int, alt: str, first: int = 0, *, labelled: bool = False
) -> bytes:
    """A signal as an SVG with a line for each channel. Where samples lie closer than pixels, the extremes are drawn.

    Parameters
    ----------
    values : (n, channels)
    first : int
        Number of the first sample, for the labels.
    """
    numbers = values[:, :MAX_LINES].astype(np.float64)
    finite = np.isfinite(numbers)
    low = float(numbers[finite].min()) if finite.any() else 0.0
    high = float(numbers[finite].max()) if finite.any() else 0.0
    left = _LABEL_WIDTH if labelled else _MARGIN
    wide, tall = width - left - _MARGIN, height - 2 * _MARGIN - (_LABEL_HEIGHT if labelled else 0)
    drawn = []
    for number in range(numbers.shape[1]):
        places, line = _extremes(numbers[:, number], wide)
        x = left + places * (wide / max(1, len(numbers) - 1))
        y = _MARGIN + (high - line) * (tall / ((high - low) or 1)) if high > low else np.full(len(line), height / 2)
        colour = COLOURS[number % len(COLOURS)]
        # A value that is not finite is a gap.
        gaps = np.flatnonzero(~np.isfinite(line))
        for part in np.split(np.arange(len(line)), gaps):
            part = part[np.isfinite(line[part])]
            if len(part):
                points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[part].tolist(), y[part].tolist(), strict=True))
                shape = f'<polyline fill="none" stroke="{colour}" stroke-width="1.3" points="{points}"/>'
                drawn.append(shape if len(part) > 1 else _dot(float(x[part[0]]), float(y[part[0]]), colour))
    if labelled:
        last = first + max(0, len(numbers) - 1)
        drawn.append(_frame(left, _MARGIN, wide, tall))
        drawn.append(_text(left - 4, _MARGIN + 9, f"{high:.4g}", "end"))
        drawn.append(_text(left - 4, _MARGIN + tall, f"{low:.4g}", "end"))
        drawn.append(_text(left, height - 4, f"{first:,}", "start"))
        drawn.append(_text(left + wide, height - 4, f"{last:,}", "end"))
    return _svg(width, height, alt, drawn)


def scatter(points: npt.NDArray[Any], side: int, alt: str) -> bytes:
    """Points, (n, 2 or 3), as an SVG: the first two numbers of each are its place, the third is its colour."""
    numbers = points.astype(np.float64)
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    if len(numbers) > MAX_DOTS:
        numbers = numbers[np.linspace(0, len(numbers) - 1, MAX_DOTS).astype(np.int64)]
    if not len(numbers):
        return _svg(side, side, alt, [])
    low, high = numbers.min(axis=0), numbers.max(axis=0)
    # One scale for both: shapes keep their proportions.
    span = float(max(high[:2] - low[:2])) or 1.0
    room = side - 4 * _MARGIN
    x = 2 * _MARGIN + room / 2 + (numbers[:, 0] - (low[0] + high[0]) / 2) * (room / span)
    y = 2 * _MARGIN + room / 2 - (numbers[:, 1] - (low[1] + high[1]) / 2) * (room / span)
    depth = numbers[:, 2] if numbers.shape[1] > 2 else None
    colours = [COLOURS[0]] * len(numbers) if depth is None else [_hex(rgb) for rgb in coloured(depth)]
    radius = max(0.8, min(3.0, side / 80)) if len(numbers) < 200 else max(0.6, side / 250)
    return _svg(
        side,
        side,
        alt,
        [_dot(a, b, colour, radius) for a, b, colour in zip(x.tolist(), y.tolist(), colours, strict=True)],
    )


def coloured(values: npt.NDArray[Any]) -> Pixels:
    """Numbers as colours from dark blue, the least, to yellow, the greatest: (*shape, 3). NaN is grey."""
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    low = float(numbers[finite].min()) if finite.any() else 0.0
    high = float(numbers[finite].max()) if finite.any() else 0.0
    place = np.where(finite, numbers - low, 0) * ((len(_VIRIDIS) - 1) / ((high - low) or 1))
    step = np.minimum(place.astype(np.int64), len(_VIRIDIS) - 2)
    within = (place - step)[..., None]
    mixed = _VIRIDIS[step] * (1 - within) + _VIRIDIS[step + 1] * within
    mixed[~finite] = 128
    pixels: Pixels = np.rint(mixed).astype(np.uint8)
    return pixels


def by_class(mask: npt.NDArray[Any]) -> Pixels:
    """Whole numbers as colours, each another: (height, width, 3). 0 is black."""
    palette = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in COLOURS], np.uint8)
    whole = mask.astype(np.int64)
    pixels = palette[(whole - 1) % len(palette)]
    pixels[whole == 0] = 0
    return pixels


def overlaid(image: Pixels, mask: npt.NDArray[Any]) -> Pixels:
    """A mask over an image, (height, width, 1, 3 or 4), of the same size, as (height, width, 3). 0 is clear."""
    base = np.broadcast_to(image[..., :1], (*image.shape[:2], 3)) if image.shape[-1] == 1 else image[..., :3]
    covered = (mask.astype(np.int64) != 0)[..., None]
    mixed = base.astype(np.float64) * (1 - _OPACITY) + by_class(mask).astype(np.float64) * _OPACITY
    return np.where(covered, np.rint(mixed).astype(np.uint8), base)


def slices(volume: npt.NDArray[Any], at: Sequence[int | None] = (None, None, None)) -> list[npt.NDArray[Any]]:
    """Three slices of a volume, across its first, second and third axis; through the middle where `at` is None."""
    places = [
        length // 2 if place is None else min(place, length - 1) for place, length in zip(at, volume.shape, strict=True)
    ]
    return [volume[places[0]], volume[:, places[1]], volume[:, :, places[2]]]


def side_by_side(pictures: Sequence[Pixels], gap: int = 4) -> Pixels:
    """Pictures of any size in a line, top to top, with nothing between them: (height, width, 4)."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    canvas = np.zeros((height, width, 4), np.uint8)
    left = 0
    for picture in pictures:
        tall, wide = picture.shape[:2]
        canvas[:tall, left : left + wide, :3] = picture[..., :3]
        canvas[:tall, left : left + wide, 3] = picture[..., 3] if picture.shape[-1] == 4 else 255
        left += wide + gap
    return canvas


def in_a_line(drawings: Sequence[bytes], gap: int = 4) -> bytes:
    """Drawings of `lines` or `scatter`, of one size, side by side."""
    sizes = [re.search(rb'width="(\d+)" height="(\d+)"', drawing) for drawing in drawings]
    width, height = (int(part) for part in sizes[0].groups()) if sizes and sizes[0] else (1, 1)
    parts = [
        drawing.decode().replace("<svg ", f'<svg x="{number * (width + gap)}" ', 1)
        for number, drawing in enumerate(drawings)
    ]
    return _svg(len(drawings) * (width + gap) - gap, height, "", parts)


def _extremes(values: npt.NDArray[np.float64], width: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Places and values of a line of about so many pixels: all of a short one, else least and greatest per pixel."""
    count = len(values)
    if count <= 2 * width:
        return np.arange(count), values
    starts = np.unique(np.linspace(0, count, width, endpoint=False).astype(np.int64))
    pairs = np.stack([np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)], axis=1)
    return np.repeat(starts, 2), pairs.reshape(-1)


def _dot(x: float, y: float, colour: str, radius: float = 1.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"/>'


def _frame(left: float, top: float, width: float, height: float) -> str:
    place = f'x="{left}" y="{top}" width="{width}" height="{height}"'
    return f'<rect {place} fill="none" stroke="{_INK}" stroke-opacity=".4"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{_INK}" font-size="11" font-family="sans-serif" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _hex(colour: Pixels) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour.tolist())


def _svg(width: int, height: int, alt: str, parts: Sequence[str]) -> bytes:
    text = escape(alt, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{text}"><title>{text}</title>{"".join(parts)}</svg>'
    ).encode("utf-8", "replace")
