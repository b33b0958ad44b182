"""Arrays in the cache folder: one safetensors body, whatever they are called, and an error where it is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from h5feed.stored.array_file import dump_arrays, load_arrays
from safetensors.numpy import load

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "narrow": np.arange(5, dtype=np.uint8),
    "__metadata__": np.arange(4, dtype=np.int32),
    "wide": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros((0, 3), np.float32),
    "größe/\udcff": np.array([True, False]),
}
ABOUT = {"field": "größe", "values": [1, "a", None], "nested": {"x": 0.5}}


def test_what_is_written_is_read() -> None:
    about, arrays = load_arrays(dump_arrays(ABOUT, ARRAYS))
    assert about == ABOUT and arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype and np.array_equal(array, ARRAYS[name])
        assert not array.flags.owndata
    assert load_arrays(dump_arrays(None, {})) == (None, {})


def test_the_official_package_reads_it() -> None:
    named = {name: array for name, array in ARRAYS.items() if name.isascii()}
    loaded = load(dump_arrays(ABOUT, named))
    assert {name: array.tolist() for name, array in loaded.items()} == {
        f"arrays/{name}": array.tolist() for name, array in named.items()
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: data[:-8],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"shape":[2,3]', b'"shape":[3,3]'),
        lambda data: data.replace(b'"shape":[2,3]', b'"shape":[true,6]'),
        lambda data: data.replace(b'"shape":[2,3]', b'"shape":[-2,-3]'),
        lambda data: data.replace(b'"I64"', b'"I65"'),
        lambda data: data.replace(b'"about"', b'"other"'),
        lambda data: data.replace(b"__metadata__", b"__metadatum_"),
    ],
)
def test_bytes_that_are_none_are_refused(damage: Callable[[bytes], bytes]) -> None:
    data = dump_arrays(ABOUT, {"wide": ARRAYS["wide"]})
    with pytest.raises(ValueError, match=r"."):
        load_arrays(damage(data))
