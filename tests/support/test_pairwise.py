"""What `sampled` leaves of a test's cases."""

from __future__ import annotations

import itertools

from tests.support.sampling import pairwise


def test_every_pair_of_values_is_there() -> None:
    """Of a product of four parameters, few cases have all pairs, the same ones each time; of fewer, all values."""
    values = {"a": "xyz", "b": "1234", "c": "pq", "d": "uvw"}
    cases = [dict(zip(values, case, strict=True)) for case in itertools.product(*values.values())]

    def combinations(chosen: list[int], together: int) -> set[object]:
        return {combined for place in chosen for combined in itertools.combinations(cases[place].items(), together)}

    everything = list(range(len(cases)))
    chosen = pairwise(cases)
    assert combinations(chosen, 2) == combinations(everything, 2) and 12 <= len(chosen) <= 18 < len(cases)
    assert pairwise(cases) == chosen
    single = pairwise(cases, 1)
    assert combinations(single, 1) == combinations(everything, 1) and len(single) == 4


def test_cases_that_leave_something_out() -> None:
    """Only pairs that occur are asked for, and cases without parameters in common are all needed."""
    assert pairwise([{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}]) == [0, 1, 2]
    assert pairwise([{"case": number} for number in range(5)]) == [0, 1, 2, 3, 4]
