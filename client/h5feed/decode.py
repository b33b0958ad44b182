"""Decode image files to arrays, in the same way for servers, clients and the builder.

Pillow reads all formats, handles EXIF, and resamples. JPEGs that are resized by ``linear`` take a faster path:
libjpeg-turbo (`simplejpeg`) decodes only as much as needed, directly into an array, and OpenCV interpolates directly
into the batch, which halves the work. All of these release the GIL, so that threads use all cores, and compute in
integers.

The other resize modes decode JPEGs larger than `resizing.REDUCING` times the target at 1/2, 1/4 or 1/8 with the inverse
DCT, as Pillow's ``thumbnail`` does. On photographs, pixels differ from a full decode by less than one level on average,
and decoding is up to three times as fast.

Servers and clients resize by Pillow, exactly. A build may resize by `cykooz.resizer` instead, in a third of the time:
it is Pillow's algorithm with shorter integers, so that a pixel differs by at most one level. It is not used where the
results on two machines must be equal, because not all platforms have it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError, features

from .images import Colour, ImageSpec, Interpolation, Resize
from .resizing import HALVINGS, Pixels, bilinear, enough, halved, linear, resized, resized_pixels

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""Supported formats. Pillow knows many more, which are not used for training and would increase the attack surface."""

SERVED_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
"""Formats that a server decodes per request, without TIFF, which is a container of some twenty other formats."""

MAX_PIXELS = 1 << 28
"""Maximum number of pixels of an image: more is a decompression bomb."""

MAX_SERVED_PIXELS = 1 << 26
"""Maximum number of pixels of an image that is decoded per request."""

MAX_SCANS = 200
"""Maximum number of scans of a progressive JPEG: real ones have ten, a crafted file of a few kilobytes could have
thousands."""

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_MODES = {"rgb": "RGB", "bgr": "RGB", "grey": "L", "rgba": "RGBA"}
_ORIENTATION = 0x0112
_SPACES = {"rgb": "RGB", "bgr": "BGR", "grey": "GRAY", "rgba": "RGBA"}
_LEAST_REDUCED = 16
"""Of a smaller reduced JPEG, other scales of libjpeg-turbo may have as many pixels as the one that is meant."""

_SCAN = b"\xff\xda"
"""Marks the start of a JPEG scan; otherwise it occurs only in embedded data."""

_START_OF_BASELINE, _START_OF_SCAN, _JFIF = 0xC0, 0xDA, 0xE0
_TABLES = frozenset((0xC4, 0xDB, 0xDD, 0xFE))
"""JPEG markers of Huffman tables, quantization tables, restart intervals, and comments."""

_GOLDEN = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5a"
    "YVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAAR"
    "CAA0AEQDASIAAhEBAxEB/8QAGwAAAgIDAQAAAAAAAAAAAAAAAAYDBAIFBwH/xAAuEAACAQMDAwMDAgcAAAAAAAABAgMABBEFEiEiMUFRYXEG"
    "E5FCoRQWIzJygbH/xAAaAQACAwEBAAAAAAAAAAAAAAAFBgIDBAAH/8QAMBEAAQMCBAMHAgcAAAAAAAAAAQACAwQRBRIhMROB8CJBUWFxobEU"
    "wRVSkdHh4vH/2gAMAwEAAhEDEQA/AJ7f78BFntZri5UMmyNcbmBDM5XnPHc+RgDAOMI4onlZprfdJFMqORk5KsN7ZZe3Ixt54z25ERaSKW6i"
    "uiFGB1IGGck4YquO3B7Ej07GspZIoRNIqCSVicl2YgKwHB5xt2qoGSxzkDntG1zr321G3X6965wI2sb/AO9C1+9eXujpOxwBVNfpck5CVcst"
    "ZjZwD1N6U06fMs6jJA+KolY2k7BBcfAIPhwquLmdsk2TQ3t0yRj5rUXxa3JG78c11G7tbb7fUVGaVNU0yOUn7cefmp01RGXWkYAeZPtZM1Xj"
    "rYo8jkkLqTLIOWPwKY9H1NcruDfiqsmgSbs4C/671LFpUkHIMh+KIzNpX6ZQOQH3JWLDqeCtfnKcrfVE+0MoPzRScfvJ0/bPHvRQwYSw629v"
    "6Jk/DYBpdXdT0ggHaKV72wmiPSDkniugteQ3Bxkc1EunRXc5OAccVZh1bJTUw8ToEjVOLyyz5HbJH062mhIJyAKYbXVZoRhSQPXzTC2gK3Sq"
    "8Dv7mtRqmktEpSIc+T6VeaqGTsDQDQ+JPgOvZN1DNTthu/dYN9RLH0s2W9Kzg1gTnqcKppQv7WaB9qDLf8qK0M0UgLbmb0rSKGMM7Onp8E7k"
    "+QS5XUsdbLZhXUtOWCYDYgJ9TWxlsYWj75z4WkbT9TkhUByf8RW4H1EFXazY9l70HmpZGOszYcuuZJ8kSiwySihzNUlzpUQlOY1Hy1FVm1qM"
    "89C/JoqQbUNFrew/YIG/E6kOKSLHV5FbLE4HNNeh6ttjDMe1aFNBkCMVWraafLbqgA96JO4L4m5dwNPUm32RjDaGCrdnKfrbVYlgHI3HgVXu"
    "7mB12rgsf2pHnvpYGOSdqcVTXXZVbJY7mPFZGYXlOZh0HRI8ydAuxml4bcsRTXLpsU7bYwMnufSvI/pxcf01AHlqpaVqwYhd3A/uNOFjfQvG"
    "pbGPC+tUzvmg0Hd7dd53J0CE4XS1Mb87kqXWjtBGdg2qPPrS1qCTQZwCo8eprqV60MikZBb9lpZv9OjnYlfPnyfir6SsLT2x11/JJ0RTEMeL"
    "BwykAXE68dI9iaKbv5fA/Qo9sE0UUbXUoFiQOuXwhYnjcL2TfZW8T253KPFS3VnBkdH6aKKW6cm8fo35K2YQSI9ElaxaxCLgeaVp4EE7kZ6R"
    "x+KKKY6AkRN5fBU53OMupV2wXYIwpIB71voLqaNWZW5BwPbmiiq5wM3X5U1UrR9Pspf42fcqbunGatWdxJJhmPJOPiiiskzWhpsPH4C88xgD"
    "jpgiACAAAAe1FFFLdRI9srmtJAurI2jINF//2Q=="
)
"""A base64-encoded JPEG of 68 × 52 pixels with chroma subsampling, as most JPEGs have."""

# Pillow warns at half the size that raises an error. Suppressed globally, because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BrokenImage(ValueError):
    """The image cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    Attributes
    ----------
    pixels : (height, width, channels)
    height, width : int
        Size before resizing, in upright orientation.
    """

    pixels: npt.NDArray[Any]
    height: int
    width: int


def decode_image(
    data: bytes | memoryview,
    spec: ImageSpec,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    exact: bool = False,
) -> Decoded:
    """Decode one image, rotate it according to EXIF, resize and convert it.

    Parameters
    ----------
    data : bytes
        A complete JPEG, PNG, BMP, GIF (first frame), WebP or TIFF file.
    formats : tuple of str
        Allowed formats.
    max_pixels : int
        Maximum height × width in the header of the file.
    exact : bool
        Resize by Pillow even if `cykooz.resizer` is installed. It resizes ``bilinear`` images of 8 bits without an
        alpha channel three times as fast, and a pixel differs by at most one level.

    Raises
    ------
    BrokenImage
    """
    if not len(data):
        raise BrokenImage("it is empty")
    try:
        return _decode(data, spec, formats, max_pixels, None if exact else _simd())
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage("it is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise BrokenImage("it has far too many pixels: a decompression bomb") from None
    except MemoryError:
        raise BrokenImage("it does not fit into memory") from None
    except Exception as error:
        # Damaged files make decoders raise all kinds of exceptions.
        raise BrokenImage(str(error) or type(error).__name__) from None


def decode_into(data: bytes | memoryview, spec: ImageSpec, out: Pixels) -> None:
    """Same as `decode_image`, with the limits of a server, into an array of the shape of `spec`, (h, w, c) uint8.

    Raises
    ------
    BrokenImage
    """
    decoded = decode_image(data, spec, formats=SERVED_FORMATS, max_pixels=MAX_SERVED_PIXELS, exact=True)
    put_pixels(decoded.pixels, out)


def put_pixels(pixels: Pixels, out: Pixels) -> None:
    """Copy a decoded image to its place in a batch.

    Raises
    ------
    BrokenImage
        The shapes differ.
    """
    if pixels.shape != out.shape:
        raise BrokenImage(f"it has shape {list(pixels.shape)}, expected {list(out.shape)}")
    out[...] = pixels


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A fingerprint of the image libraries on this machine: equal if they decode to the same pixels.

    Decoders give the same results on all common machines, but this is not guaranteed.
    """
    jpeg = base64.b64decode("".join(_GOLDEN))
    lossless = io.BytesIO()
    Image.fromarray(decode_image(jpeg, ImageSpec(None)).pixels).save(lossless, "PNG", compress_level=0)
    digest = hashlib.blake2b(digest_size=8)
    specs = [ImageSpec((h, w), r, i) for h, w, r in _SAMPLED for i in get_args(Interpolation)]
    specs += [replace(specs[0], colour=colour) for colour in get_args(Colour)]
    for data in (jpeg, lossless.getvalue()):
        for spec in specs:
            digest.update(decode_image(data, spec, exact=True).pixels)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def libraries() -> str:
    """The versions of the image libraries on this machine, such as ``Pillow 12.0.0, libjpeg-turbo 3.1.2, …, x86_64``.

    A fingerprint tells decoders apart that differ in the images it samples. Two machines on which it is equal, and this
    as well, run the same code. The processor is a part of it, because libraries have other code for each.
    """
    turbo = features.version("libjpeg_turbo")
    jpeg = f"libjpeg {features.version('jpg')}" if turbo is None else f"libjpeg-turbo {turbo}"
    own = f"simplejpeg {simplejpeg.__version__}, OpenCV {cv2.__version__}"
    return f"Pillow {PIL.__version__}, {jpeg}, {own}, {platform.machine()}"


_SAMPLED: Sequence[tuple[int, int, Resize]] = ((31, 31, "aspect"), (13, 11, "stretch"), (40, 90, "pad"))


def resizer(exact: bool) -> str:
    """The library that resizes ``bilinear`` images here, and its version, such as ``Pillow 12.0.0``."""
    return f"Pillow {PIL.__version__}" if exact or _simd() is None else f"cykooz.resizer {version('cykooz.resizer')}"


@lru_cache(maxsize=1)
def _simd() -> ModuleType | None:
    """`cykooz.resizer`, where it is installed."""
    try:
        return import_module("cykooz_resizer")
    except ImportError:
        return None


def _decode(
    data: bytes | memoryview, spec: ImageSpec, formats: tuple[str, ...], max_pixels: int, simd: ModuleType | None
) -> Decoded:
    if simd is not None and "JPEG" in formats:
        plain = _plain_jpeg(data, spec, max_pixels, simd)
        if plain is not None:
            return plain
    with Image.open(io.BytesIO(data), formats=formats) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BrokenImage(f"it has {width}×{height} pixels, more than the limit of {max_pixels}")
        orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        if spec.resize == "none" and spec.size not in (None, (height, width)):
            raise BrokenImage(f"it has {height}×{width} pixels, expected {spec.size}")
        if image.format in ("JPEG", "MPO"):
            if "progressive" in image.info and bytes(data).count(_SCAN) > MAX_SCANS:
                raise BrokenImage(f"it has more than {MAX_SCANS} scans, a sign of a crafted file")
            if spec.interpolation == "linear" and spec.size is not None and image.mode in ("RGB", "L"):
                fast = _linear_jpeg(data, spec, height, width, orientation)
                if fast is not None:
                    return Decoded(_as_dtype(fast, spec, 255), height, width)
            if spec.size is not None:
                _draft(image, spec, orientation >= 5)
                if simd is not None and spec.interpolation == "bilinear" and image.mode == "RGB":
                    fast = _bilinear_jpeg(data, spec, (image.height, image.width), orientation, simd)
                    if fast is not None:
                        return Decoded(_as_dtype(fast, spec, 255), height, width)
        return Decoded(_converted(image, spec, orientation, simd), height, width)


def _converted(image: Image.Image, spec: ImageSpec, orientation: int, simd: ModuleType | None) -> npt.NDArray[Any]:
    """Convert with Pillow: orientation, size, colours and dtype."""
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN or upright.mode == "F":
        pixels = _convert_deep(upright, spec)
    else:
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        mode = _MODES[spec.colour]
        if upright.mode != mode:
            upright = upright.convert(mode)
        pixels = _as_dtype(resized_pixels(upright, spec, simd), spec, 255)
    return np.ascontiguousarray(pixels[..., ::-1] if spec.colour == "bgr" else pixels)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation: 1 is upright; from 5 on, rows and columns are swapped."""
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _linear_jpeg(data: bytes | memoryview, spec: ImageSpec, height: int, width: int, orientation: int) -> Pixels | None:
    """The fast path for JPEGs; None if libjpeg-turbo reports an error, which Pillow may handle better."""
    by = halved(height, width, spec)
    high, wide = (width, height) if orientation >= 5 else (height, width)
    try:
        pixels = simplejpeg.decode_jpeg(data, _SPACES[spec.colour], min_height=-(-high // by), min_width=-(-wide // by))
    except ValueError:
        return None
    return linear(_turned(pixels, orientation), spec)


def _bilinear_jpeg(
    data: bytes | memoryview, spec: ImageSpec, drafted: tuple[int, int], orientation: int, simd: ModuleType
) -> Pixels | None:
    """A JPEG of three colours without Pillow's copies of its pixels; None for what Pillow may handle better.

    `drafted` is the height and width to decode to. Grey is computed from the colours, as Pillow does.
    """
    height, width = drafted
    if spec.colour not in ("rgb", "bgr") or min(height, width) < _LEAST_REDUCED:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, _SPACES[spec.colour], min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return bilinear(_turned(pixels, orientation), spec, simd)


def _plain_jpeg(data: bytes | memoryview, spec: ImageSpec, max_pixels: int, simd: ModuleType) -> Decoded | None:
    """The same without Pillow's headers, which take as long as the resizing; None for what is not that simple."""
    if spec.interpolation != "bilinear" or spec.size is None or spec.colour not in ("rgb", "bgr"):
        return None
    frame = _frame(data)
    if frame is None or frame[0] * frame[1] > max_pixels or (spec.resize == "none" and spec.size != frame):
        return None
    height, width = frame
    wide, high = enough(height, width, spec, False)
    times = min(width // wide, height // high)
    # As `Image.draft` does.
    by = next((by for by in HALVINGS if times >= by), 1)
    pixels = _bilinear_jpeg(data, spec, (-(-height // by), -(-width // by)), 1, simd)
    return None if pixels is None else Decoded(_as_dtype(pixels, spec, 255), height, width)


def _frame(data: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width of a baseline JFIF file of three colours, which has no EXIF, no colour profile and nothing else
    that Pillow takes into account; None of any other file. See ITU-T T.81, annex B."""
    at, frame, is_jfif = 2, None, False
    try:
        while at + 4 <= len(data):
            start, marker, length = struct.unpack_from(">BBH", data, at)
            if start != 0xFF or length < 2 or at + 2 + length > len(data):
                return None
            if marker == _START_OF_SCAN:
                return frame if is_jfif and bytes(data[:2]) == b"\xff\xd8" else None
            if marker == _START_OF_BASELINE:
                bits, height, width, colours = struct.unpack_from(">BHHB", data, at + 4)
                if frame is not None or bits != 8 or colours != 3 or not height or not width:
                    return None
                frame = height, width
            elif marker == _JFIF:
                is_jfif = bytes(data[at + 4 : at + 9]) == b"JFIF\0"
                if not is_jfif:
                    return None
            elif marker not in _TABLES:
                return None
            at += 2 + length
    except struct.error:
        pass
    return None


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate pixels to upright orientation."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    # The axes that are reversed, according to the EXIF specification.
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::down, ::across])


def _draft(image: Image.Image, spec: ImageSpec, turned: bool) -> None:
    """Let libjpeg decode no more than needed."""
    image.draft(None, enough(image.height, image.width, spec, turned))


def _convert_deep(image: Image.Image, spec: ImageSpec) -> npt.NDArray[Any]:
    """Convert 16 or 32-bit grey images, which Pillow would clip at 255 instead of scaling."""
    values = np.asarray(image, np.float32)
    if image.mode == "I" and values.size and values.max() > 65535:
        raise BrokenImage("it has grey values above 65,535")
    grey = np.asarray(resized(Image.fromarray(values), spec))
    if image.mode == "F":
        # Float images have no defined range.
        whole = np.dtype(spec.dtype).kind in "iu"
        if whole and grey.size and not (grey.min() >= 0 and grey.max() <= np.iinfo(spec.dtype).max):
            raise BrokenImage(f"its float values are out of range for {spec.dtype}: use dtype float32")
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
    """Convert pixels with maximum `white` to the dtype of `spec`; floats keep the range of 8 bits."""
    dtype = np.dtype(spec.dtype)
    if dtype == pixels.dtype and spec.rescale == 1.0:
        return pixels
    top = 65535 if dtype == np.uint16 else 255
    wide = pixels.astype(np.float64) * (top / white) if top != white else pixels
    return (wide * spec.rescale).astype(dtype) if dtype.kind == "f" else np.rint(wide).astype(dtype)
