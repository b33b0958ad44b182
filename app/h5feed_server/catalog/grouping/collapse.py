"""Takes off the paths of arrays what says to which split, and to which episode, their rows belong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...split_names import SPLIT_WORDS, without_split
from .episodes import episodes_among
from .pieces import Hints, Leaf, Series, kind_of
from .stacking import FEWEST, are_alike, as_row, is_sample

UNNAMED = "data"
"""What a field is called whose array has no other name than that of a split or a class."""


@dataclass
class Group:
    """A group, as it is in all the files of a dataset taken together."""

    arrays: dict[str, list[Leaf]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    def add(self, leaf: Leaf) -> None:
        """Put an array where its path says."""
        group = self
        for part in leaf.rest[:-1]:
            group = group.groups.setdefault(part, Group())
        leaf.rest = leaf.rest[-1:]
        group.arrays.setdefault(leaf.rest[0], []).append(leaf)


def collapse(group: Group, hints: Hints, split: str = "") -> list[Leaf]:
    """The arrays in a group, by what is left of their paths below it.

    Parameters
    ----------
    split : str
        That of the groups around it.
    """
    direct = _split_arrays(group.arrays, split)
    words = _split_words(group.groups)
    plain: dict[str, list[Leaf]] = {}
    found = list(direct)
    for name, below in group.groups.items():
        rest, word = words.get(name, (name, ""))
        leaves = collapse(below, hints, word or split)
        for leaf in leaves:
            leaf.split = leaf.split or word
        if word:
            for leaf in leaves:
                leaf.rest = (rest, *leaf.rest) if rest else leaf.rest
            found += leaves
        elif leaves:
            plain[name] = leaves
    episodes = set() if hints.episodes is False else set(episodes_among(plain, direct))
    if episodes and hints.stack is not False and hints.classes is not True:
        _stack([plain[name] for name in plain if name in episodes])
    for name, leaves in plain.items():
        for leaf in leaves:
            if name not in episodes:
                leaf.rest = (name, *leaf.rest)
            elif hints.classes:
                leaf.kind = name
            else:
                leaf.episode = (name, *leaf.episode)
        found += leaves
    return found


def _split_words(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """What groups that are named after splits are called otherwise, and their splits."""
    words = {name: ("", SPLIT_WORDS[name.lower()]) for name in names if name.lower() in SPLIT_WORDS}
    for name in names:
        rest, split = without_split(name)
        if split is not None and name not in words:
            words[name] = (rest, split)
    alike: dict[str, set[str]] = {}
    for rest, split in words.values():
        alike.setdefault(rest, set()).add(split)
    return {name: (rest, split) for name, (rest, split) in words.items() if _are_splits(alike[rest])}


def _are_splits(found: set[str]) -> bool:
    """One word alone may mean something else; that of the training rows does not."""
    return "train" in found or len(found) > 1


def _split_arrays(arrays: dict[str, list[Leaf]], split: str) -> list[Leaf]:
    words = {
        name: (name, None) if all(leaf.is_column for leaf in leaves) else without_split(name)
        for name, leaves in arrays.items()
    }
    there = {word for rest, word in words.values() if word is not None and rest}
    # Arrays that have no other name are splits of one field where they are alike in all but their rows.
    kinds: dict[object, set[str]] = {}
    for name, (rest, word) in words.items():
        if word is not None and not rest:
            for leaf in arrays[name]:
                kinds.setdefault(kind_of(leaf.segment), set()).add(word)
    found = []
    for name, leaves in arrays.items():
        rest, word = words[name]
        for leaf in leaves:
            if word is None:
                pass
            elif rest and (word == (split or leaf.split) or _are_splits(there)):
                leaf.rest, leaf.split = (rest,), word
            elif not rest and len(kinds[kind_of(leaf.segment)]) > 1 and leaf.segment.wire[1]:
                leaf.rest, leaf.split = (), word
            found.append(leaf)
    return found


def _stack(groups: list[list[Leaf]]) -> None:
    """Make a row of each of many groups that hold one sample each."""
    samples = [{"/".join(leaf.rest): leaf.segment.array for leaf in leaves} for leaves in groups]
    if len(groups) < FEWEST or not are_alike(samples) or is_sample(samples[0]) != "yes":
        return
    rows = [(leaf, as_row(leaf.segment)) for leaves in groups for leaf in leaves]
    for leaf, row in rows:
        if not isinstance(row, str):
            leaf.segment = row


def series_of(leaves: Iterable[Leaf]) -> list[Series]:
    """The arrays that are to become fields.

    Raises
    ------
    ValueError
        Two lay claim to the same rows of the same field.
    """
    found: dict[tuple[str, ...], Series] = {}
    for leaf in leaves:
        key = leaf.rest or (UNNAMED,)
        piece = leaf.piece
        if key in found and piece in found[key].pieces and leaf.half is not None:
            # Both halves call their array the same: the file's name tells them apart.
            key = (*key[:-1], leaf.half)
        series = found.setdefault(key, Series(key))
        if piece in series.pieces:
            raise ValueError(f"{'/'.join(key)} is there twice")
        series.note = series.note or leaf.note
        series.pieces[piece] = leaf.segment
    return list(found.values())
