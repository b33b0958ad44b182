"""What callers ask for: which rows, in which order. Checked here, once, for queries and for code alike."""

from __future__ import annotations

from typing import Annotated, Any, Self

from h5feed.order import Last
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

SPLIT_ALIASES = {"valid": "val", "validation": "val", "dev": "val"}


def _share(value: Any) -> Any:
    """With a decimal point a fraction, else a count."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    except ValueError:
        raise ValueError("expected a fraction of all rows such as 0.1, or a number of rows such as 500") from None


def _check_share(value: int | float) -> int | float:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("a fraction must be greater than 0 and less than 1; a number of rows has no decimal point")
    if isinstance(value, int) and value < 1:
        raise ValueError("a number of rows must be at least 1")
    return value


_SHARES = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "integer", "minimum": 1},
    ]
}

Share = Annotated[int | float, BeforeValidator(lambda value: _check_share(_share(value))), WithJsonSchema(_SHARES)]


class SplitSpec(BaseModel):
    """Which subsets the rows are divided into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: Share | None = Field(
        None,
        description="Size of the test split, which is taken first: with a decimal point a fraction of all rows "
        "(rounded up), else a number of rows. With `group`, of groups.",
    )
    val: Share | None = Field(None, description="Size of the validation split, taken from the rows that test leaves.")
    stratify: str | None = Field(
        None,
        description="Field whose classes have the same shares in every split, or `none`. Default: the label field if "
        "its values are classes with enough rows each. Rows with several labels are stratified "
        "iteratively. Numbers on a scale are stratified by ten quantile bins, if you name the field "
        "here.",
    )
    split_seed: int = Field(42, ge=0, lt=2**32, description="`random_state` of scikit-learn's splitters.")
    split_shuffle: bool = Field(True, description="`false`: by position, test and val from the end.")
    group: str | None = Field(
        None,
        description="Field whose equal values stay in one split, such as a patient or episode: `GroupShuffleSplit` for "
        "`test` and `val`, `StratifiedGroupKFold` or, without classes, `GroupKFold` for `folds`.",
    )
    folds: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Cross-validation: val is one of this many folds and train is the others, as made by "
        "`StratifiedKFold` (`KFold` without classes) from the rows that test leaves.",
    )
    fold: int | None = Field(None, ge=0, description="Index of the fold that is val; 0 by default.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        named = self.stratify not in (None, "none")
        if named and not self.split_shuffle and self.folds is None:
            raise ValueError("stratify needs split_shuffle=true: rows taken by position have the classes they have")
        if self.fold is not None and self.folds is None:
            raise ValueError("fold needs folds: of how many it is one")
        if self.folds is not None and self.val is not None:
            raise ValueError("folds makes val itself, of one fold: leave val out")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold} must be in 0 … folds-1 = {self.folds - 1}")
        if self.group is not None and not self.splits_rows:
            raise ValueError("group needs test, val or folds: there is nothing to keep together otherwise")
        for name in ("stratify", "split_seed", "split_shuffle"):
            has_effect = self.splits_rows or (name == "stratify" and self.is_balanced)
            if getattr(self, name) != SplitSpec.model_fields[name].default and not has_effect:
                raise ValueError(f"{name} needs test, val or folds: splits that are stored are not drawn")
        if self.group is not None and named and self.folds is None:
            raise ValueError("stratify and group together need folds: test=0.2 is about one fold of folds=5")
        return self

    @property
    def splits_rows(self) -> bool:
        return self.test is not None or self.val is not None or self.folds is not None

    @property
    def is_balanced(self) -> bool:
        """Whether `stratify` names the classes that an epoch is drawn by."""
        return False


AS_STORED = SplitSpec.model_validate({})
"""Nothing is drawn."""


class OrderSpec(SplitSpec):
    """Which rows, and in which order one epoch visits them."""

    split: str = Field(
        "all",
        description="`all`, `train`, `val` (also `valid`, `validation`, `dev`), `test`, or the name of a stored split.",
    )
    shuffle: bool = Field(False, description="Shuffle, with a new order each epoch. `false`: ascending rows.")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the order.")
    epoch: int = Field(0, ge=0, lt=2**63, description="Epoch number: each epoch has its own order.")
    window: int | None = Field(
        None,
        ge=1,
        lt=2**62,
        description="Shuffle in two steps, so that chunks of many rows are decoded once or twice per epoch and not "
        "once per row: chunks are shuffled, then rows within a window of this many consecutive rows.",
    )
    balance: bool = Field(
        False,
        description="Draw each class of the label field (or of `stratify`) equally often: each batch has every class "
        "within one row of its share. Rows of small classes repeat, all equally often; of large classes "
        "each epoch has other rows.",
    )
    weights: str | None = Field(
        None,
        description="Field of numbers ≥ 0: rows are drawn with repeats, in proportion to it.",
    )
    epoch_rows: int | None = Field(
        None,
        ge=1,
        lt=2**62,
        description="With `balance` or `weights`: number of rows per epoch. Default: the size of the split.",
    )
    limit: int | None = Field(None, ge=1, description="Use only the first rows of the split.")
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
        "image files, flat, with `NAME.offsets`. How to decode them is in the dataset's metadata, as "
        "`decode`.",
    )

    @model_validator(mode="after")
    def _names_a_split(self) -> Self:
        if self.split == "all" and self.splits_rows:
            raise ValueError(
                "split=all is every row, whatever test, val and folds say: name train, val or test, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _windows_are_shuffled(self) -> Self:
        if self.window is not None and not self.shuffle:
            raise ValueError("window needs shuffle=true: rows in their own order need none")
        return self

    @model_validator(mode="after")
    def _draws_in_one_way(self) -> Self:
        if self.balance and self.weights is not None:
            raise ValueError("balance and weights are two ways to draw rows: give one of them")
        if self.draws and self.window is not None:
            raise ValueError("window cannot be used with balance or weights: their rows come from all of the split")
        if self.epoch_rows is not None and not self.draws:
            raise ValueError("epoch_rows needs balance or weights: other epochs have each row once. Use limit for less")
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
        """Whether an epoch is drawn, with repeats, and not every row once."""
        return self.balance or self.weights is not None

    @property
    def split_spec(self) -> SplitSpec:
        if not self.splits_rows:
            # What `stratify` says then is of `balance`.
            return AS_STORED
        return SplitSpec(**{name: getattr(self, name) for name in SplitSpec.model_fields})
