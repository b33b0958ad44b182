"""Resizes pixels according to an `ImageSpec`: by Pillow, by OpenCV, or by `cykooz.resizer`."""

from __future__ import annotations

import math
import threading
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from .images import ImageSpec

Pixels = npt.NDArray[np.uint8]

REDUCING = 2.0
"""A JPEG decoded at reduced size is still at least this many times as high and wide as the target."""

HALVINGS = (8, 4, 2)
"""Divisors of both sides by which a JPEG can be decoded."""

_FILTERS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def halved(height: int, width: int, spec: ImageSpec) -> int:
    """The largest divisor of both sides that still leaves enough pixels."""
    assert spec.size is not None
    scale = _scale(height, width, spec)
    high, wide = spec.size if scale is None else (height * scale, width * scale)
    return next((by for by in HALVINGS if -(-height // by) >= high and -(-width // by) >= wide), 1)


def enough(height: int, width: int, spec: ImageSpec, turned: bool) -> tuple[int, int]:
    """Width and height from which an image of this size is to be resized, if it can be decoded at a smaller scale."""
    assert spec.size is not None
    high, wide = spec.size
    if turned:
        height, width = width, height
    scale = _scale(height, width, spec)
    if scale is not None:
        high, wide = round(height * scale), round(width * scale)
    reducing = 1.0 if spec.interpolation == "linear" else REDUCING
    wanted = (math.ceil(wide * reducing), math.ceil(high * reducing))
    return wanted[::-1] if turned else wanted


def _scale(height: int, width: int, spec: ImageSpec) -> float | None:
    """The common scale factor of both sides; None if they are scaled independently."""
    assert spec.size is not None
    both = spec.size[0] / height, spec.size[1] / width
    return max(both) if spec.resize == "aspect" else min(both) if spec.resize == "pad" else None


def _box(height: int, width: int, spec: ImageSpec, scale: float | None) -> tuple[float, float, float, float]:
    """What is kept of an image: left, top, right and bottom."""
    if scale is None:
        return 0.0, 0.0, float(width), float(height)
    assert spec.size is not None
    # Crop first, to a fraction of a pixel, so that nothing is resampled and then cut off.
    left, top = (width - spec.size[1] / scale) / 2, (height - spec.size[0] / scale) / 2
    return max(0.0, left), max(0.0, top), min(width, width - left), min(height, height - top)


_resizers = threading.local()


def bilinear(pixels: Pixels, spec: ImageSpec, simd: ModuleType) -> Pixels:
    """Resize (height, width[, channels]) as `resized` does, in a third of the time."""
    assert spec.size is not None
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    high, wide = spec.size
    height, width = pixels.shape[:2]
    if (high, wide) == (height, width) or spec.resize == "none":
        return pixels
    scale = _scale(height, width, spec)
    if spec.resize != "pad":
        return _convolved(pixels, (high, wide), _box(height, width, spec, scale), simd)
    assert scale is not None
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    padded = np.zeros((high, wide, pixels.shape[2]), np.uint8)
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    whole = (0.0, 0.0, float(width), float(height))
    padded[top : top + inner[0], left : left + inner[1]] = _convolved(pixels, inner, whole, simd)
    return padded


def _convolved(
    pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float], simd: ModuleType
) -> Pixels:
    """Resize what is in a box of left, top, right and bottom."""
    height, width, channels = pixels.shape
    kind = simd.PixelType.U8x3 if channels == 3 else simd.PixelType.U8
    left, top, right, bottom = box
    # Rounding must not make the box end beyond the image.
    across, down = (
        length if start + (length := stop - start) <= side else math.nextafter(length, 0)
        for start, stop, side in ((left, right, width), (top, bottom, height))
    )
    made = simd.ImageData(size[1], size[0], kind)
    if not hasattr(_resizers, "own"):
        # One is not for several threads, and keeps its buffers for the next image.
        _resizers.own = simd.Resizer()
    options = simd.ResizeOptions(
        resize_alg=simd.ResizeAlg.convolution(simd.FilterType.bilinear), crop_box=simd.CropBox(left, top, across, down)
    )
    _resizers.own.resize(simd.ImageData(width, height, kind, pixels.tobytes()), made, options)
    return np.frombuffer(made.get_buffer(), np.uint8).reshape(*size, channels)


def linear(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Resize (height, width, channels) according to `spec`, by linear interpolation."""
    assert spec.size is not None
    high, wide = spec.size
    height, width = pixels.shape[:2]
    if (high, wide) == (height, width) or spec.resize == "none":
        return pixels
    scale = _scale(height, width, spec)
    if spec.resize == "aspect":
        assert scale is not None
        # Crop whole pixels, equally on both sides up to one pixel.
        tall, broad = (min(side, max(1, round(to / scale))) for side, to in ((height, high), (width, wide)))
        top, left = (height - tall) // 2, (width - broad) // 2
        pixels = pixels[top : top + tall, left : left + broad]
    if spec.resize != "pad":
        scaled = np.asarray(cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_LINEAR), np.uint8)
        return scaled.reshape(high, wide, -1)
    assert scale is not None
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    padded = np.zeros((high, wide, pixels.shape[2]), np.uint8)
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    inside = cv2.resize(pixels, inner[::-1], interpolation=cv2.INTER_LINEAR).reshape(*inner, -1)
    padded[top : top + inner[0], left : left + inner[1]] = inside
    return padded


def resized_pixels(image: Image.Image, spec: ImageSpec, simd: ModuleType | None) -> npt.NDArray[Any]:
    """Resize an image; returns (height, width, channels)."""
    if simd is not None and spec.interpolation == "bilinear" and spec.size is not None and image.mode in ("RGB", "L"):
        return bilinear(np.asarray(image), spec, simd)
    if spec.interpolation != "linear" or spec.size is None:
        pixels: npt.NDArray[Any] = np.asarray(resized(image, spec))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    by = halved(image.height, image.width, spec)
    reduced: npt.NDArray[Any] = np.asarray(image.reduce(by) if by > 1 else image)
    return linear(reduced if reduced.ndim == 3 else reduced[..., None], spec)


def resized(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Resize an image by Pillow, with the filter of `spec`."""
    if spec.size is None:
        return image
    high, wide = spec.size
    width, height = image.size
    method = _FILTERS[spec.interpolation]
    if (high, wide) == (height, width):
        return image
    scale = _scale(height, width, spec)
    if spec.resize != "pad":
        return image.resize((wide, high), method, box=_box(height, width, spec, scale))
    assert scale is not None
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    padded = Image.new(image.mode, (wide, high))
    padded.paste(image.resize(inner, method), ((wide - inner[0]) // 2, (high - inner[1]) // 2))
    return padded
