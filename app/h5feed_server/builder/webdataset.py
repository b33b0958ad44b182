"""WebDataset shards: a tar in which ``000001.jpg`` and ``000001.cls`` form one sample.

The sample's key is the part of the name before its first dot. See https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from h5feed.errors import BadParameter

from .image_source import ImageSource
from .image_spec import SUFFIXES
from .members import BrokenMember, Members
from .options import BuildOptions
from .source import Column, label_column

_LABELS = ("cls", "cls.txt", "label", "json", "txt")
"""Endings of what says the class, the likeliest first."""

_JSON_KEYS = ("label", "class", "cls", "target", "category")
_PROBED = 200


def is_webdataset(members: Members) -> bool:
    """Whether one of the first images has a label with the same key."""
    endings = defaultdict(set)
    for member in members.listing.members[:_PROBED]:
        key, ending = _key(member.name)
        endings[key].add(ending)
    with_image = [own for own in endings.values() if any(f".{ending}".endswith(SUFFIXES) for ending in own)]
    return any(own & {"cls", "json", "label"} for own in with_image)


def webdataset(members: Members, options: BuildOptions) -> ImageSource:
    """Samples with an image and, if present, a class.

    Raises
    ------
    BadParameter
    """
    known = members.listing.members
    samples: dict[str, dict[str, int]] = {}
    for index, member in enumerate(known):
        key, ending = _key(member.name)
        samples.setdefault(key, {})[ending] = index
    rows: list[tuple[int, str, int | None]] = []
    ending_of_label = next((e for e in _LABELS if any(e in own for own in samples.values())), None)
    for key, own in samples.items():
        image = next((index for ending, index in own.items() if f".{ending}".endswith(SUFFIXES)), None)
        label = own.get(ending_of_label) if ending_of_label else None
        if image is None:
            members.listing.left_out[key] = "it has no image"
        elif ending_of_label is not None and label is None:
            members.listing.left_out[key] = f"it has no .{ending_of_label}"
        else:
            rows.append((image, key, label))
    if not members.anywhere:
        # Read in the order of the archive.
        rows.sort()
    columns: dict[str, Column] = {}
    if ending_of_label is not None:
        wanted = sorted(label for _, _, label in rows if label is not None)
        said = dict(members.stream(wanted))
        values = [_label(said[label], key, options.label_column) for _, key, label in rows if label is not None]
        columns["labels"] = label_column(values)
    used = {ending for own in samples.values() for ending in own if not f".{ending}".endswith(SUFFIXES)}
    other = sorted(used - {ending_of_label})
    notes = [f"files of samples that are ignored: {', '.join(f'.{ending}' for ending in other[:10])}"] if other else []
    twice = sum(1 for own in samples.values() if sum(f".{ending}".endswith(SUFFIXES) for ending in own) > 1)
    if twice:
        notes.append(f"{twice:,} samples have several images: only the first of each is used")
    chosen, names = [image for image, _, _ in rows], [known[image].name for image, _, _ in rows]
    return ImageSource(members, chosen, names, columns, "labels" if columns else None, None, options, notes)


def _key(name: str) -> tuple[str, str]:
    """``a/000001.seg.png`` → ``a/000001``, ``seg.png``."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _label(content: bytes | BrokenMember, key: str, wanted: str | None) -> Any:
    """An integer or a text."""
    try:
        if isinstance(content, BrokenMember):
            raise content
        value: Any = content.decode().strip()
        if value.startswith("{"):
            about = json.loads(value)
            names = (wanted,) if wanted is not None else _JSON_KEYS
            value = next(about[name] for name in names if name in about)
        return int(value) if str(value).lstrip("-").isdigit() else str(value)
    except StopIteration:
        raise BadParameter(f"{key}.json has no {wanted or 'label'}: choose its key with label_column") from None
    except RecursionError:
        raise BadParameter(f"the label of {key} cannot be read: its JSON is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadParameter(f"the label of {key} cannot be read: {error}") from None
