"""A readable JSON summary of a binary body: types, ranges and first values of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.wire import OFFSETS

FIRST = 32
"""Values that are shown of a tensor."""

_MAX_CHARS = 200
"""Characters that are shown of one string."""


def preview(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str], texts: Collection[str]
) -> dict[str, Any]:
    """The body in short.

    Parameters
    ----------
    texts : collection of str
        Tensors that are the bytes of strings, which the tensors named ``NAME.offsets`` divide.
    """
    described: dict[str, Any] = {}
    for name, tensor in tensors.items():
        about: dict[str, Any] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
        if name in texts:
            offsets = tensors[name + OFFSETS][: FIRST + 1].tolist()
            about["first"] = [_text(tensor[begin:end]) for begin, end in pairwise(offsets)]
        else:
            about |= {**_range(tensor), "first": _first(tensor)}
        described[name] = about
    return {"metadata": dict(metadata), "tensors": described}


def _text(data: npt.NDArray[Any]) -> str:
    # Four bytes are one character at most.
    text = data[: 4 * _MAX_CHARS + 4].tobytes().decode("utf-8", "replace")
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"


def _range(tensor: npt.NDArray[Any]) -> dict[str, Any]:
    if not tensor.size or tensor.dtype.kind not in "biuf":
        return {}
    # In float16 a mean overflows.
    mean = tensor.mean(dtype=np.float64)
    return {"min": _plain(tensor.min()), "max": _plain(tensor.max()), "mean": _plain(mean)}


def _first(tensor: npt.NDArray[Any]) -> list[Any]:
    values = tensor[:FIRST] if tensor.ndim == 1 else tensor[:1].reshape(-1)[:FIRST]
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """As JSON has it; what it has not, such as NaN, as text."""
    plain = value.item()
    if isinstance(plain, (bool, int)) or (isinstance(plain, float) and np.isfinite(plain)):
        return plain
    return str(plain)
