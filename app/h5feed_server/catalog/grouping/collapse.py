"""Removes the parts of paths that name splits and episodes, and records them with the arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..split_names import counted_split, without_split
from ..vocabulary import is_running
from .episodes import episodes_among
from .names import are_counted
from .pieces import Hints, Leaf, Series, kind_of, rows_of
from .stacking import are_samples, as_row, members_of

UNNAMED = "data"
"""Name of a field whose arrays are named only after splits or classes."""

_NO_SPLIT = "its name contains the name of a split, but it describes the rows of other arrays: it is no split"


@dataclass
class Group:
    """A group, merged from all files of a dataset."""

    arrays: dict[str, list[Leaf]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def rows(self) -> set[int]:
        """Lengths of all arrays below the group."""
        own = {leaf.segment.rows for leaves in self.arrays.values() for leaf in leaves if leaf.segment.array.shape}
        return own.union(*(below.rows for below in self.groups.values()))

    def add(self, leaf: Leaf) -> None:
        """Add an array at its path."""
        group = self
        for part in leaf.rest[:-1]:
            group = group.groups.setdefault(part, Group())
        leaf.rest = leaf.rest[-1:]
        group.arrays.setdefault(leaf.rest[0], []).append(leaf)


def collapse(group: Group, hints: Hints, split: str = "", beside: int = 0) -> list[Leaf]:
    """Return the arrays below a group. Their remaining paths, `Leaf.rest`, are relative to the group.

    Parameters
    ----------
    group : Group
    hints : Hints
    split : str
        The split of the groups above; empty if there is none.
    beside : int
        Number of groups in this group and in those of the other splits.

    Raises
    ------
    InDoubt
        The groups are ambiguous.
    """
    direct = _split_arrays(group.arrays, split)
    words = _split_words(group.groups)
    rows = {leaf.segment.rows for leaf in direct if not leaf.split and leaf.segment.array.text is None}
    lengths: dict[str, set[int]] = {}
    for name, (rest, _, _) in words.items():
        lengths.setdefault(rest, set()).update(group.groups[name].rows)
    # A group whose arrays have the same rows as the arrays next to it is not a split.
    words = {name: said for name, said in words.items() if not said[0] or not lengths[said[0]] <= rows}
    plain: dict[str, list[Leaf]] = {}
    counted: dict[str, list[Leaf]] = {}
    inner = sum(len(group.groups[name].groups) for name in words)
    collapsed = list(direct)
    for name, below in group.groups.items():
        rest, word, number = words.get(name, (name, "", -1))
        leaves = collapse(below, hints, word or split, inner if word else 0)
        for leaf in leaves:
            leaf.split = leaf.split or word
        if word:
            for leaf in leaves:
                leaf.rest = (rest, *leaf.rest) if rest else leaf.rest
                leaf.episode = (name, *leaf.episode) if number >= 0 else leaf.episode
            if number >= 0:
                counted[name] = leaves
            collapsed += leaves
        elif leaves:
            plain[name] = leaves
    # If the file says what the rows of each group describe, groups with the same members are not episodes.
    among = {
        name: leaves
        for name, leaves in plain.items()
        if hints.episodes or all(rows_of(leaf.segment) is None for leaf in leaves)
    }
    episodes = set() if hints.episodes is False else set(episodes_among(among, direct))
    if hints.stack is None and hints.classes is not True:
        _stack(counted[name] for name in _samples_among(counted, counted, 0))
        samples = _samples_among(plain, episodes, beside)
        _stack(plain[name] for name in samples)
        episodes |= samples
    for name, leaves in plain.items():
        for leaf in leaves:
            if name not in episodes:
                leaf.rest = (name, *leaf.rest)
            elif hints.classes:
                leaf.kind = name
            else:
                leaf.episode = (name, *leaf.episode)
        collapsed += leaves
    return collapsed


def _split_words(names: Iterable[str]) -> dict[str, tuple[str, str, int]]:
    """The groups that are named after splits: the rest of the name, the split, and the number in the split or -1."""
    counted: dict[str, dict[str, tuple[str, str, int]]] = {}
    alike: dict[str, dict[str, tuple[str, str, int]]] = {}
    for name in names:
        rest, split, number = counted_split(name)
        if split is not None:
            counted.setdefault(rest, {})[name] = (rest, split, number)
    words: dict[str, tuple[str, str, int]] = {}
    for named in counted.values():
        if are_counted([(split, number) for _, split, number in named.values()]):
            words |= named
    for name in names:
        rest, split = without_split(name)
        if split is not None and name not in words:
            alike.setdefault(rest, {})[name] = (rest, split, -1)
    for named in alike.values():
        if _are_splits({split for _, split, _ in named.values()}):
            words |= named
    return words


def _are_splits(splits: set[str]) -> bool:
    """Whether these split words mean splits: a single word other than ``train`` may mean something else."""
    return "train" in splits or len(splits) > 1


def _split_arrays(arrays: dict[str, list[Leaf]], split: str) -> list[Leaf]:
    words = {
        name: (name, None) if all(leaf.is_column for leaf in leaves) else without_split(name)
        for name, leaves in arrays.items()
    }
    for name in _about_rows(arrays, words, split):
        words[name] = (name, None)
        for leaf in arrays[name]:
            leaf.note = leaf.note or _NO_SPLIT
    there = {word for rest, word in words.values() if word is not None and rest}
    # Arrays whose whole name is a split word are splits of one field if they are alike except for their length.
    kinds: dict[object, set[str]] = {}
    for name, (rest, word) in words.items():
        if word is not None and not rest:
            for leaf in arrays[name]:
                kinds.setdefault(kind_of(leaf.segment), set()).add(word)
    split_leaves = []
    for name, leaves in arrays.items():
        rest, word = words[name]
        for leaf in leaves:
            if word is None:
                pass
            elif rest and (word == (split or leaf.split) or _are_splits(there)):
                leaf.rest, leaf.split = (rest,), word
            elif not rest and len(kinds[kind_of(leaf.segment)]) > 1 and leaf.segment.wire[1]:
                leaf.rest, leaf.split = (), word
            split_leaves.append(leaf)
    return split_leaves


def _about_rows(arrays: Mapping[str, list[Leaf]], words: Mapping[str, tuple[str, str | None]], split: str) -> list[str]:
    """Names of arrays that contain a split word but are about the rows of the other arrays: masks, and row numbers."""
    if not _are_splits({word for rest, word in words.values() if word is not None and rest}):
        return []
    rows: dict[tuple[str, int], set[int]] = {}
    rests: dict[str, list[str]] = {}
    for name, leaves in arrays.items():
        rest, word = words[name]
        if word is None:
            for leaf in leaves:
                if leaf.segment.array.shape and leaf.segment.array.text is None:
                    rows.setdefault((leaf.split, leaf.shard), set()).add(leaf.segment.rows)
        elif rest and any(word != (split or leaf.split) for leaf in leaves):
            rests.setdefault(rest, []).append(name)
    aligned, numbers, others = [], [], []
    for rest, names in rests.items():
        leaves = [leaf for name in names for leaf in arrays[name]]
        lengths = {(leaf.split, leaf.shard, leaf.segment.rows) for leaf in leaves if leaf.segment.array.shape}
        places = {(leaf.split, leaf.shard) for leaf in leaves}
        if len(lengths) == len(places) and all(length in rows.get((s, shard), ()) for s, shard, length in lengths):
            aligned.append(names)
        elif rows and is_running(rest) and not any(leaf.segment.wire[1] for leaf in leaves):
            numbers.append(names)
        else:
            others.append(names)
    # If there are real splits, arrays have matching lengths by chance, and row numbers count the rows of their split.
    if any(len(names) > 1 for names in others):
        return [name for names in aligned if len(names) > 1 for name in names]
    return [name for names in aligned + numbers for name in names]


def _samples_among(groups: Mapping[str, list[Leaf]], episodes: Collection[str], beside: int) -> set[str]:
    """Names of the groups that hold one sample each: episodes, and groups that share members with them.

    Raises
    ------
    InDoubt
        They seem to hold one sample each, but do not fit together or are few.
    """
    if not episodes:
        return set()
    samples = {name: {"/".join(leaf.rest): leaf.segment.array for leaf in leaves} for name, leaves in groups.items()}
    members = {name: members_of(sample) for name, sample in samples.items()}
    most, _ = Counter(members[name] for name in episodes).most_common(1)[0]
    alike = {name: sample for name, sample in samples.items() if name in episodes or members[name] & most}
    return {*alike} if are_samples(alike, "group", beside) else set()


def _stack(groups: Iterable[list[Leaf]]) -> None:
    """Turn the arrays of each group into single rows."""
    for leaf in (leaf for leaves in groups for leaf in leaves):
        row = as_row(leaf.segment)
        if not isinstance(row, str):
            leaf.segment = row


def series_of(leaves: Iterable[Leaf]) -> list[Series]:
    """Combine arrays into the series that become fields.

    Raises
    ------
    ValueError
        Two arrays are the same piece of the same field.
    """
    by_path: dict[tuple[str, ...], Series] = {}
    for leaf in leaves:
        key = leaf.rest or (UNNAMED,)
        piece = leaf.piece
        if key in by_path and piece in by_path[key].pieces and leaf.half is not None:
            # Both halves have an array of this name: name the field after the half of the file name.
            key = (*key[:-1], leaf.half)
        series = by_path.setdefault(key, Series(key))
        if piece in series.pieces:
            raise ValueError(f"{'/'.join(key)} exists twice")
        series.note = series.note or leaf.note
        series.pieces[piece] = leaf.segment
        series.apart = series.apart or series.why_apart is not None
    return list(by_path.values())
