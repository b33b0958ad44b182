"""Prepare batches for a model: inputs, targets and sample weights, scaled and augmented."""

from .preparation import Preparation

__all__ = ["Preparation"]
