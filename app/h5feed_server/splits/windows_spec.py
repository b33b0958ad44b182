"""Parameters of windows: samples that are several rows of one episode."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from h5feed.offsets import MAX_OFFSET, MAX_OFFSETS, Offsets, Taken, offsets_text, parse_offsets
from pydantic import AfterValidator, BaseModel, Field, model_validator

Int64s = npt.NDArray[np.int64]

MAX_OFFSETS_CHARS = 4096
"""Maximum length of the parameter ``offsets``."""


def _canonical(text: str) -> str:
    return offsets_text(parse_offsets(text))


class WindowsSpec(BaseModel):
    """How samples are made of consecutive rows of an episode."""

    sequence_length: int | None = Field(
        None,
        ge=1,
        le=MAX_OFFSETS,
        description="A sample is this many rows of one episode, from its own row on: each field has one more axis.",
    )
    sequence_stride: int = Field(
        1, ge=1, le=MAX_OFFSET, description="A sample begins every so many rows, from the first of the episode on."
    )
    sampling_rate: int = Field(1, ge=1, le=MAX_OFFSET, description="Step between the rows of a sequence.")
    offsets: Annotated[str, AfterValidator(_canonical)] | None = Field(
        None,
        max_length=MAX_OFFSETS_CHARS,
        description="Rows of single fields, relative to the sample's own row: `image:-1,0;action:0..15`. Ranges "
        "include both ends; `0..30/2` is every second. One number alone adds no axis: `target:24`. `next=image:1` has "
        "rows of a field under another name, which `fields` can name. Names are percent-encoded. Other fields have "
        "`sequence_length` rows, or the own row.",
    )
    ends: Literal["drop", "pad", "pad_start", "pad_end"] = Field(
        "drop",
        description="What to do with samples that reach over an end of their episode: `drop` them, or `pad` them by "
        "repeating the first or last row. `NAME.mask` is then sent, and false for repeated rows. `pad_start` and "
        "`pad_end` pad one end, and drop samples that reach over the other.",
    )
    episode: str | None = Field(
        None,
        description="Field whose value changes where an episode ends, or `none`: the whole dataset is one. Default: "
        "the groups and files that the dataset is made of.",
    )

    @model_validator(mode="after")
    def _has_windows(self) -> Self:
        if self.sequence_length is None and self.sampling_rate > 1:
            raise ValueError("sampling_rate needs sequence_length: the offsets of fields can have steps, as in 0..30/2")
        for name in ("sequence_stride", "ends", "episode"):
            if getattr(self, name) != WindowsSpec.model_fields[name].default and not self.has_windows:
                raise ValueError(f"{name} needs sequence_length or offsets: a sample is one row otherwise")
        if self._reach > MAX_OFFSET:
            raise ValueError(f"sequence_length and sampling_rate reach {self._reach} rows, more than 2**40")
        return self

    @property
    def has_windows(self) -> bool:
        """Whether samples are other rows than their own."""
        return self.sequence_length is not None or self.offsets is not None

    @cached_property
    def offsets_by_name(self) -> dict[str, Taken]:
        """What ``offsets`` says."""
        return {} if self.offsets is None else parse_offsets(self.offsets)

    @property
    def default_offsets(self) -> Offsets:
        """Offsets of the other fields."""
        return 0 if self.sequence_length is None else tuple(range(0, self._reach + 1, self.sampling_rate))

    def offsets_within(self, prefix: str) -> Int64s:
        """The offsets of all fields whose names begin with `prefix`, (k,) int64; ascending, without repeats."""
        named = [own.offsets for own in self.offsets_by_name.values() if own.field.startswith(prefix)]
        return np.unique(
            np.concatenate([np.atleast_1d(np.array(own, np.int64)) for own in (self.default_offsets, *named)])
        )

    @property
    def _reach(self) -> int:
        return 0 if self.sequence_length is None else (self.sequence_length - 1) * self.sampling_rate

    @property
    def needed(self) -> tuple[int, int]:
        """How far an episode has to reach from a sample's own row, so that the sample is not left out: the least and
        the greatest offset, or 0 at an end that is padded."""
        low, high = self.span
        return 0 if self.ends in ("pad", "pad_start") else low, 0 if self.ends in ("pad", "pad_end") else high

    @property
    def span(self) -> tuple[int, int]:
        """The least and the greatest offset of any field; at most and at least 0."""
        named = [own.offsets for own in self.offsets_by_name.values()]
        every = [number for own in named for number in ((own,) if isinstance(own, int) else own)]
        return min([0, *every]), max([0, self._reach, *every])


NO_WINDOWS: dict[str, Any] = {name: field.default for name, field in WindowsSpec.model_fields.items()}
"""The values of all parameters for samples of one row."""
