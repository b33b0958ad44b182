"""Samples as pictures: conversion to 8-bit colours, scaling, contact sheets, PNG and SVG."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

MAX_SIDE = 8192
"""Maximum length of the longer side of a single picture, in pixels."""

_PAD = 2
"""Gap between the pictures of a sheet, in pixels."""

_WHITE = 255

_PIECE = 1 << 20
"""Values converted at a time, which bounds temporary arrays."""

MAX_SHEET_PIXELS = 4 << 20
"""Maximum number of pixels of all pictures of a sheet together. Above it, pictures are scaled down."""

Pixels = npt.NDArray[np.uint8]


def arranged(samples: npt.NDArray[Any], channels: str) -> npt.NDArray[Any]:
    """Move the channel axis of image samples to the end, and bring the channels into the order RGB or RGBA.

    Parameters
    ----------
    samples : (n, *sample)
    channels : str
        ``grey``, ``rgb`` or ``bgr``.

    Returns
    -------
    (n, height, width, 1, 3 or 4)
    """
    if channels != "grey" and samples.shape[-1] not in (3, 4):
        samples = np.moveaxis(samples, 1, -1)
    if samples.ndim == 3:
        samples = samples[..., None]
    if channels == "bgr":
        samples = samples[..., [2, 1, 0, *range(3, samples.shape[-1])]]
    return samples


def to_pixels(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> Pixels:
    """Convert values to 8-bit brightness, with one scale for the whole array.

    uint8, and floats from 0 to 255, are shown unchanged. Floats from 0 to 1, and bools, are multiplied by 255.
    Everything else is scaled so that the smallest value is 0 and the largest is 255. NaN and infinities are black.

    Parameters
    ----------
    values : array
    dtype : numpy dtype
        Dtype in the file. It differs from ``values.dtype`` if the values were averaged.

    Returns
    -------
    uint8 array of the same shape
    """
    if values.dtype == np.uint8 and dtype == np.uint8:
        return values
    flat = values.reshape(-1)
    pixels = np.empty(flat.shape, np.uint8)
    # Convert in pieces: the temporary arrays for all values at once would be several times as large as the result.
    pieces = [slice(begin, begin + _PIECE) for begin in range(0, flat.size, _PIECE)]
    if dtype == np.uint8:
        for piece in pieces:
            pixels[piece] = np.rint(flat[piece])
        return pixels.reshape(values.shape)
    lows, highs = zip(*(_range(flat[piece]) for piece in pieces), strict=True) if pieces else ((0.0,), (0.0,))
    low, high = min(lows), max(highs)
    if dtype.kind == "b" or (dtype.kind == "f" and low >= 0 and high <= 1):
        low, high = 0.0, 1.0
    elif dtype.kind == "f" and low >= 0 and high <= _WHITE:
        low, high = 0.0, float(_WHITE)
    for piece in pieces:
        numbers = _finite(flat[piece])
        scaled = np.rint((numbers - low) * (_WHITE / ((high - low) or 1)))
        pixels[piece] = np.where(np.isfinite(flat[piece]), scaled, 0)
    return pixels.reshape(values.shape)


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The values as float64, with 0 for NaN and infinities."""
    return np.where(np.isfinite(values), values, 0).astype(np.float64)


def _range(values: npt.NDArray[Any]) -> tuple[float, float]:
    numbers = _finite(values)
    return float(numbers.min()), float(numbers.max())


def fit(values: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Scale pictures up or down by an integer factor, so that their longer side is close to `side` but not above it.

    Enlarging repeats pixels. Reducing takes the mean of blocks of pixels.

    Parameters
    ----------
    values : (n, height, width, depth)
    side : int
        In pixels.

    Returns
    -------
    (n, new height, new width, depth)
        Of the same dtype if enlarged or unchanged, float32 if reduced.
    """
    longest = max(values.shape[1:3])
    if longest <= side:
        factor = max(1, side // longest)
        return values.repeat(factor, axis=1).repeat(factor, axis=2)
    factor = -(-longest // side)
    count, height, width, depth = values.shape
    rows, columns = max(1, height // factor), max(1, width // factor)
    tall, wide = min(factor, height), min(factor, width)
    cut = values[:, : rows * tall, : columns * wide]
    # squares: (n, rows, tall, columns, wide, depth), the blocks of pixels to average
    squares = cut.reshape(count, rows, tall, columns, wide, depth)
    means: npt.NDArray[Any] = squares.mean(axis=(2, 4), dtype=np.float32)
    return means


def side_in_sheet(side: int, count: int) -> int:
    """The longer side of each of `count` pictures on a sheet: `side`, or less if they would exceed the limit."""
    return max(1, min(side, math.isqrt(MAX_SHEET_PIXELS // max(1, count))))


def sheet(lines: Sequence[Pixels], columns: int) -> Pixels:
    """Arrange pictures in lines on a white canvas.

    Parameters
    ----------
    lines : sequence of (k, height, width, depth) uint8
        The pictures of each line; all have the same size, and k is at most `columns`.
    columns : int
        Pictures per line, which sets the width of the canvas.

    Returns
    -------
    (canvas height, canvas width, 3) uint8
    """
    height, width = lines[0].shape[1:3]
    canvas = np.full((len(lines) * (height + _PAD) - _PAD, columns * (width + _PAD) - _PAD, 3), _WHITE, dtype=np.uint8)
    for number, line in enumerate(lines):
        top = number * (height + _PAD)
        for place, picture in enumerate(line):
            left = place * (width + _PAD)
            canvas[top : top + height, left : left + width] = picture[..., :3]
    return canvas


def png(pixels: Pixels) -> bytes:
    """Encode a picture, (height, width, 1, 3 or 4) uint8, as PNG."""
    encoded = imagecodecs.png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    return bytes(encoded)


def svg(pixels: Pixels, alt: str) -> bytes:
    """Encode a picture as SVG with an embedded PNG, and with alternative text for screen readers.

    Parameters
    ----------
    pixels : (height, width, 1, 3 or 4) uint8
    alt : str
        Alternative text.
    """
    height, width = pixels.shape[:2]
    data = base64.b64encode(png(pixels)).decode()
    text = escape(alt, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{text}"><title>{text}</title>'
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/></svg>'
    ).encode()
