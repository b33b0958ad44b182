"""Split parameters: how rows are divided. Checked here, for queries and for Python callers."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator


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
