"""Real images: parts of scikit-learn's two photographs, as pixels and as files."""

from __future__ import annotations

import functools
import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_images


@functools.cache
def _photographs() -> list[npt.NDArray[np.uint8]]:
    return list(load_sample_images().images)


def photograph(number: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """A part of a photograph, (height, width, 3), another for every number; no higher than 427, no wider than 640."""
    whole = _photographs()[number % 2]
    random = np.random.default_rng(number)
    top = int(random.integers(0, whole.shape[0] - height + 1))
    left = int(random.integers(0, whole.shape[1] - width + 1))
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


def encoded(pixels: npt.NDArray[Any] | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """An image file."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return stream.getvalue()


def endless_bmp(width: int, height: int) -> bytes:
    """Of one run for each pixel, which Pillow unpacks one by one."""
    begin = 14 + 40 + 1024
    head = b"BM" + struct.pack("<IHHI", begin + 2 * width * height, 0, 0, begin)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + bytes(1024) + b"\1\0" * (width * height)
