"""Splits that a file holds, beside those that are asked for: what of them stays, and what is said of the rest.

One rule, for the server and for `build`: test comes first, then val. As long as an option says what the file records,
the stored split is the answer; from the first that does not, rows are drawn.
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
    """Whether nothing else is asked for than what is stored.

    Parameters
    ----------
    has_label : bool
        Whether there is a field that rows are stratified by unless another one is named.
    """
    if record is None:
        return False
    if spec.val is not None:
        return _has_val(record, spec, has_label)
    return spec.folds is None and "val" not in record.rows and _has_test(record, spec, has_label)


def _has_test(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """Whether the test split that is asked for is the stored one."""
    of = sum(record.rows.values())
    return _is_same(spec.test, record.test, of, record.rows.get("test")) and _is_alike(record, spec, has_label)


def _has_val(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """The same for val, which comes out of what test leaves."""
    of = sum(record.rows.values())
    if spec.test is None:
        # Test stays as it is stored: only the others are divided.
        of -= record.rows.get("test", 0)
    elif not _has_test(record, spec, has_label):
        return False
    return _is_same(spec.val, record.val, of, record.rows.get("val")) and _is_alike(record, spec, has_label)


def _is_same(asked: Share | None, recorded: Share | None, of: int, rows: int | None) -> bool:
    """Whether two shares are the same number, or come to the same rows."""
    if asked is None or recorded is None:
        return False
    return asked == recorded or count_of(asked, of) == rows


def _is_alike(record: SplitRecord, spec: SplitSpec, has_label: bool) -> bool:
    """Whether so many rows would be drawn in the same way."""
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
    """A share as a number of rows: of a fraction, rounded up, as scikit-learn does."""
    return math.ceil(share * rows) if isinstance(share, float) else share


def divide(
    total: int,
    stored: Mapping[str, Rows],
    record: SplitRecord | None,
    spec: SplitSpec,
    strata: Strata | None,
    groups: Labels | None,
    *,
    has_label: bool,
    advance: Callable[[int], None] = lambda rows: None,
) -> Splits:
    """Divide rows of which some lie in stored splits.

    Parameters
    ----------
    total, spec, strata, groups, advance
        As of `compute_splits`.
    stored : mapping of str to (k,) int32
        Ascending rows of each stored split.
    record : SplitRecord or None
        How they were drawn, as far as is known.
    has_label : bool
        Whether there is a field that rows are stratified by unless another one is named.

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
        # A validation split out of train is what was asked for.
        moved.pop("train", None)
    lost = [_whereabouts(name, len(stored[name]), counts) for name, counts in moved.items() if name != "train"]
    note = "; ".join(filter(None, [start.note, *lost, drawn.note])) or None
    return replace(drawn, rows=rows, note=note, stored=same, replaces=moved or None)


@dataclass(frozen=True)
class _Start:
    """What is drawn out of which rows, and what is kept as it is stored."""

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
        return _Start(spec, note=f"all rows are divided anew, in place of the stored splits ({rows}; {how})")
    # Out of what is stored for training and validation. Masks of episodes may overlap.
    pool = np.union1d(stored["train"], stored["val"]) if "val" in stored else stored["train"]
    kept = {name: rows for name, rows in stored.items() if name not in ("train", "val")}
    if has_test:
        # Fractions are of all rows, where test is one of what is asked for.
        val = None if spec.val is None else count_of(spec.val, total)
        spec = spec.model_copy(update={"test": None, "val": val})
    what = (
        "val is drawn out" if spec.val is not None else "folds are made" if spec.folds is not None else "train is all"
    )
    note = f"{what} of the {len(pool):,} rows stored for {'train and val' if 'val' in stored else 'train'}"
    if kept:
        note = f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} as stored, {note}"
    return _Start(spec, pool, kept, note)


def _moved(total: int, stored: Mapping[str, Rows], rows: Mapping[str, Rows]) -> dict[str, dict[str, int]]:
    """Of each stored split, how many of its rows are in which split now."""
    if not stored:
        return {}
    where = np.zeros(total, np.uint16)
    # Masks of episodes may overlap train and val, which come first.
    for number, own in reversed([*enumerate(rows.values(), 1)]):
        where[own] = number
    counts = {name: np.bincount(where[own], minlength=len(rows) + 1)[1:] for name, own in stored.items()}
    return {name: dict(zip(rows, own.tolist(), strict=True)) for name, own in counts.items()}


def _whereabouts(name: str, rows: int, counts: Mapping[str, int]) -> str:
    """``23 of the 30 rows of the stored test split are in train, 3 in val, 4 in test``."""
    first, *others = [(count, split) for split, count in counts.items() if count] or [(0, "any")]
    rest = "".join(f", {count:,} in {split}" for count, split in others)
    return f"{first[0]:,} of the {rows:,} rows of the stored {name} split are in {first[1]}{rest}"
