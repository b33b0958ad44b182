"""The fields of a plan: of which rows of which datasets its samples are made, see `WindowsSpec` and `JoinsSpec`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from h5feed.errors import BadParameter
from h5feed.offsets import axes_of

from ..catalog.dataset import names_in
from ..splits.order_spec import OrderSpec
from .joins import Joined, Source
from .sampled import RowMap, SampledField, sampled


def fields_of(joined: Joined, spec: OrderSpec) -> tuple[SampledField, ...]:
    """The fields of samples, which are rows or windows of rows of one or several datasets.

    Raises
    ------
    BadParameter
        Rows of a field do not form an array, or another name for a field is that of a field.
    FieldNotFound, UnsupportedField
    """
    renamed = {}
    for name, taken in spec.offsets_by_name.items():
        source = joined.source(taken.field)
        if name != taken.field:
            if joined.has(name):
                raise BadParameter(f"offsets={spec.offsets:.300}: {name!r} is a field of its own: choose another name")
            renamed[name] = source._replace(field=replace(source.field, name=name))
    if spec.fields is None:
        sources = [*joined.chosen(None, spec.encoded), *renamed.values()]
    else:
        names = names_in(spec.fields)
        stored = joined.chosen([name for name in names if name not in renamed], spec.encoded)
        by_name = renamed | {source.field.name: source for source in stored}
        sources = [by_name[name] for name in dict.fromkeys(names)]
    return tuple(part for source in sources for part in sampled(source.field, _row_map(joined, source, spec)))


def _row_map(joined: Joined, source: Source, spec: OrderSpec) -> RowMap | None:
    """Which rows of a field samples are made of; None: those of the same number."""
    field, named = source.field, spec.offsets_by_name.get(source.field.name)
    offsets = spec.default_offsets if named is None else named.offsets
    partners, windows, axes = source.partners, joined.windows, axes_of(offsets)
    if axes and field.is_ragged:
        alike = "are sparse" if field.is_sparse else "differ in length"
        raise BadParameter(
            f"rows of {field.name!r} {alike}, so several of them are no array: give it one offset, as in "
            f"offsets={field.name}:0, or leave it out of fields"
        )
    if offsets == 0 or windows is None:
        return None if partners is None else RowMap(partners)
    # steps: (), or (number of offsets,)
    steps = np.asarray(offsets, np.int64)
    if spec.ends == "drop":
        own = RowMap(lambda samples: samples.reshape(-1, *[1] * len(axes)) + steps, axes)
    else:
        own = RowMap(
            lambda samples: windows().rows(samples, steps), axes, lambda samples: windows().mask(samples, steps)
        )
    return own if partners is None else replace(own, rows=lambda samples: partners(own.rows(samples)))
