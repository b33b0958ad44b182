"""Parameters for rows of different lengths: cut them, put similar lengths together, or pack several into one row."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

MAX_BUCKET = 1 << 20
"""Samples of a bucketing window, which are sorted together."""

MAX_PACK = 1 << 24
"""Items of a packed row."""


class RaggedSpec(BaseModel):
    """How lists and text are cut, bucketed or packed."""

    pad: str | None = Field(
        None,
        description="With `max_length`: comma-separated names of the lists and text to cut. The client pads them to "
        "this length.",
    )
    max_length: str | None = Field(
        None,
        pattern="^[1-9][0-9]{0,9}(,[1-9][0-9]{0,9})*$",
        description="With `pad`: maximum number of items of a row (bytes of text), or one number for each field of "
        "`pad`. Without `truncate`, a longer row is an error.",
    )
    truncate: Literal["start", "end"] | None = Field(
        None, description="With `max_length`: cut longer rows, and keep their `start` or their `end`."
    )
    bucket: int | None = Field(
        None,
        ge=1,
        le=MAX_BUCKET,
        description="Put rows of similar length into the same batch. The rows in each window of this many rows of the "
        "order are sorted by length and cut into batches, and the batches are shuffled. The number is rounded up to "
        "whole batches.",
    )
    bucket_by: str | None = Field(
        None, description="With `bucket`: the list or text field whose lengths count. Default: the only one."
    )
    bucket_group: int | None = Field(
        None,
        ge=1,
        le=MAX_BUCKET,
        description="With `bucket`: number of consecutive batches of similar lengths, which are shuffled together. "
        "Default: `shards`, so that all readers of a step take about as long.",
    )
    pack: int | None = Field(
        None,
        ge=1,
        le=MAX_PACK,
        description="Pack several rows, one after the other, into one of this many items. `batch_size` counts packed "
        "rows. Row ids and items come flat, and `__rows__.offsets` says where each packed row begins.",
    )
    pack_by: str | None = Field(
        None, description="With `pack`: the list or text field whose lengths count. Default: the only one."
    )
    overlong: Literal["truncate", "split"] | None = Field(
        None,
        description="With `pack`: what to do with rows of more than `pack` items. `truncate` keeps their start, "
        "`split` cuts them into pieces that count as rows of their own. Default: an error.",
    )

    @model_validator(mode="after")
    def _agrees_on_lengths(self) -> Self:
        for name, needs in (
            ("max_length", "pad"),
            ("pad", "max_length"),
            ("truncate", "max_length"),
            ("bucket_by", "bucket"),
            ("bucket_group", "bucket"),
            ("pack_by", "pack"),
            ("overlong", "pack"),
        ):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"{name} needs {needs}: it has no effect without it")
        for name in ("pad", "bucket"):
            if self.pack is not None and getattr(self, name) is not None:
                raise ValueError(f"pack and {name} are two ways to batch rows of different lengths: use one of them")
        return self
