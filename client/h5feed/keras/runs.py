"""Calls of a Keras model, and the runs over a sequence that each of them makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .stack import Mode


@dataclass
class Run:
    """One run of Keras over the batches."""

    mode: Mode
    batches: int
    position: int = 0
    """The next batch of an evaluation or prediction; training has one place for all its runs."""
    looked_at: tuple[Any, ...] | None = None
    given_up: bool = False


@dataclass
class Call:
    """One call of a method of a Keras model."""

    mode: Mode
    steps: int | None
    """Its ``steps_per_epoch``."""
    run: Run | None = None
