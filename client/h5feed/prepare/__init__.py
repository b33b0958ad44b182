"""What a model is given of a batch: inputs, targets and weights, scaled and augmented."""

from .preparation import Preparation

__all__ = ["Preparation"]
