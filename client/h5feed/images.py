"""What images are made into: plain data, which names no library that decodes them."""

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
    """What images are made into. Checks itself.

    Attributes
    ----------
    size : (int, int) or None
        Height and width; None: as they are.
    resize : {"aspect", "stretch", "pad", "none"}
        ``aspect``: the shorter side to size, then the centre is cropped; ``pad``: the longer side to size, black beside
        it; ``none``: images are taken as they are, and must be of `size` where one is given.
    interpolation : {"linear", "bilinear", "area", "bicubic", "lanczos", "nearest"}
        ``linear``: from the four pixels around each, after what is more than twice as large has been halved, in a JPEG
        by its own inverse DCT: what the loaders of TensorFlow and OpenCV do, and less than half of the work. All others
        but ``nearest`` average over all the pixels that become one, so that nothing aliases.
    colour : {"rgb", "bgr", "grey", "rgba"}
        Order of the channels.
    dtype : str
    rescale : float
        Pixels are multiplied by it, after the conversion to `dtype`, where it is not 1.
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
                raise BadParameter(
                    f"{name}={getattr(self, name)!r} is not known: valid are {', '.join(get_args(known))}"
                )
        if self.size is not None and not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in self.size):
            raise BadParameter(f"size={list(self.size)!r} must be a height and a width, of 1 … {MAX_SIDE} pixels")

    @property
    def channels(self) -> int:
        return _CHANNELS[self.colour]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image; (0, 0, channels) where all have sizes of their own."""
        return (*(self.size or (0, 0)), self.channels)

    def about(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> ImageSpec:
        """From what `about` gave.

        Raises
        ------
        BadParameter
            It is not that, or one of its values is not known here.
        """
        try:
            height, width = about["size"]
            return cls(**{**about, "size": (height, width)})
        except (KeyError, TypeError, ValueError) as error:
            raise BadParameter(f"{dict(about)!r} does not say what images are made into: {error}") from None
