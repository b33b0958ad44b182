"""Options of all loops: the rows, their order, and how they are prepared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

import numpy.typing as npt

from .cache import RowCache

ClassMode = Literal["auto", "int", "sparse", "categorical", "binary", "input", "raw"]
"""How targets are made from labels: see `h5feed.prepare.Preparation`."""

FieldNames = str | Sequence[str] | Mapping[str, str]
"""Input or target fields: one name, several, or a mapping from the names of a model's inputs or outputs."""

Statistic = float | npt.ArrayLike | Literal["server"]
"""A mean or standard deviation: one number, one per channel or position, or computed by the server."""


class WindowOptions(TypedDict, total=False):
    """Options that make a sample of several rows of an episode: see "Windows of rows" in the HTTP API."""

    sequence_length: int | None
    """Rows of a sample, from its own row on: each field gets one more axis. As in
    `keras.utils.timeseries_dataset_from_array`, as are the next two."""
    sequence_stride: int | None
    """A sample begins every so many rows; default: 1."""
    sampling_rate: int | None
    """Step between the rows of a sequence; default: 1."""
    offsets: Mapping[str, int | Sequence[int] | tuple[str, int | Sequence[int]]] | str | None
    """Rows of single fields, relative to the sample's own row: ``{"image": [-1, 0], "action": range(16)}``. An int,
    such as ``{"target": 24}``, adds no axis. ``{"next": ("image", 1)}`` adds rows of a field under another name."""
    ends: Literal["drop", "pad", "pad_start", "pad_end"] | None
    """``drop``, the default: samples that reach over an end of their episode are left out. ``pad``: the first or last
    row is repeated, and ``NAME.mask`` is False there. ``pad_start``, ``pad_end``: only this end is padded, and samples
    that reach over the other one are left out."""
    episode: str | None
    """Field whose value changes where an episode ends, or ``"none"``; default: the groups and files of the dataset."""


class SplitOptions(WindowOptions, total=False):
    """Options that select the rows: see "Split parameters" in the HTTP API."""

    test: float | int | None
    """A float is a fraction of all rows, an int is a number of rows."""
    val: float | int | None
    stratify: str | None
    """Field to stratify by, or ``"none"``; default: the label field, if it holds classes."""
    split_seed: int | None
    split_shuffle: bool | None
    group: str | None
    """Field whose equal values stay in one split: patients, episodes, videos; ``"__pieces__"``: the groups and files
    that the dataset is made of."""
    folds: int | None
    """Number of folds for cross-validation: ``val`` is fold `fold`, ``train`` the others."""
    fold: int | None
    where: str | Sequence[str] | None
    """Conditions that rows must meet, such as ``"label in cat, dog"``: see "Filters" in the reference. All must hold.
    Splits are those of all rows, filtered."""


class EpochOptions(SplitOptions, total=False):
    """Options that select the rows of an epoch and how they are sent."""

    window: int | None
    """Number of rows to shuffle among, by whole chunks: for files whose chunks hold many rows."""
    pad: bool | str | Sequence[str] | None
    """Fields of lists or text to pad, or True for all: see `h5feed.ragged`."""
    max_length: int | Mapping[str, int] | None
    """Length of padded rows, or one for each field; with `pad_to`, their maximum length. Default: the length of the
    longest row of the batch, rounded up."""
    truncate: Literal["start", "end"] | None
    """The part of rows longer than `max_length` to keep; default: they are an error."""
    pad_to: int | Sequence[int] | None
    """Rounds the length of the longest row of the batch up: to a multiple of this number (8), or to the next of these
    lengths. The result is at most `max_length`."""
    pad_value: float | Mapping[str, float] | None
    """What fills the rest of a padded or packed row; default 0."""
    bucket: int | None
    """Put rows of similar length into the same batch: rows are sorted by length within windows of this many rows of
    the order, and the batches are shuffled."""
    bucket_by: str | None
    """With `bucket`: the field whose lengths count; default: the only list field."""
    bucket_group: int | None
    """With `bucket`: number of consecutive batches of similar lengths; default: `shards`."""
    pack: int | None
    """Pack several rows into one of this many items. `batch_size` counts packed rows."""
    pack_by: str | None
    """With `pack`: the field whose lengths count; default: the only list field."""
    overlong: Literal["truncate", "split"] | None
    """With `pack`: what to do with longer rows; default: they are an error."""
    balance: bool | None
    """Draw each class equally often; rows may repeat."""
    weights: str | npt.ArrayLike | None
    """Draw each row as often as its number says, relative to the others; rows may repeat. A field of numbers, or an
    array with a number ≥ 0 for each row of the dataset, which is sent to the server once."""
    epoch_rows: int | None
    """Rows per epoch with `balance` or `weights`; default: the number of rows in the split."""
    crop: str | int | Sequence[int] | None
    """Train on parts of rows of these lengths, such as ``(64, 64)`` pixels of images or ``(64, 64, 64)`` of volumes.
    Channels are not cropped. ``batch["__crop__"]`` has the start of each part."""
    crop_fields: Sequence[str] | str | None
    """Fields to crop, all with the same part of a row; default: all that have at least so many axes."""
    crop_at: Literal["random", "center", "grid"] | None
    """``random``, the default: at another place for each sample and epoch. ``center``: in the middle. ``grid``: each
    row becomes as many samples as it takes to cover it."""
    limit: int | None
    """Use only the first rows of the split that meet `where`, at most this many."""
    join: str | Sequence[str] | None
    """Other datasets whose rows are parts of the same samples, as for `Dataset.join`. Their fields are
    ``OTHER/field``."""
    how: Literal["inner"] | None
    """With `join`: ``"inner"`` leaves out rows that have no partner."""
    encoded: Sequence[str] | None
    """Fields stored as JPEG or PNG to receive as encoded bytes: see `Batch.lists`."""
    decode: Literal["auto", "server", "client"] | None
    """Where to decode. ``auto``, the default: compressed chunks, and images stored as JPEG or PNG, are decoded by the
    read-ahead threads if that makes responses at least 1.2 times shorter and the arrays are certain to be the same, and
    on the server's machine the rows are read from its files; needs ``h5feed[decode]``, else as ``server``. ``server``:
    everything is decoded there. ``client``: as ``auto``, and images are always sent as they are and decoded here, to
    the same pixels."""
    compress: Literal["zstd"] | None
    """Let the server compress rows that are not stored in compressed chunks, for slow links; needs ``h5feed[decode]``.
    Fields that do not get at least 1.2 times shorter come as they are. Ignored if the server is on this machine, and
    for single batches. The arrays are the same."""
    decode_cf: bool | None
    """Unpack numbers that are packed by the CF conventions of netCDF: ``stored * scale_factor + add_offset``, with NaN
    for missing values, in the float type that xarray uses. The read-ahead threads do it."""
    sparse: Literal["dense", "csr"] | None
    """What sparse rows become. ``dense``, the default of loops: arrays of equal shape, which read-ahead threads fill.
    ``csr``: in `Dataset.batches`, where it is the default, the parts of a sparse matrix, see `Batch.sparse`; in
    `Dataset.loader`, a ``scipy.sparse.csr_matrix``; in `Dataset.torch`, a sparse CSR tensor."""


class OrderOptions(EpochOptions, total=False):
    """Options that select the rows and their order: see "Order parameters" in the HTTP API."""

    shuffle: bool
    seed: int
    epoch: int
    shard: int | None
    shards: int | None
    last: Literal["keep", "drop", "pad"] | None
    fields: Sequence[str] | None


class ShardOptions(TypedDict, total=False):
    """Options that select the shard of a reader."""

    shard: int | Literal["auto"]
    """``"auto"``: the rank of this process; see `h5feed.loops.sharding.shard_of`."""
    shards: int | None
    last: Literal["keep", "drop", "pad"] | None


class PreparationOptions(TypedDict, total=False):
    """How batches are prepared: see `h5feed.prepare.Preparation`."""

    x: FieldNames | None
    y: FieldNames | None
    sample_weight: str | None
    class_mode: ClassMode | None
    classes: Sequence[str | float] | None
    """Only rows of these classes, numbered from 0 in this order."""
    rescale: float | Mapping[str, float] | None
    mean: Statistic | Mapping[str, Statistic] | None
    std: Statistic | Mapping[str, Statistic] | None
    transform: Any


class RowOptions(EpochOptions, ShardOptions, PreparationOptions, total=False):
    """Options of all loops: the rows of an epoch, the shard, and how batches are prepared."""


class PassOptions(TypedDict, total=False):
    """Options of passes and how they are fetched: see `h5feed.loops.loader.Loader`."""

    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    connections: int | None
    readahead: int | None
    cache: str | os.PathLike[str] | RowCache | None


class LoaderOptions(RowOptions, PassOptions, total=False):
    """Options of `Dataset.loader` and `Dataset.tf_data`."""

    follow: bool
    """Start each pass with the rows that the dataset has then. Joined datasets stay at the revision that they had when
    the loop was made; a line is logged when they change."""


class TorchOptions(LoaderOptions, total=False):
    """Options of `Dataset.torch`: see `h5feed.torch.TorchBatches`."""

    pin_memory: bool


class TorchRowsOptions(SplitOptions, PreparationOptions, total=False):
    """Options of `Dataset.torch_map`: see `h5feed.torch.TorchRows`."""


class SequenceOptions(LoaderOptions, total=False):
    """Options of `Dataset.sequence`: see `h5feed.keras.Sequence`."""

    verbose: bool
    workers: int | None
    use_multiprocessing: bool
    max_queue_size: int | None


def field_names(chosen: FieldNames | None) -> list[str]:
    """The names in an option that chooses fields."""
    if chosen is None:
        return []
    if isinstance(chosen, Mapping):
        return list(chosen.values())
    return [chosen] if isinstance(chosen, str) else list(chosen)


def split_options(options: Mapping[str, Any]) -> SplitOptions:
    """The options that define splits. Without `test`, `val` and `folds`, `stratify` belongs to ``balance``."""
    found = {name: value for name, value in options.items() if name in SplitOptions.__annotations__}
    if all(found.get(name) is None for name in ("test", "val", "folds")):
        found.pop("stratify", None)
    return cast("SplitOptions", found)
