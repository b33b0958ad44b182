"""Samples that are parts of rows: see `CropsSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from h5feed.crops import CropAt, centre, cropped_fields, grid_starts, random_starts, samples_of_row
from h5feed.errors import BadParameter

from ..splits.order_spec import OrderSpec
from .sampled import SampledField

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Crops:
    """Which part of its row each sample of a plan has.

    Attributes
    ----------
    lengths : tuple of int
        Of a part, along the first axes of the rows.
    extents : tuple of int
        Lengths of the rows along the same axes.
    at : str
        See `CropsSpec.crop_at`.
    """

    lengths: tuple[int, ...]
    extents: tuple[int, ...]
    at: CropAt

    @property
    def samples_of_row(self) -> int:
        """Number of samples that each row is made into."""
        return samples_of_row(self.lengths, self.extents, self.at)

    def starts(self, samples: Int64s, positions: Int64s, key: bytes) -> Int64s:
        """Where the parts begin in their rows, (k, axes) int64.

        Parameters
        ----------
        samples : (k,) int64
            Row ids, or numbers of cells of the grids of all rows, one grid after the other.
        positions : (k,) int64
            Positions of the samples in the epoch.
        key : bytes
            Of the epoch, see `Order.crop_key`.
        """
        if self.at == "random":
            return random_starts(positions, self.lengths, self.extents, key)
        if self.at == "grid":
            return grid_starts(samples % self.samples_of_row, self.lengths, self.extents)
        return np.tile(np.array(centre(self.lengths, self.extents), np.int64), (len(samples), 1))


def with_crops(spec: OrderSpec, fields: Sequence[SampledField]) -> tuple[tuple[SampledField, ...], Crops | None]:
    """The fields of a plan, of which some are cropped, and how; None if nothing is.

    Raises
    ------
    FieldNotFound, BadParameter
    """
    lengths = spec.crop_lengths
    if lengths is None:
        return tuple(fields), None
    named = None
    if spec.crop_fields is not None:
        named = [unquote(name) for name in spec.crop_fields.split(",") if name]
    rows = {field.field.whole_name: field.field.row_shape for field in fields}
    names, extents = cropped_fields(lengths, named, rows)
    crops = Crops(lengths, extents, spec.crop_at)
    if crops.samples_of_row >= 1 << 40:
        raise BadParameter(f"crop={spec.crop} would make {crops.samples_of_row} samples of each row: use larger crops")
    return tuple(replace(field, crop=lengths) if field.name in names else field for field in fields), crops
