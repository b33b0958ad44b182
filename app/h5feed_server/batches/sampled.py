"""The fields of a plan: of which rows of a field a sample is made.

Usually that is one row, which has the number of the sample. Other kinds of samples give a function: windows of rows and
joins with other datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.offsets import MASK
from h5feed.stored.column import Column
from h5feed.stored.crop_reader import Boxes

from ..catalog.dataset import Field
from ..storage.reader import Reader

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


_WORTH_TAKING = 0.8
"""If at most this share of the rows of a batch are distinct, each is read once, and then copied to its places."""


@dataclass(frozen=True)
class RowMap:
    """Which rows of a field each sample is made of.

    Parameters
    ----------
    rows : callable
        From sample ids, (k,) int64, to row ids of the field, (k, *extra) int64. It is called for every batch.
    extra : tuple of int
        Axes that a sample has in addition to those of a row; before them.
    mask : callable, optional
        From sample ids, (k,) int64, to which of their rows are real, (k, *extra) bool. It is sent as ``NAME.mask``.
    """

    rows: Callable[[Int64s], Int64s]
    extra: tuple[int, ...] = ()
    mask: Callable[[Int64s], Bools] | None = None


@dataclass(frozen=True)
class SampledField:
    """A field of a plan.

    Parameters
    ----------
    field : Field
        It may be of another dataset than the plan, and a part of a sparse field: see `sampled`.
    row_map : RowMap, optional
        Default: a sample is the row of the same number.
    crop : tuple of int, optional
        Lengths of the part of each row that is sent, along its first axes. Default: all of it.
    """

    field: Field
    row_map: RowMap | None = None
    crop: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def column(self) -> Column:
        """Where its rows are stored."""
        return self.field.column

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype on the wire."""
        return self.field.dtype

    @property
    def extra(self) -> tuple[int, ...]:
        """Axes that a sample has in addition to those of a row."""
        return () if self.row_map is None else self.row_map.extra

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample on the wire."""
        return (*self.extra, *(self.crop or ()), *self.field.sample_shape[len(self.crop or ()) :])

    @property
    def rows_per_sample(self) -> int:
        return math.prod(self.extra)

    @property
    def is_text(self) -> bool:
        """Whether its items are bytes of text."""
        return self.field.is_text

    @property
    def is_ragged(self) -> bool:
        """Whether it is sent as flat items with offsets."""
        return self.field.is_ragged

    @property
    def offsets_name(self) -> str:
        """Name of the tensor with its offsets, if it is ragged."""
        return self.field.offsets_name

    @property
    def has_mask(self) -> bool:
        return self.row_map is not None and self.row_map.mask is not None

    @property
    def mask_name(self) -> str:
        """Name of the tensor with its mask; only if `has_mask`."""
        return self.field.whole_name + MASK

    def rows(self, samples: Int64s) -> Int64s:
        """Row ids of the field, (*any, *extra), for sample ids of any shape, (*any)."""
        if self.row_map is None:
            return samples
        return self.row_map.rows(samples.reshape(-1)).reshape(*samples.shape, *self.extra)

    def flat_rows(self, samples: Int64s) -> Int64s:
        """Row ids of the field, (k * rows_per_sample,), which may repeat, for sample ids, (k,)."""
        return samples if self.row_map is None else self.row_map.rows(samples).reshape(-1)

    def read(self, reader: Reader, samples: Int64s, out: npt.NDArray[Any], starts: Int64s | None = None) -> None:
        """Read the rows of samples, (k,), into `out`, (k, *sample_shape). Not if `is_ragged`.

        Parameters
        ----------
        starts : (k, cropped axes) int64, optional
            Where the parts of the rows begin; only needed with `crop`.
        """
        if self.crop is not None:
            assert starts is not None
            boxes = self.boxes(samples, starts)
            reader.read_crops(self.column, boxes, out.reshape(len(boxes), *boxes.shape(self.field.sample_shape)))
            return
        rows = self.rows(samples)
        kept = reader.whole(self.column, rows.size)
        if kept is not None:
            # The rows are known to exist. "clip" avoids the buffer that "raise" needs to leave `out` intact on errors.
            np.take(kept, rows, axis=0, out=out, mode="clip")
        else:
            self.read_rows(reader, rows, out)

    def read_rows(self, reader: Reader, rows: Int64s, out: npt.NDArray[Any]) -> None:
        """Read rows of the field, (k, *extra), into `out`, (k, *sample_shape), bypassing the cache of small fields."""
        if self.row_map is None:
            reader.read_from_source(self.column, rows, out)
            return
        flat = out.reshape(-1, *self.field.sample_shape)
        distinct, places = np.unique(rows.reshape(-1), return_inverse=True)
        if len(distinct) > _WORTH_TAKING * rows.size:
            reader.read_from_source(self.column, rows.reshape(-1), flat)
            return
        read = np.empty((len(distinct), *self.field.sample_shape), self.dtype)
        reader.read_from_source(self.column, distinct, read)
        np.take(read, places, axis=0, out=flat, mode="clip")

    def boxes(self, samples: Int64s, starts: Int64s) -> Boxes:
        """Which parts of which rows samples, (k,), have; only with `crop`. See `read`."""
        assert self.crop is not None
        return Boxes(self.flat_rows(samples), np.repeat(starts, self.rows_per_sample, axis=0), self.crop)

    def put_mask(self, samples: Int64s, out: Bools) -> None:
        """Write which rows of samples, (*any), are real, into `out`, (*any, *extra); only if `has_mask`."""
        assert self.row_map is not None and self.row_map.mask is not None
        out[...] = self.row_map.mask(samples.reshape(-1)).reshape(out.shape)


def sampled(field: Field, row_map: RowMap | None = None) -> tuple[SampledField, ...]:
    """A field of which samples are made of some rows; if it is sparse, its parts, of which the first has the mask."""
    first, *others = field.parts
    unmasked = None if row_map is None else replace(row_map, mask=None)
    return SampledField(first, row_map), *(SampledField(part, unmasked) for part in others)


def each_row(fields: Sequence[Field]) -> tuple[SampledField, ...]:
    """Fields of which a sample is the row of the same number; sparse ones as their parts."""
    return tuple(part for field in fields for part in sampled(field))
