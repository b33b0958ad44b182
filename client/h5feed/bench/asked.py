"""The settings of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadParameter

BATCH_SIZE = 64

SECONDS = 20.0
"""Approximate duration of a benchmark."""

MAX_BYTES = 16 * 10**9
"""Approximate limit on the bytes fetched: about 20 seconds at 6 Gbit/s."""


@dataclass(frozen=True)
class Asked:
    """What to measure, and for how long.

    Attributes
    ----------
    split, batch_size, fields, options
        See `Dataset.plan`.
    seconds, max_bytes : float
        Limits on the whole benchmark; at least one batch is always read.
    step : float, optional
        Duration of a training step, in seconds.
    cache : str, optional
        Folder of a row cache to measure as well.
    """

    split: str = "all"
    batch_size: int = BATCH_SIZE
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = SECONDS
    max_bytes: float = MAX_BYTES
    step: float | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "seconds", "max_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadParameter(f"{name}={getattr(self, name)} must be positive and finite")
        if self.step is not None and not 0 < self.step < math.inf:
            raise BadParameter(f"step_ms={self.step * 1e3:g} must be positive and finite")
