"""Divides rows into disjoint splits, the same as scikit-learn's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from h5feed.errors import SplitImpossible, SplitNotFound
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.suggestions import did_you_mean

from ..row_bits import Bits, RowSet
from . import as_sklearn, multilabel
from .as_sklearn import Codes, TooFew
from .labels import L, Labels, Strata
from .split_spec import PIECES, SplitSpec

Rows = npt.NDArray[np.int32]

R = TypeVar("R", covariant=True, bound="RowSet | Bits")

_BLOCK = 1 << 17
"""Rows processed at a time, which bounds temporary arrays."""


@dataclass(frozen=True)
class Splits(Generic[R]):
    """The rows of each split, and how they were drawn.

    Attributes
    ----------
    rows : mapping of str to (k,) int32, or to RowBits or RowRuns
        Ascending rows of each split: the stored splits, or ``train``, and ``val`` and ``test`` if requested. Empty
        if there are no splits.
    method : str or None
        The scikit-learn function or class that gives the same rows, or a short description if there is none. None if
        nothing was drawn.
    stratify, group : str or None
        The field that rows are stratified by, and the field whose equal values stay together.
    note : str or None
        Anything unexpected, such as why rows are not stratified.
    stored : tuple of str
        Splits whose rows are exactly those stored in the files under the same name.
    replaces : mapping of str to mapping of str to int, or None
        For each stored split that is replaced: how many of its rows are now in each split.
    """

    rows: Mapping[str, R]
    method: str | None = None
    stratify: str | None = None
    group: str | None = None
    note: str | None = None
    stored: tuple[str, ...] = ()
    replaces: Mapping[str, Mapping[str, int]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def of(self, split: str) -> R:
        """Ascending rows of a split.

        Raises
        ------
        SplitNotFound
        """
        if split not in self.rows:
            hint = "" if self.rows else " Set test=, val= or folds= to divide the rows."
            said = did_you_mean(split, ["all", *self.rows])
            raise SplitNotFound(f"there is no split {split!r}: {said}.{hint}")
        return self.rows[split]


def native_splits(runs: Mapping[str, Sequence[tuple[int, int]]]) -> Splits[Rows]:
    """The splits stored in the files, from half-open ranges of rows, (begin, end)."""
    rows = {
        name: np.concatenate([np.arange(begin, end, dtype=np.int32) for begin, end in sorted(own)])
        for name, own in runs.items()
    }
    return Splits(rows, stored=tuple(rows))


def compute_splits(
    total: int,
    pool: Rows | None,
    spec: SplitSpec,
    strata: Strata[Labels] | None,
    groups: Labels | None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Splits[Rows]:
    """Divide rows into train, val and test.

    Parameters
    ----------
    total : int
        Rows of the dataset.
    pool : (n,) int32 or None
        The rows to divide, ascending. None: all rows.
    spec : SplitSpec
    strata : Strata or None
        Classes of ``spec.stratify``, or by default of the label field. None: do not stratify.
    groups : Labels or None
        Groups of ``spec.group``, by row of the dataset.
    advance : callable
        Called with the number of rows divided: once after test, once after val or the fold.

    Raises
    ------
    SplitImpossible
        A split would be empty, or rows cannot be stratified by the field that ``spec.stratify`` names.
    """
    if not spec.splits_rows:
        return Splits({})
    try:
        return _ListDivision(total, pool, spec, strata, groups, advance).splits()
    except TooFew as error:
        raise SplitImpossible(str(error)) from None


class Division(Generic[L, R]):
    """What a request for splits means for some rows: how many rows, or groups, and by which classes.

    Subclasses find the rows.

    Parameters
    ----------
    rows : int
        Rows to divide.
    spec : SplitSpec
    strata : Strata or None
        See `compute_splits`.
    groups : int or None
        Number of groups; None: rows are divided, not groups.

    Raises
    ------
    SplitImpossible
        A split would be empty.
    """

    def __init__(self, rows: int, spec: SplitSpec, strata: Strata[L] | None, groups: int | None) -> None:
        self._spec, self._strata, self._rows = spec, strata, rows
        self._has_groups = groups is not None
        self._seed = spec.split_seed if spec.split_shuffle else None
        whole = rows if groups is None else groups
        self._what = "rows" if groups is None else "groups" if spec.group == PIECES else f"groups of {spec.group!r}"
        self._test = self._count(spec.test, whole, "test")
        self._val = self._count(spec.val, whole, "val")
        if self._test + self._val >= whole:
            raise SplitImpossible(
                f"test ({self._test} {self._what}) and val ({self._val}) leave none of the {whole} for train"
            )
        self._notes: list[str] = []
        if groups is not None and (self._test or self._val):
            self._notes.append(f"test and val count groups, not rows; there are {whole} groups")

    def draw(self, labels: L | None) -> Mapping[str, R]:
        """The rows of each split, stratified by classes unless they are None.

        Raises
        ------
        SplitImpossible
        TooFew
            A class is too small to stratify by.
        """
        raise NotImplementedError

    def method(self, labels: L | None) -> str:
        """See `Splits`."""
        raise NotImplementedError

    def splits(self) -> Splits[R]:
        """The splits.

        Raises
        ------
        SplitImpossible
        TooFew
            There are too few rows or groups, also without classes.
        """
        labels = self._usable_labels()
        if labels is not None:
            assert self._strata is not None
            try:
                rows = self.draw(labels)
            except TooFew as error:
                reason = str(error) if error.code is None else f"{labels.word(error.code)} {error}"
                self._not_stratified(f"{self._strata.field!r}: {reason}")
                labels = None
            else:
                if labels.kind == "bins":
                    self._notes.append(
                        f"{self._strata.field!r} holds continuous values: stratified by {len(labels.values)} "
                        "quantile bins"
                    )
                return self._found(rows, labels, self._strata.field)
        return self._found(self.draw(None), None, None)

    def _found(self, rows: Mapping[str, R], labels: L | None, field: str | None) -> Splits[R]:
        notes = "; ".join(self._notes) or None
        return Splits(rows, self.method(labels), field, self._spec.group, notes)

    def _count(self, share: int | float | None, whole: int, name: str) -> int:
        if share is None:
            return 0
        count = math.ceil(share * whole) if isinstance(share, float) else share
        if count >= whole:
            raise SplitImpossible(f"{name}={share} takes {count} of {whole} {self._what} and leaves none for train")
        return count

    def _usable_labels(self) -> L | None:
        """The classes to stratify by; None if there are none, or if the rest of the spec rules them out.

        Raises
        ------
        SplitImpossible
            ``spec.stratify`` names the field.
        """
        if self._strata is None:
            return None
        labels, field = self._strata.labels, self._strata.field
        if labels is None:
            self._not_stratified(f"{field!r}: it {self._strata.reason}")
        elif self._has_groups and self._spec.folds is None:
            self._notes.append("not stratified, because groups stay together: use folds= for both")
            labels = None
        elif self._spec.folds is not None and not self._spec.split_shuffle and self._spec.stratify is None:
            labels = None
        elif not labels.single and self._has_groups:
            self._not_stratified(f"{field!r}: its rows have several labels each, and groups stay together")
            labels = None
        return labels

    def _not_stratified(self, reason: str) -> None:
        """Note why rows are not stratified.

        Raises
        ------
        SplitImpossible
            ``spec.stratify`` requires it.
        """
        if self._spec.stratify is not None:
            raise SplitImpossible(f"cannot stratify by {reason}. Use stratify=none for splits that ignore classes.")
        self._notes.append(f"not stratified by {reason}")

    def _check_folds(self) -> None:
        spec = self._spec
        if spec.folds is not None and spec.folds > self._rows - self._test:
            raise SplitImpossible(f"folds={spec.folds} is more than the {self._rows - self._test} rows to divide")

    def _note_small_classes(self, labels: L, counts: npt.NDArray[np.int64], folds: int) -> None:
        small = np.flatnonzero((counts > 0) & (counts < folds))
        if len(small):
            word, count = labels.word(int(small[0])), int(counts[small[0]])
            self._notes.append(
                f"{word} has {count} row{'s' * (count != 1)}, fewer than there are folds: some folds have none"
            )


class _ListDivision(Division[Labels, Rows]):
    """Divides lists of rows: takes test first, then val or a fold from the remaining rows."""

    def __init__(
        self,
        total: int,
        pool: Rows | None,
        spec: SplitSpec,
        strata: Strata[Labels] | None,
        groups: Labels | None,
        advance: Callable[[int], None],
    ) -> None:
        whole = None if groups is None else int(np.count_nonzero(groups.count(pool)))
        super().__init__(total if pool is None else len(pool), spec, strata, whole)
        self._pool, self._advance = pool, advance
        self._groups = None if groups is None else groups.codes

    def draw(self, labels: Labels | None) -> dict[str, Rows]:
        """See `Division.draw`."""
        spec = self._spec
        self._check_folds()
        # If rows are divided again, keep scikit-learn's order: its second call starts from the result of the first.
        rest, test = self._carve(self._pool, labels, self._test, ordered=self._val > 0 or spec.folds is not None)
        self._advance(self._rows)
        if spec.folds is not None:
            rest, val = self._fold(rest, labels, spec.folds, spec.fold or 0)
        else:
            rest, val = self._carve(rest, labels, self._val, ordered=False)
        self._advance(self._rows)
        named = {"train": rest}
        if spec.val is not None or spec.folds is not None:
            named["val"] = val
        if spec.test is not None:
            named["test"] = test
        for rows in named.values():
            rows.sort()
        return named

    def _carve(self, rows: Rows | None, labels: Labels | None, count: int, ordered: bool) -> tuple[Rows, Rows]:
        """Take `count` rows (or groups) out of `rows`; returns the remaining and the taken rows, as new arrays."""
        length = self._rows if rows is None else len(rows)
        if not count or (self._seed is None and self._groups is None):
            every = np.arange(length, dtype=np.int32) if rows is None else rows.copy()
            return every[: length - count], every[length - count :]
        if self._groups is not None:
            left, held = as_sklearn.group_split(_at(self._groups, rows), count, self._seed)
        elif labels is None:
            left, held = as_sklearn.shuffle_split(length, count, self._spec.split_seed)
        elif labels.single:
            left, held = as_sklearn.stratified_split(
                _at(labels.codes, rows), count, self._spec.split_seed, ordered=ordered
            )
        else:
            sizes = np.array([length - count, count])
            part = multilabel.stratify(_at(labels.codes, rows), sizes, self._spec.split_seed)
            left, held = (np.flatnonzero(part == side).astype(np.int32) for side in (0, 1))
        return _translated(left, rows), _translated(held, rows)

    def _fold(self, rows: Rows, labels: Labels | None, folds: int, fold: int) -> tuple[Rows, Rows]:
        """Rows outside and inside one fold, both in the order of `rows`."""
        if labels is not None and not labels.single:
            sizes = np.full(folds, len(rows) // folds)
            sizes[: len(rows) % folds] += 1
            parts = multilabel.stratify(labels.codes[rows], sizes, self._spec.split_seed)
            held: Rows = np.flatnonzero(parts == fold).astype(np.int32)
        elif labels is not None:
            self._note_small_classes(labels, labels.count(rows), folds)
            codes = labels.codes[rows]
            if self._groups is not None:
                held = as_sklearn.stratified_group_fold(codes, self._groups[rows], folds, fold, self._seed)
            else:
                held = as_sklearn.stratified_fold(codes, folds, fold, self._seed)
        elif self._groups is not None:
            held = as_sklearn.group_fold(self._groups[rows], folds, fold, self._seed)
        else:
            held = as_sklearn.fold_of(len(rows), folds, fold, self._seed)
        is_held = np.zeros(len(rows), np.bool_)
        is_held[held] = True
        return rows[~is_held], rows[is_held]

    def method(self, labels: Labels | None) -> str:
        """See `Division.method`."""
        several = labels is not None and not labels.single
        if self._spec.folds is not None:
            if several:
                return "iterative stratification (Sechidis 2011)"
            return f"{'Stratified' if labels else ''}{'Group' if self._groups is not None else ''}KFold"
        if self._seed is None:
            return "by position"
        if self._groups is not None:
            return "GroupShuffleSplit"
        return "iterative stratification (Sechidis 2011)" if several else "train_test_split"


def _at(codes: Codes, rows: Rows | None) -> Codes:
    return codes if rows is None else codes[rows]


def _translated(places: Rows, rows: Rows | None) -> Rows:
    """Replace places by row ids, in place: row lists take most of the memory of a split, so copies are avoided."""
    if rows is not None:
        for start in range(0, len(places), _BLOCK):
            places[start : start + _BLOCK] = rows[places[start : start + _BLOCK]]
    return places


def dump_splits(splits: Splits[Rows]) -> bytes:
    """Serialise splits for the cache folder."""
    about = {item.name: getattr(splits, item.name) for item in fields(splits) if item.name != "rows"}
    return dump_arrays(about, splits.rows)


def load_splits(data: bytes) -> Splits[Rows]:
    """Read what `dump_splits` wrote."""
    about, rows = load_arrays(data)
    return Splits(rows, **{**about, "stored": tuple(about["stored"])})
