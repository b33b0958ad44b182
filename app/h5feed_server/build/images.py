"""From the bytes of an image file to an array: one way, for building, for local loading and for tests.

Pillow decodes every format (its wheels bring libjpeg-turbo) and resamples; both release the GIL, so threads use all
cores. JPEGs of more than `REDUCING` times the size are decoded at 1/2, 1/4 or 1/8 by the inverse DCT itself, which is
what Pillow's ``thumbnail`` does: on photographs the pixels differ from those of a full decode by less than one level in
the mean, and decoding is up to three times as fast.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .options import BuildOptions, Colour, Interpolation, Resize

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Files that are taken for images."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""Formats that are decoded: Pillow knows many more, which nobody trains on and which widen what a file may attack."""

REDUCING = 2.0
"""A JPEG that is decoded reduced is still at least so many times as high and wide as what it is resampled to."""

MAX_PIXELS = 1 << 28
"""Pixels of an image that is decoded: more is a decompression bomb."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_MODES = {"rgb": "RGB", "bgr": "RGB", "grey": "L", "rgba": "RGBA"}


class BrokenImage(ValueError):
    """It cannot be decoded; says why."""


@dataclass(frozen=True)
class ImageSpec:
    """What images are made into.

    Attributes
    ----------
    size : (int, int) or None
        Height and width; None: as they are.
    rescale : float
        Pixels are multiplied by it, after the conversion to `dtype`, where it is not 1.
    """

    size: tuple[int, int] | None
    resize: Resize = "aspect"
    interpolation: Interpolation = "bilinear"
    colour: Colour = "rgb"
    dtype: str = "uint8"
    rescale: float = 1.0

    @classmethod
    def of(cls, options: BuildOptions) -> ImageSpec:
        size = None if options.resize == "none" else options.size
        dtype = options.dtype or "uint8"
        return cls(size, options.resize, options.interpolation, options.colour, dtype, options.rescale)

    @property
    def channels(self) -> int:
        return {"grey": 1, "rgba": 4}.get(self.colour, 3)


@dataclass(frozen=True)
class Decoded:
    """An image.

    Attributes
    ----------
    pixels : (height, width, channels)
    height, width : int
        Of the file, turned upright, before resizing.
    """

    pixels: npt.NDArray[Any]
    height: int
    width: int


def decode_image(data: bytes | memoryview, spec: ImageSpec) -> Decoded:
    """Decode, turn upright as EXIF says, resize and convert one image.

    Parameters
    ----------
    data : bytes
        A whole JPEG, PNG, BMP, GIF (its first frame), WebP or TIFF file.

    Raises
    ------
    BrokenImage
    """
    if not len(data):
        raise BrokenImage("it is empty")
    try:
        return _decode(data, spec)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage("it is no image of a format that is known") from None
    except Image.DecompressionBombError:
        raise BrokenImage("it has far too many pixels: a decompression bomb") from None
    except MemoryError:
        raise BrokenImage("it does not fit into memory") from None
    except Exception as error:
        # Decoders of damaged files raise whatever they stumble over.
        raise BrokenImage(str(error) or type(error).__name__) from None


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width of the upright image, from its header alone.

    Raises
    ------
    BrokenImage
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            return (width, height) if _turned(image) else (height, width)
    except Exception as error:
        raise BrokenImage(str(error) or type(error).__name__) from None


def _decode(data: bytes | memoryview, spec: ImageSpec) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BrokenImage(f"it has {width}×{height} pixels, more than the {MAX_PIXELS} that are decoded")
        turned = _turned(image)
        if image.format in ("JPEG", "MPO") and spec.size is not None:
            _draft(image, spec, turned)
        upright: Image.Image = image
        if image.getexif().get(0x0112, 1) != 1:
            upright = ImageOps.exif_transpose(image)
        if turned:
            width, height = height, width
        if upright.mode in _SIXTEEN or upright.mode == "F":
            pixels = _convert_deep(upright, spec)
        else:
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            mode = _MODES[spec.colour]
            if upright.mode != mode:
                upright = upright.convert(mode)
            pixels = np.asarray(_resized(upright, spec))
            pixels = _as_dtype(pixels if pixels.ndim == 3 else pixels[..., None], spec, 255)
        if spec.colour == "bgr":
            pixels = pixels[..., ::-1]
        return Decoded(np.ascontiguousarray(pixels), height, width)


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says that the file's rows are columns."""
    return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _draft(image: Image.Image, spec: ImageSpec, turned: bool) -> None:
    """Have libjpeg decode no more than what is needed."""
    assert spec.size is not None
    high, wide = spec.size
    width, height = image.size[::-1] if turned else image.size
    scale = _scale(height, width, spec)
    if scale is not None:
        high, wide = round(height * scale), round(width * scale)
    wanted = (math.ceil(wide * REDUCING), math.ceil(high * REDUCING))
    image.draft(None, wanted[::-1] if turned else wanted)


def _scale(height: int, width: int, spec: ImageSpec) -> float | None:
    """By what both sides are multiplied; None where each has its own."""
    assert spec.size is not None
    both = spec.size[0] / height, spec.size[1] / width
    return max(both) if spec.resize == "aspect" else min(both) if spec.resize == "pad" else None


def _resized(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if spec.size is None:
        return image
    high, wide = spec.size
    width, height = image.size
    method = _FILTERS[spec.interpolation]
    if (high, wide) == (height, width):
        return image
    if spec.resize == "stretch":
        return image.resize((wide, high), method)
    scale = _scale(height, width, spec)
    assert scale is not None
    if spec.resize == "aspect":
        # The crop first, to a fraction of a pixel: nothing is resampled that is cut off afterwards.
        left, top = (width - wide / scale) / 2, (height - high / scale) / 2
        box = (max(0.0, left), max(0.0, top), min(width, width - left), min(height, height - top))
        return image.resize((wide, high), method, box=box)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    padded = Image.new(image.mode, (wide, high))
    padded.paste(image.resize(inner, method), ((wide - inner[0]) // 2, (high - inner[1]) // 2))
    return padded


def _convert_deep(image: Image.Image, spec: ImageSpec) -> npt.NDArray[Any]:
    """Grey of 16 or 32 bits, which Pillow would cut off at 255 rather than scale."""
    values = np.asarray(image, np.float32)
    if image.mode == "I" and values.size and values.max() > 65535:
        raise BrokenImage("it has grey values above 65,535")
    grey = np.asarray(_resized(Image.fromarray(values), spec))
    if image.mode == "F":
        # Floats have no range of their own.
        whole = np.dtype(spec.dtype).kind in "iu"
        if whole and grey.size and not (grey.min() >= 0 and grey.max() <= np.iinfo(spec.dtype).max):
            raise BrokenImage(f"its float values do not fit into {spec.dtype}: use dtype float32")
        grey = (grey.round() if whole else grey).astype(spec.dtype)
        grey = grey if spec.rescale == 1.0 else (grey * spec.rescale).astype(spec.dtype)
    else:
        grey = _as_dtype(grey, spec, 65535)
    if spec.colour == "grey":
        return grey[..., None]
    pixels = np.repeat(grey[..., None], spec.channels, axis=-1)
    if spec.colour == "rgba":
        pixels[..., 3] = _as_dtype(np.full(1, 255, np.float32), spec, 255)[0]
    return pixels


def _as_dtype(pixels: npt.NDArray[Any], spec: ImageSpec, white: int) -> npt.NDArray[Any]:
    """Pixels of which `white` is the brightest, in the dtype that is wanted: floats keep the range of 8 bits."""
    dtype = np.dtype(spec.dtype)
    if dtype == pixels.dtype and spec.rescale == 1.0:
        return pixels
    top = 65535 if dtype == np.uint16 else 255
    wide = pixels.astype(np.float64) * (top / white) if top != white else pixels
    return (wide * spec.rescale).astype(dtype) if dtype.kind == "f" else np.rint(wide).astype(dtype)
