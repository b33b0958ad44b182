"""A remote dataset as a `keras.utils.PyDataset` (`keras.utils.Sequence`), for fit, evaluate and predict.

What Keras 3 does with such an object, and what follows:

- It permutes the indices of a shuffled epoch in a way that nobody else can predict, and with ``workers > 1`` it fetches
  in threads whose batches leak into the next epoch. So the index is only a *ticket*: the k-th batch that a run of Keras
  asks for is the k-th of an order that is our own, and read-ahead is our own too.
- It looks at a batch or two to build a model, and on TensorFlow it runs ahead of the loop and leaves runs behind that
  nobody reads any more. So every run is told from the others, see `keras_stack`.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from copy import copy
from types import FrameType
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..cache import RowCache
from ..dataset import DEFAULT_READAHEAD, Dataset, OrderOptions, SplitOptions
from ..errors import BadParameter, FeedError
from ..forks import tell_after_fork
from ..loop_stats import LoopStats
from ..net.trace import clock
from ..prepare.labels import ClassMode
from ..prepare.preparation import FieldNames, Preparation
from ..prepare.scale import Number
from ..reading.meter import Meter
from ..reading.passes import described, position_in, state_of
from ..reading.sharding import shard_of
from ..reading.stream import Stream
from .course import Course
from .ordered_rows import OrderedRows
from .runs import Call, Run
from .stack import GENERATOR, LOOK, Mode, epoch_iterator, initial_epoch, keras_frame, running_method
from .state_backup import StateBackup

__all__ = ["Sequence", "StateBackup"]

_ONLY_TRAINING = ("shuffle", "window", "balance", "weights", "epoch_rows")
"""Options of the training order that evaluating and predicting do without: they take each row once, ascending."""

_RUNS_KNOWN = 16
"""Runs of Keras that are told from each other: one for each loop under way, and some that are only left to die."""


class Sequence(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split for ``model.fit``, ``evaluate`` and ``predict``; made by `Dataset.sequence`.

    Each pass in ``fit`` delivers every row exactly once, in an order of its own when `shuffle` is set. ``evaluate`` and
    ``predict`` deliver ascending rows whatever `shuffle` says, so that `row_ids` aligns with predictions.

    A pass is one run over all batches, however ``steps_per_epoch`` cuts it. Passes are counted from `epoch` on, over
    several calls of ``fit``; one that is stopped in the middle is followed by the next. ``fit(initial_epoch=k)`` goes
    to where epoch k begins, `set_epoch` to a pass, `load_state_dict` to any batch.

    Parameters
    ----------
    dataset : Dataset
    split : str
        ``"all"``, ``"train"``, ``"val"`` or ``"test"``.
    batch_size : int
        Of each shard.
    shuffle : bool
        Keras' own ``fit(shuffle=…)`` has no effect: this one decides.
    seed, epoch : int
        The order of pass e is that of ``epoch + e`` of this seed.
    x, y, sample_weight, class_mode, rescale, mean, std, transform
        What is made of a batch: see `h5feed.prepare.Preparation`. It is made on the thread that asks for the batch: the
        main thread with JAX and torch, which meanwhile leave the accelerator at work, a thread of tf.data with
        TensorFlow.
    connections : int, optional
        Requests in flight at most; default: as many as the link needs.
    readahead : int, optional
        Bytes fetched ahead at most; default 64 MiB.
    cache : path or RowCache, optional
        A local folder that keeps what was fetched: see `Dataset.cache`.
    shard : int or ``"auto"``
        Which share of each step this process takes. ``"auto"``: as JAX (`keras.distribution`), `torch.distributed` or
        ``RANK`` and ``WORLD_SIZE`` say. Every shard has the same number of batches.
    shards : int, optional
        How many share a step.
    last : ``"keep"``, ``"drop"`` or ``"pad"``, optional
        What becomes of the tail. ``"pad"``, the default of several shards, repeats rows with sample weight 0: use
        ``weighted_metrics``, and `class_weight` by way of the loss, because Keras takes no ``class_weight`` beside
        sample weights.
    verbose : bool
        Print "Found 1257 images belonging to 10 classes.", as ``flow_from_directory`` does.
    workers, max_queue_size : int, optional
        For scripts that pass them. Keras' own threads would mix epochs up, so that none are made: `workers` above 1
        becomes `connections`, and `max_queue_size`, in batches, becomes `readahead`.
    use_multiprocessing : bool
        Without effect: fetching waits for the network, which threads do as well as processes.
    **options
        Split and order options: ``val``, ``test``, ``stratify``, ``split_seed``, ``folds``, ``window``, ``limit``,
        ``balance`` …

    Attributes
    ----------
    samples : int
        Rows of the split.
    shard, shards : int
    epoch : int
        Number of the pass that the next batch belongs to: what `epoch` must be to go on from here.

    It pickles, as a `transform` does that is a function of a module or a Keras layer: the copy has connections and
    threads of its own, the shard of the original, and goes on as from its state, with the rest of a pass of training
    that was under way. In a forked child it goes on where it was; the parent's goes on too.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        x: FieldNames | None = None,
        y: FieldNames | None = None,
        sample_weight: str | None = None,
        class_mode: ClassMode | None = "int",
        rescale: float | Mapping[str, float] | None = None,
        mean: Number | Mapping[str, Number] | None = None,
        std: Number | Mapping[str, Number] | None = None,
        transform: Any = None,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        shard: int | Literal["auto"] = 0,
        shards: int | None = None,
        last: Literal["keep", "drop", "pad"] | None = None,
        verbose: bool = True,
        workers: int | None = None,
        use_multiprocessing: bool = False,
        max_queue_size: int | None = None,
        **options: Any,
    ) -> None:
        # One worker means none: batches are asked for on the caller's thread and have been fetched ahead by ours.
        super().__init__(workers=1, use_multiprocessing=False)
        known = set(OrderOptions.__annotations__) - {"fields", "shuffle", "seed", "epoch"}
        if unknown := sorted(set(options) - known):
            raise BadParameter(f"unknown option {unknown[0]!r}: known are {', '.join(sorted(known))}")
        self._dataset = dataset
        rank, count = shard_of(shard, shards)
        self.shard, self.shards = rank, count
        split_options = {name: value for name, value in options.items() if name in SplitOptions.__annotations__}
        self._prepare = Preparation(
            dataset,
            split,
            x=x,
            y=y,
            sample_weight=sample_weight,
            class_mode=class_mode,
            rescale=rescale,
            mean=mean,
            std=std,
            transform=transform,
            seed=seed,
            shard=rank,
            split_options=split_options,
        )
        order = {**options, "batch_size": batch_size, "seed": seed, "shard": rank, "shards": count, "last": last}
        order = {**order, "shuffle": shuffle, "fields": self._prepare.fields}
        in_order = {name: value for name, value in order.items() if name not in _ONLY_TRAINING}
        if connections is None and workers is not None and workers > 1:
            connections = workers
        plan = dataset.plan(split, **order)
        if readahead is None and max_queue_size is not None:
            readahead = max(1, max_queue_size) * max(1, plan.batch_bytes)
        fetching = {"connections": connections, "readahead": readahead or DEFAULT_READAHEAD, "cache": cache}
        self._training = Stream(dataset, plan, fetching)
        self._ordered = Stream(dataset, dataset.plan(split, **in_order), fetching)
        self._rows = OrderedRows(dataset, split, in_order, split_options, self._prepare)
        self._lock = threading.RLock()
        self._course = Course(epoch, plan.batches)
        self._calls: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
        self._runs: dict[int, Run] = {}
        self._meter, self._ordered_meter = Meter(), Meter()
        tell_after_fork(self)
        if verbose and rank == 0:
            print(self._rows.found(self.samples), flush=True)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_calls", "_runs")}
            streams = {"_training": copy(self._training), "_ordered": copy(self._ordered)}
            return {**kept, **streams, "_course": self._course.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._calls, self._runs = weakref.WeakKeyDictionary(), {}
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: threads and locks are the parent's."""
        self._lock = threading.RLock()
        self._training.after_fork()
        self._ordered.after_fork()

    def __repr__(self) -> str:
        with self._lock:
            where = f"at batch {self._course.position} of pass {self._course.epoch}"
        return f"<Sequence of {described(self._dataset, self._training.plan)}; {where}>"

    @property
    def num_batches(self) -> int:
        caller = keras_frame(sys._getframe(1))
        if caller is not None and caller.f_code.co_name == GENERATOR:
            with self._lock:
                return self._begin_run(caller).batches
        return self._stream_of(running_method(caller)).batches

    def __len__(self) -> int:
        return self._stream_of(running_method(sys._getframe(1))).batches

    def _stream_of(self, mode: Mode | None) -> Stream:
        return self._ordered if mode in ("evaluate", "predict") else self._training

    @property
    def samples(self) -> int:
        return self._ordered.plan.rows

    @property
    def batch_size(self) -> int:
        return self._training.plan.batch_size

    @property
    def epoch(self) -> int:
        with self._lock:
            return self._course.epoch

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """Row ids in the order in which ``evaluate`` and ``predict`` deliver them, (predictions,) int64.

        With ``last="pad"`` the repeated rows at the end are in it, as their predictions are.
        """
        return self._rows.ids

    @property
    def classes(self) -> npt.NDArray[Any]:
        """The class of each row of `row_ids`, (predictions,) ints; where labels are no classes, what is stored."""
        return self._rows.classes

    @property
    def class_indices(self) -> dict[str, int]:
        """Name of each class, and the number that stands for it."""
        return self._rows.labels.class_indices

    @property
    def class_weight(self) -> dict[int, float]:
        """Balanced weights of this split's classes, for ``fit(class_weight=…)``: rows / (classes · rows of a class)."""
        return self._rows.class_weight

    def stats(self, of: Literal["fit", "evaluate"] | None = None) -> LoopStats:
        """How long the loop has waited for data, and what for, since the start and in the last pass; prints a table.

        Parameters
        ----------
        of : str, optional
            ``"fit"``: of training; ``"evaluate"``: of evaluating and predicting. Default: of training, if there was
            any.

        Raises
        ------
        BadParameter
            `of` is neither.

        With TensorFlow, whose threads take batches ahead of the loop, this is how long *they* have waited: more than
        the loop, and with the compilation among the times of computing. A `WaitMonitor` makes it the loop's own.
        """
        if of not in (None, "fit", "evaluate"):
            raise BadParameter(f"of={of!r} must be 'fit' or 'evaluate'")
        training, evaluating = self._meter.stats(), self._ordered_meter.stats()
        return evaluating if of == "evaluate" or (of is None and not training.steps) else training

    @property
    def waited(self) -> float:
        """Seconds that training, evaluating and predicting have waited for batches: see `stats`."""
        return self.stats("fit").waited + self.stats("evaluate").waited

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the next pass."""
        if epoch < 0:
            raise BadParameter(f"epoch={epoch} must be 0 or more")
        self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where training is, as plain values that JSON can hold: see `h5feed.reading.passes.state_of`.

        In the middle of ``fit`` batches may have been handed out that are not trained on yet: `state_after` tells
        where training is.
        """
        with self._lock:
            return state_of(self._dataset, self._training.plan, self._course.epoch, self._course.position)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after so many batches of the ``fit`` that is under way have been trained on."""
        with self._lock:
            return state_of(self._dataset, self._training.plan, *self._course.after(batches))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next ``fit`` or loop delivers exactly what that pass had not delivered yet.

        The first run of that ``fit`` over the batches is as much shorter, so that passes end with epochs as they would
        have. It may be taken up by more or fewer shards, if ``batch_size × shards`` is the same.

        Raises
        ------
        RevisionChanged
        BadParameter
            It is the state of another order.
        """
        self._go_to(*position_in(state, self._dataset, self._training.plan))

    def _go_to(self, epoch: int, position: int) -> None:
        with self._lock:
            self._course.go_to(epoch, position)
            self._give_up_runs()

    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""
        with self._lock:
            self._training.close()
            self._ordered.close()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        caller = keras_frame(sys._getframe(1))
        name = None if caller is None else caller.f_code.co_name
        with self._lock:
            if caller is not None and name == GENERATOR:
                run = self._runs.get(id(caller)) or self._begin_run(caller)
                return self._of_run(run)
            stream = self._stream_of(running_method(caller))
            if not -stream.batches <= index < stream.batches:
                raise IndexError(f"batch {index} does not exist: valid are 0 … {stream.batches - 1}")
            index %= stream.batches
            epoch, position = self._course.epoch, self._course.ticket(index)
            if name == LOOK:
                # Only the shapes matter; what has been read ahead is left for the pass itself.
                return self._arrays(stream.look(epoch, index), epoch)
            if position is not None:
                return self._arrays(self._training.look(epoch, position), epoch)
            position = self._course.position
            # The ticket is given after the batch: who asks again after a failure is given the same one.
            arrays = self._next_of_own_loop()
            self._course.keep_ticket(index, position)
            return arrays

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """What is left of a pass that was resumed, or else a new pass."""
        with self._lock:
            self._course.begin_loop()
            epoch = self._course.epoch
            self._begin_own_pass()
        while self._training.batches:
            with self._lock:
                if self._course.epoch != epoch:
                    self._meter.end_pass()
                    return
                self._course.count()
                arrays = self._next_of_training()
            yield arrays

    def __next__(self) -> tuple[Any, ...]:
        """The next batch of training; passes follow each other without end."""
        with self._lock:
            if not self._training.batches:
                raise StopIteration
            self._course.count()
            return self._next_of_own_loop()

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch begins, also when it only looks at a batch to build the model."""
        caller = keras_frame(sys._getframe(1))
        mode = running_method(caller)
        if caller is None or mode is None:
            return
        with self._lock:
            # One adapter serves one call: with steps_per_epoch a run goes on over several of its epochs.
            adapter = caller.f_locals["self"]
            call = self._calls.get(adapter)
            iterator = epoch_iterator(caller)
            if call is None or call.mode != mode:
                call = self._calls[adapter] = Call(mode, getattr(iterator, "steps_per_epoch", None))
                if mode == "fit":
                    self._course.begin_fit(initial_epoch(caller), call.steps)
            if mode in ("evaluate", "predict") and call.run is not None:
                # An evaluation that was cut short is followed by one that begins at the first row again.
                call.run.position = 0
            # Keras on JAX takes a batch ahead, and the first execution is compiled when it has all of its own.
            first = getattr(iterator, "steps_per_execution", 1) + (keras.backend.backend() == "jax")
            goes_on = bool(call.steps and getattr(iterator, "_steps_seen", 0))
            self._meter_of(mode).begin_pass(first, goes_on=goes_on)
            if mode == "fit" and not goes_on:
                self._meter.begin_demands()
            if mode == "fit" and iterator is not None and not goes_on:
                # Keras is told that a run which begins in the middle of a pass is the rest of it only.
                iterator._num_batches = self._training.batches - self._course.position

    def on_epoch_end(self) -> None:
        """Called by Keras when an epoch ends; call it yourself to begin a new pass in a loop of your own."""
        caller = keras_frame(sys._getframe(1))
        mode = running_method(caller)
        if caller is None or mode is None:
            self._meter.end_pass()
            with self._lock:
                if self._course.position:
                    self._course.count()
                    self._course.end_pass()
        elif caller.f_locals.get("self") in self._calls:
            # Not one that only resets what has not begun.
            self._meter_of(mode).end_pass()

    def _begin_run(self, caller: FrameType) -> Run:
        """Keras begins to run over this sequence; the run is told by the frame of its generator."""
        adapter = caller.f_locals["self"]
        call = self._calls.get(adapter)
        mode = (call.mode if call is not None else running_method(caller)) or "fit"
        run = Run(mode, self._stream_of(mode).batches)
        if mode == "fit":
            run.batches -= self._course.position
            self._give_up_runs()
            self._meter.begin_run()
        if call is not None:
            call.run = run
        self._runs.pop(id(caller), None)
        self._runs[id(caller)] = run
        while len(self._runs) > _RUNS_KNOWN:
            self._runs.pop(next(iter(self._runs)))
        return run

    def _give_up_runs(self) -> None:
        """Batches of training are no longer for the runs of before: a thread of tf.data may still ask for some."""
        for run in self._runs.values():
            run.given_up = run.given_up or run.mode == "fit"

    def _of_run(self, run: Run) -> tuple[Any, ...]:
        if run.given_up:
            raise FeedError("another loop over this sequence has begun: make a sequence for each")
        if run.mode == "build":
            # Only the shapes matter; what has been read ahead is left for the pass itself.
            if run.looked_at is None:
                run.looked_at = self._arrays(self._training.look(self._course.epoch, 0), self._course.epoch)
            return run.looked_at
        if run.mode == "fit":
            self._course.count()
            return self._next_of_training()
        arrays = self._metered(self._ordered_meter, self._ordered, 0, run.position)
        run.position = (run.position + 1) % self._ordered.batches
        return arrays

    def _next_of_own_loop(self) -> tuple[Any, ...]:
        if not self._course.position:
            self._begin_own_pass()
        return self._next_of_training()

    def _begin_own_pass(self) -> None:
        # A fit that was interrupted has not said that nobody takes batches ahead any more.
        self._meter.run_ahead(False)
        self._meter.begin_pass()

    def _next_of_training(self) -> tuple[Any, ...]:
        arrays = self._metered(self._meter, self._training, self._course.epoch, self._course.position)
        self._course.advance()
        return arrays

    def _meter_of(self, mode: Mode) -> Meter:
        return self._ordered_meter if mode in ("evaluate", "predict") else self._meter

    def _metered(self, meter: Meter, stream: Stream, epoch: int, position: int) -> tuple[Any, ...]:
        asked = clock()
        batch = stream.batch(epoch, position)
        trace, came = stream.taken, clock()
        arrays = self._arrays(batch, epoch)
        meter.step(asked, came, trace, len(batch.rows))
        return arrays

    def _arrays(self, batch: Batch, epoch: int) -> tuple[Any, ...]:
        arrays = self._prepare(batch, epoch)
        if keras.backend.backend() != "torch":
            return arrays
        # Only that backend needs torch.
        import torch

        from ..tensors import tensors_of

        tensors: tuple[Any, ...] = tensors_of(arrays, pin=torch.cuda.is_available())
        return tensors
