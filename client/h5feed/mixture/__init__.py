"""Mixtures: several datasets, of one server or of several, as the samples of one training loop."""

from .making import mix as mix
from .mixture import Mixture as Mixture
