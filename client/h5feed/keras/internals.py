"""All that is known here of the inside of Keras, and whether it is still so.

Keras 3.10 and later hand a dataset to a ``PyDatasetAdapter``, one for each call of ``fit``, ``evaluate`` or
``predict``, a generator of which runs over the batches; an ``EpochIterator`` cuts these runs into epochs. The adapter
is given a `h5feed.keras.call.Call` in the place of the sequence, so that what *it* asks for is told from what anybody
else does. That is all that evaluating and predicting need; training needs what `rehearsed` tries out besides.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, Literal, cast

import keras
import numpy as np

Method = Literal["fit", "evaluate", "predict"]

_METHODS = ("fit", "evaluate", "predict")

_TRIED = ("3.10", "3.15")
"""The first and the last release of Keras of which `rehearsed` is known to find no fault."""


DEALT = "Keras deals the batches of each pass to the data shards of its distribution: this process gets some of them"
ADVICE = "Set auto_shard_dataset=False on the distribution, and shard='auto' here"


def is_of_keras(frame: FrameType | None) -> bool:
    """Whether a function of Keras runs in it."""
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("keras.")


def _method_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not (frame.f_code.co_name in _METHODS and is_of_keras(frame)):
        frame = frame.f_back
    return frame


def running_method(frame: FrameType | None) -> Method | None:
    """The innermost ``fit``, ``evaluate`` or ``predict`` of a Keras model on the stack."""
    found = _method_frame(frame)
    return None if found is None else cast(Method, found.f_code.co_name)


def initial_epoch(frame: FrameType | None) -> int:
    """The ``initial_epoch`` of the running method, one that `BackupAndRestore` has set included."""
    found = _method_frame(frame)
    return int(found.f_locals.get("initial_epoch") or 0) if found is not None else 0


class UnderWay:
    """The running method of Keras, to be asked later, from any thread, whether it still runs."""

    def __init__(self, frame: FrameType | None) -> None:
        found = _method_frame(frame)
        # The frame itself would keep alive all that the method has in hand.
        self._thread, self._frame = threading.get_ident(), id(found)

    def __bool__(self) -> bool:
        frame = sys._current_frames().get(self._thread)
        while frame is not None and not (id(frame) == self._frame and frame.f_code.co_name in _METHODS):
            frame = frame.f_back
        return frame is not None


def _first_argument(frame: FrameType) -> Any:
    code: CodeType = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def holder_of(dataset: Any, frame: FrameType | None) -> tuple[Any, str] | None:
    """Whoever of Keras runs in this frame and keeps `dataset`, and the attribute in which that is kept."""
    if frame is None or not is_of_keras(frame):
        return None
    holder = _first_argument(frame)
    for name, value in getattr(holder, "__dict__", {}).items():
        if value is dataset:
            return holder, name
    return None


def is_run(frame: FrameType) -> bool:
    """Whether it is one of a generator, which runs over batches, and not of who only wants to know how many."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def epoch_iterator(adapter: Any, frame: FrameType | None) -> Any:
    """The ``EpochIterator`` that has called the `adapter`; None where there is none."""
    while frame is not None and is_of_keras(frame):
        holder = _first_argument(frame)
        if getattr(holder, "data_adapter", None) is adapter:
            return holder
        frame = frame.f_back
    return None


def steps_per_epoch(iterator: Any) -> int | None:
    """Where an epoch is so many steps and not all batches."""
    return getattr(iterator, "steps_per_epoch", None)


def batches_ahead(iterator: Any) -> int:
    """Batches that Keras takes before it waits for the first step: those of one execution, and on JAX one more."""
    # The first execution is compiled when it has all of its own.
    return int(getattr(iterator, "steps_per_execution", 1)) + int(keras.backend.backend() == "jax")


def is_amid_run(iterator: Any) -> bool:
    """Whether the last epoch ended, by its steps, before the run over the batches did."""
    return bool(getattr(iterator, "_steps_seen", 0))


def tell_batches(iterator: Any, batches: int) -> None:
    """Tell an ``EpochIterator`` that the run which begins has so many batches."""
    iterator._num_batches = batches


def trial_run(adapter: Any) -> Iterator[Any] | None:
    """A run over the batches as `adapter` asks for them, to be looked at; None where it cannot be had."""
    run = getattr(adapter, "get_numpy_iterator", None)
    return None if run is None else iter(run())


class _Rehearsal(keras.utils.PyDataset):  # type: ignore[misc]
    """Three batches of which a run is told to take two; keeps what it is asked, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._adapter: Any = None
        super().__init__()

    @property
    def workers(self) -> int:
        found = holder_of(self, sys._getframe(1))
        if found is not None:
            self._adapter = found[0]
            self.told.append("an adapter")
        return 1

    @property
    def num_batches(self) -> int:
        if not is_run(sys._getframe(1)):
            return 3
        self.told.append("a run")
        return 2

    def __getitem__(self, index: int) -> Any:
        self.told.append("a batch")
        return (np.zeros((1, 1), np.float32),)

    def on_epoch_begin(self) -> None:
        iterator = epoch_iterator(self._adapter, sys._getframe(1))
        names = vars(iterator) if iterator is not None else {}
        can_try = hasattr(self._adapter, "get_numpy_iterator")
        if can_try and names.get("_num_batches") == 3 and "_steps_seen" in names:
            tell_batches(iterator, 2)
            self.told.append("an epoch")

    def on_epoch_end(self) -> None:
        self.told.append("its end")


def rehearsed() -> str:
    """What of Keras is not as training needs it; empty where all is well."""
    try:
        from keras.src.trainers.epoch_iterator import EpochIterator
    except ImportError as error:
        return str(error)
    dataset = _Rehearsal()
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        iterator = EpochIterator(x=dataset)
        iterator.reset()
        for _ in iterator:
            pass
    except Exception as error:
        return f"its EpochIterator fails: {error}"
    finally:
        keras.distribution.set_distribution(distribution)
    expected = ["an adapter", "its end", "an epoch", "a run", "a batch", "a batch", "its end"]
    if dataset.told != expected:
        return f"its EpochIterator is told to make {', '.join(expected)} and makes {', '.join(dataset.told)}"
    fit = inspect.unwrap(keras.Model.fit)
    # Whoever has put a function of their own in its place calls it.
    if str(fit.__module__).startswith("keras.") and "reset" not in fit.__code__.co_names:
        return "its fit() does not tell any more when it has built the model"
    return ""


FAULT = rehearsed()
"""What of Keras is not as training needs it, found out when this is imported."""


def refusal() -> str:
    """Why there is no training."""
    first, last = _TRIED
    fault = FAULT or "its data adapter does not take what it is given"
    return (
        f"this h5feed cannot train with Keras {keras.version()}: {fault}. Rows would be seen twice or never. "
        "Looking at batches, evaluating and predicting work. To train, install a Keras that is known to do, "
        f"`pip install 'keras>={first},<={last}.*'`, or a later h5feed; or take dataset.loader() and train_on_batch()"
    )
