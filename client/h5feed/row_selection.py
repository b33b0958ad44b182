"""Checks the rows and keys that callers name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BadParameter


def key_list(keys: Sequence[str | int] | npt.NDArray[Any]) -> list[str | int]:
    """Keys as they are sent.

    Raises
    ------
    BadParameter
    """
    if isinstance(keys, str):
        raise BadParameter(f"keys={keys!r} is a single key: pass a list of keys")
    listed: list[Any] = list(keys.tolist() if isinstance(keys, np.ndarray) else keys)
    found: list[str | int] = []
    for one in listed:
        if isinstance(one, bytes):
            try:
                one = one.decode()
            except UnicodeDecodeError:
                raise BadParameter(f"keys are text in UTF-8, which {one!r:.100} is not") from None
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, (str, int, np.integer)):
            raise BadParameter(f"keys must be text or integers, not {one!r:.100}")
        found.append(one if isinstance(one, str) else int(one))
    return found


def row_ids(rows: npt.ArrayLike) -> npt.NDArray[Any]:
    """Row ids as an array of integers.

    Raises
    ------
    BadParameter
    """
    wanted = np.asarray(rows)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise BadParameter(f"rows must be a flat list of integers, got {wanted.dtype} of shape {wanted.shape}")
    return wanted
