"""A Keras callback that saves the position of training to a file, next to the model checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import keras

from ..errors import BadParameter
from .sequence import Sequence


class StateBackup(keras.callbacks.Callback):  # type: ignore[misc]
    """Lets a restarted ``fit`` continue with the batch after the last one that the weights were trained on.

    Use it with a callback that saves the weights, with the same `save_freq` and after it in the list::

        model.fit(train, epochs=10, callbacks=[
            keras.callbacks.BackupAndRestore("backup", save_freq=100),
            h5feed.keras.StateBackup(train, "backup/feed.json", save_freq=100),
        ])

    Parameters
    ----------
    sequence : Sequence
        The sequence passed to ``fit``.
    path : path
        The file. It is replaced atomically: a crash leaves the previous one. With several shards, the first shard
        writes it and all read it.
    save_freq : ``"epoch"`` or int
        When to save: at the end of each epoch, or every `save_freq` batches.
    delete_checkpoint : bool
        Delete the file at the end of training, like `keras.callbacks.BackupAndRestore`.

    If the file exists when training starts, the sequence resumes from it (`Sequence.load_state_dict`). It counts the
    batches *trained on*, not those handed out, because backends take batches ahead of training.
    """

    def __init__(
        self,
        sequence: Sequence,
        path: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if save_freq != "epoch" and (not isinstance(save_freq, int) or save_freq < 1):
            raise BadParameter(f"save_freq={save_freq!r} must be 'epoch' or a positive integer")
        self._sequence = sequence
        self._path = Path(path)
        self._save_freq = save_freq
        self._delete = delete_checkpoint
        self._trained = self._trained_before = self._saved_at = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._trained = self._trained_before = self._saved_at = 0
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return
        try:
            state = json.loads(text)
        except ValueError:
            raise BadParameter(f"{self._path} is not a valid state file: delete it to start over") from None
        self._sequence.load_state_dict(state)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # With steps_per_execution, the last batch number may exceed the epoch.
        self._trained = self._trained_before + min(batch + 1, self.params["steps"])
        if self._save_freq != "epoch" and self._trained - self._saved_at >= self._save_freq:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._trained_before = self._trained
        if self._save_freq == "epoch":
            self._save()

    def on_train_end(self, logs: Any = None) -> None:
        if self._delete and self._sequence.shard == 0:
            self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        self._saved_at = self._trained
        if self._sequence.shard != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with unfinished.open("w") as file:
            json.dump(self._sequence.state_after(self._trained), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path)
