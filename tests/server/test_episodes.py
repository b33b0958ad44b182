"""Where samples of several rows lie, in datasets of any size: against sets of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter
from h5feed_server.row_bits import LISTED_ROWS, RowBits, RowRuns, RowSet
from h5feed_server.splits.windows import Windows, runs_of, samples_in
from h5feed_server.splits.windows_spec import WindowsSpec
from hypothesis import given
from hypothesis import strategies as st

ROWS = 40


def _sets(rows: list[int]) -> list[RowSet]:
    """The same rows in every form."""
    is_in = np.isin(np.arange(ROWS), rows)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_in, [False]]).astype(int))).reshape(-1, 2)
    return [
        np.array(rows, np.int32),
        RowBits(np.packbits(is_in)),
        RowRuns([(int(begin), int(end)) for begin, end in edges]),
    ]


@given(
    rows=st.one_of(st.none(), st.lists(st.integers(0, ROWS - 1), unique=True).map(sorted)),
    cuts=st.lists(st.integers(0, ROWS), max_size=5).map(sorted),
)
def test_runs(rows: list[int] | None, cuts: list[int]) -> None:
    """Runs are consecutive rows of a split, cut where an episode ends, whatever the form of the split."""
    expected: list[list[int]] = []
    for row in range(ROWS) if rows is None else rows:
        if expected and expected[-1][1] == row and row not in cuts:
            expected[-1][1] = row + 1
        else:
            expected.append([row, row + 1])
    bounds = np.array([0, *cuts, ROWS], np.int64)
    for form in [None] if rows is None else _sets(rows):
        assert [list(run) for run in zip(*map(np.ndarray.tolist, runs_of(form, bounds)), strict=True)] == expected


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("ends", ["drop", "pad", "pad_start", "pad_end"])
def test_samples_of_large_datasets(stride: int, ends: str) -> None:
    """Beyond the limit of lists, the samples are the same in another form."""
    starts, ends_of = np.array([0, 9, 20]), np.array([4, 18, ROWS])
    spec = WindowsSpec.model_validate({"offsets": "x:-2..3", "sequence_stride": stride, "ends": ends})
    listed = samples_in(starts, ends_of, spec, ROWS, "episode")
    large = samples_in(starts, ends_of, spec, LISTED_ROWS + 1, "episode")
    assert isinstance(listed, np.ndarray) and not isinstance(large, np.ndarray)
    assert large[np.arange(len(large))].tolist() == listed.tolist()
    first, last = {"drop": (11, 36), "pad": (0, 39), "pad_start": (0, 36), "pad_end": (2, 39)}[ends]
    assert listed[0] == first and last - stride < listed[-1] <= last
    if ends == "pad":
        windows = Windows(starts, ends_of, listed)
        assert windows.rows(np.array([9]), np.array([-2, 0, 8, 9])).tolist() == [[9, 9, 17, 17]]
        assert windows.mask(np.array([9]), np.array([-2, 0, 8, 9])).tolist() == [[False, True, True, False]]


@given(
    marked=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
    offsets=st.sets(st.integers(-6, 6), min_size=1).map(sorted).map(np.array),
)
def test_samples_with_marked_rows(marked: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> None:
    """A sample meets the marked rows if one of its rows is marked, also where an end of its run is repeated."""
    samples = np.array([*range(4), *range(9, 18), *range(20, ROWS)], np.int32)
    windows = Windows(np.array([0, 9, 20]), np.array([4, 18, ROWS]), samples)
    found = windows.meet(samples, offsets, marked)
    assert found.tolist() == marked[windows.rows(samples.astype(np.int64), offsets)].any(axis=1).tolist()


def test_no_rows_and_short_runs() -> None:
    """A split without rows has no samples; if no run is long enough, the error says how long they are."""
    none = np.zeros(0, np.int64)
    spec = WindowsSpec.model_validate({"sequence_length": 4, "sampling_rate": 2})
    for rows in (ROWS, LISTED_ROWS + 1):
        assert len(samples_in(none, none, spec, rows, "episode")) == 0
    with pytest.raises(BadParameter, match="spans 7 rows, but the longest episode has 6"):
        samples_in(np.array([0]), np.array([6]), spec, ROWS, "episode")
