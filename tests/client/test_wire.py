"""Bodies: the official safetensors package reads them, nothing is copied, what is broken is refused."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from h5feed.errors import BadAnswer
from h5feed.wire import ALIGNMENT, DTYPE_NAMES, Body, Tensor, read_body, read_runs
from hypothesis import given
from hypothesis import strategies as st

ABOUT = {"dataset": 'a "quoted" \\u0000 näme', "revision": "r", "epoch": "3", "batches": "1000"}


def filled(body: Body, index: int) -> np.ndarray:
    buffer = np.empty(body.nbytes, np.uint8)
    random = np.random.default_rng(index)
    for array in body.place(buffer, index).values():
        array[...] = random.integers(0, 2, array.shape)
    return buffer


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_NAMES)), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=6
    ),
    index=st.integers(0, 999),
)
def test_official_package_reads_what_is_written(shapes: list[tuple[str, list[int]]], index: int) -> None:
    """Any tensors of any dtype come out of safetensors as they went in, and out of our own reader."""
    body = Body([Tensor(f"t{i}", np.dtype(d), tuple(s)) for i, (d, s) in enumerate(shapes)], ABOUT)
    buffer = filled(body, index)
    official = safetensors.numpy.load(buffer.tobytes())
    tensors, metadata, nbytes = read_body(buffer)
    assert metadata == {**ABOUT, "index": str(index)}
    assert nbytes == len(buffer)
    assert set(official) == set(tensors) == {tensor.name for tensor in body.tensors}
    for name, tensor in tensors.items():
        assert tensor.dtype == official[name].dtype
        np.testing.assert_array_equal(tensor, official[name])


def test_layout() -> None:
    """Data begins 64-byte aligned, each tensor is aligned to its item size, views share the buffer."""
    body = Body([Tensor(n, np.dtype(d), (3,)) for n, d in (("a", "|u1"), ("b", "<i8"), ("c", "<f2"))], ABOUT)
    buffer = filled(body, 1)
    assert body.data_start % ALIGNMENT == 0
    tensors, _, _ = read_body(buffer)
    for tensor in tensors.values():
        assert np.shares_memory(tensor, buffer)
        assert (tensor.ctypes.data - buffer.ctypes.data) % tensor.itemsize == 0


def test_every_batch_has_the_same_length() -> None:
    """The digits of the index do not change the length, so that a stream's length is known before it is read."""
    body = Body([Tensor("x", np.dtype("<f4"), (2,))], ABOUT)
    assert {len(body.header(index)) for index in (0, 7, 42, 999)} == {body.data_start}


def test_back_to_back() -> None:
    """Several bodies in one buffer are read one by one."""
    body = Body([Tensor("x", np.dtype("|u1"), (5,))], ABOUT)
    buffer = np.concatenate([filled(body, index) for index in range(4)])
    assert [index for run in read_runs(buffer) for index in run.indices] == [0, 1, 2, 3]


def test_broken_bodies_are_refused() -> None:
    """Every truncation, and a header that lies, is an error, never a wrong array."""
    buffer = filled(Body([Tensor("x", np.dtype("<i4"), (6,))], ABOUT), 0)
    for end in range(len(buffer)):
        with pytest.raises(BadAnswer):
            read_body(buffer[:end])
    for change in (b"[6]", b"[7]"), (b'"I32"', b'"XXX"'), (b"[0,24]", b"[0,99]"):
        with pytest.raises(BadAnswer):
            read_body(np.frombuffer(buffer.tobytes().replace(*change), np.uint8))
