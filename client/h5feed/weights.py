"""Weights of rows that the client gives: an array for each dataset, named in the URL by its digest.

The digest keeps a batch a pure function of its URL. Servers that lack the array say so, and the client gives it to
them: see `h5feed.net.client`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import BadParameter

DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
"""The dtypes in which weights are sent, by name."""

_PREFIX = "digest:"
_NAMED = re.compile(f"{_PREFIX}([0-9a-f]{{32}})")


class Digest:
    """The digest of an array of weights, which may come in pieces."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._hash = hashlib.blake2b(f"weights {dtype.str}\0".encode(), digest_size=16)

    def update(self, piece: bytes | memoryview) -> None:
        self._hash.update(piece)

    def text(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()


def named(digest: str) -> str:
    """The value of the parameter ``weights`` for an array with this digest."""
    return _PREFIX + digest


def digest_in(weights: str) -> str | None:
    """The digest in a value of the parameter ``weights``; None if it is the name of a field.

    Raises
    ------
    BadParameter
        It begins like a digest, but is none.
    """
    match = _NAMED.fullmatch(weights)
    if match is None and weights.startswith(_PREFIX):
        raise BadParameter(f"weights={weights}: {_PREFIX} is followed by the 32 hexadecimal digits of a digest")
    return None if match is None else match[1]


def first_bad(values: npt.NDArray[Any]) -> int | None:
    """Position of the first value that is no weight: negative, infinite or NaN."""
    bad = ~(np.isfinite(values) & (values >= 0))
    return int(bad.argmax()) if bad.any() else None


def bad_weight(row: int, value: float) -> BadParameter:
    """The error for a value that is no weight."""
    return BadParameter(f"weights: row {row} has {value}, but weights must be finite numbers ≥ 0")


NOTHING_TO_DRAW = "weights: all are 0, so there is nothing to draw"


class GivenWeights(str):
    """The value of the parameter ``weights`` for an array, which it carries for servers that lack it.

    Attributes
    ----------
    values : (rows,) float32 or float64, little-endian
        A copy of the array, read-only.
    path : str
        Path of the URL to which the array is posted.
    """

    values: npt.NDArray[Any]
    path: str

    @classmethod
    def of(cls, weights: npt.ArrayLike, rows: int, path: str) -> Self:
        """Check an array and name it.

        Parameters
        ----------
        weights : (rows,) array of numbers
            A weight for each row of the dataset, not only of a split.

        Raises
        ------
        BadParameter
        """
        given = np.asarray(weights)
        if given.dtype.kind not in "biuf" or given.ndim != 1:
            raise BadParameter(
                f"weights must be the name of a field or a flat array of numbers, not {given.dtype} of shape "
                f"{list(given.shape)}"
            )
        if len(given) != rows:
            raise BadParameter(
                f"{len(given)} weights do not match the {rows} rows of the dataset: give one for each row, also of "
                "those in other splits"
            )
        # A copy: if the caller changes the array, the digest still names what is sent.
        values = np.array(given, "<f4" if given.dtype == np.float32 else "<f8")
        if (bad := first_bad(values)) is not None:
            raise bad_weight(bad, values[bad])
        if not values.any():
            raise BadParameter(NOTHING_TO_DRAW)
        values.flags.writeable = False
        digest = Digest(values.dtype)
        digest.update(memoryview(values).cast("B"))
        self = cls(named(digest.text()))
        self.values, self.path = values, path
        return self

    @property
    def target(self) -> str:
        """Path and query of the request that gives the array to a server."""
        return f"{self.path}?dtype={self.values.dtype.name}"


def class_balanced(labels: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Weights with which every class is drawn equally often.

    Parameters
    ----------
    labels : (rows,) array
        The class of each row.

    Returns
    -------
    (rows,) float64
        Of each row, the share of its class if all had the same, divided by its real share. The mean is 1.
    """
    given = np.asarray(labels)
    if given.ndim != 1:
        raise BadParameter(f"labels must be a flat array with one class per row, not of shape {list(given.shape)}")
    _, codes, counts = np.unique(given, return_inverse=True, return_counts=True)
    return np.asarray(len(given) / (len(counts) * counts[codes]), np.float64)
