"""Fields of samples that are windows of rows: see `WindowsSpec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from h5feed.errors import BadParameter
from h5feed.offsets import Offsets, axes_of
from h5feed.suggestions import did_you_mean

from ..catalog.dataset import Field
from ..splits.windows import Windows
from ..splits.windows_spec import WindowsSpec
from .sampled import RowMap, SampledField


def windows_of(fields: Sequence[Field], spec: WindowsSpec, windows: Callable[[], Windows]) -> tuple[SampledField, ...]:
    """The fields of samples that are windows of rows.

    Parameters
    ----------
    windows : callable
        Returns the samples. It is a function so that plans do not hold references to what a cache may want to drop.

    Raises
    ------
    BadParameter
        Offsets are given for a field that is not among `fields`, or for one whose rows differ in length.
    """
    chosen = {field.name: field for field in fields}
    for name in spec.offsets_by_field:
        if name not in chosen:
            raise BadParameter(
                f"offsets={spec.offsets:.300}: {name!r} is not among the requested fields: {did_you_mean(name, chosen)}"
            )
    return tuple(_windowed(field, spec, windows) for field in fields)


def _windowed(field: Field, spec: WindowsSpec, windows: Callable[[], Windows]) -> SampledField:
    offsets = spec.offsets_by_field.get(field.name, spec.default_offsets)
    if offsets == 0:
        return SampledField(field)
    axes = axes_of(offsets)
    if axes and field.is_ragged:
        raise BadParameter(
            f"rows of {field.name!r} differ in length, so several of them are no array: give it one offset, as in "
            f"offsets={field.name}:0, or leave it out of fields"
        )
    return SampledField(field, _row_map(offsets, spec, windows))


def _row_map(offsets: Offsets, spec: WindowsSpec, windows: Callable[[], Windows]) -> RowMap:
    # steps: (), or (number of offsets,)
    steps, axes = np.asarray(offsets, np.int64), axes_of(offsets)
    if spec.ends == "drop":
        return RowMap(lambda samples: samples.reshape(-1, *[1] * len(axes)) + steps, axes)
    return RowMap(
        lambda samples: windows().rows(samples, steps),
        axes,
        lambda samples: windows().mask(samples, steps),
    )
