"""Plans where every row goes: split, file, group and position. Computed before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter
from h5feed.runs import consecutive
from pydantic import ValidationError

from ..catalog.split_names import SPLITS
from ..catalog.split_record import SplitRecord
from ..splits.labels import Labels, NoClasses, Strata, read_labels
from ..splits.split_spec import SplitSpec
from ..splits.stored import divide, has_all
from .options import BuildOptions
from .source import Column, Source

Rows = npt.NDArray[np.int64]

_SPLIT_FILES = "{}.hdf5"
_FILE_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")


@dataclass(frozen=True)
class Part:
    """Rows of one group in one file, in order.

    Attributes
    ----------
    split : str
        Empty where nothing is split.
    group : str
        Its name in the file; empty for the root.
    rows : (n,) int64
        Of the source.
    """

    split: str
    group: str
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """Everything that is to be written.

    Attributes
    ----------
    files : dict of Path to tuple of Part
    notes : tuple of str
        What one might not expect of the splits.
    method : str or None
        What of scikit-learn gives the same splits.
    record : SplitRecord or None
        How they were drawn, to be kept in every file.
    """

    files: dict[Path, tuple[Part, ...]]
    notes: tuple[str, ...] = ()
    method: str | None = None
    record: SplitRecord | None = None

    def parts(self) -> Iterator[Part]:
        for parts in self.files.values():
            yield from parts

    def rows_of(self, split: str) -> Rows:
        """Of the source."""
        own = [part.rows for part in self.parts() if part.split == split]
        return np.concatenate(own) if own else np.zeros(0, np.int64)

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(part.split for part in self.parts()))

    @property
    def rows(self) -> int:
        return sum(len(part.rows) for part in self.parts())

    @property
    def train(self) -> Rows:
        """The rows used for means: train, or all rows without splits."""
        return self.rows_of("train" if "train" in self.splits else self.splits[0] if self.splits else "")


@dataclass(frozen=True)
class _Divided:
    """Rows of each split, ascending; one split of no name where nothing is split. See `Plan` for the rest."""

    rows: dict[str, Rows]
    record: SplitRecord | None
    notes: tuple[str, ...] = ()
    method: str | None = None


def make_plan(source: Source, options: BuildOptions, output: Path, usable: npt.NDArray[np.bool_]) -> Plan:
    """Divide the usable rows of a source among splits and files.

    Parameters
    ----------
    usable : (rows,) bool
        Rows that are wanted and not broken.

    Raises
    ------
    BadParameter, SplitImpossible
    """
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise BadParameter("there are no rows to write: all rows of the source are broken")
    division = _divide(source, options, rows)
    divided = division.rows
    files: dict[Path, tuple[Part, ...]]
    if options.split_files:
        files = {
            output / _SPLIT_FILES.format(split or "all"): (Part(split, "", own),) for split, own in divided.items()
        }
    elif options.shards > 1:
        if options.shards > min(map(len, divided.values())):
            raise BadParameter(f"shards={options.shards} is more than the number of rows in a split")
        files = {
            shard_path(output, number, options.shards): tuple(
                Part(split, split, np.array_split(own, options.shards)[number]) for split, own in divided.items()
            )
            for number in range(options.shards)
        }
    else:
        files = {output: tuple(Part(split, split, own) for split, own in divided.items())}
    return Plan(files, division.notes, division.method, division.record)


def check_output(output: Path, options: BuildOptions) -> Path:
    """The output path with its extension; a folder if each split gets a file.

    Raises
    ------
    BadParameter
    """
    if options.split_files:
        if output.exists() and not output.is_dir():
            raise BadParameter(f"split_files needs a folder: {output} is a file")
        return output
    if output.is_dir():
        raise BadParameter(f"{output} is a folder: pass a file such as {output / 'images.h5'}")
    return output if output.suffix.lower() in _FILE_SUFFIXES else output.with_name(f"{output.name}.h5")


def shard_path(output: Path, number: int, shards: int) -> Path:
    """``name-00000-of-00010.h5``."""
    return output.with_name(f"{output.stem}-{number:05d}-of-{shards:05d}{output.suffix}")


def limited(limit: int | None, rows: int, labels: Column | None, splits: npt.NDArray[Any] | None) -> Rows:
    """The first rows of each class and split in turn, `limit` in total, ascending."""
    if limit is None or limit >= rows:
        return np.arange(rows)
    keys = np.zeros((2, rows), np.int64)
    if labels is not None and labels.values.ndim == 1:
        keys[0] = np.unique(labels.values, return_inverse=True)[1]
    if splits is not None:
        keys[1] = splits
    together = keys[0] * (int(keys[1].max()) + 1) + keys[1]
    order = np.argsort(together, kind="stable")
    counts = np.bincount(together)
    # turn: how many of its kind come before each row.
    turn = np.empty(rows, np.int64)
    turn[order] = consecutive(0, counts)
    return np.sort(np.argsort(turn, kind="stable")[:limit])


def _divide(source: Source, options: BuildOptions, rows: Rows) -> _Divided:
    stored = _stored(source, rows)
    # It is of all rows of the source.
    record = source.split_record if len(rows) == source.rows else None
    try:
        asked = {name: getattr(options, name) for name in ("test", "val", "split_seed", "split_shuffle")}
        spec = SplitSpec.model_validate(asked | {"stratify": None if options.stratify else "none"})
    except ValidationError as error:
        item = error.errors()[0]
        reason = item["msg"].removeprefix("Value error, ")
        raise BadParameter(f"{'.'.join(map(str, item['loc'][:1]))}={item['input']}: {reason}") from None
    has_label = source.label is not None
    if not spec.splits_rows or has_all(record, spec, has_label):
        return _Divided(stored or {"": rows}, record)
    places = {name: np.searchsorted(rows, own).astype(np.int32) for name, own in stored.items()}
    strata = _strata(source, options, rows)
    drawn = divide(len(rows), places, record, spec, strata, None, has_label=has_label)
    divided = {split: rows[drawn.rows[split]] for split in SPLITS if split in drawn.rows}
    record = SplitRecord(
        rows={split: len(own) for split, own in divided.items()},
        test=spec.test,
        val=spec.val,
        split_seed=spec.split_seed,
        split_shuffle=spec.split_shuffle,
        stratify=options.stratify,
        stratified_by=drawn.stratify and drawn.stratify.replace("/", "."),
    )
    return _Divided(divided, record, (drawn.note,) if drawn.note else (), drawn.method)


def _stored(source: Source, rows: Rows) -> dict[str, Rows]:
    if source.splits is None:
        return {}
    own = source.splits[rows]
    return {name: rows[own == number] for number, name in enumerate(SPLITS) if (own == number).any()}


def _strata(source: Source, options: BuildOptions, rows: Rows) -> Strata[Labels] | None:
    if source.label is None or not options.stratify or not options.split_shuffle:
        return None
    values = source.columns[source.label].values[rows]
    try:
        labels = read_labels(lambda: iter([values]), len(rows), values.dtype, values.shape[1:], bins=False)
    except NoClasses as error:
        return Strata(source.label, None, str(error))
    return Strata(source.label, labels)


def counts_per_class(column: Column, rows: Rows) -> Mapping[str, int]:
    """Number of these rows per class, by class name or value."""
    values, counts = np.unique(column.values[rows], return_counts=True)
    names = column.attributes.get("class_names")
    if names is None:
        return {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    return {name: int(counts[values == number].sum()) for number, name in enumerate(names)}


def column_bytes(columns: Mapping[str, Column], rows: int) -> int:
    """Size of the small fields for this many rows, including those that a build adds."""
    each = sum(column.values.dtype.itemsize * int(np.prod(column.values.shape[1:])) for column in columns.values())
    return rows * (each + 40)


def beside(output: Path, what: str) -> Path:
    """A hidden file beside the output; servers ignore it."""
    return Path(os.path.join(output.parent, f".{output.name}.{what}"))
