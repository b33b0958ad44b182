"""Options of all loops: which rows, in which order, and what is made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

import numpy.typing as npt

from .cache import RowCache

ClassMode = Literal["auto", "int", "sparse", "categorical", "binary", "input", "raw"]
"""What targets are made of labels: see `h5feed.prepare.Preparation`."""

FieldNames = str | Sequence[str] | Mapping[str, str]
"""Fields that are inputs or targets: a name, several, or names for a model's inputs and outputs."""

Statistic = float | npt.ArrayLike | Literal["server"]
"""A mean or a standard deviation: a number, one for each channel or place, or as the server counted it."""


class SplitOptions(TypedDict, total=False):
    """Which rows: see "Split parameters" of the HTTP API."""

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
    """Which rows, in which order: see "Order parameters" of the HTTP API."""

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
    mean: Statistic | Mapping[str, Statistic] | None
    std: Statistic | Mapping[str, Statistic] | None
    transform: Any


class RowOptions(EpochOptions, ShardOptions, PreparationOptions, total=False):
    """Which rows an epoch has, which of them come here, and what is made of them: what all loops take."""


class PassOptions(TypedDict, total=False):
    """How passes go, and how they are fetched: see `h5feed.loops.loader.Loader`."""

    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    connections: int | None
    readahead: int | None
    cache: str | os.PathLike[str] | RowCache | None


class LoaderOptions(RowOptions, PassOptions, total=False):
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
