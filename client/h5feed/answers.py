"""The types of the server's JSON responses, as far as this package reads them; see `h5feed.schema.checked`."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from .schema import Count, Number

Text = str | None
Scalar = str | bool | Number
"""The stored value of a class."""


class ServerListing(TypedDict):
    """A list of servers: see `h5feed.net.server_list`."""

    servers: list[str]


class FieldSummary(TypedDict):
    """A field in the catalogue."""

    name: str
    role: str
    shape: list[Count]
    dtype: str
    readable: bool
    reason: Text


class SplitRows(TypedDict):
    """A stored split."""

    name: str
    rows: Count


class DatasetSummary(TypedDict):
    """A dataset in the catalogue."""

    name: str
    status: str
    reason: Text
    revision: Text
    rows: Count | None
    fields: list[FieldSummary]


class CataloguePage(TypedDict):
    datasets: list[DatasetSummary]
    total: Count


class ImageInfo(TypedDict):
    """The format of decoded images: see `h5feed.images.ImageSpec`."""

    size: list[Count]
    decoder: str


class SparseInfo(TypedDict):
    """How sparse rows are sent."""

    format: Literal["csr"]
    index_dtype: str


class PackedInfo(TypedDict):
    """How numbers are packed: see `h5feed.stored.packing`."""

    dtype: Literal["float16", "float32", "float64", "uint8", "uint16", "uint32", "uint64"]
    scale_factor: Number | None
    add_offset: Number | None
    missing: list[Number]
    unsigned: bool
    problem: NotRequired[Text]


class FieldInfo(FieldSummary):
    spatial_axes: NotRequired[Count]
    ragged: bool
    sparse: NotRequired[SparseInfo | None]
    cf: NotRequired[list[PackedInfo] | None]
    class_names: list[str] | None
    chunks: list[Count] | None
    filters: list[str]
    channels: Text
    decode: ImageInfo | None
    image_libraries: NotRequired[Text]
    image_bytes: NotRequired[Count | None]
    decoded_per_served_byte: Number


class DrawnInfo(TypedDict):
    """The options that produced the stored splits."""

    test: Number | None
    val: Number | None
    split_seed: int
    split_shuffle: bool
    stratified_by: Text


class HashingInfo(TypedDict):
    """How far the files of a dataset have been hashed."""

    done: Count
    total: Count


class DatasetInfo(TypedDict):
    name: str
    revision: str
    content: NotRequired[Text]
    hashing: NotRequired[HashingInfo | None]
    rows: Count
    fields: list[FieldInfo]
    class_names: list[str] | None
    native_splits: list[SplitRows]
    splits_drawn: DrawnInfo | None
    notes: list[str]


class TensorInfo(TypedDict):
    name: str
    dtype: str
    shape: list[Count]


class Limits(TypedDict):
    rows: Count
    body_bytes: Count


class PackedRowsInfo(TypedDict):
    rows: Count
    empty: Count
    items: Count
    fill: Number


class PlanInfo(TypedDict):
    revision: str
    rows: Count
    batches: Count
    last_rows: Count
    batch_bytes: Count
    last: Literal["keep", "drop", "pad"]
    tensors: list[TensorInfo]
    limits: Limits
    part_rows: NotRequired[Count]
    packed: NotRequired[PackedRowsInfo | None]
    bucket_rows: NotRequired[Count | None]
    rows_decoded_together: NotRequired[Count]
    stored: bool | None
    note: Text
    replaces: dict[str, Any] | None


class ClassInfo(TypedDict):
    value: Scalar
    name: Text
    rows: Count
    share: Number
    weight: Number | None


class SplitInfo(TypedDict):
    rows: Count
    share: Number
    digest: str
    stored: NotRequired[bool]
    groups: NotRequired[Count]
    max_deviation: NotRequired[Number]
    classes: NotRequired[list[ClassInfo]]
    classes_total: NotRequired[Count]


class NamedSplits(TypedDict):
    """The splits by name; ``all`` is always present."""

    all: SplitInfo


class SplitsInfo(TypedDict):
    dataset: str
    revision: str
    method: Text
    stratify: Text
    group: Text
    classes_of: Text
    classes_are: Text
    note: Text
    splits: dict[str, SplitInfo]


class HistogramInfo(TypedDict):
    edges: list[Number]
    counts: list[Count]


class Numbers(TypedDict):
    """Statistics of numeric values."""

    count: Count | None
    min: Number | None
    max: Number | None
    mean: Number | None
    std: Number | None
    zeros: Count | None
    nan: Count | None
    inf: Count | None
    zero_share: Number | None
    histogram: HistogramInfo | None


class ChannelInfo(Numbers):
    name: str


class ValueInfo(TypedDict):
    value: Scalar
    rows: Count
    share: Number


class FieldStatsInfo(Numbers):
    field: str
    split: str
    role: str
    dtype: str
    shape: list[Count]
    rows: Count
    channels: list[ChannelInfo] | None
    channel_means: dict[str, Number | None] | None
    classes: list[ClassInfo] | None
    values: list[ValueInfo] | None
    distinct: Count | None
    lengths: Numbers | None


class StatsInfo(TypedDict):
    revision: str
    split: str
    rows: Count
    note: Text
    replaces: dict[str, Any] | None
    fields: dict[str, FieldStatsInfo]


class JobInfo(TypedDict):
    """Progress of a long-running job."""

    job: str
    done: Count
    total: Count
