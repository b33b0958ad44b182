"""Finds groups with the same members: episodes, subjects or clients of one dataset, with any names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from .names import is_field, natural, pattern
from .pieces import Kind, Leaf, Path, kind_of

Signature = frozenset[tuple[Path, Kind]]


def signature(leaves: Sequence[Leaf]) -> Signature:
    """The names, dtypes and row shapes of the arrays in a group."""
    return frozenset((leaf.rest, kind_of(leaf.segment)) for leaf in leaves if leaf.segment.array.shape)


def episodes_among(groups: Mapping[str, Sequence[Leaf]], direct: Sequence[Leaf]) -> list[str]:
    """Return the names of the groups that are episodes of one dataset, in natural order; empty if there are none.

    Parameters
    ----------
    groups : mapping of str to sequence of Leaf
        The arrays in each group.
    direct : sequence of Leaf
        The arrays next to the groups.
    """
    groups = {name: leaves for name, leaves in groups.items() if any(leaf.segment.array.shape for leaf in leaves)}
    if len(groups) < 2:
        return []
    rows = {leaf.segment.rows for leaves in groups.values() for leaf in leaves if leaf.segment.array.shape}
    # Groups with the rows of the arrays next to them are fields, as ``obs`` and ``next_obs``, and so are groups with
    # names of fields.
    if len(rows) == 1 and (rows <= {leaf.segment.rows for leaf in direct} or all(map(is_field, groups))):
        return []
    signatures = {name: signature(leaves) for name, leaves in groups.items()}
    same: dict[Signature, list[str]] = defaultdict(list)
    for name, members in signatures.items():
        same[members].append(name)
    best = max(same.values(), key=len)
    # For names that differ in a number, some common members are enough. The others do not exist for all rows.
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in groups:
        if "#" in pattern(name):
            numbered[pattern(name)].append(name)
    for names in numbered.values():
        if len(names) > len(best) and frozenset.intersection(*(signatures[name] for name in names)):
            best = names
    return sorted(best, key=natural) if len(best) > 1 else []
