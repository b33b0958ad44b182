"""Splits by the names that people give to files, folders and arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping

SPLIT_WORDS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What people call splits, and what we call them."""

SPLITS = ("train", "val", "test")

_WORD = re.compile(rf"(?:^|[_.\-])({'|'.join(SPLIT_WORDS)})(?:[_.\-]?set)?(?=$|[_.\-])", re.I)
"""A split's word in a name: ``train_set_x``, ``x_train``, ``level_2_split_train_x``."""


def without_split(name: str) -> tuple[str, str | None]:
    """``x_train`` → ``x``, ``train``."""
    match = _WORD.search(name)
    if match is None:
        return name, None
    return (name[: match.start()] + name[match.end() :]).strip("_.-"), SPLIT_WORDS[match[1].lower()]
