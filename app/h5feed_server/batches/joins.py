"""Joined datasets: whose rows are parts of the samples of a plan, and which ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, KeysNotFound
from h5feed.suggestions import no_field

from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field
from ..keys.partners import Partners
from ..row_bits import RowSet, as_list
from ..splits.joins_spec import Join
from ..splits.order_spec import OrderSpec
from .sampled import RowMap, SampledField, each_row

Int64s = npt.NDArray[np.int64]

_SHOWN = 5


@dataclass(frozen=True)
class Joined:
    """The datasets that a plan joins.

    Attributes
    ----------
    dataset : Dataset
        Whose rows number the samples.
    others : tuple of (Join, Dataset)
    """

    dataset: Dataset
    others: tuple[tuple[Join, Dataset], ...]
    inner: bool
    partners: Partners

    @classmethod
    def of(cls, catalog: Catalog, partners: Partners, dataset: Dataset, spec: OrderSpec) -> Joined:
        """Look up the datasets that `spec` joins, as far as the caller may see them.

        Raises
        ------
        DatasetNotFound, RevisionChanged, Unreadable
        """
        others = tuple((join, catalog.dataset(join.dataset, join.revision)) for join in spec.joins)
        return cls(dataset, others, spec.how == "inner", partners)

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the state of all joined datasets."""
        return tuple((other.names.key, other.revision, other.identity) for _, other in self.others)

    @property
    def revisions(self) -> str:
        """The revisions of all datasets, as one text."""
        return " ".join([self.dataset.revision, *(other.revision for _, other in self.others)])

    @property
    def is_pinned(self) -> bool:
        """Whether the request names the revisions of the joined datasets."""
        return all(join.revision is not None for join, _ in self.others)

    @property
    def about(self) -> dict[str, str]:
        """The revision of each joined dataset."""
        return {other.name: other.revision for _, other in self.others}

    @property
    def by_key(self) -> list[str]:
        """Names of the datasets that are joined by key, not by row number."""
        return [other.name for join, other in self.others if join.key is not None]

    def partners_of(self, samples: Int64s) -> dict[str, Int64s]:
        """The rows of the datasets in `by_key` that samples have, (k,), by name."""
        return {other.name: self._partners(join, other, samples) for join, other in self.others if join.key is not None}

    def check(self) -> None:
        """Check that every join is possible.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter, AmbiguousKey, TooLarge
        InProgress
            A job finds partners.
        """
        for join, other in self.others:
            taken = next((one.name for one in self.dataset.fields if one.name.startswith(f"{other.name}/")), None)
            if taken is not None:
                raise BadParameter(f"join={join.dataset}: {self.dataset.name!r} has a field named {taken!r} itself")
            if join.key is not None:
                self._rows_of(join, other)
            elif other.rows != self.dataset.rows:
                raise BadParameter(
                    f"join={join.dataset}: {other.name!r} has {other.rows} rows, but {self.dataset.name!r} has "
                    f"{self.dataset.rows}. Join by a key: join={join.dataset}:key=otherkey"
                )

    def fields(self, names: str | None, encoded: str | None) -> tuple[SampledField, ...]:
        """Fields of all datasets, from comma-separated, percent-encoded lists. Those of others are ``OTHER/field``.

        Parameters
        ----------
        names : str, optional
            Default: inputs and labels of the dataset, and inputs of the others.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
        """
        if not self.others:
            return each_row(self.dataset.chosen(names, encoded))
        by_name = {other.name: (join, other) for join, other in self.others}
        undecoded = _listed(encoded or "")
        if names is None:
            own = self.dataset.chosen(None, [name for name in undecoded if "/" not in name])
            wanted = [field.name for field in own]
            for _, other in self.others:
                inputs = [f for f in other.fields if f.role == "input" and not f.unreadable and not f.is_ragged]
                wanted += [f"{other.name}/{field.name}" for field in inputs]
        else:
            wanted = list(dict.fromkeys(_listed(names)))
        stray = next((name for name in undecoded if name not in wanted), None)
        if stray is not None:
            raise BadParameter(f"encoded={stray}: this field is not among the requested ones")
        found: list[SampledField] = []
        for name in wanted:
            whose, slash, bare = name.partition("/")
            as_stored = name in undecoded
            if not slash or whose not in by_name:
                if slash and name not in self._names():
                    raise no_field(name, self._names(), "no joined dataset has the field")
                found += each_row(self.dataset.chosen([name], [name] if as_stored else []))
                continue
            join, other = by_name[whose]
            (field,) = other.chosen([bare], [bare] if as_stored else [])
            found.append(SampledField(replace(field, name=name), RowMap(partial(self._partners, join, other))))
        return tuple(found)

    def select(self, spec: OrderSpec, rows: RowSet | None) -> RowSet | None:
        """Leave out the rows of a split that have no partner, if the join is inner. None: all rows."""
        if not self.inner:
            return rows
        dataset = self.dataset
        key = (dataset.name, dataset.names.key, dataset.identity, spec.split, spec.split_spec, spec.where, spec.join)
        return self.partners.selected((*key, *self.key), lambda: self._with_partners(rows))

    def _with_partners(self, rows: RowSet | None) -> npt.NDArray[Any]:
        listed = np.arange(self.dataset.rows, dtype=np.int32) if rows is None else as_list(rows)
        for join, other in self.others:
            if join.key is not None:
                listed = listed[self._rows_of(join, other)[listed] >= 0]
        return listed

    def check_complete(self, rows: RowSet | None, limit: int | None) -> None:
        """Check that every row of the split has its partners.

        Raises
        ------
        KeysNotFound
        """
        for join, other in self.others:
            if join.key is None or self.inner:
                continue
            partners = self._rows_of(join, other)
            listed = np.arange(self.dataset.rows) if rows is None else as_list(rows)
            listed = listed[:limit]
            alone = listed[partners[listed] < 0]
            if len(alone):
                shown = ", ".join(map(str, alone[:_SHOWN].tolist()))
                raise KeysNotFound(
                    f"join={join.dataset}: {len(alone)} of {len(listed)} rows have a {join.key!r} that no row of "
                    f"{other.name!r} has as {join.other_key!r}: row {shown}{' …' if len(alone) > _SHOWN else ''}. "
                    "Leave them out with how=inner"
                )

    def _partners(self, join: Join, other: Dataset, samples: Int64s) -> Int64s:
        if join.key is None:
            return samples
        return self._rows_of(join, other)[samples].astype(np.int64)

    def _rows_of(self, join: Join, other: Dataset) -> npt.NDArray[Any]:
        assert join.key is not None and join.other_key is not None
        return self.partners.of(self.dataset, join.key, other, join.other_key)

    def _names(self) -> list[str]:
        """Names of all fields that can be chosen."""

        def readable(dataset: Dataset) -> Sequence[Field]:
            return [field for field in dataset.fields if not field.unreadable]

        own = [field.name for field in readable(self.dataset)]
        return own + [f"{other.name}/{field.name}" for _, other in self.others for field in readable(other)]


def _listed(names: str) -> list[str]:
    return [unquote(name) for name in names.split(",") if name]
