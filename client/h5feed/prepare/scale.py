"""Scaling of inputs by a factor, a mean and a standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadParameter, SplitNotFound
from ..options import Statistic
from ..samples import Samples

_DOUBLE = ("float64", "int32", "uint32", "int64", "uint64")
"""Dtypes that float32 cannot represent exactly: they are scaled as float64, then cast to float32."""


@dataclass(frozen=True)
class Scale:
    """``(x * rescale - mean) / std`` as one multiplication and one addition, with float64 factor and offset."""

    factor: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]

    def __call__(self, values: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Scale `values` into `out`, of the same shape."""
        if values.dtype.name in _DOUBLE:
            out[...] = values * self.factor + self.offset
            return
        np.multiply(values, self.factor.astype(np.float32), out=out, dtype=np.float32, casting="unsafe")
        if self.offset.any():
            out += self.offset.astype(np.float32)


def scale_of(
    dataset: Samples,
    name: str,
    shape: tuple[int, ...],
    split: str,
    rescale: float | Mapping[str, float] | None,
    mean: Statistic | Mapping[str, Statistic] | None,
    std: Statistic | Mapping[str, Statistic] | None,
    split_options: Mapping[str, Any],
    source: str | None = None,
) -> Scale | None:
    """The scale of one field, see `h5feed.prepare.Preparation`; None if there is nothing to scale.

    Parameters
    ----------
    shape : tuple of int
        Of a sample, or of each row of one.
    source : str, optional
        The field, if batches have it under another name.

    Raises
    ------
    BadParameter
        A value is not a number or does not fit the shape of a sample, or the server lacks the statistics.
    """
    given = {
        option: value.get(name) if isinstance(value, Mapping) else value
        for option, value in (("rescale", rescale), ("mean", mean), ("std", std))
    }
    if all(value is None for value in given.values()):
        return None
    factor = _number("rescale", given.pop("rescale"), 1.0)
    source = name if source is None else source
    statistics = _statistics(dataset, source, split, split_options) if any(map(_is_server, given.values())) else {}
    shift, spread = (
        _counted(statistics, option, name, shape) * factor if _is_server(value) else _number(option, value, default)
        for (option, value), default in zip(given.items(), (0.0, 1.0), strict=True)
    )
    spread = np.where(spread == 0, 1.0, spread)
    for option, value in (("rescale", factor), ("mean", shift), ("std", spread)):
        try:
            fits = np.broadcast_shapes(value.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise BadParameter(
                f"{option} of shape {list(value.shape)} does not broadcast to {list(shape)}, a sample of {name!r}"
            )
    return Scale(factor / spread, -shift / spread)


def _statistics(dataset: Samples, name: str, split: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    # Validation and test rows use the statistics of the training rows. Their own would differ, and leak information.
    stats: Mapping[str, Any]
    try:
        stats = dataset.stats("all" if split == "all" else "train", field=name, **options)
    except SplitNotFound:
        stats = dataset.stats(split, field=name, **options)
    return stats


def _counted(statistics: Mapping[str, Any], key: str, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    channels = statistics.get("channels")
    numbers = [channel.get(key) for channel in channels] if channels else [statistics.get(key)]
    if None in numbers:
        raise BadParameter(f"the server has no {key} of {name!r}: pass a number")
    if channels and len(numbers) not in shape[-1:] and len(numbers) in shape[:1]:
        # Channels come first: (channels, height, width)
        return np.asarray(numbers, np.float64).reshape(-1, *(1 for _ in shape[1:]))
    return np.asarray(numbers if channels else numbers[0], np.float64)


def _is_server(value: Any) -> bool:
    return isinstance(value, str) and value == "server"


def _number(option: str, value: Any, default: float) -> npt.NDArray[np.float64]:
    try:
        number = np.asarray(default if value is None else value, np.float64)
    except (TypeError, ValueError):
        raise BadParameter(f"{option}={value!r} must be a number, one number per channel, or 'server'") from None
    if not np.isfinite(number).all():
        raise BadParameter(f"{option}={value!r} must be finite")
    return number
