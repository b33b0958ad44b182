"""What a bench is asked to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadParameter

SECONDS = 20.0
"""Of a bench in all, about."""

MAX_BYTES = 16 * 10**9
"""Fetched in all, about: some 20 seconds of 6 Gbit/s."""


@dataclass(frozen=True)
class Asked:
    """What is asked about.

    Attributes
    ----------
    split, batch_size, fields, options
        As `Dataset.plan` has them.
    seconds, max_bytes : float
        Bounds on the whole; a batch is let through in any case.
    step : float, optional
        Seconds of a training step.
    cache : str, optional
        Folder of a row cache to measure too.
    """

    split: str = "all"
    batch_size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = SECONDS
    max_bytes: float = MAX_BYTES
    step: float | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "seconds", "max_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadParameter(f"{name}={getattr(self, name)} must be more than 0, and finite")
        if self.step is not None and not 0 < self.step < math.inf:
            raise BadParameter(f"step_ms={self.step * 1e3:g} must be more than 0, and finite")
