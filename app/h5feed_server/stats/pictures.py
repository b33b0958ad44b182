"""Samples as pictures: 8-bit colours as screens show them, PNG, sheets of many."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

MAX_SIDE = 8192
"""Pixels: pictures are made smaller than that."""

_PAD = 2
"""Pixels between the pictures of a sheet."""

_WHITE = 255

Pixels = npt.NDArray[np.uint8]


def arranged(samples: npt.NDArray[Any], channels: str) -> npt.NDArray[Any]:
    """Samples as (n, height, width, 1, 3 or 4), red first.

    Parameters
    ----------
    samples : (n, *sample)
    channels : str
        ``grey``, ``rgb`` or ``bgr``.
    """
    if channels != "grey" and samples.shape[-1] not in (3, 4):
        samples = np.moveaxis(samples, 1, -1)
    if samples.ndim == 3:
        samples = samples[..., None]
    if channels == "bgr":
        samples = samples[..., [2, 1, 0, *range(3, samples.shape[-1])]]
    return samples


def to_pixels(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> Pixels:
    """Numbers as brightness, all on one scale.

    uint8 is shown as it is, as are floats from 0 to 255; floats from 0 to 1 and bools are scaled; anything else is
    stretched from its least to its greatest value. NaN and infinities are black.

    Parameters
    ----------
    values : array
    dtype : numpy dtype
        That they had in the file.
    """
    if dtype == np.uint8 or not values.size:
        return np.asarray(np.rint(values), np.uint8)
    finite = np.isfinite(values)
    numbers = np.where(finite, values, 0).astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if dtype.kind == "b" or (dtype.kind == "f" and low >= 0 and high <= 1):
        low, high = 0.0, 1.0
    elif dtype.kind == "f" and low >= 0 and high <= _WHITE:
        low, high = 0.0, float(_WHITE)
    scaled = (numbers - low) * (_WHITE / ((high - low) or 1))
    return np.asarray(np.where(finite, np.rint(scaled), 0), np.uint8)


def fit(values: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Pictures scaled by a whole factor, or its inverse, so that their longer side is about `side` and not above it.

    Enlarged, a pixel becomes a square; reduced, squares become their mean.

    Parameters
    ----------
    values : (n, height, width, depth)
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
    # squares: (n, rows, tall, columns, wide, depth)
    squares = cut.reshape(count, rows, tall, columns, wide, depth)
    means: npt.NDArray[Any] = squares.mean(axis=(2, 4), dtype=np.float32)
    return means


def sheet(lines: Sequence[Pixels], columns: int) -> Pixels:
    """Lines of pictures, one below the other, on white.

    Parameters
    ----------
    lines : sequence of (k, height, width, depth) uint8
        All of one size; k is `columns` at most.

    Returns
    -------
    (height, width, 3) uint8
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
    """One picture, (height, width, 1, 3 or 4) uint8."""
    encoded = imagecodecs.png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    return bytes(encoded)


def svg(pixels: Pixels, alt: str) -> bytes:
    """One picture as SVG, with a text for those who do not see it."""
    height, width = pixels.shape[:2]
    data = base64.b64encode(png(pixels)).decode()
    text = escape(alt, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{text}"><title>{text}</title>'
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/></svg>'
    ).encode()
