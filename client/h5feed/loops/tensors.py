"""Convert the arrays of a batch to tensors, without copying where torch allows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .tree import mapped as mapped


def tensors_of(arrays: Any, pin: bool) -> Any:
    """The same dicts, tuples and lists, with a tensor in place of every numeric array.

    Parameters
    ----------
    arrays : tree
        Numpy arrays, and anything else that a transform returns. Arrays of other libraries become tensors too, sparse
        matrices of scipy sparse CSR tensors. Objects that are not arrays, and dtypes that torch lacks (text, dates),
        stay as they are.
    pin : bool
        Use pinned memory, which a CUDA device reads directly.

    A tensor shares the memory of its array. Arrays that torch cannot share are copied: read-only ones, those with
    negative strides (a flip), and those in non-native byte order.
    """

    def tensor(value: Any) -> Any:
        found = _sparse(value) if hasattr(value, "indptr") else _tensor(value)
        if pin and isinstance(found, torch.Tensor) and found.device.type == "cpu" and found.layout == torch.strided:
            return found.pin_memory()
        return found

    return mapped(tensor, arrays)


def _sparse(matrix: Any) -> torch.Tensor:
    """A matrix of scipy in CSR as a tensor in CSR."""
    rows, columns, data = (_tensor(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    return torch.sparse_csr_tensor(rows, columns, data, matrix.shape)


def _tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    alike = _ML_DTYPES.get(array.dtype.name)
    if alike is not None:
        array = array.view(f"u{array.itemsize}")
    if array.dtype.kind not in "biufc":
        return value
    # Of several C types of the same size (long, long long), torch accepts only one.
    native = np.dtype(f"{array.dtype.kind}{array.itemsize}")
    array = array.view(native) if array.dtype.isnative else array.astype(native)
    if not _is_shared(array):
        array = array.copy()
    if alike is not None:
        return torch.from_numpy(array).view(alike)
    try:
        return torch.from_numpy(array)
    except TypeError:
        # long double; in older versions of torch also uint16, uint32 and uint64
        return value


def _is_shared(array: npt.NDArray[Any]) -> bool:
    """Whether torch can share the memory of an array: it must be writable, with strides of whole items."""
    return array.flags.writeable and all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)


_ML_DTYPES = {
    name: getattr(torch, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
"""Dtypes of ``ml_dtypes`` that torch has under the same name."""
