"""A part of a test's parametrised cases that has each pair of values of its parameters at least once."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pytest


def pairwise(cases: Sequence[Mapping[str, object]], together: int = 2) -> list[int]:
    """Places of cases that have each combination of `together` values which occurs at all; the same ones each time.

    A greedy choice: always the case that brings the most combinations that are still missing.
    """
    combinations = [set(itertools.combinations(sorted(case.items()), min(together, len(case)))) for case in cases]
    missing = set().union(*combinations)
    places = list(range(len(cases)))
    random.Random(0).shuffle(places)
    chosen = []
    while missing:
        best = max(places, key=lambda place: len(combinations[place] & missing))
        chosen.append(best)
        missing -= combinations[best]
    return sorted(chosen)


def mark_what_is_left_out(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what is not chosen of the cases of each test that is marked with ``sampled``."""
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.get_closest_marker("sampled"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("sampled")
        assert marker is not None
        chosen = pairwise([_values(case) for case in cases], *marker.args)
        for place in set(range(len(cases))).difference(chosen):
            cases[place].add_marker(pytest.mark.slow)


def _values(case: pytest.Function) -> dict[str, str]:
    """Parameters by name. Equal ones are written alike, others differently."""
    return {name: repr(value) for name, value in case.callspec.params.items()}
