"""The format of decoded images, independent of any image library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .errors import BadParameter

Resize = Literal["aspect", "stretch", "pad", "none"]
Interpolation = Literal["linear", "bilinear", "area", "bicubic", "lanczos", "nearest"]
Colour = Literal["rgb", "bgr", "grey", "rgba"]

MAX_SIDE = 1 << 14
"""Pixels."""

_CHANNELS = {"grey": 1, "rgb": 3, "bgr": 3, "rgba": 4}


@dataclass(frozen=True)
class ImageSpec:
    """The format of decoded images. Validates its values.

    Attributes
    ----------
    size : (int, int) or None
        Height and width; None: original size.
    resize : {"aspect", "stretch", "pad", "none"}
        ``aspect``: resize the shorter side, then crop the centre; ``pad``: resize the longer side, then pad with black;
        ``none``: do not resize; images must have `size` if it is given.
    interpolation : {"linear", "bilinear", "area", "bicubic", "lanczos", "nearest"}
        ``linear``: from the four neighbouring pixels. Images more than twice as large are first halved, JPEGs by their
        inverse DCT. This is what TensorFlow and OpenCV loaders do, with less than half of the work. All others except
        ``nearest`` average over all source pixels, which avoids aliasing.
    colour : {"rgb", "bgr", "grey", "rgba"}
        Order of the channels.
    dtype : str
    rescale : float
        Factor for the pixels, applied after the conversion to `dtype`, if it is not 1.
    """

    size: tuple[int, int] | None
    resize: Resize = "aspect"
    interpolation: Interpolation = "bilinear"
    colour: Colour = "rgb"
    dtype: str = "uint8"
    rescale: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("resize", Resize), ("interpolation", Interpolation), ("colour", Colour)):
            if getattr(self, name) not in get_args(known):
                raise BadParameter(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(known))}")
        if self.size is not None and not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in self.size):
            raise BadParameter(f"size={list(self.size)!r} must be a height and a width from 1 to {MAX_SIDE} pixels")

    @property
    def channels(self) -> int:
        return _CHANNELS[self.colour]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image; (0, 0, channels) if images differ in size."""
        return (*(self.size or (0, 0)), self.channels)

    def about(self) -> dict[str, Any]:
        """The format as JSON-serialisable values."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> ImageSpec:
        """The inverse of `about`.

        Raises
        ------
        BadParameter
            A value is missing or invalid.
        """
        try:
            height, width = about["size"]
            return cls(**{**about, "size": (height, width)})
        except (KeyError, TypeError, ValueError) as error:
            raise BadParameter(f"invalid image format {dict(about)!r}: {error}") from None
