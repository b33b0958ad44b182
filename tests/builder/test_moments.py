"""Sums of pixels and of their squares, which the channel means of a build are computed from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from h5feed_server.builder.moments import MAX_CHANNELS, moments


def exact(rows: npt.NDArray[np.uint8], power: int) -> list[list[int]]:
    """The sums as whole numbers of any size."""
    pixels = rows.reshape(len(rows), -1, rows.shape[-1])
    # Each value of a byte as often as it occurs: whole images of one colour are not too large for this.
    counted = [[np.bincount(row[:, channel], minlength=256) for channel in range(row.shape[-1])] for row in pixels]
    return [[sum(int(count) * value**power for value, count in enumerate(counts)) for counts in row] for row in counted]


@pytest.mark.parametrize("shape", [(3, 1, 1, 3), (2, 300, 7, 4), (4, 65, 33, 3), (2, 9, 9, 1), (2, 64, 64, 2)])
def test_bytes_are_added_exactly(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sums, squares, missing = moments(rows)
    assert sums[:, : shape[-1]].tolist() == exact(rows, 1)
    assert squares[:, : shape[-1]].tolist() == exact(rows, 2)
    assert not sums[:, shape[-1] :].any() and not squares[:, shape[-1] :].any() and not missing.any()


def test_the_largest_images_are_added_exactly() -> None:
    """Their sums of squares have more than 32 bits and more than a float32 holds."""
    rows = np.full((1, 9000, 9000, 1), 255, np.uint8)
    rows[0, :77, :99] = 254
    sums, squares, _ = moments(rows)
    assert (sums[:, :1].tolist(), squares[:, :1].tolist()) == (exact(rows, 1), exact(rows, 2))


@pytest.mark.parametrize("shape", [(2, 0, 5, 3), (0, 4, 4, 3), (3, 0), (2, 7), (2, 5, 6)])
def test_rows_that_are_no_images(shape: tuple[int, ...]) -> None:
    """All values of a row are one channel, and there may be none."""
    rows = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sums, squares, missing = moments(rows)
    assert sums.shape == squares.shape == missing.shape == (shape[0], MAX_CHANNELS)
    assert sums.sum() == rows.sum(dtype=np.int64)
    assert squares.sum() == (rows.astype(np.int64) ** 2).sum()


def test_nan_is_left_out() -> None:
    rows = np.array([[[[1, np.nan], [2, 3]]]], np.float32)
    sums, squares, missing = moments(rows)
    assert (sums[0, :2].tolist(), squares[0, :2].tolist(), missing[0, :2].tolist()) == ([3, 3], [5, 9], [0, 1])
