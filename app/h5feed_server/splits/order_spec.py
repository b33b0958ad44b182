"""Order parameters: which rows an epoch has, and their order. Validates HTTP queries and calls from Python."""

from __future__ import annotations

from typing import Self

from h5feed.order import SPLIT_ALIASES, Last
from pydantic import Field, field_validator, model_validator

from .crops_spec import CropsSpec
from .joins_spec import JoinsSpec
from .ragged_spec import RaggedSpec
from .split_spec import AS_STORED, FilteredSpec, SplitSpec


class OrderSpec(CropsSpec, FilteredSpec, JoinsSpec, RaggedSpec):
    """Which rows an epoch visits, and in which order."""

    split: str = Field(
        "all",
        description="`all`, `train`, `val` (also `valid`, `validation`, `dev`), `test`, or the name of a stored split.",
    )
    shuffle: bool = Field(False, description="Shuffle, with a new order each epoch. `false`: ascending rows.")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the order.")
    epoch: int = Field(0, ge=0, lt=2**63, description="Epoch number. Each epoch has its own order.")
    window: int | None = Field(
        None,
        ge=1,
        lt=2**62,
        description="Shuffle in two steps: first the chunks, then the rows within windows of this many consecutive "
        "rows. Chunks of many rows are then decoded once or twice per epoch, not once per row.",
    )
    balance: bool = Field(
        False,
        description="Draw each class of the label field (or of `stratify`) equally often. In each batch, the number of "
        "rows of a class is within one of its share. Rows of small classes repeat equally often. For large classes, "
        "each epoch has different rows.",
    )
    weights: str | None = Field(
        None,
        description="Field of numbers ≥ 0. Rows are drawn with repeats, in proportion to this field. Or `digest:` and "
        "the digest of an array that was given with `POST …/weights`; a field of this name comes first.",
    )
    epoch_rows: int | None = Field(
        None,
        ge=1,
        lt=2**62,
        description="With `balance` or `weights`: number of rows per epoch. Default: the size of the split.",
    )
    limit: int | None = Field(
        None, ge=1, description="Use only the first rows of the split, or of those that meet `where`."
    )
    shard: int = Field(0, ge=0, description="Index of this reader among `shards`.")
    shards: int = Field(1, ge=1, le=1 << 20, description="Number of readers that share each step.")
    last: Last | None = Field(
        None,
        description="How to treat the last, incomplete batch: `keep` it (one shard only; the default there), `drop` "
        "it, or `pad` it with repeated rows of weight 0 (the default for several shards).",
    )
    fields: str | None = Field(
        None,
        description="Comma-separated field names. Default: inputs and labels. Empty: row ids only.",
    )
    encoded: str | None = Field(
        None,
        description="Comma-separated names of fields stored as JPEG or PNG to return undecoded: the bytes of the "
        "image files, flat, with `NAME.offsets`. The dataset's metadata says under `decode` how to decode them.",
    )

    @model_validator(mode="after")
    def _names_a_split(self) -> Self:
        if self.split == "all" and self.splits_rows:
            raise ValueError(
                "split=all is every row, so test, val and folds have no effect: name train, val or test, or omit them"
            )
        return self

    @model_validator(mode="after")
    def _windows_are_shuffled(self) -> Self:
        if self.window is not None and not self.shuffle:
            raise ValueError("window needs shuffle=true: it has no effect on ascending rows")
        return self

    @model_validator(mode="after")
    def _draws_in_one_way(self) -> Self:
        if self.balance and self.weights is not None:
            raise ValueError("balance and weights are two ways to draw rows: use one of them")
        if self.draws and self.window is not None:
            raise ValueError("window cannot be used with balance or weights: they draw rows from the whole split")
        if self.draws and self.crop_at == "grid":
            raise ValueError(
                "crop_at=grid visits each part of each row once, but balance and weights draw rows: use crop_at=random"
            )
        if self.crop is not None and (self.pack is not None or (self.bucket is not None and self.crop_at == "grid")):
            raise ValueError(
                "crop cannot be used with pack, nor crop_at=grid with bucket: these are about rows of different lengths"
            )
        if self.pack is not None and (self.draws or self.window is not None):
            raise ValueError(
                "pack cannot be used with balance, weights or window: which rows share a packed row depends on the "
                "lengths of all rows of the split"
            )
        if self.epoch_rows is not None and not self.draws:
            raise ValueError("epoch_rows needs balance or weights: other epochs have each row once; see limit instead")
        return self

    @model_validator(mode="after")
    def _lengths_are_of_single_rows(self) -> Self:
        for name in ("bucket", "pack", "max_length"):
            if getattr(self, name) is not None and self.has_windows:
                raise ValueError(f"{name} cannot be used with sequence_length or offsets: it is about single rows")
        return self

    @field_validator("split")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return SPLIT_ALIASES.get(value, value)

    @property
    def is_balanced(self) -> bool:
        return self.balance

    @property
    def draws(self) -> bool:
        """Whether rows are drawn with repeats, instead of visiting each row once."""
        return self.balance or self.weights is not None

    @property
    def split_spec(self) -> SplitSpec:
        if not self.splits_rows:
            # Without test, val and folds, `stratify` belongs to `balance` and does not affect the split.
            return AS_STORED
        return super().split_spec
