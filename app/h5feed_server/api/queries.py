"""Query parameters of the endpoints: split and order parameters, and those that only HTTP has."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from ..splits.order_spec import OrderSpec
from ..splits.split_spec import FilteredSpec, Share, SplitSpec, Where
from .binary import Format

_REVISION = "Answer 409 instead of other data than this revision's; makes the answer cacheable for ever."
_FORMAT = "Instead of an Accept header."

Duplicates = Literal["refuse", "all"]
_DUPLICATES = (
    "If several rows have a key: `refuse` the request, so that there is one row for each key, or return `all` of them, "
    "one after the other."
)

_MAX_NAMES = 10_000
"""Names of fields in a body."""


class SplitsQuery(FilteredSpec):
    test: Share | None = Field(None, description=SplitSpec.model_fields["test"].description, examples=[0.1])
    val: Share | None = Field(None, description=SplitSpec.model_fields["val"].description, examples=[0.1])
    revision: str | None = Field(None, description=_REVISION)

    @property
    def spec(self) -> FilteredSpec:
        return FilteredSpec(**{name: getattr(self, name) for name in FilteredSpec.model_fields})


class SplitReportQuery(SplitsQuery):
    classes: str | None = Field(
        None, description="Field whose classes are counted. Default: the field used for stratification, else the label."
    )


class SplitRowsQuery(SplitsQuery):
    format: Format | None = Field(None, description=_FORMAT)


class PlanQuery(OrderSpec):
    batch_size: int = Field(32, ge=1, lt=2**40, description="Rows per batch.")
    revision: str | None = Field(None, description=_REVISION)

    @cached_property
    def spec(self) -> OrderSpec:
        return OrderSpec(**{name: getattr(self, name) for name in OrderSpec.model_fields})


class BatchQuery(PlanQuery):
    format: Format | None = Field(None, description=_FORMAT)
    body: Literal["tensors", "pieces", "places", "rows"] = Field(
        "tensors",
        description="What a body contains. `tensors`: the rows. The others are for clients that decode or cache rows. "
        "`pieces`: the stored chunks that hold the rows, where these are shorter. `places`, over the Unix socket only: "
        "where the rows are in the data files. `rows`: only the ids of the rows that samples are made of.",
    )
    compress: Literal["zstd"] | None = Field(
        None,
        description="With `body=pieces`: compress rows that are not stored in compressed chunks, field by field, if "
        "they get at least 1.2 times shorter. For slow links.",
    )

    @model_validator(mode="after")
    def _compresses_pieces(self) -> Self:
        if self.compress is not None and self.body != "pieces":
            raise ValueError(f"compress={self.compress} needs body=pieces: other bodies contain rows as they are")
        return self


class WeightsQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "float64"] = Field("float64", description="Type of the numbers in the body.")
    revision: str | None = Field(None, description="Answer 409 instead of taking weights for other data.")


class OneBatchQuery(BatchQuery):
    from_row: int = Field(
        0,
        ge=0,
        le=2**62,
        description="First row of the batch to return. A batch may be larger than one response: the plan's `part_rows` "
        "says how many of its rows to request at once.",
    )
    to_row: int | None = Field(
        None, ge=1, le=2**62, description="One past the last row of the batch to return. Default: all."
    )

    @property
    def is_whole(self) -> bool:
        return self.from_row == 0 and self.to_row is None


class StreamQuery(BatchQuery):
    start: int = Field(0, ge=0, description="First batch.")
    stop: int = Field(..., ge=1, description="One past the last batch.", examples=[1])


class RowsQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(0, ge=0, le=2**62, description="First row; with `where`, counted among the rows that meet it.")
    stop: int | None = Field(None, ge=0, le=2**62, description="One past the last row; default: all.", examples=[8])
    step: int = Field(1, ge=1, le=2**62, description="Step between rows.")
    where: Where = ()
    key: str | None = Field(
        None,
        description="Instead of a range: the field that rows are found by, which has one integer or text per row. If "
        "it has class names, a value is the name of a class, or its number.",
    )
    value: tuple[str, ...] = Field(
        (), description="With `key`: value of the wanted row. Repeat the parameter for several rows, in this order."
    )
    duplicates: Duplicates = Field("refuse", description=_DUPLICATES)
    fields: str | None = Field(None, description=OrderSpec.model_fields["fields"].description)
    encoded: str | None = Field(None, description=OrderSpec.model_fields["encoded"].description)
    revision: str | None = Field(None, description=_REVISION)
    format: Format | None = Field(None, description=_FORMAT)

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> Self:
        if (self.key is None) != (not self.value):
            raise ValueError("key and value belong together: key names a field, and value is in the wanted row")
        if self.key is not None and (self.start, self.stop, self.step, self.where) != (0, None, 1, ()):
            raise ValueError("key finds rows by their values: leave out start, stop, step and where")
        if self.key is None and self.duplicates != "refuse":
            raise ValueError("duplicates needs key")
        return self


class RowsPostQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: str | None = Field(None, description=_REVISION)
    format: Format | None = Field(None, description=_FORMAT)


class RowsRequest(BaseModel):
    """Row ids to return, in this order, or keys to find rows by. Those that are listed twice are returned twice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Of a million ids that are none, the first is named.
    rows: list[StrictInt] | None = Field(
        None, fail_fast=True, description="Row ids; or else `keys`.", examples=[[0, 1, 2]]
    )
    key: str | None = Field(
        None,
        description="With `keys`: the field that rows are found by, which has one integer or text per row.",
        examples=[None],
    )
    keys: list[StrictInt | StrictStr] | None = Field(
        None,
        fail_fast=True,
        description="Values of the field `key`, each in one row. If it has class names, text is the name of a class, "
        "and an integer is its number.",
        examples=[None],
    )
    duplicates: Duplicates = Field("refuse", description=_DUPLICATES, examples=["refuse"])
    fields: list[str] | None = Field(
        None, max_length=_MAX_NAMES, description="Field names; default: inputs and labels.", examples=[None]
    )
    encoded: list[str] | None = Field(
        None,
        max_length=_MAX_NAMES,
        description="Fields stored as JPEG or PNG to return undecoded, as the bytes of the image files.",
        examples=[None],
    )

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> Self:
        if (self.rows is None) == (self.keys is None):
            raise ValueError("give either rows, a list of row ids, or keys and the key that they are values of")
        if (self.key is None) != (self.keys is None):
            raise ValueError("key and keys belong together: key names a field, and keys are values of it")
        if self.keys is None and self.duplicates != "refuse":
            raise ValueError("duplicates needs keys")
        return self


class CatalogQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="Entries per page.")
    offset: int = Field(0, ge=0, description="Entries to skip.")
    q: str | None = Field(None, description="Only names containing this text (case-insensitive).")


class TreeQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None = Field(None, description="One of the dataset's files. Default: the first.")
    path: str = Field("/", description="Path in the file, from its root.", examples=["/"])
    depth: int = Field(1, ge=0, le=16, description="Levels below the object at `path`.")
    limit: int = Field(100, ge=1, le=1000, description="Members of a group per page.")
    offset: int = Field(0, ge=0, le=2**62, description="Members of the group at `path` to skip.")
    revision: str | None = Field(None, description="Answer 409 instead of other data than this revision's.")


class DescriptorQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="One of the dataset's files.", examples=["digits.h5"])
    revision: str | None = Field(None, description="Answer 409 instead of other data than this revision's.")
