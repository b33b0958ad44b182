"""A Keras callback that reports after each epoch how long the accelerator waited for data, and why."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import keras

from ..extras import needing
from ..loops.wait_stats import LoopStats
from .sequence import Sequence

_LOGGED = ("waited", "waiting", "transfer", "decode")


class WaitMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Reports how much of each epoch of ``fit`` was spent waiting for batches. ::

        model.fit(train, epochs=10, callbacks=[h5feed.keras.WaitMonitor(train), keras.callbacks.CSVLogger("log.csv")])

        GPU waited 3.1% of the time (waiting 2.0%, transfer 0.9%, decode 0.2%); utilisation 0.97

    If the utilisation is below 0.95, the next line says what to change. Validation is not included.

    Parameters
    ----------
    sequence : Sequence
        The sequence passed to ``fit``.
    log_dir : path, optional
        Folder for TensorBoard logs, which also contain bytes per second and the longest wait in seconds. Needs the
        package ``tensorboard``, not TensorFlow. With several shards, only the first writes and prints.
    verbose : bool
        Print the line.

    Raises
    ------
    ModuleNotFoundError
        `log_dir` is given, but ``tensorboard`` is not installed.

    The fractions of the epoch (0 to 1) are added to its logs as ``feed_waited``, ``feed_waiting``, ``feed_transfer``
    and ``feed_decode``, and the utilisation as ``feed_utilisation``, for History and for callbacks after this one. See
    `h5feed.loops.wait_stats.LoopStats` for their meaning and `Sequence.stats` for seconds.

    TensorFlow's threads take batches ahead of the loop. With it, waiting is counted from the moment the loop needs a
    batch, which only a callback knows.
    """

    def __init__(
        self, sequence: Sequence, log_dir: str | os.PathLike[str] | None = None, *, verbose: bool = True
    ) -> None:
        super().__init__()
        self._sequence = sequence
        self._meter = sequence._meter
        self._make_writer = None if log_dir is None else partial(_writer_class(), os.fspath(log_dir))
        self._verbose = verbose and sequence.shard == 0
        self._writer: Any = None
        self._told: LoopStats | None = None
        self._lines: list[str] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._told = self._meter.ended
        self._meter.run_ahead(keras.backend.backend() == "tensorflow")
        if self._make_writer is not None and self._sequence.shard == 0:
            self._writer = self._make_writer()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._print()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._meter.demand(self.model.steps_per_execution)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        stats = self._meter.ended
        if stats is None or stats is self._told:
            # Another sequence is trained on, or the epoch was interrupted.
            return
        self._told = stats
        shares = {f"feed_{name}": stats.share(name) for name in _LOGGED}
        shares["feed_utilisation"] = stats.utilisation
        if logs is not None:
            logs.update(shares)
        if self._verbose:
            # The progress bar of the epoch is still open: print the line later.
            self._lines.append(f"GPU waited {stats.summary()}; utilisation {stats.utilisation:.2f}")
            self._lines += filter(None, [stats.advice()])
        if self._writer is not None:
            more = {"feed_bytes_per_second": stats.bytes_per_second, "feed_longest": stats.longest}
            for name, value in {**shares, **more}.items():
                self._writer.add_scalar(name.replace("feed_", "feed/"), value, epoch)
            self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        self._print()
        self._meter.run_ahead(False)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _print(self) -> None:
        if self._lines:
            print(*self._lines, sep="\n", flush=True)
        self._lines.clear()


def _writer_class() -> Any:
    with needing("log_dir=", "TensorBoard", "`pip install 'h5feed[tensorboard]'`, or omit log_dir"):
        from tensorboard.summary import Writer
    return Writer
