"""Compares requested splits with those stored in a file: which stored splits are used, and which rows are drawn.

The server and `build` share one rule. Options are compared with the file's record, test first, then val. As long as
they match, the stored splits are used. From the first option that does not match, rows are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..catalog.split_record import SplitRecord
from .compute import Rows, Splits, compute_splits
from .labels import Labels, Strata
from .split_spec import Share, SplitSpec


def has_all(record: SplitRecord | None, spec: SplitSpec, has_label: bool) -> bool:
    """Whether all requested splits are stored.

    Parameters
    ----------
    record : SplitRecord or None
        How the stored splits were drawn, if known.
    spec : SplitSpec
        The requested splits.
    has_label : bool
        Whether there is a label field, by which rows are stratified by default.
    """
    if record is None:
        return False
    if spec.val is not None:
        return _has_val(record, spec, has_label)
    return spec.folds is None and "val" not in record.rows and _has_test(record, spec, has_label)


def _has_test(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """Whether the requested test split is the stored one."""
    of = sum(record.rows.values())
    return _is_same(spec.test, record.test, of, record.rows.get("test")) and _is_alike(record, spec, has_label)


def _has_val(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """Whether the requested val split is the stored one. Val is drawn from the rows not in test."""
    of = sum(record.rows.values())
    if spec.test is None:
        # Test stays as stored; only the other rows are divided.
        of -= record.rows.get("test", 0)
    elif not _has_test(record, spec, has_label):
        return False
    return _is_same(spec.val, record.val, of, record.rows.get("val")) and _is_alike(record, spec, has_label)


def _is_same(asked: Share | None, recorded: Share | None, of: int, rows: int | None) -> bool:
    """Whether two shares are equal, or give the same number of rows."""
    if asked is None or recorded is None:
        return False
    return asked == recorded or count_of(asked, of) == rows


def _is_alike(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """Whether rows would be drawn in the same way: same seed, shuffling and stratification, and no groups."""
    if spec.group is not None or spec.split_shuffle != record.split_shuffle:
        return False
    if not record.split_shuffle:
        return True
    if spec.stratify is None:
        alike = record.stratify or not has_label
    else:
        alike = record.stratified_by == (None if spec.stratify == "none" else spec.stratify)
    return alike and spec.split_seed == record.split_seed


def count_of(share: Share, rows: int) -> int:
    """A share as a number of rows. Fractions are rounded up, as in scikit-learn."""
    return math.ceil(share * rows) if isinstance(share, float) else share


def divide(
    total: int,
    stored: Mapping[str, Rows],
    record: SplitRecord | None,
    spec: SplitSpec,
    strata: Strata[Labels] | None,
    groups: Labels | None,
    *,
    has_label: bool,
    advance: Callable[[int], None] = lambda rows: None,
) -> Splits[Rows]:
    """Divide rows, using the stored splits as far as they match the request.

    Parameters
    ----------
    total, spec, strata, groups, advance
        See `compute_splits`.
    stored : mapping of str to (k,) int32
        Ascending rows of each stored split.
    record : SplitRecord or None
        How the stored splits were drawn, if known.
    has_label : bool
        Whether there is a label field, by which rows are stratified by default.

    Raises
    ------
    SplitImpossible
    """
    if not spec.splits_rows or has_all(record, spec, has_label):
        return Splits(stored, stored=tuple(stored))
    start = _start(total, stored, record, spec, has_label)
    if start.spec.splits_rows:
        drawn = compute_splits(total, start.pool, start.spec, strata, groups, advance)
    else:
        assert start.pool is not None
        drawn = Splits({"train": start.pool})
    rows = {**drawn.rows, **start.kept}
    same = tuple(name for name in rows if name in stored and np.array_equal(rows[name], stored[name]))
    if set(stored) == set(same) == set(rows):
        return replace(drawn, rows=rows, stored=same)
    moved = _moved(total, {name: own for name, own in stored.items() if name not in same}, rows)
    if start.pool is not None:
        # The request takes val from the stored train, so a smaller train is expected and not reported as replaced.
        moved.pop("train", None)
    lost = [_whereabouts(name, len(stored[name]), counts) for name, counts in moved.items() if name != "train"]
    note = "; ".join(filter(None, [start.note, *lost, drawn.note])) or None
    return replace(drawn, rows=rows, note=note, stored=same, replaces=moved or None)


@dataclass(frozen=True)
class _Start:
    """What to draw from which rows, and which stored splits to use.

    Attributes
    ----------
    spec : SplitSpec
        What is still to be drawn.
    pool : (n,) int32 or None
        Rows to draw from, ascending. None: all rows, and no stored split is used.
    kept : mapping of str to (k,) int32
        Stored splits that are used unchanged.
    note : str
        Describes this; empty if nothing is stored.
    """

    spec: SplitSpec
    pool: Rows | None = None
    kept: Mapping[str, Rows] = field(default_factory=dict)
    note: str = ""


def _start(
    total: int, stored: Mapping[str, Rows], record: SplitRecord | None, spec: SplitSpec, has_label: bool
) -> _Start:
    has_test = record is not None and _has_test(record, spec, has_label)
    if not has_test and (spec.test is not None or "train" not in stored):
        if not stored:
            return _Start(spec)
        how = "how they were drawn is not recorded" if record is None else f"drawn with {record.words()}"
        rows = ", ".join(f"{name} {len(own):,}" for name, own in stored.items())
        return _Start(spec, note=f"all rows are divided again, in place of the stored splits ({rows}; {how})")
    # Draw from the rows stored for train and val. Episode masks may overlap, hence the union.
    pool = np.union1d(stored["train"], stored["val"]) if "val" in stored else stored["train"]
    kept = {name: rows for name, rows in stored.items() if name not in ("train", "val")}
    if has_test:
        # If test is requested too, a fraction for val is of all rows.
        val = None if spec.val is None else count_of(spec.val, total)
        spec = spec.model_copy(update={"test": None, "val": val})
    what = (
        "val is drawn from" if spec.val is not None else "folds are made of" if spec.folds is not None else "train is"
    )
    note = f"{what} the {len(pool):,} rows stored for {'train and val' if 'val' in stored else 'train'}"
    if kept:
        note = f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} as stored, {note}"
    return _Start(spec, pool, kept, note)


def _moved(total: int, stored: Mapping[str, Rows], rows: Mapping[str, Rows]) -> dict[str, dict[str, int]]:
    """For each stored split, how many of its rows are now in each split."""
    if not stored:
        return {}
    where = np.zeros(total, np.uint16)
    # Episode masks may overlap train and val. Iterating in reverse lets train and val, which come first, win.
    for number, own in reversed([*enumerate(rows.values(), 1)]):
        where[own] = number
    counts = {name: np.bincount(where[own], minlength=len(rows) + 1)[1:] for name, own in stored.items()}
    return {name: dict(zip(rows, own.tolist(), strict=True)) for name, own in counts.items()}


def _whereabouts(name: str, rows: int, counts: Mapping[str, int]) -> str:
    """Where the rows of a stored split are now.

    For example: ``23 of the 30 rows of the stored test split are in train, 3 in val, 4 in test``.
    """
    first, *others = [(count, split) for split, count in counts.items() if count] or [(0, "any")]
    rest = "".join(f", {count:,} in {split}" for count, split in others)
    return f"{first[0]:,} of the {rows:,} rows of the stored {name} split are in {first[1]}{rest}"
