"""Split parameters: how rows are divided. Validates HTTP queries and calls from Python."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ..filters.grammar import MAX_CHARS, MAX_CONDITIONS, canonical
from .windows_spec import WindowsSpec


def _share(value: Any) -> Any:
    """Parse a share from a query: a number with a decimal point is a fraction, otherwise a count.

    Raises
    ------
    ValueError
    """
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


Where = Annotated[
    tuple[str, ...],
    AfterValidator(canonical),
    Field(
        description="Condition that rows must meet: `label in cat, dog`, `width >= 200`, `score != nan`, "
        '`title startswith "The "`. Repeat the parameter for several conditions: all must hold. Splits are those '
        "of all rows, filtered.",
        json_schema_extra={"items": {"type": "string", "maxLength": MAX_CHARS}, "maxItems": MAX_CONDITIONS},
    ),
]


class SplitSpec(WindowsSpec):
    """How rows are divided into splits. It depends on the windows that samples are: see `drawn_spec`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: Share | None = Field(
        None,
        description="Size of the test split, which is taken first. With a decimal point: a fraction of all rows, "
        "rounded up. Otherwise: a number of rows. With `group`, of groups instead of rows.",
    )
    val: Share | None = Field(None, description="Size of the validation split, taken from the rows not in test.")
    stratify: str | None = Field(
        None,
        description="Field whose classes have the same shares in every split, or `none`. Default: the label field if "
        "its values are classes with enough rows each. Rows with several labels are stratified "
        "iteratively. Continuous values are stratified by ten quantile bins, but only if you name the "
        "field here.",
    )
    split_seed: int = Field(42, ge=0, lt=2**32, description="`random_state` of scikit-learn's splitters.")
    split_shuffle: bool = Field(True, description="`false`: by position, with test and val at the end.")
    group: str | None = Field(
        None,
        description="Field whose equal values stay in one split, such as a patient or episode; `__pieces__`: the "
        "groups and files that the dataset is made of. `test` and `val` use "
        "`GroupShuffleSplit`; `folds` uses `StratifiedGroupKFold` or, without classes, `GroupKFold`.",
    )
    folds: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Cross-validation: val is one of this many folds, and train is the other folds. Folds are made by "
        "`StratifiedKFold` (`KFold` without classes) from the rows not in test.",
    )
    fold: int | None = Field(None, ge=0, description="Index of the fold used as val. Default: 0.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        named = self.stratify not in (None, "none")
        if named and not self.split_shuffle and self.folds is None:
            raise ValueError("stratify needs split_shuffle=true: rows taken by position cannot be stratified")
        if self.fold is not None and self.folds is None:
            raise ValueError("fold needs folds, the number of folds")
        if self.folds is not None and self.val is not None:
            raise ValueError("folds cannot be used with val, because one of the folds is val: leave val out")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold} must be in 0 … folds-1 = {self.folds - 1}")
        if self.group is not None and not self.splits_rows:
            raise ValueError("group needs test, val or folds: without them, no rows are divided")
        if self.stratify == "none" and self.is_balanced and not self.splits_rows:
            raise ValueError("balance draws by the label, or by the field that stratify names: leave stratify=none out")
        for name in ("stratify", "split_seed", "split_shuffle"):
            has_effect = self.splits_rows or (name == "stratify" and named and self.is_balanced)
            if getattr(self, name) != SplitSpec.model_fields[name].default and not has_effect:
                raise ValueError(f"{name} needs test, val or folds: it has no effect on stored splits")
        if not self.split_shuffle and self.split_seed != SplitSpec.model_fields["split_seed"].default:
            raise ValueError("split_seed needs split_shuffle=true: it has no effect on rows taken by position")
        if self.group is not None and named and self.folds is None:
            raise ValueError("stratify and group together need folds: one fold of folds=5 is about test=0.2")
        return self

    @property
    def splits_rows(self) -> bool:
        """Whether rows are to be divided; otherwise the stored splits are used."""
        return self.test is not None or self.val is not None or self.folds is not None

    @property
    def is_balanced(self) -> bool:
        """Whether the epoch is drawn by class, so that `stratify` has an effect without test, val and folds."""
        return False


PIECES = "__pieces__"
"""Value of ``group``: the pieces that the dataset is made of."""

AS_STORED = SplitSpec.model_validate({})
"""Use the splits stored in the files; draw nothing."""


class FilteredSpec(SplitSpec):
    """How rows are divided into splits, and which of them are kept."""

    where: Where = ()

    @property
    def split_spec(self) -> SplitSpec:
        """How all rows are divided."""
        return SplitSpec(**{name: getattr(self, name) for name in SplitSpec.model_fields})

    @property
    def where_text(self) -> str:
        """The conditions, to go after the name of a split: " where width >= 200"; empty without conditions."""
        return f" where {' and '.join(self.where)}" if self.where else ""
