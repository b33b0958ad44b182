"""Interprets names: splits, shards and halves of files, numbers, and names of fields."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..split_names import counted_split, numbered_split, without_split
from ..vocabulary import is_telling, says

_SHARD = re.compile(r"[_.\-](\d{3,6})-of-(\d{3,6})$")
_ROLE_SUFFIX = re.compile(r"(?:^|[_.\-])(x|y|images?|labels?|data|targets?|inputs?|mask)$", re.I)
"""The end of a file name that tells which fields of the dataset the file holds."""

_NUMBER = re.compile(r"(\d+)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

_PART_WORD = re.compile(r"[_.\- ]*(part|shard|chunk|piece|file)s?$", re.I)
"""A word that has no meaning at the end of a name after its number was removed."""

_FIELD_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        action actions ans audio band bands bgr box caption captions channel channels coordinates coords dataset
        descriptors distances dones dst ecg eeg embedding embeddings events feat feats flow frame frames gray
        grey info kspace latent latents left length lengths logits meta metadata neighbors neighbours next
        normal normals obs observation observations params patches photo photos picture pictures point points
        pos position positions prob probs query rewards rgb right sample samples score scores sensor sequence
        sequences signal signals snippets source sources spectrogram state states text timeouts token tokens
        trace traces tracings value vector vectors video videos waveform waveforms weight weights
        """,
    )
)
"""Words in names of fields, in addition to those that tell roles."""

_FIELD_LETTERS = frozenset("abcdefhiklmnoprstuvwxyz")
"""Single letters that are names of fields, as in formulas."""

_IMAGE_WORDS = frozenset(
    re.findall(r"\w+", "bgr depth frame gray grey image img mask mri photo picture rgb scan seg segmentation slice")
)
"""Words in names of images and masks."""


@dataclass(frozen=True)
class Tags:
    """What a file name tells about the place of the file in a dataset."""

    stem: str
    split: str | None = None
    shard: int = 0
    shards: int = 1
    half: str | None = None
    number: int = -1
    """The number next to the split word, as in ``train0``; -1 if there is none."""

    @property
    def is_part(self) -> bool:
        return self.split is not None or self.shards > 1 or self.half is not None


def tags_of(stem: str, *, counted: bool = False) -> Tags:
    """Interpret a file name without its extension.

    Parameters
    ----------
    stem : str
    counted : bool
        Whether a number that is separated from the split word counts the files of the split, as in ``train_0``. Else
        it is part of the name.
    """
    shard, shards, half = 0, 1, None
    if match := _SHARD.search(stem):
        shard, shards, stem = int(match[1]), int(match[2]), stem[: match.start()]
    if match := _ROLE_SUFFIX.search(stem):
        half, stem = match[1].lower(), stem[: match.start()]
    stem, split, number = counted_split(stem) if counted else numbered_split(stem)
    return Tags(stem, split, shard, shards, half, number)


def are_counted(numbered: Collection[tuple[str | None, int]]) -> bool:
    """Whether numbers count the parts of several splits.

    Parameters
    ----------
    numbered : collection of (str or None, int)
        Split and number of each part; the number is -1 if there is none.
    """
    numbers: dict[str | None, list[int]] = {}
    for split, number in numbered:
        numbers.setdefault(split, []).append(number)
    if None in numbers or "train" not in numbers or len(numbers) < 2 or max(map(len, numbers.values())) < 2:
        return False
    # Next to ``train``, ``train_2`` is the second part, but ``train_64`` is something else.
    firsts = [sorted(several)[1] for several in numbers.values() if min(several) < 0 and len(several) > 1]
    return all(first in (1, 2) for first in firsts) and all(len({*n}) == len(n) for n in numbers.values())


def natural(name: str) -> tuple[str | int, ...]:
    """Sort key for natural order: ``demo_2`` before ``demo_10``."""
    return tuple(int(part) if number % 2 else part for number, part in enumerate(_NUMBER.split(name)))


def pattern(name: str) -> str:
    """The name with numbers replaced by ``#``, in lower case: equal for names that differ only in numbers."""
    return _NUMBER.sub("#", name).lower()


def numbers_in(name: str) -> list[int]:
    """The numbers in a name, in order."""
    return [int(part) for part in _NUMBER.findall(name)]


def are_numbered(names: Collection[str]) -> bool:
    """Whether names contain numbers and differ only in these."""
    patterns = {pattern(name) for name in names}
    return len(patterns) == 1 and "#" in next(iter(patterns))


def without_numbers(names: Collection[str]) -> str:
    """The common name of names that differ only in numbers, without the numbers that differ."""
    parts = [_NUMBER.split(name) for name in names]
    kept = ""
    for place in range(len(parts[0])):
        values = {row[place] for row in parts}
        if place % 2 == 0 or len(values) == 1:
            kept += parts[0][place]
        else:
            kept = kept.rstrip("_.- ")
    return _PART_WORD.sub("", kept.strip("_.- ")).strip("_.- ")


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


def is_field(name: str) -> bool:
    """Whether a name is more likely that of a field than of a class, person or place."""
    name = without_split(name)[0]
    return name.lower() in _FIELD_LETTERS or not _FIELD_WORDS.isdisjoint(_words(name)) or is_telling(name)


def is_label(name: str) -> bool:
    """Whether a name is usual for labels."""
    return says(name, single=True) == "label"


def is_image(name: str) -> bool:
    """Whether a name is usual for an image or a mask of one."""
    return not _IMAGE_WORDS.isdisjoint(_words(name))
