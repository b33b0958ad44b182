"""Reads splits from the attribute ``split`` in the format of Fuel's H5PYDataset: a range of rows for each field.

See https://fuel.readthedocs.io/en/latest/h5py_dataset.html.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from ..split_names import SPLIT_WORDS
from .pieces import Table

ATTRIBUTE = "split"


def apply(attribute: Any, tables: list[Table]) -> None:
    """Set the native splits of tables from the attribute. If it does not fit a table, the table gets a note."""
    if not isinstance(attribute, list) or not all(isinstance(entry, dict) for entry in attribute):
        return
    for table in tables:
        mine = [e for e in attribute if e["source"] in {field.name for field in table.fields if not field.unreadable}]
        if not mine or table.native:
            continue
        runs: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for entry in mine:
            if entry["available"]:
                runs[SPLIT_WORDS.get(entry["split"], entry["split"])].add((entry["start"], entry["stop"]))
        problem = None
        if any(entry["indices"] for entry in mine):
            problem = "it refers to lists of rows"
        elif any(len(ranges) > 1 for ranges in runs.values()):
            problem = "its fields have different rows"
        elif not all(0 <= begin < end <= table.rows for ranges in runs.values() for begin, end in ranges):
            problem = f"it names rows beyond the {table.rows} of the dataset"
        ends = sorted(next(iter(ranges)) for ranges in runs.values())
        if problem is None and any(begin < end for (_, end), (begin, _) in pairwise(ends)):
            problem = "its splits overlap"
        if problem is None:
            table.native = {split: sorted(ranges) for split, ranges in runs.items()}
        else:
            table.notes = (
                *table.notes,
                f"its attribute 'split' is ignored: {problem}; declare [datasets.NAME.splits] in h5feed.toml",
            )
