"""Joined datasets: whose rows are parts of the samples of a plan, and which ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, KeysNotFound
from h5feed.suggestions import no_field

from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, names_in
from ..keys.partners import Partners
from ..row_bits import RowSet, as_list
from ..splits.joins_spec import Join, JoinsSpec
from ..splits.order_spec import OrderSpec
from ..splits.windows import Windows
from ..splits.windows_spec import NO_WINDOWS

Int64s = npt.NDArray[np.int64]

OF_OTHER = "/"
"""Between the names of a joined dataset and of its field: no name of either contains it."""

_SHOWN = 5


class Source(NamedTuple):
    """Where a field of samples is stored.

    Attributes
    ----------
    dataset : Dataset
        The dataset that it is of.
    stored : Field
        The field there.
    field : Field
        The same with the name that it has in samples.
    partners : callable or None
        From rows of the plan's dataset, of any shape, to rows of `dataset`; -1: none. None: they are the same.
    """

    dataset: Dataset
    stored: Field
    field: Field
    partners: Callable[[Int64s], Int64s] | None = None


@dataclass(frozen=True)
class Joined:
    """The datasets that a plan joins.

    Attributes
    ----------
    dataset : Dataset
        Whose rows number the samples.
    others : tuple of (Join, Dataset)
    windows : callable or None
        Returns the samples, if they are windows of rows. It is a function so that plans do not hold references to what
        a cache may want to drop.
    offsets : callable or None
        Returns the offsets of the rows of a window that fields with some prefix of their names can be taken at.
    """

    dataset: Dataset
    others: tuple[tuple[Join, Dataset], ...]
    inner: bool
    partners: Partners
    windows: Callable[[], Windows] | None = None
    offsets: Callable[[str], Int64s] | None = None

    @classmethod
    def of(
        cls,
        catalog: Catalog,
        partners: Partners,
        dataset: Dataset,
        spec: JoinsSpec,
        windows: Callable[[], Windows] | None = None,
        offsets: Callable[[str], Int64s] | None = None,
    ) -> Joined:
        """Look up the datasets that `spec` joins, as far as the caller may see them.

        Raises
        ------
        DatasetNotFound, RevisionChanged, Unreadable
        """
        others = tuple((join, catalog.dataset(join.dataset, join.revision)) for join in spec.joins)
        return cls(dataset, others, spec.how == "inner", partners, windows, offsets)

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the joins, and the state of all joined datasets."""
        return tuple((join, other.names.key, other.revision, other.identity) for join, other in self.others)

    @property
    def revisions(self) -> str:
        """The revisions of all datasets, as one text."""
        return " ".join([self.dataset.revision, *(other.revision for _, other in self.others)])

    @property
    def is_pinned(self) -> bool:
        """Whether the request names the revisions of the joined datasets."""
        return all(join.revision is not None for join, _ in self.others)

    @property
    def pinned(self) -> JoinsSpec:
        """The joins with the revisions of the datasets."""
        joins = (str(join._replace(revision=other.names.current)) for join, other in self.others)
        return JoinsSpec(join=tuple(joins), how="inner" if self.inner else None)

    @property
    def is_settled(self) -> bool:
        """Whether the revisions of the joined datasets are names of their content, not provisional ones."""
        return all(other.names.current == other.names.content for _, other in self.others)

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

    def chosen(self, names: str | Sequence[str] | None, encoded: str | None) -> tuple[Source, ...]:
        """Fields of all datasets, from comma-separated, percent-encoded lists, or by name. Those of others are
        ``OTHER/field``.

        Parameters
        ----------
        names : str or sequence of str, optional
            Default: inputs and labels of the dataset, and inputs of the others.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
        """
        undecoded = names_in(encoded or "")
        if names is None:
            wanted = [field.name for field in self.dataset.chosen(None, [one for one in undecoded if "/" not in one])]
            for _, other in self.others:
                readable = [field for field in other.fields if field.role == "input" and not field.unreadable]
                wanted += [_of_other(other, field) for field in readable if field.is_sparse or not field.is_ragged]
        else:
            wanted = list(dict.fromkeys(names_in(names)))
        stray = next((name for name in undecoded if name not in wanted), None)
        if stray is not None:
            raise BadParameter(f"encoded={stray}: this field is not among the requested ones")
        return tuple(self.source(name, encoded=name in undecoded) for name in wanted)

    def source(self, name: str, *, encoded: bool = False) -> Source:
        """A readable field of any of the datasets.

        Raises
        ------
        FieldNotFound, UnsupportedField, BadParameter
        """
        whose, slash, bare = name.partition(OF_OTHER)
        found = next(((join, other) for join, other in self.others if slash and other.name == whose), None)
        if found is None:
            if slash and self.others and name not in (names := self.names):
                raise no_field(name, names, "no joined dataset has the field")
            (own,) = self.dataset.chosen([name], [name] if encoded else [])
            return Source(self.dataset, own, own)
        join, other = found
        (field,) = other.chosen([bare], [bare] if encoded else [])
        partners = _same if join.key is None else partial(self._partners, join, other)
        return Source(other, field, replace(field, name=name), partners)

    def rows_of(self, source: Source, rows: RowSet | None) -> RowSet | None:
        """The rows of the dataset of a field that belong to some rows of this one, all of which have partners:
        ascending, each as often as it does. None: all rows."""
        if source.partners is None or source.partners is _same:
            return rows
        listed = np.arange(self.dataset.rows) if rows is None else as_list(rows).astype(np.int64)
        found: npt.NDArray[Any] = source.partners(listed)
        found.sort()
        return found

    def select(self, spec: OrderSpec, samples: RowSet | None) -> RowSet | None:
        """Leave out the samples of a split that have a row without partner, if the join is inner. None: all rows."""
        if not self.inner:
            return samples
        dataset = self.dataset
        windows = tuple(getattr(spec, name) for name in NO_WINDOWS)
        way = (spec.split, spec.split_spec, spec.where, spec.join, windows)
        key = (dataset.name, dataset.names.key, dataset.identity, way, *self.key)
        return self.partners.selected(key, lambda: self.with_partners(samples))

    def with_partners(self, samples: RowSet | None) -> npt.NDArray[Any]:
        """Those samples of which all rows have their partners, ascending. None: all rows."""
        listed = np.arange(self.dataset.rows, dtype=np.int32) if samples is None else as_list(samples)
        for join, other in self.others:
            if join.key is not None:
                listed = listed[~self._alone(join, other, listed)]
        return listed

    def check_complete(self, samples: RowSet | None, limit: int | None = None) -> None:
        """Check that all rows of the samples of a split have their partners; of the first `limit` samples.

        Raises
        ------
        KeysNotFound
        """
        for join, other in self.others:
            if join.key is None or self.inner:
                continue
            listed = np.arange(self.dataset.rows) if samples is None else as_list(samples)
            listed = listed[:limit]
            alone = listed[self._alone(join, other, listed)]
            if len(alone):
                shown = ", ".join(map(str, alone[:_SHOWN].tolist()))
                have = "rows have" if self.windows is None else "samples have a row with"
                raise KeysNotFound(
                    f"join={join.dataset}: {len(alone)} of {len(listed)} {have} a {join.key!r} that no row of "
                    f"{other.name!r} has as {join.other_key!r}: row {shown}{' …' if len(alone) > _SHOWN else ''}. "
                    "Leave them out with how=inner"
                )

    def _alone(self, join: Join, other: Dataset, samples: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which samples, (k,), have a row without a partner, of those that fields of `other` can be taken at."""
        alone = self._rows_of(join, other) < 0
        if self.windows is not None and self.offsets is not None:
            return self.windows().meet(samples, self.offsets(f"{other.name}{OF_OTHER}"), alone)
        found: npt.NDArray[np.bool_] = alone[samples]
        return found

    def has(self, name: str) -> bool:
        """Whether this is the name of a field, readable or not."""
        return name in (one.name for one in self.dataset.fields) or any(
            name == _of_other(other, one) for _, other in self.others for one in other.fields
        )

    def _partners(self, join: Join, other: Dataset, samples: Int64s) -> Int64s:
        return self._rows_of(join, other)[samples].astype(np.int64)

    def _rows_of(self, join: Join, other: Dataset) -> npt.NDArray[Any]:
        assert join.key is not None and join.other_key is not None
        return self.partners.of(self.dataset, join.key, other, join.other_key)

    @property
    def names(self) -> list[str]:
        """Names of all fields that can be chosen."""

        def readable(dataset: Dataset) -> Sequence[Field]:
            return [field for field in dataset.fields if not field.unreadable]

        own = [field.name for field in readable(self.dataset)]
        return own + [_of_other(other, field) for _, other in self.others for field in readable(other)]


def _same(rows: Int64s) -> Int64s:
    """The partners of rows that are joined by their numbers."""
    return rows


def _of_other(other: Dataset, field: Field) -> str:
    """Name of a field of a joined dataset."""
    return f"{other.name}{OF_OTHER}{field.name}"
