"""A remote dataset as a `keras.utils.PyDataset` (`keras.utils.Sequence`), for fit, evaluate and predict.

Keras' data adapter, whose indices are tickets, is given a `h5feed.keras.call.Call` in the place of the sequence.
Whoever else asks for a batch by number is given that batch, and takes it from nobody.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Mapping
from copy import copy
from types import FrameType
from typing import Any, Literal, Unpack

import keras
import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..cache import RowCache
from ..errors import BadParameter, FeedError
from ..forks import tell_after_fork
from ..loops.looks import Looks
from ..loops.loop import Loop
from ..loops.loop_options import check_loop_options, divided, preparation_of
from ..loops.meter import Meter
from ..loops.passes import state_of
from ..loops.stream import Stream
from ..loops.wait_stats import LoopStats
from ..net.trace import clock
from ..options import RowOptions, split_options
from ..plan import Plan
from ..remote_dataset import DEFAULT_READAHEAD, RemoteDataset
from . import internals
from .call import ASKED, Call, Run
from .internals import Method, UnderWay, holder_of, is_of_keras, running_method
from .ordered_rows import OrderedRows
from .own_loops import OwnLoop, OwnLoops
from .position import Position

_ONLY_TRAINING = ("shuffle", "window", "balance", "weights", "epoch_rows")
"""Options of the training order that evaluating and predicting do without: they take each row once, ascending."""


_OF_THIS_PROCESS = ("_lock", "_owner", "_endless", "_fitting", "_is_dealt", "_has_just_ended", "_asked_in")


class Sequence(OwnLoops, Loop, keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split for ``model.fit``, ``evaluate`` and ``predict``; made by `Dataset.sequence`.

    Each pass in ``fit`` delivers every row exactly once, in an order of its own when `shuffle` is set. ``evaluate`` and
    ``predict`` deliver ascending rows whatever `shuffle` says, so that `row_ids` aligns with predictions.

    A pass is one run over all batches, however ``steps_per_epoch`` cuts it. Passes are counted from `epoch` on, over
    several calls of ``fit``; one that is stopped in the middle is followed by the next. ``fit(initial_epoch=k)`` goes
    to where epoch k begins, `set_epoch` to a pass, `load_state_dict` to any batch.

    ``sequence[i]`` is batch i of the pass that `epoch` names, from the end where i is negative: a look, which takes
    nothing from anybody, whoever asks and when. Looks in order are read ahead. ``iter(sequence)`` is a loop of its own
    over that pass, and ``next(sequence)`` goes on from pass to pass. Where such a loop has come to the end of its pass,
    or `on_epoch_end` is called, `epoch` is the next one; a loop that is left early has never been. While ``fit`` is
    under way, none of them moves `epoch`.

    Parameters
    ----------
    dataset : RemoteDataset
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
        Print "Found 1257 images belonging to 10 classes (as numbers).", as ``flow_from_directory`` does: the
        classes come "as numbers", "as one-hot rows" or "as 0.0 and 1.0". Where the file holds splits, it says too
        whether these are rows of a split "as stored".
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
        dataset: RemoteDataset,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        verbose: bool = True,
        workers: int | None = None,
        use_multiprocessing: bool = False,
        max_queue_size: int | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        # One worker means none: batches are asked for on the caller's thread and have been fetched ahead by ours.
        super().__init__(workers=1, use_multiprocessing=False)
        check_loop_options(options, Sequence.__init__)
        self._dataset = dataset
        order, preparing = divided(options)
        self.shard, self.shards = int(order.get("shard") or 0), int(order.get("shards") or 1)
        self._prepare = preparation_of(dataset, split, order, preparing, seed)
        of_split = split_options(order)
        order |= {"batch_size": batch_size, "seed": seed, "fields": self._prepare.fields}
        only_training = _ONLY_TRAINING if "stratify" in of_split else (*_ONLY_TRAINING, "stratify")
        in_order = {name: value for name, value in order.items() if name not in only_training}
        plan, plan_in_order = dataset.plan(split, shuffle=shuffle, **order), dataset.plan(split, **in_order)
        if connections is None and workers is not None and workers > 1:
            connections = workers
        if readahead is None and max_queue_size is not None:
            readahead = max(1, max_queue_size) * max(1, plan.batch_bytes)
        ahead = readahead or DEFAULT_READAHEAD
        fetching = {"connections": connections, "readahead": ahead, "cache": cache}
        self._training, self._ordered = Stream(dataset, plan, fetching), Stream(dataset, plan_in_order, fetching)
        few = {"readahead": max(1, min(ahead, max(ahead // 4, 4 * plan.batch_bytes)))}
        self._looks = Looks(dataset, plan, {**fetching, **few})
        self._rows = OrderedRows(dataset, split, in_order, of_split, self._prepare)
        self._lock = threading.RLock()
        self._position = Position(epoch, plan.batches)
        self._begin_anew()
        self._meter, self._ordered_meter = Meter(), Meter()
        tell_after_fork(self)
        if verbose and self.shard == 0:
            print(self._rows.found(plan_in_order), flush=True)

    def _begin_anew(self) -> None:
        self._owner: Run | OwnLoop | None = None
        """Whom the next batch of training is for."""
        self._endless: OwnLoop | None = None
        self._fitting: UnderWay | None = None
        self._is_dealt = False
        """Whether Keras deals the batches of a pass, so that its position does not tell which are delivered."""
        self._has_just_ended = False
        """Whether a loop of the user's own came to its end, and nothing has happened since."""
        self._asked_in: Method | None = None
        """What Keras runs, where its adapter has not taken what it was given."""

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_PROCESS}
            streams = {"_training": copy(self._training), "_ordered": copy(self._ordered)}
            return {**kept, **streams, "_position": self._position.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._begin_anew()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: threads and locks are the parent's."""
        self._lock = threading.RLock()
        self._training.after_fork()
        self._ordered.after_fork()
        self._looks.after_fork()

    @keras.utils.PyDataset.workers.getter  # type: ignore[untyped-decorator]
    def workers(self) -> int:
        """None of Keras' own; its data adapter, which asks for them first of all, is given a call of its own."""
        found = holder_of(self, sys._getframe(1))
        if found is not None:
            adapter, name = found
            setattr(adapter, name, Call(self, adapter))
        return 1

    @keras.utils.PyDataset.use_multiprocessing.getter  # type: ignore[untyped-decorator]
    def use_multiprocessing(self) -> bool:
        return False

    @property
    def num_batches(self) -> int:
        return self._stream_of(self._asked_by_keras(sys._getframe(1))).batches

    @property
    def plan(self) -> Plan:
        """Which rows training gets, in how many batches."""
        return self._training.plan

    def _where(self) -> tuple[int, int]:
        with self._lock:
            return self._position.epoch, self._position.batch

    def _stream_of(self, method: Method | None) -> Stream:
        return self._ordered if method in ("evaluate", "predict") else self._training

    def _asked_by_keras(self, caller: FrameType | None) -> Method | None:
        """What Keras runs, where it asks this and not the call that its adapter was given."""
        while caller is not None and caller.f_locals.get("self") is self:
            caller = caller.f_back
        if not is_of_keras(caller):
            return None
        method = running_method(caller)
        if internals.FAULT:
            # A thread of tf.data has none on its stack.
            method = self._asked_in = method or self._asked_in
        return method

    @property
    def samples(self) -> int:
        return self._ordered.plan.rows

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

    def state_dict(self) -> dict[str, Any]:
        """Where training is, as plain values that JSON can hold: see `h5feed.loops.passes.state_of`.

        In the middle of ``fit`` batches may have been handed out that are not trained on yet: `state_after` tells
        where training is.
        """
        with self._lock:
            self._check_told()
            return super().state_dict()

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after so many batches of the ``fit`` that is under way have been trained on."""
        with self._lock:
            self._check_told()
            return state_of(self._dataset, self.plan, *self._position.after(batches))

    def _check_told(self) -> None:
        if self._is_dealt and self._position.batch:
            raise FeedError(
                f"{internals.DEALT}, and not where a pass is: it has no state before it ends. {internals.ADVICE}"
            )

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
        super().load_state_dict(state)

    def _go_to(self, epoch: int, position: int) -> None:
        with self._lock:
            self._position.go_to(epoch, position)
            # Runs and loops that are under way would go on somewhere else.
            self._owner, self._has_just_ended = None, False

    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""
        with self._lock:
            self._training.close()
            self._ordered.close()
            self._looks.close()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Batch `index` of the pass that `epoch` names.

        Raises
        ------
        IndexError
        """
        ticket = ASKED.ticket
        if ticket is not None and ticket.is_for(self, index):
            return ticket.take()
        method = self._asked_by_keras(sys._getframe(1)) if internals.FAULT else None
        if method in ("evaluate", "predict"):
            return self._evaluated(index)
        return self._look(index, method)

    def _look(self, index: int, method: Method | None = None) -> tuple[Any, ...]:
        """That batch, which nobody else misses."""
        stream, wanted = self._stream_of(method), operator.index(index)
        if not -stream.batches <= wanted < stream.batches:
            raise IndexError(f"batch {index} does not exist: valid are {-stream.batches} … {stream.batches - 1}")
        wanted %= stream.batches
        epoch = self._position.epoch
        return self._seen(epoch, wanted) if stream is self._training else self._arrays(stream.look(0, wanted), 0)

    def _seen(self, epoch: int, position: int) -> tuple[Any, ...]:
        batch = self._looks.batch(epoch, position)
        with self._lock:
            return self._arrays(batch, epoch)

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch begins; it does nothing here."""
        self._check_trained(sys._getframe(1))

    def on_epoch_end(self) -> None:
        """Called by Keras when an epoch ends; call it yourself, outside of ``fit``, to go on to the next pass."""
        if ASKED.by_keras or self._check_trained(sys._getframe(1)):
            return
        with self._lock:
            if self._is_fitting():
                return
            self._meter.end_pass()
            has_ended = self._has_just_ended
            self._leave_own_loop()
            if not has_ended:
                self._position.end_pass()

    def _check_trained(self, caller: FrameType) -> bool:
        """Whether it is Keras that calls; training is refused where its adapter has not taken what it was given."""
        method = None if ASKED.by_keras else self._asked_by_keras(caller)
        if method == "fit":
            raise FeedError(internals.refusal())
        return method is not None

    def _begin_fit(self, initial_epoch: int, steps: int | None, is_dealt: bool) -> None:
        self._leave_own_loop()
        self._position.begin_fit(initial_epoch, steps)
        self._is_dealt = is_dealt
        if is_dealt and self._position.batch:
            raise FeedError(
                f"{internals.DEALT}: none can be taken up at batch {self._position.batch}. {internals.ADVICE}"
            )

    def _next_of_training(self) -> tuple[Any, ...]:
        arrays = self._metered(self._meter, self._training, self._position.epoch, self._position.batch)
        self._position.advance()
        return arrays

    def _dealt(self, index: int) -> tuple[Any, ...]:
        """Batch `index` of the pass under way, of which other data shards are given the others."""
        asked, epoch = clock(), self._position.epoch
        batch, came = self._looks.batch(epoch, index), clock()
        arrays = self._arrays(batch, epoch)
        self._meter.step(asked, came, None, len(batch.rows))
        self._position.batch += 1
        return arrays

    def _evaluated(self, index: int) -> tuple[Any, ...]:
        with self._lock:
            return self._metered(self._ordered_meter, self._ordered, 0, index)

    def _meter_of(self, method: Method) -> Meter:
        return self._ordered_meter if method in ("evaluate", "predict") else self._meter

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

        from ..loops.tensors import tensors_of

        tensors: tuple[Any, ...] = tensors_of(arrays, pin=torch.cuda.is_available())
        return tensors
