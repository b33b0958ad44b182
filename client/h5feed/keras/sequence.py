"""A remote dataset as a `keras.utils.PyDataset` (`keras.utils.Sequence`), for fit, evaluate and predict.

Keras' data adapter gets a `h5feed.keras.call.Call` instead of the sequence, because its indices are only tickets. All
other callers that index a sequence get the batch with that index, which does not affect training.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from copy import copy
from dataclasses import replace
from types import FrameType
from typing import Any, Literal, Unpack

import keras
import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..cache import RowCache
from ..errors import BadParameter, FeedError, RowOutOfRange
from ..fetching.readahead import DEFAULT_READAHEAD
from ..forks import tell_after_fork
from ..loops.looks import Looks
from ..loops.loop import Loop, check_can_follow
from ..loops.loop_options import check_dense, check_loop_options, divided, preparation_of
from ..loops.meter import Meter
from ..loops.passes import described, state_of
from ..loops.stream import Stream
from ..loops.wait_stats import LoopStats
from ..net.trace import clock
from ..options import RowOptions, split_options
from ..plan import Plan
from ..prepare import Preparation
from ..samples import Samples
from . import internals
from .call import ASKED, Call, Run
from .internals import Method, UnderWay, holder_of, is_of_keras, running_method
from .ordered_rows import OrderedRows
from .own_loops import OwnLoop, OwnLoops
from .position import Position

_ONLY_TRAINING = (
    *("shuffle", "window", "balance", "weights", "epoch_rows"),
    *("bucket", "bucket_by", "bucket_group"),
)
"""Options that do not apply to ``evaluate`` and ``predict``, which take each row once in ascending order."""


_OF_THIS_PROCESS = ("_lock", "_owner", "_endless", "_fitting", "_is_dealt", "_has_just_ended", "_asked_in")


class Sequence(OwnLoops, Loop, keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split for ``model.fit``, ``evaluate`` and ``predict``; made by `Dataset.sequence`.

    Each pass in ``fit`` delivers every row exactly once, in a new order if `shuffle` is set. ``evaluate`` and
    ``predict`` always deliver rows in ascending order, so that `row_ids` aligns with predictions.

    A pass is one run over all batches, however ``steps_per_epoch`` divides it. Passes are numbered from `epoch` on,
    across calls of ``fit``; after an interrupted pass, the next one starts. ``fit(initial_epoch=k)`` moves to the start
    of epoch k, `set_epoch` to a pass, `load_state_dict` to any batch: the first run of the next ``fit`` is shorter
    accordingly, so that passes and epochs still end together.

    ``sequence[i]`` is batch i of the pass number `epoch`; a negative i counts from the end. It does not affect
    training. Consecutive indices are read ahead. ``iter(sequence)`` loops over that pass, and ``next(sequence)`` loops
    endlessly. At the end of such a loop, or if you call `on_epoch_end`, `epoch` advances by one. A loop that is left
    early changes nothing. While ``fit`` runs, none of these changes `epoch`.

    Parameters
    ----------
    dataset : Samples
    split : str
        ``"all"``, ``"train"``, ``"val"`` or ``"test"``.
    batch_size : int
        Rows per batch of each shard.
    shuffle : bool
        Replaces Keras' own ``fit(shuffle=…)``, which has no effect.
    seed, epoch : int
        Pass e has the order of epoch ``epoch + e`` for this seed.
    x, y, sample_weight, class_mode, classes, rescale, mean, std, transform
        How batches are prepared: see `h5feed.prepare.Preparation`. This runs on the thread that requests the batch: the
        main thread with JAX and torch, while the accelerator keeps working, or a tf.data thread with TensorFlow.
    connections : int, optional
        Maximum number of concurrent requests; default: as many as the link needs.
    readahead : int, optional
        Maximum number of bytes fetched ahead; default 64 MiB.
    cache : path or RowCache, optional
        A local folder that keeps fetched rows: see `Dataset.cache`.
    follow : bool
        Start each pass with the rows that the dataset has then, for growing datasets: in ``fit``, each epoch, unless
        ``steps_per_epoch`` divides the pass. ``evaluate`` and ``predict`` have the rows of the training pass that is
        under way, else those of now. The number of batches may differ from pass to pass. Joined datasets stay at the
        revision that they had when the sequence was made; a line is logged when they change.
    shard : int or ``"auto"``
        The share of each step that this process takes. ``"auto"``: the rank from JAX (`keras.distribution`),
        `torch.distributed`, or ``RANK`` and ``WORLD_SIZE``. Every shard has the same number of batches.
    shards : int, optional
        Number of shards.
    last : ``"keep"``, ``"drop"`` or ``"pad"``, optional
        What to do with an incomplete last step. ``"pad"``, the default with several shards, repeats rows with sample
        weight 0: use ``weighted_metrics``, and put class weights into the loss, because Keras does not accept
        ``class_weight`` together with sample weights.
    verbose : bool
        Print "Found 1257 images belonging to 10 classes (as numbers).", like ``flow_from_directory``. Targets are "as
        numbers", "as one-hot rows" or "as 0.0 and 1.0". If the file stores splits, the line also says whether the rows
        are a split "as stored".
    workers, max_queue_size : int, optional
        Accepted for existing scripts. Keras' own threads would mix up epochs and are not used. `workers` above 1 sets
        `connections`, and `max_queue_size`, in batches, sets `readahead`.
    use_multiprocessing : bool
        Ignored: threads wait for the network as well as processes.
    **options
        Split and order options: ``val``, ``test``, ``stratify``, ``split_seed``, ``folds``, ``where``, ``window``,
        ``limit``, ``balance`` …; and those of samples: ``sequence_length``, ``offsets``, ``crop``, ``pad``, ``bucket``,
        ``pack``, ``join``, ``decode_cf`` …: see `h5feed.options`.

    Attributes
    ----------
    samples : int
        Rows of the split.
    shard, shards : int
    epoch : int
        Number of the pass of the next batch. Pass it as `epoch` to continue from here.

    A sequence can be pickled if its `transform` can (a module-level function or a Keras layer, for example). The copy
    has its own connections and threads and the same shard, and resumes from the same state, with the rest of the
    current training pass. In a forked child the sequence continues where it was, independently of the parent's.
    """

    def __init__(
        self,
        dataset: Samples,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        follow: bool = False,
        verbose: bool = True,
        workers: int | None = None,
        use_multiprocessing: bool = False,
        max_queue_size: int | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        # One worker means no Keras threads: the caller's thread takes batches that our threads have fetched ahead.
        super().__init__(workers=1, use_multiprocessing=False)
        check_loop_options(options, Sequence.__init__)
        if connections is not None and (workers or 0) > 1:
            raise BadParameter(f"workers={workers} and connections={connections} set the same number: give one of them")
        if readahead is not None and max_queue_size is not None:
            raise BadParameter(
                f"max_queue_size={max_queue_size}, in batches, and readahead={readahead}, in bytes, limit the same "
                "read-ahead: give one of them"
            )
        given: dict[str, Any] = dict(options)
        dataset = dataset.joined_by(given)
        self._follow, self._given = follow, given
        self._batching: dict[str, Any] = {"split": split, "batch_size": batch_size, "shuffle": shuffle, "seed": seed}
        if workers is not None and workers > 1:
            connections = workers
        self._fetching: dict[str, Any] = {"connections": connections, "readahead": readahead, "cache": cache}
        self._batches_ahead = max_queue_size
        self._meter, self._ordered_meter = Meter(), Meter()
        order = self._begin(dataset)
        self.shard, self.shards = int(order.get("shard") or 0), int(order.get("shards") or 1)
        if follow:
            check_can_follow(dataset, order, cache)
        self._lock = threading.RLock()
        self._position = Position(epoch, self._training.batches)
        self._begin_anew()
        tell_after_fork(self)
        if verbose and self.shard == 0:
            print(self._rows.found(self._ordered.plan), flush=True)

    def _begin(self, dataset: Samples, before: Preparation | None = None) -> dict[str, Any]:
        """Read this dataset from now on. Returns the options of its order."""
        order, preparing = divided(dataset, self._given)
        check_dense(order, "Keras")
        split, shuffle, seed = (self._batching[name] for name in ("split", "shuffle", "seed"))
        prepare = preparation_of(dataset, split, order, preparing, seed)
        if before is not None:
            prepare.check_prepares_as(before)
        of_split = split_options(order)
        order |= {"batch_size": self._batching["batch_size"], "seed": seed, "fields": prepare.fields}
        only_training = _ONLY_TRAINING if "stratify" in of_split else (*_ONLY_TRAINING, "stratify")
        in_order = {name: value for name, value in order.items() if name not in only_training}
        plan, plan_in_order = dataset.plan(split, shuffle=shuffle, **order), dataset.plan(split, **in_order)
        ahead = self._fetching["readahead"]
        if ahead is None and self._batches_ahead is not None:
            ahead = max(1, self._batches_ahead) * max(1, plan.batch_bytes)
        ahead = ahead or DEFAULT_READAHEAD
        fetching = {**self._fetching, "readahead": ahead}
        self._dataset, self._prepare = dataset, prepare
        self._training = Stream(dataset, plan, {**fetching, "waits": self._meter.waits})
        self._ordered = Stream(dataset, plan_in_order, {**fetching, "waits": self._ordered_meter.waits})
        few = {"readahead": max(1, min(ahead, max(ahead // 4, 4 * plan.batch_bytes)))}
        self._looks = Looks(dataset, plan, {**fetching, **few})
        self._rows = OrderedRows(dataset, split, in_order, of_split, prepare)
        return order

    def _take_from(self, dataset: Samples) -> None:
        before = (self._training, self._ordered, self._looks)
        self._begin(dataset, self._prepare)
        for one in before:
            one.close()
        self._position.resize(self._training.batches)

    def _begin_pass(self) -> None:
        """Take the rows that the dataset has now, if the sequence follows it and is not amid a training pass."""
        if self._follow and not self._position.batch:
            self._catch_up()

    def _begin_anew(self) -> None:
        self._owner: Run | OwnLoop | None = None
        """The run or loop that gets the next training batch."""
        self._endless: OwnLoop | None = None
        self._fitting: UnderWay | None = None
        self._is_dealt = False
        """Whether Keras distributes batches to shards, so that the position does not say which were delivered."""
        self._has_just_ended = False
        """Whether the last thing that happened is that the user's own loop reached its end."""
        self._asked_in: Method | None = None
        """The running Keras method, if the adapter did not accept the `Call`."""

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
        """In the child: drop the parent's threads and locks."""
        self._lock = threading.RLock()
        self._training.after_fork()
        self._ordered.after_fork()
        self._looks.after_fork()

    @keras.utils.PyDataset.workers.getter  # type: ignore[untyped-decorator]
    def workers(self) -> int:
        """Always 1: no Keras threads. The data adapter reads this first, and gets a `Call` in the sequence's place."""
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
        """The rows and batches of one training pass."""
        return self._training.plan

    def _where(self) -> tuple[int, int]:
        with self._lock:
            return self._position.epoch, self._position.batch

    def _stream_of(self, method: Method | None) -> Stream:
        return self._ordered if method in ("evaluate", "predict") else self._training

    def _asked_by_keras(self, caller: FrameType | None) -> Method | None:
        """The running Keras method, if Keras calls the sequence itself and not the `Call`."""
        while caller is not None and caller.f_locals.get("self") is self:
            caller = caller.f_back
        if not is_of_keras(caller):
            return None
        method = running_method(caller)
        if internals.FAULT:
            # A tf.data thread has no Keras method on its stack.
            method = self._asked_in = method or self._asked_in
        return method

    @property
    def samples(self) -> int:
        return self._ordered.plan.rows

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """Row ids in the order of ``evaluate`` and ``predict``, (predictions,) int64.

        With ``last="pad"``, includes the repeated rows at the end, which have predictions too.
        """
        return self._rows.ids

    @property
    def classes(self) -> npt.NDArray[Any]:
        """The class of each row in `row_ids`, (predictions,) ints; the stored values if labels are not classes."""
        return self._rows.classes

    @property
    def class_indices(self) -> dict[str, int]:
        """The number of each class, by class name."""
        return self._rows.labels.class_indices

    @property
    def class_weight(self) -> dict[int, float]:
        """Balanced class weights of this split for ``fit(class_weight=…)``: rows / (classes · rows of a class)."""
        return self._rows.class_weight

    def stats(self, of: Literal["fit", "evaluate"] | None = None) -> LoopStats:
        """How long the loop waited for data, and why: in total and in the last pass. Prints as a table.

        Parameters
        ----------
        of : str, optional
            ``"fit"``: training; ``"evaluate"``: evaluate and predict. Default: training, if there was any.

        Raises
        ------
        BadParameter
            `of` is neither.

        TensorFlow's threads take batches ahead of the loop. With it, these are the times of the *threads*, which wait
        longer than the loop and count compilation as compute. Use a `WaitMonitor` to measure the loop itself.
        """
        if of not in (None, "fit", "evaluate"):
            raise BadParameter(f"of={of!r} must be 'fit' or 'evaluate'")
        training, evaluating = self._meter.stats(), self._ordered_meter.stats()
        stats = evaluating if of == "evaluate" or (of is None and not training.steps) else training
        return replace(stats, via=self._dataset.via, replicas=self._dataset.replicas)

    @property
    def waited(self) -> float:
        """Seconds that fit, evaluate and predict have waited for batches: see `stats`."""
        return self.stats("fit").waited + self.stats("evaluate").waited

    def state_dict(self) -> dict[str, Any]:
        """The position of training, serialisable as JSON: see `h5feed.loops.passes.state_of`.

        During ``fit``, batches may have been handed out that are not trained on yet: use `state_after`.
        """
        with self._lock:
            self._check_told()
            return super().state_dict()

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after training on `batches` batches of the current ``fit``."""
        with self._lock:
            self._check_told()
            if batches < self._position.earliest:
                raise BadParameter(f"batches={batches} ended in an earlier pass, which had other rows")
            return state_of(self._dataset, self.plan, *self._position.after(batches))

    def _check_told(self) -> None:
        if self._is_dealt and self._position.batch:
            raise FeedError(f"{internals.DEALT}. A pass has no state before its end. {internals.ADVICE}")

    def _go_to(self, epoch: int, position: int) -> None:
        with self._lock:
            self._position.go_to(epoch, position)
            # End running loops, which would continue at another position.
            self._owner, self._has_just_ended = None, False

    def close(self) -> None:
        """Stop the read-ahead and its threads. The next batch restarts it."""
        with self._lock:
            self._training.close()
            self._ordered.close()
            self._looks.close()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Batch `index` of the pass number `epoch`.

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

    def _check_batches(self, method: Method | None) -> None:
        """Raise an error if there are no batches.

        Raises
        ------
        RowOutOfRange
        """
        plan = self._stream_of(method).plan
        if not plan.batches:
            raise RowOutOfRange(f"there are no batches: {described(self._dataset, plan)}")

    def _look(self, index: int, method: Method | None = None) -> tuple[Any, ...]:
        """The batch, without an effect on training."""
        stream, wanted = self._stream_of(method), operator.index(index)
        if not -stream.batches <= wanted < stream.batches:
            valid = f" (valid: {-stream.batches} to {stream.batches - 1})" if stream.batches else ""
            raise IndexError(
                f"index {index} is out of range for {stream.batches} batches{valid}: "
                f"{described(self._dataset, stream.plan)}"
            )
        wanted %= stream.batches
        epoch = self._position.epoch
        return self._seen(epoch, wanted) if stream is self._training else self._arrays(stream.look(0, wanted), 0)

    def _seen(self, epoch: int, position: int) -> tuple[Any, ...]:
        batch = self._looks.batch(epoch, position)
        with self._lock:
            return self._arrays(batch, epoch)

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch starts; does nothing."""
        self._check_trained(sys._getframe(1))

    def on_epoch_end(self) -> None:
        """Called by Keras when an epoch ends. Outside ``fit``, call it yourself to advance to the next pass."""
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
            self._begin_pass()

    def _check_trained(self, caller: FrameType) -> bool:
        """Whether Keras is the caller. Refuses training if the adapter did not accept the `Call`."""
        method = None if ASKED.by_keras else self._asked_by_keras(caller)
        if method == "fit":
            raise FeedError(internals.refusal())
        return method is not None

    def _begin_fit(self, initial_epoch: int, steps: int | None, is_dealt: bool) -> None:
        self._leave_own_loop()
        self._position.begin_fit(initial_epoch, steps)
        self._is_dealt = is_dealt
        if is_dealt and self._follow:
            raise FeedError(f"{internals.DEALT}. With follow=True, they would have different rows. {internals.ADVICE}")
        if is_dealt and self._position.batch:
            raise FeedError(f"{internals.DEALT}. It cannot resume at batch {self._position.batch}. {internals.ADVICE}")

    def _next_of_training(self) -> tuple[Any, ...]:
        arrays = self._metered(self._meter, self._training, self._position.epoch, self._position.batch)
        self._position.advance()
        return arrays

    def _dealt(self, index: int) -> tuple[Any, ...]:
        """Batch `index` of the current pass, whose other batches go to other data shards."""
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
        # torch is installed only with this backend.
        import torch

        from ..loops.tensors import tensors_of

        tensors: tuple[Any, ...] = tensors_of(arrays, pin=torch.cuda.is_available())
        return tensors
