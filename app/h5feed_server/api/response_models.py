"""Models of the API's JSON responses; they describe exactly what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def answers(model: type[BaseModel], more: Mapping[int | str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Options of a route that answers with such JSON, which is sent as it is and not checked anew."""
    return {"responses": {200: {"model": model}, **(more or {})}, "response_model": None}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Answer):
    """An error as problem+json (RFC 9457)."""

    type: Literal["about:blank"]
    title: str = Field(description="Short description of the status.")
    status: int
    detail: str = Field(description="The invalid value and what would be valid.")
    code: str = Field(description="Machine-readable error code. New codes may be added.")
    request_id: str = Field(description="Identifies the request in the server's log.")


class StoredSplit(_Answer):
    name: str
    rows: int = Field(ge=0)


class FieldSummary(_Answer):
    name: str
    role: str = Field(description="`input`, `label`, `weight` or `other`.")
    shape: list[int] = Field(description="Shape of one row.")
    dtype: str
    readable: bool
    reason: str | None = Field(description="Why the field cannot be read.")


class Hashing(_Answer):
    """How far the files of a dataset have been hashed."""

    done: int = Field(description="Bytes that have been hashed.")
    total: int = Field(description="Bytes to hash in all.")


_PROVISIONAL = "Whether `revision` is a provisional name, which only this server knows."
_CONTENT = "The revision by content; null until all files have been hashed."
_HASHING = "How far the files have been hashed; null when all are."


class DatasetSummary(_Answer):
    name: str
    status: str = Field(description="`ok`, `preparing`, `unreadable` or `unavailable`.")
    reason: str | None = Field(description="Why the status is not `ok`.")
    revision: str | None = Field(description="Changes when the data changes.")
    provisional: bool = Field(description=_PROVISIONAL)
    content: str | None = Field(description=_CONTENT)
    hashing: Hashing | None = Field(description=_HASHING)
    rows: int | None
    native_splits: list[StoredSplit] = Field(description="Splits stored in the files.")
    files: list[str]
    fields: list[FieldSummary]


class WeightsKept(_Answer):
    """An array of weights that the server keeps."""

    dataset: str
    weights: str = Field(description="Value of the parameter `weights` that draws rows by this array.")
    digest: str = Field(description="Digest of type and values.")
    dtype: str
    rows: int
    expires_in: float = Field(description="Seconds after its last use until the array is forgotten.")


class Catalogue(_Answer):
    datasets: list[DatasetSummary]
    total: int = Field(description="Number of datasets on all pages.")
    limit: int
    offset: int


class Decoded(_Answer):
    """How images are decoded."""

    size: list[int]
    mode: str | None = None
    resize: str | None = None
    decoder: str = Field(description="Fingerprint of the image decoder: equal fingerprints decode to equal pixels.")

    model_config = ConfigDict(extra="allow")


class Sparse(_Answer):
    """How sparse rows are sent: as `NAME.data`, `NAME.indices` and `NAME.indptr`, like scipy's `csr_matrix`."""

    format: Literal["csr"]
    index_dtype: str = Field(description="dtype of `NAME.indices`.")
    stored_values: int = Field(description="Number of values that are stored, of all rows together.")


class Packed(_Answer):
    """How numbers are packed by the CF conventions: ``stored * scale_factor + add_offset``, and NaN where missing."""

    dtype: str = Field(description="dtype of the unpacked numbers, chosen like xarray does.")
    scale_factor: float | None
    add_offset: float | None
    missing: list[int | float] = Field(description="Stored numbers that stand for missing values.")
    unsigned: bool = Field(description="The stored integers are to be interpreted as unsigned.")
    problem: str | None = Field(description="Why its attributes do not tell how to unpack it; null if they do.")


class FieldDescription(FieldSummary):
    role_reason: str | None = Field(description="How the role was determined.")
    channels: str | None = Field(description="Channel order of images: `rgb`, `bgr`, `grey` …")
    spatial_axes: int = Field(description="How many axes of a row can be cropped: all but those of channels.")
    ragged: bool = Field(description="Rows have different lengths.")
    sparse: Sparse | None = Field(description="Of a sparse matrix; null if rows are not sparse.")
    cf: list[Packed] | None = Field(
        description="Each way in which its pieces are packed; null if they are not, or are served unpacked."
    )
    rows: int
    note: str | None
    stored_dtype: str
    chunks: list[int] | None
    filters: list[str]
    pieces: int = Field(description="Number of arrays that are concatenated.")
    stored_bytes: int
    logical_bytes: int
    enum: dict[str, int] | None
    class_names: list[str] | None
    attributes: dict[str, Any]
    decode: Decoded | None
    image_libraries: str | None = Field(description="Versions of the libraries that decode images.")
    image_bytes: int | None = Field(description="Bytes of all image files. null if it holds none, or only h5py knows.")
    decoded_per_served_byte: float = Field(description="Bytes decoded per byte of a shuffled batch.")
    advice: str | None = Field(description="How to make shuffled batches cheaper.")


class StoredSplitsDrawn(_Answer):
    """How the stored splits were drawn."""

    test: int | float | None
    val: int | float | None
    split_seed: int
    split_shuffle: bool
    stratified_by: str | None


class DatasetDescription(_Answer):
    name: str
    status: Literal["ok"]
    reason: None
    revision: str
    revision_covers: str
    provisional: bool = Field(description=_PROVISIONAL)
    content: str | None = Field(description=_CONTENT)
    hashing: Hashing | None = Field(description=_HASHING)
    rows: int
    fields: list[FieldDescription]
    class_names: list[str] | None = Field(description="Class names of the label, by value.")
    native_splits: list[StoredSplit]
    splits_drawn: StoredSplitsDrawn | None
    files: list[str]
    notes: list[str]
    attributes: dict[str, Any]
    card: dict[str, str] = Field(
        description="What people say of it: `title`, `description`, `licence`, `source`, `citation`."
    )


class ClassShare(_Answer):
    value: bool | int | float | str
    name: str | None = Field(description="Class name, if known.")
    rows: int
    share: float
    weight: float | None = Field(description="Balanced: rows / (classes · rows of the class).")


class Split(_Answer):
    rows: int
    share: float
    digest: str = Field(description="Digest of the row ids.")
    stored: bool | None = Field(None, description="Whether this is a split as stored in the files.")
    groups: int | None = None
    classes: list[ClassShare] | None = None
    classes_total: int | None = Field(None, description="Set if there are too many classes to list.")
    max_deviation: float | None = Field(
        None, description="Largest difference between a class's share here and in all rows."
    )


_Replaced = dict[str, dict[str, int]] | None


class Splits(_Answer):
    dataset: str
    revision: str
    method: str | None = Field(description="The scikit-learn call that gives the same rows.")
    stratify: str | None
    group: str | None
    classes_of: str | None = Field(description="Field whose classes are counted.")
    classes_are: str | None
    note: str | None = Field(description="Remarks.")
    replaces: _Replaced = Field(description="Stored splits that were replaced: where their rows are now.")
    where: list[str] = Field(description="Conditions that the rows meet, in canonical form.")
    splits: dict[str, Split]


class TensorDescription(_Answer):
    name: str
    dtype: str
    shape: list[int]


class Limits(_Answer):
    body_bytes: int
    rows: int


class PackedInfo(_Answer):
    by: str = Field(description="The field whose lengths count.")
    rows: int = Field(description="Rows of the dataset in the packed rows.")
    empty: int = Field(description="Rows of no items, which are left out.")
    items: int = Field(description="Items in all packed rows together.")
    fill: float = Field(description="Share of the places of all packed rows that hold items.")


class Plan(_Answer):
    dataset: str
    revision: str
    split: str
    stored: bool | None = Field(description="Whether this is a split as stored in the files.")
    note: str | None
    replaces: _Replaced
    where: list[str] = Field(description="Conditions that the rows meet, in canonical form.")
    joined: dict[str, str] = Field(description="Revision of each joined dataset, by its name.")
    rows: int = Field(description="Rows of one epoch.")
    batch_size: int
    batches: int
    last: Literal["keep", "drop", "pad"]
    window: int | None
    bucket_rows: int | None = Field(
        description="With `bucket`: how many rows are sorted together. It is `bucket`, rounded up to whole batches, or "
        "down at the limit."
    )
    rows_decoded_together: int
    last_rows: int = Field(description="Rows of the last batch.")
    ragged: bool = Field(description="Batches have different lengths: `batch_bytes` excludes text and lists.")
    batch_bytes: int
    last_bytes: int
    part_rows: int = Field(
        description="Rows of a batch that one response may have. If these are fewer than `batch_size`, request batches "
        "in parts, with `from_row` and `to_row`. If `ragged`, an estimate: responses that are too large get 413."
    )
    packed: PackedInfo | None = Field(description="With `pack`: what the packed rows hold; `rows` counts them.")
    tensors: list[TensorDescription]
    limits: Limits = Field(description="Limits of one response.")


class Histogram(_Answer):
    edges: list[float] = Field(description="Bin edges: one more than `counts`.")
    counts: list[int]


class Numbers(_Answer):
    """Statistics of numbers; null if there are none."""

    mean: float | None
    std: float | None = Field(description="Standard deviation, `ddof=0`.")
    min: int | float | None
    max: int | float | None
    count: int | None = Field(description="Number of finite values.")
    zeros: int | None
    nan: int | None
    inf: int | None
    zero_share: float | None
    nan_share: float | None
    histogram: Histogram | None


class Channel(Numbers):
    name: str


class ValueShare(_Answer):
    value: bool | int | float | str
    rows: int
    share: float


class FieldStatistics(Numbers):
    field: str
    split: str
    role: str
    dtype: str
    shape: list[int]
    rows: int
    channel_means: dict[str, float | None] | None = Field(description="Channel means of images.")
    channel_stds: dict[str, float | None] | None
    classes: list[ClassShare] | None = Field(description="Count of every class of a label.")
    classes_kind: str | None
    values: list[ValueShare] | None = Field(description="The most frequent values.")
    distinct: int | None
    lengths: Numbers | None = Field(description="Statistics of row lengths.")
    mean_image: list[int] | None = Field(
        description="Shape of the mean image, if there is one: see `/stats/mean-image`."
    )
    channels: list[Channel] | None


class Statistics(_Answer):
    dataset: str
    revision: str
    split: str
    stored: bool | None
    note: str | None
    replaces: _Replaced
    where: list[str] = Field(description="Conditions that the rows meet, in canonical form.")
    rows: int
    fields: dict[str, FieldStatistics]


class Job(_Answer):
    job: str
    url: str
    status: Literal["queued", "running", "done", "failed"]
    done: int
    total: int
    unit: str
    request: dict[str, Any]
    result: str = Field(description="URL of the result.")
    code: str | None = Field(description="Error code, if the job failed.")
    detail: str | None


class TensorPreview(_Answer):
    dtype: str
    shape: list[int]
    min: int | float | str | None = None
    max: int | float | str | None = None
    mean: float | str | None = None
    first: list[Any] = Field(
        description="The first rows if a row is one value, else the first values of the first row."
    )


class Preview(_Answer):
    """Readable summary of tensors. Programs use the binary formats."""

    metadata: dict[str, str]
    tensors: dict[str, TensorPreview]


class TreeLink(_Answer):
    """The link by which an object was found."""

    kind: Literal["hard", "soft", "external", "user-defined"]
    path: str | None = Field(description="Target path of a soft or external link.")
    file: str | None = Field(description="File of an external link, without its folder if that is absolute.")


class TreeMember(_Answer):
    name: str
    dtype: str


class TreeType(_Answer):
    dtype: str = Field(description="numpy's name, or `record`, `string`, `variable-length array`, `reference`.")
    bytes: int | None
    members: list[TreeMember] | None = Field(description="Members of a record, the first 100.")
    enum: dict[str, int] | None = Field(description="Names of an enum's integers, the first 100.")


class TreeFilter(_Answer):
    id: int = Field(description="Registered number of the filter.")
    name: str | None
    options: list[int]


class TreeArray(_Answer):
    shape: list[int] | None = Field(description="`[]` is one value, null is no value.")
    max_shape: list[int | None] | None = Field(description="null is unlimited.")
    layout: str = Field(description="`contiguous`, `chunked`, `compact`, `virtual` or `external`.")
    chunks: list[int] | None
    filters: list[TreeFilter]
    logical_bytes: int | None
    stored_bytes: int | None = Field(description="null if there are too many chunks to count.")


class TreeAttribute(_Answer):
    name: str
    dtype: str | None
    shape: list[int] | None
    value: Any = Field(description="null if `note` says why it is not shown.")
    note: str | None


class TreeField(_Answer):
    name: str
    role: str
    reason: str | None = Field(description="Why the field cannot be read.")


class TreeNode(_Answer):
    """An object in a file."""

    name: str
    path: str | None = Field(description="null if the object cannot be requested by its name.")
    kind: Literal["group", "array", "type", "unresolved"] = Field(
        description="`unresolved`: it cannot be opened, see `note`."
    )
    link: TreeLink
    hard_links: int | None = Field(description="Number of hard links to the object.")
    same_as: str | None = Field(description="Path under which the object is already listed.")
    note: str | None
    type: TreeType | None = Field(description="Type of the elements of an array, or a stored type.")
    array: TreeArray | None
    fields: list[TreeField] = Field(description="Fields of the dataset that are read from this array.")
    attributes: list[TreeAttribute]
    attributes_total: int | None
    members: int | None = Field(description="Number of all members of a group.")
    children: list[TreeNode] | None = Field(description="Members of a group. null if they are not listed here.")


class PassedFile(_Answer):
    """The state in which a file was inspected. One that differs is not read."""

    file: str
    device: int
    inode: int
    size: int = Field(description="Bytes.")
    mtime_ns: int
    ctime_ns: int


class Tree(_Answer):
    dataset: str
    revision: str | None = Field(description="null if the dataset cannot be read.")
    file: str
    files: int = Field(description="Number of the dataset's files.")
    depth: int
    limit: int
    offset: int
    node: TreeNode = Field(description="The object at `path`.")


class LocalOffer(_Answer):
    socket: str = Field(description="Path of the server's Unix socket.")
    instance: str = Field(description="Id of this run of the server.")
    uid: int = Field(description="User id under which the server runs, and which the socket's peer must have.")
    client: str = Field(description="Address and port from which this request came.")
    ticket: str = Field(description="To be sent over the socket.")
    secret: str = Field(description="The key of the proof, in hexadecimal. Never to be sent.")
    seconds: float = Field(description="How long the ticket is valid.")


class LocalProof(_Answer):
    instance: str
    proof: str
