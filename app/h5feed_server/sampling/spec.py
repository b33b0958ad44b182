"""What callers ask for: which rows, in which order. Checked here, once, for queries and for code alike."""

from __future__ import annotations

from typing import Annotated, Any, Self

from h5feed.order import Last
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

SPLIT_ALIASES = {"valid": "val", "validation": "val", "dev": "val"}


def _share(value: Any) -> Any:
    """With a decimal point a fraction, else a count."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    except ValueError:
        raise ValueError("use a fraction of all rows such as 0.1, or a count of rows such as 500") from None


def _check_share(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("a fraction must lie between 0 and 1, both excluded; a count has no decimal point")
    if isinstance(value, int) and value < 1:
        raise ValueError("a count of rows must be 1 or more")
    return value


Share = Annotated[int | float, BeforeValidator(lambda value: _check_share(_share(value)))]


class SplitSpec(BaseModel):
    """Which subsets the rows are divided into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: Share | None = Field(
        None,
        description="Rows of the test split, carved off first: with a decimal point a fraction of all rows (rounded "
        "up), else a count.",
    )
    val: Share | None = Field(None, description="Rows of the validation split, carved off what test leaves.")
    stratify: str | None = Field(
        None,
        description="Field whose classes every split holds in equal shares, or `none`. Default: the label field, where "
        "its values are classes with enough rows each.",
    )
    split_seed: int = Field(42, ge=0, lt=2**32, description="`random_state` of scikit-learn's `train_test_split`.")
    split_shuffle: bool = Field(True, description="`false`: by position, test and val from the end.")

    @model_validator(mode="after")
    def _positional_splits_are_not_stratified(self) -> Self:
        if not self.split_shuffle and self.stratify not in (None, "none"):
            raise ValueError("stratify needs split_shuffle=true: rows taken by position have the classes they have")
        return self

    @property
    def splits_rows(self) -> bool:
        return self.test is not None or self.val is not None


class OrderSpec(SplitSpec):
    """Which rows, and in which order one epoch visits them."""

    split: str = Field("all", description="`all`, `train`, `val` or `test` (also `valid`, `validation`, `dev`).")
    shuffle: bool = Field(False, description="A new order each epoch; `false`: ascending rows.")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the order.")
    epoch: int = Field(0, ge=0, lt=2**63, description="Number of the epoch: each has an order of its own.")
    window: int | None = Field(
        None,
        ge=1,
        lt=2**62,
        description="Shuffle in two steps, so that chunks of many rows are decoded once or twice in an epoch and not "
        "for every row: the chunks are put in a new order, and rows are shuffled among so many that follow each other.",
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many rows of the split.")
    shard: int = Field(0, ge=0, description="Which of the `shards` readers asks.")
    shards: int = Field(1, ge=1, le=1 << 20, description="Readers that share each step of the epoch.")
    last: Last | None = Field(
        None,
        description="What becomes of the tail: `keep` a smaller batch (one shard only, the default there), `drop` it, "
        "or `pad` it with repeated rows of weight 0 (the default for several shards).",
    )
    fields: str | None = Field(
        None,
        description="Comma-separated field names; default: inputs and labels. Empty: row ids only.",
    )

    @model_validator(mode="after")
    def _windows_are_shuffled(self) -> Self:
        if self.window is not None and not self.shuffle:
            raise ValueError("window needs shuffle=true: rows in their own order need none")
        return self

    @field_validator("split")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return SPLIT_ALIASES.get(value, value)

    @property
    def split_spec(self) -> SplitSpec:
        return SplitSpec(**{name: getattr(self, name) for name in SplitSpec.model_fields})
