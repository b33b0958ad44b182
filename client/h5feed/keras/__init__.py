"""A remote dataset for Keras: `Sequence`, a `keras.utils.PyDataset`, and callbacks that belong to it."""

from .sequence import Sequence
from .state_backup import StateBackup
from .wait_monitor import WaitMonitor

__all__ = ["Sequence", "StateBackup", "WaitMonitor"]
