"""Tensors of whatever a transform returns: what torch can hold becomes a tensor of the same values, the rest stays."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from h5feed.loops.tensors import tensors_of  # noqa: E402

VALUES = np.arange(24).reshape(2, 3, 4) % 5
"""Numbers that every dtype can hold."""


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda a: a,
    "flipped": lambda a: a[:, ::-1],
    "mirrored in every way": lambda a: a[::-1, ::-1, ::-1],
    "strided": lambda a: a[:, ::2, 1:3],
    "transposed": lambda a: a.T,
    "read-only": read_only,
    "broadcast": lambda a: np.broadcast_to(a, (5, *a.shape)),
    "no rows": lambda a: a[:0],
    "no rows, flipped": lambda a: a[:0, ::-1],
    "of no dimension": lambda a: np.array(a[1, 2, 3]),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "member of records": lambda a: np.rec.fromarrays([a, np.zeros(a.shape, "i1")])["f0"],
    "Fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list("?bhiqBHIQefdFD"))
def test_arrays_of_any_layout(dtype: str, layout: str) -> None:
    """Same values, shape and type as the array's, and no warning, however it lies in memory."""
    array = LAYOUTS[layout](VALUES.astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = tensors_of(array, False)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.numpy().dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_memory_is_shared_where_torch_can(recwarn: pytest.WarningsRecorder) -> None:
    """A batch is not copied, and what torch may write to is never an array that was read-only."""
    array = VALUES.astype("f4")
    assert np.shares_memory(tensors_of(array, False).numpy(), array)
    assert np.shares_memory(tensors_of(array[:, ::2], False).numpy(), array)
    fixed = read_only(array)
    tensors_of(fixed, False)[...] = 7
    np.testing.assert_array_equal(fixed, array)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_numpy_lacks(name: str) -> None:
    """What ``ml_dtypes`` adds to numpy is torch's type of the same name, flipped too."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = VALUES.astype(getattr(ml_dtypes, name))
    for given in (array, array[:, ::-1], read_only(array)):
        tensor = tensors_of(given, False)
        assert tensor.dtype == getattr(torch, name)
        np.testing.assert_array_equal(tensor.float().numpy(), given.astype(np.float32))


def test_what_is_no_array_of_numbers() -> None:
    """Text, dates, plain Python values and objects come through as they are; scalars of numpy are tensors."""
    marker = object()
    for value in ("cat", b"cat", 3, 2.5, True, None, marker):
        assert tensors_of(value, False) is value
    for text in (
        np.array(["cat", "dog"]),
        np.array([b"cat"]),
        np.array(["a", None], object),
        np.array(["2024"], "M8[D]"),
    ):
        assert tensors_of(text, False) is text
    for scalar in (np.float32(2.5), np.int64(3), np.bool_(True)):
        tensor = tensors_of(scalar, False)
        assert tensor.shape == () and tensor.numpy().dtype == scalar.dtype and tensor.item() == scalar.item()
    tensor = torch.arange(3)
    assert tensors_of(tensor, False) is tensor


def test_arrays_of_other_libraries() -> None:
    """What a Keras layer on another backend returns is a tensor of the same values."""
    numpy = pytest.importorskip("jax.numpy")
    tensor = tensors_of(numpy.asarray(VALUES, "float32"), False)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), VALUES)


def test_trees() -> None:
    """Dicts, tuples, lists and named tuples keep their kind and order, as deep as they go."""
    Pair = namedtuple("Pair", "left right")
    ones, flipped = np.ones(2, "f4"), np.arange(3)[::-1]
    tree = {"a": (ones, [flipped, "text"]), "b": Pair(ones, {"c": 1}), "d": [], "e": ()}
    found = tensors_of(tree, False)
    assert list(found) == list(tree) and type(found["a"]) is tuple and type(found["a"][1]) is list
    assert isinstance(found["b"], Pair) and found["b"].right == {"c": 1} and found["d"] == [] and found["e"] == ()
    assert found["a"][1][0].tolist() == [2, 1, 0] and found["a"][1][1] == "text"
    assert torch.equal(found["b"].left, torch.ones(2))
