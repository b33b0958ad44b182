"""Keras support: `Sequence`, a `keras.utils.PyDataset`, and its callbacks."""

from .sequence import Sequence
from .state_backup import StateBackup
from .wait_monitor import WaitMonitor

__all__ = ["Sequence", "StateBackup", "WaitMonitor"]
