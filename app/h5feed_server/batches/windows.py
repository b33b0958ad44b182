"""Fields of samples that are windows of rows: see `WindowsSpec`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from h5feed.errors import BadParameter
from h5feed.offsets import Offsets, axes_of

from ..catalog.dataset import Dataset, Field, names_in
from ..splits.order_spec import OrderSpec
from ..splits.windows import Windows
from ..splits.windows_spec import WindowsSpec
from .sampled import RowMap, SampledField


def windows_of(dataset: Dataset, spec: OrderSpec, windows: Callable[[], Windows]) -> tuple[SampledField, ...]:
    """The fields of samples that are windows of rows.

    Parameters
    ----------
    windows : callable
        Returns the samples. It is a function so that plans do not hold references to what a cache may want to drop.

    Raises
    ------
    BadParameter
        Rows of a field differ in length, or another name for a field is that of a field.
    FieldNotFound, UnsupportedField
    """
    renamed = {}
    for name, taken in spec.offsets_by_name.items():
        field = dataset.field(taken.field)
        if name != taken.field:
            if any(own.name == name for own in dataset.fields):
                raise BadParameter(f"offsets={spec.offsets:.300}: {name!r} is a field of its own: choose another name")
            renamed[name] = replace(field, name=name)
    if spec.fields is None:
        fields = [*dataset.chosen(None, spec.encoded), *renamed.values()]
    else:
        names = names_in(spec.fields)
        stored = dataset.chosen([name for name in names if name not in renamed], spec.encoded)
        by_name = renamed | {field.name: field for field in stored}
        fields = [by_name[name] for name in dict.fromkeys(names)]
    return tuple(_windowed(field, spec, windows) for field in fields)


def _windowed(field: Field, spec: WindowsSpec, windows: Callable[[], Windows]) -> SampledField:
    named = spec.offsets_by_name.get(field.name)
    offsets = spec.default_offsets if named is None else named.offsets
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
