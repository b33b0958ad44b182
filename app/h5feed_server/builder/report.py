"""The report at the end of a build, and the files written beside the output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalog.discovery import LEFT_OUT
from .plan import Plan, counts_per_class
from .source import Source


@dataclass(frozen=True)
class Report:
    """What was built.

    Attributes
    ----------
    files : tuple of Path
        Empty if they were uploaded.
    rows : dict of str to int
        Of each split; of the empty name where nothing is split.
    nbytes : int
        Of the files.
    seconds : float
    resumed : int
        Rows that an interrupted build had finished.
    left_out : dict of str to str
        What of the source is no row, and why; also written beside the output as ``NAME.left-out.tsv``.
    means : dict of str to list of float
        ``mean`` and ``std`` of each channel of train.
    notes : tuple of str
    urls : tuple of str
        Of the objects, if the output is in an object store.
    """

    files: tuple[Path, ...]
    rows: dict[str, int]
    nbytes: int
    seconds: float
    resumed: int
    left_out: dict[str, str] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()


def twins(plan: Plan, digests: npt.NDArray[np.void], of_files: bool) -> list[str]:
    """Files that occur more than once: a test image that is also in train is not a test.

    Parameters
    ----------
    digests : (rows of the source,) void of 16 bytes
    of_files : bool
        Whether they are of files, and not of rows: those may well be alike.
    """
    if not of_files:
        return []
    parts = list(plan.parts())
    own = np.concatenate([digests[part.rows] for part in parts])
    splits = np.repeat([plan.splits.index(part.split) for part in parts], [len(part.rows) for part in parts])
    _, numbers, counts = np.unique(own, return_inverse=True, return_counts=True)
    again = int((counts - 1).sum())
    if not again:
        return []
    # Pairs of a file and a split that has it: more pairs than files, where one is in several.
    shared = len(np.unique(numbers * len(plan.splits) + splits)) - len(counts)
    where = f", {shared:,} of them in another split" if shared else ""
    counted = "1 image is" if again == 1 else f"{again:,} images are"
    return [f"{counted} identical to another image{where}: compare the field digests"]


def lost_classes(source: Source, plan: Plan) -> list[str]:
    """Classes whose images are all broken."""
    if source.label is None or source.columns[source.label].values.ndim > 1:
        return []
    column = source.columns[source.label]
    before = counts_per_class(column, np.arange(source.rows))
    rows = np.concatenate([part.rows for part in plan.parts()])
    after = counts_per_class(column, rows)
    lost = [name for name, count in before.items() if count and not after.get(name)]
    return [f"class {name!r} has no rows: none of its images could be used" for name in lost]


def write_left_out(output: Path, left_out: Mapping[str, str]) -> None:
    """Write a file beside the output with one line per item left out, if any."""
    path = output.with_name(f"{output.name}{LEFT_OUT}")
    if not left_out:
        path.unlink(missing_ok=True)
        return
    lines = [f"{name}\t{reason}".replace("\n", " ") + "\n" for name, reason in left_out.items()]
    path.write_text("".join(lines), errors="surrogateescape")


def write_means(path: Path, means: list[float], attributes: Mapping[str, Any]) -> None:
    """Write channel means as a JSON file with keys ``R``, ``G`` and ``B``, whatever the channel order."""
    letters = {"rgb": "RGB", "bgr": "BGR", "rgba": "RGBA", "grey": "L"}.get(attributes.get("channels", ""), "")
    keys = list(letters) if len(letters) == len(means) else [str(number) for number in range(len(means))]
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(dict(zip(keys, means, strict=True))) + "\n")
    os.replace(unfinished, path)
