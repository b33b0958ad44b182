"""Splits: disjoint sets of rows, drawn by scikit-learn's `train_test_split`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed import wire
from h5feed.errors import SplitImpossible, SplitNotFound

from .spec import SplitSpec

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Splits:
    """The rows of each split, and by what they are stratified.

    Attributes
    ----------
    rows : mapping of str to (k,) int64
        Ascending row ids of ``train``, and of ``val`` and ``test`` where asked for; empty where nothing is split.
    stratify : str or None
        The field.
    note : str or None
        Why not stratified, where one would expect it.
    """

    rows: Mapping[str, Int64s]
    stratify: str | None
    note: str | None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def of(self, split: str) -> Int64s:
        """Rows of a split.

        Raises
        ------
        SplitNotFound
        """
        if split not in self.rows:
            valid = ", ".join(["all", *self.rows])
            hint = "" if self.rows else " Give test= and val= (fractions or counts) to divide the rows."
            raise SplitNotFound(f"there is no split {split!r} here: valid are {valid}.{hint}")
        return self.rows[split]


def class_ids(labels: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """One class per row, or None where the labels are no classes.

    Ints and bools are classes as they are; of one-hot rows (2-D, one non-zero each) it is the position.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1 and labels.dtype.kind in "biuSU":
        return labels
    one_hot = (
        labels.ndim == 2
        and labels.dtype.kind in "biuf"
        and bool(((labels == 0) | (labels == 1)).all())
        and bool((np.count_nonzero(labels, axis=1) == 1).all())
    )
    return labels.argmax(axis=1) if one_hot else None


def native_splits(runs: Mapping[str, Sequence[tuple[int, int]]]) -> Splits:
    """Splits that are stored as runs of rows, half-open."""
    rows = {
        name: np.concatenate([np.arange(begin, end, dtype=np.int64) for begin, end in sorted(own)])
        for name, own in runs.items()
    }
    return Splits(rows, None, None)


def compute_splits(everything: Int64s, spec: SplitSpec, field: str | None, classes: npt.NDArray[Any] | None) -> Splits:
    """Divide rows.

    Parameters
    ----------
    everything : (n,) int64
        Ascending.
    spec : SplitSpec
    field : str or None
        The label field, asked for (``spec.stratify``) or found.
    classes : array or None
        Its class of every row of the dataset; None where it has none.

    Raises
    ------
    SplitImpossible
        A split would be empty, or the stratification that was asked for by name cannot be had.
    """
    if not spec.splits_rows:
        return Splits({}, None, None)
    rows = len(everything)
    test, val = _count(spec.test, rows, "test"), _count(spec.val, rows, "val")
    if test + val >= rows:
        raise SplitImpossible(f"test ({test} rows) and val ({val} rows) leave no row of {rows} for train")
    if not spec.split_shuffle:
        cut = rows - test
        return Splits(_named(everything[: cut - val], everything[cut - val : cut], everything[cut:], spec), None, None)
    note = None
    if spec.stratify == "none":
        field = None
    elif field is not None and classes is None:
        note = f"not stratified: {field!r} holds no classes (ints, bools or one-hot rows)"
    if field is not None and classes is not None:
        try:
            return Splits(_draw(everything, test, val, classes, spec), field, None)
        except ValueError as error:
            note = f"not stratified by {field!r}: {_explain(error, classes[everything], test, val)}"
    if note and spec.stratify is not None:
        raise SplitImpossible(f"{note[4:]}. Use stratify=none for splits that disregard classes.")
    return Splits(_draw(everything, test, val, None, spec), None, note)


def _count(share: int | float | None, rows: int, name: str) -> int:
    if share is None:
        return 0
    count = math.ceil(share * rows) if isinstance(share, float) else share
    if count >= rows:
        raise SplitImpossible(f"{name}={share} takes {count} of {rows} rows and leaves none for train")
    return count


def _draw(
    everything: Int64s, test: int, val: int, classes: npt.NDArray[Any] | None, spec: SplitSpec
) -> dict[str, Int64s]:
    """Test first, then val out of the rest in the order that scikit-learn left it: as if called by hand, twice."""
    # Imported when first needed: it takes longer to load than everything else together.
    from sklearn.model_selection import train_test_split

    rest, held = everything, {"test": everything[:0], "val": everything[:0]}
    for name, count in (("test", test), ("val", val)):
        if count:
            rest, held[name] = train_test_split(
                rest,
                test_size=count,
                stratify=None if classes is None else classes[rest],
                random_state=spec.split_seed,
            )
    return _named(np.sort(rest), np.sort(held["val"]), np.sort(held["test"]), spec)


def _named(train: Int64s, val: Int64s, test: Int64s, spec: SplitSpec) -> dict[str, Int64s]:
    named = {"train": train}
    if spec.val is not None:
        named["val"] = val
    if spec.test is not None:
        named["test"] = test
    return named


def _explain(error: ValueError, classes: npt.NDArray[Any], test: int, val: int) -> str:
    """scikit-learn's reason, with the class named."""
    values, counts = np.unique(classes, return_counts=True)
    smallest = int(counts.argmin())
    if counts[smallest] < 2 + bool(test and val):
        return f"class {values[smallest].item()!r} has only {counts[smallest]} rows"
    return f"{len(values)} classes do not fit into every split ({str(error).rstrip('.')})"


def describe_split(
    rows: Int64s, classes: npt.NDArray[Any] | None, names: Mapping[int, str], shares: Mapping[Any, float]
) -> dict[str, Any]:
    """What the API says of one split: rows, and per class its rows, share and balanced weight.

    The weight is scikit-learn's "balanced" one, rows / (classes · rows of the class). ``max_deviation`` is the largest
    difference between a class's share here and in all rows.
    """
    report: dict[str, Any] = {
        "rows": len(rows),
        "digest": hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=8).hexdigest(),
    }
    if classes is None:
        return report
    values, counts = np.unique(classes[rows], return_counts=True)
    report["classes"] = [
        {
            "value": _plain(value),
            "name": names.get(_plain(value)) if isinstance(_plain(value), int) else None,
            "rows": int(count),
            "share": float(count / len(rows)),
            "weight": float(len(rows) / (len(values) * count)),
        }
        for value, count in zip(values, counts, strict=True)
    ]
    here = {entry["value"]: entry["share"] for entry in report["classes"]}
    report["max_deviation"] = max((abs(here.get(v, 0.0) - share) for v, share in shares.items()), default=0.0)
    return report


def class_shares(classes: npt.NDArray[Any]) -> dict[Any, float]:
    """Share of each class among all rows."""
    values, counts = np.unique(classes, return_counts=True)
    return {_plain(value): float(count / len(classes)) for value, count in zip(values, counts, strict=True)}


def _plain(value: Any) -> Any:
    item = value.item()
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else item


def dump_splits(splits: Splits) -> bytes:
    """As one safetensors body, for the cache folder."""
    about = json.dumps({"stratify": splits.stratify, "note": splits.note, "order": list(splits.rows)})
    tensors = [wire.Tensor(name, np.dtype("<i8"), rows.shape) for name, rows in splits.rows.items()]
    body = wire.Body(tensors, {"about": about, "batches": "1"})
    buffer = np.empty(body.nbytes, np.uint8)
    for name, view in body.place(buffer, 0).items():
        view[...] = splits.rows[name]
    return buffer.tobytes()


def load_splits(data: bytes) -> Splits:
    """What `dump_splits` wrote."""
    tensors, metadata, _ = wire.read_body(np.frombuffer(data, np.uint8))
    about = json.loads(metadata["about"])
    return Splits({name: tensors[name] for name in about["order"]}, about["stratify"], about["note"])
