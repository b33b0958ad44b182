"""What images are made into when they are built; `h5feed.decode` decodes them."""

from __future__ import annotations

from h5feed.decode import BrokenImage, Decoded, decode_image
from h5feed.images import ImageSpec

from .options import BuildOptions

__all__ = ["SUFFIXES", "UNREAD_SUFFIXES", "BrokenImage", "Decoded", "ImageSpec", "decode_image", "image_spec"]

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Files that are taken for images."""


def image_spec(options: BuildOptions) -> ImageSpec:
    """What the options make of images."""
    size = None if options.resize == "none" else options.size
    return ImageSpec(
        size, options.resize, options.resampling, options.colour, options.dtype or "uint8", options.rescale
    )


UNREAD_SUFFIXES = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".tga",
    ".ppm",
)
"""Files that are images, too, but none that are decoded here."""
