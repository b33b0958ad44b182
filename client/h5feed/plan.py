"""Which rows, in which order, and what becomes of them: the options of all loops, and the plan that comes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast
from urllib.parse import quote, unquote

import numpy as np

from .frames import Frame
from .images import ImageSpec
from .wire import Tensor

if TYPE_CHECKING:
    from .cache import RowCache
    from .prepare.labels import ClassMode
    from .prepare.preparation import FieldNames
    from .prepare.scale import Number


class SplitOptions(TypedDict, total=False):
    """Which rows: see "Split spec" of the HTTP API."""

    test: float | int | None
    """A float is a fraction of all rows, an int a count."""
    val: float | int | None
    stratify: str | None
    """Field to stratify by, or ``"none"``; default: the label field where it is class-like."""
    split_seed: int | None
    split_shuffle: bool | None
    group: str | None
    """Field whose equal values stay together: patients, episodes, videos."""
    folds: int | None
    """Cross-validation: ``val`` is fold `fold` of so many, ``train`` the others."""
    fold: int | None


class EpochOptions(SplitOptions, total=False):
    """Which of the rows an epoch has, and how they come."""

    window: int | None
    """Rows to shuffle among: for files whose chunks hold many rows."""
    balance: bool | None
    """Each class equally often, with repeats."""
    weights: str | None
    """Field of numbers: rows as often as theirs says, with repeats."""
    epoch_rows: int | None
    """Rows of an epoch with `balance` or `weights`; default: as many as the split has."""
    limit: int | None
    encoded: Sequence[str] | None
    """Fields that are stored as JPEG or PNG and are to come so, as bytes: see `Batch.lists`."""
    decode: Literal["server", "client"] | None
    """Where images that are stored as JPEG or PNG are decoded. ``client``: a tenth of the bytes travel, and the threads
    that fetch ahead decode them, to the same pixels; needs ``h5feed[decode]``."""


class OrderOptions(EpochOptions, total=False):
    """Which rows, in which order: see "Order spec" of the HTTP API."""

    shuffle: bool
    seed: int
    epoch: int
    shard: int | None
    shards: int | None
    last: Literal["keep", "drop", "pad"] | None
    fields: Sequence[str] | None


class ShardOptions(TypedDict, total=False):
    """Which part of each step a reader has."""

    shard: int | Literal["auto"]
    """``"auto"``: the rank of this process; see `h5feed.loops.sharding.shard_of`."""
    shards: int | None
    last: Literal["keep", "drop", "pad"] | None


class PreparationOptions(TypedDict, total=False):
    """What is made of the fields: see `h5feed.prepare.Preparation`."""

    x: FieldNames | None
    y: FieldNames | None
    sample_weight: str | None
    class_mode: ClassMode | None
    rescale: float | Mapping[str, float] | None
    mean: Number | Mapping[str, Number] | None
    std: Number | Mapping[str, Number] | None
    transform: Any


class PassOptions(TypedDict, total=False):
    """How passes go, and how they are fetched: see `h5feed.loops.loader.Loader`."""

    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    connections: int | None
    readahead: int | None
    cache: str | os.PathLike[str] | RowCache | None


class LoaderOptions(EpochOptions, ShardOptions, PreparationOptions, PassOptions, total=False):
    """Options of `Dataset.loader` and `Dataset.tf_data`."""


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


def split_options(options: Mapping[str, Any]) -> SplitOptions:
    """Those options that divide rows: without such, `stratify` is of ``balance``."""
    found = {name: value for name, value in options.items() if name in SplitOptions.__annotations__}
    if all(found.get(name) is None for name in ("test", "val", "folds")):
        found.pop("stratify", None)
    return cast("SplitOptions", found)


@dataclass(frozen=True)
class Plan:
    """What one epoch of an order looks like, known before the first fetch."""

    rows: int
    batches: int
    batch_bytes: int
    """Bytes of one full batch on the wire."""
    params: Mapping[str, str]
    """The order spec with the revision pinned."""
    batch_size: int
    tensors: tuple[Tensor, ...]
    """What a full batch consists of when it is handed out, the row ids and weights included."""
    max_rows: int
    """Rows of one answer of the server at most."""
    max_bytes: int
    """Bytes of one answer at most."""
    last_rows: int
    """Rows of the last batch."""
    frame: Frame
    """What each batch is on the wire."""
    decoding: Mapping[str, ImageSpec]
    """Fields that come as bytes of image files, and what they are decoded to here."""
    stored: bool | None = None
    """Whether the rows are those of a split that is stored; None for all rows."""
    note: str | None = None
    """What one might not expect of the splits, and which stored ones they take the place of."""

    def of_fields(self, names: Sequence[str]) -> Plan:
        """The same order, of some of its fields as they come."""
        params = {**self.params, "fields": parameter(list(names))}
        encoded = [name for name in params.pop("encoded", "").split(",") if unquote(name) in names]
        params |= {"encoded": ",".join(encoded)} if encoded else {}
        return replace(self, params=params, frame=self.frame.only(names))


def tail_of(asked: Mapping[str, Any]) -> str:
    """What becomes of the tail."""
    return asked.get("last") or ("keep" if int(asked.get("shards") or 1) == 1 else "pad")


def names_of(given: str | Sequence[str] | None) -> list[str]:
    """Names of fields that are given as a list, or as the API writes it."""
    if isinstance(given, str):
        return [unquote(name) for name in given.split(",") if name]
    return list(given or ())


def parameter(value: object) -> str:
    """A parameter as the API writes it: fractions with a decimal point, lists with commas."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(float(value), trim="0")
    if isinstance(value, (list, tuple)):
        return ",".join(quote(str(item), safe="") for item in value)
    return str(value)
