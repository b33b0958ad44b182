"""Compares batches."""

from __future__ import annotations

import h5feed
import numpy as np


def assert_same_batch(one: h5feed.Batch, other: h5feed.Batch) -> None:
    """In every detail."""
    assert [*one] == [*other]
    assert (one.index, one.epoch, one.revision) == (other.index, other.epoch, other.revision)
    assert np.array_equal(one.rows, other.rows)
    assert (one.weight is None) == (other.weight is None)
    assert one.weight is None or other.weight is None or np.array_equal(one.weight, other.weight)
    for name, array in other.items():
        assert (one[name].dtype, one[name].shape) == (array.dtype, array.shape)
        assert one[name].tobytes() == array.tobytes(), name
