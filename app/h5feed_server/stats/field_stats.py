"""Statistics of a field: as the API reports them, and as stored in the cache folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.stored.array_file import dump_arrays, load_arrays

from .scan import ColumnAccumulator
from .summary import Summary

MAX_CLASSES = 1 << 14
"""Maximum number of classes listed."""

TOP_VALUES = 20
"""How many of the most frequent values are listed if the field is not reported as classes."""

_MEAN_IMAGE = "mean_image"


@dataclass(frozen=True)
class FieldStats:
    """Statistics of one field in one split.

    Attributes
    ----------
    report : dict
        The API's response.
    mean_image : (*sample,) float32 or None
        None if the field has no mean image.
    """

    report: dict[str, Any]
    mean_image: npt.NDArray[np.float32] | None

    def dump(self) -> bytes:
        """Serialise for the cache folder."""
        return dump_arrays(self.report, {} if self.mean_image is None else {_MEAN_IMAGE: self.mean_image})

    @classmethod
    def load(cls, data: bytes) -> FieldStats:
        """Read what `dump` wrote."""
        report, arrays = load_arrays(data)
        return cls(report, arrays.get(_MEAN_IMAGE))


def report_of(
    accumulated: ColumnAccumulator,
    channel_names: Sequence[str] | None,
    class_names: Sequence[str] | None,
    is_label: bool,
) -> dict[str, Any]:
    """The statistics of a field as the API reports them.

    Parameters
    ----------
    channel_names : sequence of str or None
        Names of the channels, in stored order. None if there is no channel axis.
    class_names : sequence of str or None
        Names of the classes; the label's value is the index.
    is_label : bool
        Whether the values are classes. Up to `MAX_CLASSES` are then listed, with balanced weights.
    """
    channels = None
    if channel_names is not None and accumulated.numbers is not None:
        summaries = accumulated.numbers.summaries()
        channels = [{"name": name, **_numbers(summary)} for name, summary in zip(channel_names, summaries, strict=True)]
    numbers = _numbers(None if accumulated.numbers is None else accumulated.numbers.overall())
    histogram = numbers.pop("histogram")
    # Keys are in reading order: the most wanted first, the longest last.
    report: dict[str, Any] = {"rows": accumulated.rows}
    report |= {f"channel_{key}s": _by_colour(channels, key) for key in ("mean", "std")}
    report |= numbers
    report |= {"classes": None, "classes_kind": None, "values": None, "distinct": None, "lengths": None}
    report["mean_image"] = None if accumulated.mean_image is None else list(accumulated.mean_image.mean().shape)
    report |= {"histogram": histogram, "channels": channels}
    if accumulated.lengths is not None:
        report["lengths"] = _numbers(accumulated.lengths.overall())
    if accumulated.values is not None:
        report["distinct"] = len(accumulated.values.counts) if accumulated.values.complete else None
        if is_label and accumulated.values.complete and len(accumulated.values.counts) <= MAX_CLASSES:
            pairs = sorted(accumulated.values.counts.items())
            report |= {"classes": _classes(pairs, accumulated.rows, class_names), "classes_kind": "values"}
        else:
            report["values"] = [
                {"value": _plain(value), "rows": rows, "share": rows / accumulated.rows}
                for value, rows in accumulated.values.counts.most_common(TOP_VALUES)
            ]
    if accumulated.indicators is not None and accumulated.indicators.kind is not None and accumulated.rows:
        pairs = list(enumerate(accumulated.indicators.ones.tolist()))
        report |= {
            "classes": _classes(pairs, accumulated.rows, class_names),
            "classes_kind": accumulated.indicators.kind,
        }
        if accumulated.indicators.kind == "multi_label":
            # No weight per class can balance rows with several classes.
            report["classes"] = [{**entry, "weight": None} for entry in report["classes"]]
    return report


def _numbers(summary: Summary | None) -> dict[str, Any]:
    if summary is None:
        return dict.fromkeys(
            ("mean", "std", "min", "max", "count", "zeros", "nan", "inf", "zero_share", "nan_share", "histogram")
        )
    histogram = summary.histogram
    count = max(1, summary.count)
    return {
        "mean": summary.mean,
        "std": summary.std,
        "min": summary.minimum,
        "max": summary.maximum,
        "count": summary.count,
        "zeros": summary.zeros,
        "nan": summary.nan,
        "inf": summary.inf,
        "zero_share": summary.zeros / count,
        "nan_share": summary.nan / count,
        "histogram": None if histogram is None else {"edges": histogram.edges, "counts": histogram.counts},
    }


def _by_colour(channels: Sequence[dict[str, Any]] | None, key: str) -> dict[str, Any] | None:
    """``{"R": …, "G": …, "B": …}``, in this order regardless of the stored order; None without these channels."""
    by_name = {channel["name"]: channel[key] for channel in channels or ()}
    return {name: by_name[name] for name in "RGB"} if set("RGB") <= set(by_name) else None


def _classes(pairs: Sequence[tuple[int | bytes, int]], rows: int, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Rows, share and balanced weight of each class.

    The weight is rows / (classes · rows of the class), where only classes with rows count. It is None for a class
    without rows.
    """
    there = sum(1 for _, count in pairs if count)
    total = sum(count for _, count in pairs)
    return [
        {
            "value": _plain(value),
            "name": names[value] if names and isinstance(value, int) and 0 <= value < len(names) else None,
            "rows": count,
            "share": count / rows,
            "weight": total / (there * count) if count else None,
        }
        for value, count in pairs
    ]


def _plain(value: int | bytes) -> int | str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
