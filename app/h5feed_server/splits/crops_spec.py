"""Parameters of crops: samples that are parts of rows."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Self

from h5feed.crops import CropAt, crop_text, parse_crop
from pydantic import AfterValidator, BaseModel, Field, model_validator


class CropsSpec(BaseModel):
    """Which part of each row a sample has."""

    crop: Annotated[str, AfterValidator(lambda text: crop_text(parse_crop(text)))] | None = Field(
        None,
        description="Send only a part of each row, of these lengths along its first axes: `64x64` of images, "
        "`64x64x64` of volumes. Channels are not cropped. `__crop__` has the start of each part.",
        examples=[None],
    )
    crop_fields: str | None = Field(
        None,
        description="Comma-separated names of the fields to crop, all with the same part of a row. Default: all with "
        "at least so many axes, which have to agree in their lengths.",
    )
    crop_at: CropAt = Field(
        "random",
        description="Where the parts are. `random`: elsewhere for each sample and in each epoch. `center`: in the "
        "middle. `grid`: each row becomes as many samples as it takes to cover it, side by side; the last of an axis "
        "end with the row.",
    )

    @model_validator(mode="after")
    def _crops(self) -> Self:
        for name in ("crop_fields", "crop_at"):
            if getattr(self, name) != CropsSpec.model_fields[name].default and self.crop is None:
                raise ValueError(f"{name} needs crop, the size of the parts, such as crop=64x64")
        return self

    @cached_property
    def crop_lengths(self) -> tuple[int, ...] | None:
        """What ``crop`` says."""
        return None if self.crop is None else parse_crop(self.crop)
