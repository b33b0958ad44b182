"""Convert Keras layers, an `ImageDataGenerator` and functions to a transform ``f(x, y, rng)``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadParameter

Call = Callable[[Any, Any, np.random.Generator], tuple[Any, ...]]
"""Takes inputs, targets and the generator of the batch; returns (x, y) or (x, y, sample_weight)."""


@dataclass(frozen=True)
class Transform:
    call: Call
    writes: bool
    """Whether it may modify its arguments in place."""
    of: Any
    """The original object, which is pickled instead."""

    def __reduce__(self) -> tuple[Any, ...]:
        return adapted, (self.of,)


_SEED_STATE = "seed_generator_state"
"""Keras' name for the state of a random layer (`keras.random.SeedGenerator`)."""

_MIXES_LABELS = ("MixUp", "CutMix")


def generator_of(seed: int, epoch: int, index: int, shard: int) -> np.random.Generator:
    """The generator of one batch. It depends only on the position, so a resumed run augments in the same way."""
    return np.random.default_rng([seed % 2**64, epoch, index, shard])


def adapted(transform: Any) -> Transform:
    """`transform` as a function of inputs, targets and a generator.

    Raises
    ------
    BadParameter
        `transform` has an unsupported type; the message lists the supported ones.
    """
    if hasattr(transform, "random_transform") and hasattr(transform, "standardize"):
        return Transform(lambda x, y, rng: (_by_generator(transform, x, rng), y), False, transform)
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(transform, keras.Layer):
        return Transform(_by_layer(transform), False, transform)
    if not callable(transform):
        raise BadParameter(f"transform={transform!r} must be a function f(x, y), Keras layer or ImageDataGenerator")
    return Transform(_by_function(transform), True, transform)


def _by_generator(generator: Any, x: Any, rng: np.random.Generator) -> Any:
    """Transform each image as `ImageDataGenerator.flow` does."""
    if not isinstance(x, np.ndarray) or x.ndim != 4:
        raise BadParameter("an ImageDataGenerator needs a single image field of shape (rows, height, width, channels)")
    # It uses numpy's global generator, whose state belongs to the user.
    state = np.random.get_state()
    try:
        images: Any = np.empty(x.shape, np.float32)
        for image, row, seed in zip(images, x, rng.integers(0, 2**31, len(x)), strict=True):
            image[...] = generator.standardize(generator.random_transform(row.astype(np.float32), seed=int(seed)))
    finally:
        np.random.set_state(state)
    return images


def _by_layer(layer: Any) -> Call:
    for part in layer._flatten_layers():
        if type(part).__name__ in _MIXES_LABELS:
            raise BadParameter(
                f"{type(part).__name__} also mixes targets: use a function f(x, y, rng) that passes it both as "
                '{"images": x, "labels": y}'
            )
    options = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}

    def transform(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, ...]:
        for variable in layer.variables:
            if variable.name == _SEED_STATE:
                variable.assign(rng.integers(0, 2**31, 2))
        return layer(x, **options), y

    return transform


def _by_function(function: Callable[..., Any]) -> Call:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise BadParameter(
            f"cannot inspect the signature of {function!r}: wrap it, as in transform=lambda x, y: (…, y)"
        ) from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional if p.name != "rng")
    takes_rng = any(p.name == "rng" for p in parameters)
    takes_y = required >= 2 or any(p.name == "y" for p in positional)

    def transform(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, ...]:
        options = {"rng": rng} if takes_rng else {}
        if not takes_y:
            result = function(x, **options), y
        elif required >= 3:
            result = function(x, y, rng)
        else:
            result = function(x, y, **options)
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise BadParameter(
                f"transform must return (x, y) or (x, y, sample_weight), but returned {type(result).__name__}"
            )
        return result

    return transform
