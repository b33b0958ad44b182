"""Recognises splits in the names of files, folders and arrays."""

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
"""Words for splits, and the split that each means."""

SPLITS = ("train", "val", "test")

_WORD = re.compile(rf"(?:^|[_.\-])({'|'.join(SPLIT_WORDS)})(?:[_.\-]?set)?(?=$|[_.\-])", re.I)
"""A split word in a name: ``train_set_x``, ``x_train``, ``level_2_split_train_x``."""

_NUMBERED = re.compile(rf"(?:^|[_.\-])({'|'.join(SPLIT_WORDS)})(?:[_.\-]?set)?(\d+)(?=$|[_.\-])", re.I)
"""A split word followed by a number, as in file names: ``ply_data_train0``."""

_COUNTED = re.compile(
    rf"(?:^|[_.\-])({'|'.join(SPLIT_WORDS)})(?:[_.\-]?set)?(?:[_.\-]?(?:part|shard|chunk|piece|file|batch))?[_.\-]?(\d+)$",
    re.I,
)
_COUNTED_BEFORE = re.compile(rf"^(\d+)[_.\-]({'|'.join(SPLIT_WORDS)})(?:[_.\-]?set)?$", re.I)
"""A split word and a number that may be separated or come first: ``img_train_0``, ``train_part0``, ``0_train``."""


def without_split(name: str) -> tuple[str, str | None]:
    """Take the split out of a name: ``x_train`` → ``x``, ``train``. The split is None if there is none."""
    match = _WORD.search(name)
    if match is None:
        return name, None
    return (name[: match.start()] + name[match.end() :]).strip("_.-"), SPLIT_WORDS[match[1].lower()]


def numbered_split(name: str) -> tuple[str, str | None, int]:
    """Take the split and the number directly after it out of a name: ``ply_data_train0`` → ``ply_data``, ``train``, 0.

    The number is -1 if there is none.
    """
    rest, split = without_split(name)
    if split is not None:
        return rest, split, -1
    match = _NUMBERED.search(name)
    if match is None:
        return name, None, -1
    rest = (name[: match.start()] + name[match.end() :]).strip("_.-")
    return rest, SPLIT_WORDS[match[1].lower()], int(match[2])


def counted_split(name: str) -> tuple[str, str | None, int]:
    """Same as `numbered_split`, but the number may be apart or come first: ``img_train_0`` → ``img``, ``train``, 0."""
    if match := _COUNTED.search(name):
        return name[: match.start()].strip("_.-"), SPLIT_WORDS[match[1].lower()], int(match[2])
    if match := _COUNTED_BEFORE.match(name):
        return "", SPLIT_WORDS[match[2].lower()], int(match[1])
    return numbered_split(name)
