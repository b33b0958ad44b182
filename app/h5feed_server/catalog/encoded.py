"""How to decode a field of image files, according to the attributes of the field or to ``h5feed.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from h5feed.errors import BadParameter
from h5feed.images import Colour, ImageSpec, Interpolation, Resize
from pydantic import BaseModel, ConfigDict

ENCODINGS = ("jpeg", "png", "mixed")
"""Values of the attribute ``encoding`` of fields that hold image files."""

_COLOURS: Mapping[int, Colour] = {1: "grey", 3: "rgb", 4: "rgba"}


class DeclaredImages(BaseModel):
    """An entry of ``decode`` in ``h5feed.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, int] | tuple[int, int, int]
    resize: Resize = "aspect"
    interpolation: Interpolation = "linear"
    colour: Colour | None = None

    @property
    def spec(self) -> ImageSpec:
        """The checked specification.

        Raises
        ------
        BadParameter
            The shape and the colour do not fit together.
        """
        return _spec([*self.shape, 3] if len(self.shape) == 2 else self.shape, **self.model_dump(exclude={"shape"}))


def spec_of(attributes: Mapping[str, Any]) -> ImageSpec | None:
    """Return how to decode a field according to its attributes.

    The attributes are ``encoding``, ``shape``, ``resize``, ``interpolation`` and ``channels``. Returns None if they do
    not say that the field holds image files, or do not give a shape.

    Raises
    ------
    BadParameter
        The attributes are invalid.
    """
    shape = attributes.get("shape")
    if attributes.get("encoding") not in ENCODINGS or shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int for side in shape):
        raise BadParameter(f"its attribute shape={shape!r} must be a height, a width and a number of channels")
    colour = attributes.get("channels")
    return _spec(
        shape,
        attributes.get("resize", "aspect"),
        attributes.get("interpolation", "linear"),
        colour if colour in get_args(Colour) else None,
    )


def _spec(shape: Any, resize: Any, interpolation: Any, colour: Any) -> ImageSpec:
    height, width, channels = shape
    if channels not in _COLOURS:
        raise BadParameter(f"images of shape {list(shape)} must have 1, 3 or 4 channels")
    spec = ImageSpec((height, width), resize, interpolation, colour or _COLOURS[channels])
    if spec.channels != channels:
        raise BadParameter(f"images of shape {list(shape)} are not {colour}: that has {spec.channels} channels")
    return spec
