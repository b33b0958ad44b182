"""The weights of the sources of a mixture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from ..errors import BadParameter
from ..mixing import Parts, parts_of
from ..suggestions import did_you_mean

Weights = Mapping[str, float] | Sequence[float]
"""The weight of each source, by name or in their order."""

ChangingWeights = Callable[[int], Weights] | Mapping[int, Weights]
"""Weights for each epoch: a function of the epoch, or a table of the epochs from which on they apply."""


@dataclass(frozen=True)
class Schedule:
    """Weights that change from epoch to epoch."""

    names: tuple[str, ...]
    given: ChangingWeights

    def __post_init__(self) -> None:
        if not callable(self.given) and (not self.given or min(self.given) != 0):
            raise BadParameter(f"weights={self.given!r}: a table of epochs must start with epoch 0")
        for epoch in (0,) if callable(self.given) else self.given:
            self(epoch)

    def __call__(self, epoch: int) -> Parts:
        """The weights of an epoch."""
        if callable(self.given):
            weights = self.given(epoch)
        else:
            weights = self.given[max(first for first in self.given if first <= epoch)]
        return checked_weights(self.names, weights, f"the weights of epoch {epoch}", may_be_zero=True)

    @property
    def described(self) -> str:
        """What a state keeps of them: a function cannot be saved, but its first weights can."""
        if callable(self.given):
            return f"by a function, at first {list(self(0))}"
        return json.dumps({str(epoch): self(epoch) for epoch in sorted(self.given)})

    @property
    def table(self) -> dict[int, Parts]:
        """The weights as a table.

        Raises
        ------
        BadParameter
            They are a function.
        """
        if callable(self.given):
            raise BadParameter(
                "weights that a function gives cannot be recorded: give a table of the epochs, such as "
                "weights={epoch: function(epoch) for epoch in range(100)}"
            )
        return {epoch: self(epoch) for epoch in sorted(self.given)}


def checked_weights(names: tuple[str, ...], weights: Weights, what: str, *, may_be_zero: bool = False) -> Parts:
    """Weights as integers, in the order of the sources.

    Raises
    ------
    BadParameter
    """
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise BadParameter(f"{what}: there is no source {name!r}: {did_you_mean(str(name), names)}")
        lacking = [name for name in names if name not in weights]
        if lacking:
            raise BadParameter(f"{what}: the source {lacking[0]!r} has none")
        weights = [weights[name] for name in names]
    weights = list(weights)
    if len(weights) != len(names):
        raise BadParameter(f"{what}={weights!r}: there are {len(names)} sources")
    for name, weight in zip(names, weights, strict=True):
        is_number = isinstance(weight, Real) and math.isfinite(weight)
        if not is_number or weight < 0 or (weight == 0 and not may_be_zero):
            least = "0 or more" if may_be_zero else "above 0"
            raise BadParameter(f"{what}: {weight!r} of the source {name!r} must be a number {least}")
    if not any(weights):
        raise BadParameter(f"{what}: at least one must be above 0")
    return parts_of(weights)
