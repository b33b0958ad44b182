"""PyTorch support: datasets for `torch.utils.data.DataLoader`, or for loops without one."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import get_spawning_popen
from operator import itemgetter
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info

from .batch import Batch
from .buffers import BufferPool
from .cache import RowCache
from .errors import BadParameter, FeedError
from .fetching.readahead import ReadAhead
from .loops.card import Card, CudaCard, LockedMemory, moved, on_host
from .loops.data_loaders import Loaded, check_accelerate, is_data_loader
from .loops.loop import Loop, check_can_follow
from .loops.loop_options import PREPARING, check_loop_options, divided, preparation_of
from .loops.meter import Meter
from .loops.pass_numbers import Pass, PassNumbers, Start
from .loops.passes import position_in, state_of
from .loops.tensors import mapped, tensors_of
from .loops.wait_stats import LoopStats
from .loops.worker_stats import Reporting, WorkerStats
from .net.trace import clock
from .options import OrderOptions, RowOptions, SplitOptions, TorchRowsOptions, WindowOptions
from .plan import Plan
from .prepare import Preparation
from .remote_dataset import RemoteDataset
from .samples import Samples
from .suggestions import check_options
from .wire import OFFSETS, WEIGHT

POOL_BYTES = 256 << 20
"""Maximum size of the page-locked buffers of a `TorchBatches`, in bytes; twice the ``readahead`` if that is more."""


def to_device(batches: Iterable[Any], device: str | torch.device = "cuda", *, ahead: int = 2) -> Iterator[Any]:
    """Move batches to a device ahead of the loop, so that copies overlap with computation. ::

        for x, y in to_device(dataset.torch("train", batch_size=64, shuffle=True)):
            loss = loss_of(model(x), y)

    Batches of `Dataset.torch` are received into page-locked buffers, from which the GPU copies them by itself while it
    computes. Buffers are locked once, and reused when their copies are done. If memory cannot be locked, or if there is
    a ``transform``, batches are copied from ordinary memory, and so are buffers of less than 1 MiB.

    Parameters
    ----------
    batches : iterable
        The result of `Dataset.torch` or `Dataset.batches`, a DataLoader, or any iterable of trees of tensors or numpy
        arrays. A `Batch` becomes a dict.
    device : str or torch.device
        A device that is not a CUDA GPU gets plain copies. The CPU gets tensors that share the memory of the batch.
    ahead : int
        Number of batches on the device beyond the current one.

    Yields
    ------
    tree of torch.Tensor
        Use them in the CUDA stream that is current when you request the batch.

    Raises
    ------
    BadParameter
        `ahead` is negative, or torch finds no such device here.
    """
    if ahead < 0:
        raise BadParameter(f"ahead={ahead} must be 0 or more")
    where = _device_of(device)
    if where.type != "cuda":
        # Without a stream for copies, there is nothing to gain from copying ahead.
        return (mapped(lambda leaf: _on(leaf, where), on_host(batch)) for batch in batches)
    return _on_card(batches, CudaCard(where), ahead)


def encoded(batch: Batch, field: str) -> list[torch.Tensor]:
    """The files of images that were requested with ``encoded=[field]``, for decoders that take them. ::

        for batch in photos.batches("train", batch_size=64, shuffle=True, encoded=["images"]):
            images = torchvision.io.decode_jpeg(encoded(batch, "images"), device="cuda")

    Returns
    -------
    list of (length,) uint8 tensors
        One for each row. They share the memory of the batch.

    Raises
    ------
    BadParameter
        The field was not requested as files, or the batch does not have it.
    """
    if field not in batch:
        raise BadParameter(f"the batch has no field {field!r}: it has {', '.join(map(repr, batch))}")
    if field + OFFSETS not in batch:
        raise BadParameter(f"the images of {field!r} are decoded: request their files with encoded=[{field!r}]")
    return [torch.from_numpy(file) for file in batch.lists(field)]


def _device_of(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadParameter(
            f"device={device!r} is not a device of this machine: use 'cuda', 'cuda:1' or 'cpu'"
        ) from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise BadParameter(
            f"device={str(device)!r} needs a CUDA GPU, but torch {torch.__version__} finds none here "
            "(torch.cuda.is_available() is False): use device='cpu' to run without one"
        )
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise BadParameter(f"device={str(device)!r}, but the last GPU of this machine is 'cuda:{count - 1}'")
    return found


def _on_card(batches: Iterable[Any], card: Card, ahead: int) -> Iterator[Any]:
    return moved(batches._for_card(card) if isinstance(batches, TorchBatches) else batches, card, ahead)


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf


class TorchBatches(Loop, IterableDataset[tuple[Any, ...]]):  # type: ignore[misc]
    """Batches of a split as tensors, in a new order each pass if `shuffle` is set; made by `Dataset.torch`.

    The dataset is already batched: use ``DataLoader(batches, batch_size=None)``. With ``num_workers=k``, each worker
    fetches every k-th batch, and the DataLoader yields them in the same order as without workers. Threads fetch ahead
    in any case, so workers help only if `transform` is slow, because each batch is copied from the worker.

    Passes are numbered consecutively, with and without workers, persistent or not, whatever their seed. `set_epoch`
    sets the number. A pass starts when its first batch is requested; workers request it as soon as they are started.

    `load_state_dict` resumes a pass, with any number of workers. `state_dict` is the position of a loop without
    workers; torchdata's ``StatefulDataLoader`` also gets the position of each worker from it. A DataLoader with workers
    takes batches ahead of the loop: there, `state_after` is the position of the loop.

    `stats` has the times of the training loop if there are no DataLoader workers, else those of the workers.

    Parameters
    ----------
    dataset : Samples
    split : str
    batch_size, shuffle, seed, epoch, connections, readahead, cache, **options
        See `h5feed.loops.loader.Loader`. `readahead` applies to each worker.
    follow : bool
        See `Loader`. The DataLoader workers of a pass all have the same rows.
    pin_memory : bool
        Copy the tensors to pinned memory if CUDA is available. With workers, use the DataLoader's own ``pin_memory``
        instead. `to_device` needs neither: it receives batches into pinned memory.

    Raises
    ------
    BadParameter
        Also if a DataLoader would batch the batches again, or if Accelerate would lose rows.

    The memory of the tensors is recycled once no tensor or view refers to it.
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
        pin_memory: bool = False,
        **options: Unpack[RowOptions],
    ) -> None:
        self._split = split
        self._seed = seed
        check_loop_options(options, TorchBatches.__init__)
        given: dict[str, Any] = dict(options)
        self._follow = follow
        self._given = given
        self._batching = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed}
        self._locked: tuple[int, BufferPool] | None = None
        self._begin(dataset.joined_by(given))
        if follow:
            check_can_follow(dataset, self._order)
        folder = cache.folder if isinstance(cache, RowCache) else cache
        cache_bytes = cache.max_bytes if isinstance(cache, RowCache) else None
        # Each worker opens the cache folder itself.
        self._cache = None if folder is None else (os.fspath(folder), cache_bytes)
        self._fetching: dict[str, Any] = {"connections": connections, "readahead": readahead}
        self._pin = pin_memory
        self._passes = PassNumbers(epoch)
        self._at: _Place | None = None
        self._resumed: _Place | None = None
        self._open: list[ReadAhead[Batch]] = []
        self._meter = Meter()
        self._worker_stats = WorkerStats()
        self._reporting: tuple[int, Reporting] | None = None

    def _take_from(self, dataset: Samples) -> None:
        self._begin(dataset, self._preparation())

    def _begin(self, dataset: Samples, before: Preparation | None = None) -> None:
        order, preparing = divided(dataset, self._given)
        prepare = preparation_of(dataset, self._split, order, preparing, self._seed)
        if before is not None:
            prepare.check_prepares_as(before)
        self._dataset, self._order, self._preparing = dataset, order, preparing
        self._prepared: tuple[int, Preparation] | None = (os.getpid(), prepare)
        self._options = {**self._batching, **self._order}
        self._plan = self._planned()

    @property
    def plan(self) -> Plan:
        """The rows and batches of one pass."""
        if self._follow and self._passes.is_of_workers and not self._passes.is_shared:
            self._take_rows_of(self._passes.latest)
        return self._plan

    @property
    def epoch(self) -> int:
        """Number of the next pass."""
        return self._passes.following

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass. Call it between passes."""
        check_accelerate(sys._getframe(1), int(self._order.get("shards") or 1))
        super().set_epoch(epoch)

    def _here(self) -> _Place | None:
        """The position in the current pass of this process, or in the pass whose loop was left."""
        return self._at if self._at is not None and self._at.pid == os.getpid() else None

    def _where(self) -> tuple[int, int]:
        here = self._here()
        return (self._passes.following, self._passes.first) if here is None else (here.epoch, here.following)

    def _go_to(self, epoch: int, delivered: int) -> None:
        self._at = None
        self._passes.go_to(Start(epoch, delivered, *(self._rows_here() if delivered else ())))

    def _rows_here(self) -> tuple[str, int]:
        """The revision that is read now, and its rows; for loops that follow."""
        return (self._dataset.revision, self._dataset.rows) if self._follow else ("", 0)

    def _take_rows_of(self, start: Start, now: Samples | None = None) -> None:
        """Take the batches from the dataset as a pass has it. `now` is what it is now, if that is known."""
        if start.revision in ("", self._dataset.revision):
            return
        assert isinstance(self._dataset, RemoteDataset)
        has_it = now is not None and now.revision == start.revision
        self._take_from(now if now is not None and has_it else self._dataset.at(start.revision))

    def _begun(self, called: Pass | None, resumed: _Place | None) -> Start:
        """Start a pass. If the loop follows, all workers get the rows that the first of them has found."""
        if not self._follow:
            return self._passes.begin(called, None if resumed is None else Start(resumed.epoch, resumed.first))
        if resumed is not None:
            return self._passes.begin(called, Start(resumed.epoch, resumed.first, *self._rows_here()))
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            self._tell_of_joined()
        now = self._dataset if self._passes.first else self._grown()
        start = self._passes.begin(called, None, (now.revision, now.rows))
        self._take_rows_of(start, now)
        return start

    def state_dict(self) -> dict[str, Any]:
        """The position of the loop, serialisable as JSON: see `h5feed.loops.passes.state_of`.

        Raises
        ------
        FeedError
            DataLoader workers deliver the batches, so this process does not know the position of the loop.
        """
        if not self._passes.is_shared:
            if self._passes.is_of_workers:
                raise FeedError(
                    "DataLoader workers take batches ahead of the loop: use state_after(batches), or torchdata's "
                    "StatefulDataLoader"
                )
            return super().state_dict()
        worker, here = get_worker_info(), self._here() or self._resumed
        if here is None and self._follow and (called := self._passes.called) is not None:
            # The states of all workers name the same rows.
            self._begun(called, None)
        epoch, first = self._passes.latest[:2] if here is None else (here.epoch, here.first)
        following = first if here is None else here.following
        of_worker = {"worker": worker.id, "workers": worker.num_workers, "first": first}
        # A worker without further batches waits for the others: the pass ends for all of them together.
        return {**state_of(self._dataset, self._plan, epoch, 0), "delivered": following, **of_worker}

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after the loop got `batches` batches of the latest pass, with or without workers.

        Raises
        ------
        BadParameter
        """
        plan, (epoch, first, *_) = self.plan, self._passes.latest
        if not 0 <= batches <= plan.batches - first:
            raise BadParameter(f"batches={batches} must be from 0 to {plan.batches - first}, as the pass has")
        return state_of(self._dataset, plan, epoch, first + batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state: the next pass delivers exactly what the saved pass had not delivered yet.

        The number of workers may differ, and the number of shards if ``batch_size × shards`` is the same. Call it
        between passes.

        Raises
        ------
        RevisionChanged
        BadParameter
            The state belongs to another order, or to another worker.
        """
        if self._follow:
            self._return_to(state)
        epoch, delivered = position_in(state, self._dataset, self._plan)
        of_worker = tuple(state.get(name) for name in ("worker", "workers"))
        worker = get_worker_info() if self._passes.is_shared else None
        here = (None, None) if worker is None else (worker.id, worker.num_workers)
        if of_worker != here:
            whose = "a whole pass" if of_worker == (None, None) else f"worker {of_worker[0]} of {of_worker[1]}"
            who = "not a worker" if worker is None else f"worker {here[0]} of {here[1]}"
            raise BadParameter(f"the state belongs to {whose}, but this process is {who}: keep num_workers the same")
        if worker is None:
            self._go_to(epoch, delivered)
        else:
            self._resumed = _Place(os.getpid(), int(state["epoch"]), int(state["first"]), int(state["delivered"]))

    def close(self) -> None:
        """Stop the read-ahead of this process and its threads. A running loop fails with an error."""
        while self._open:
            self._open.pop().close()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        batches = self._batches(self._passes.call(), worker, workers)
        return map(Loaded, batches) if is_data_loader(sys._getframe(1)) else batches

    def _for_card(self, card: Card) -> Iterator[tuple[Any, ...]]:
        """One pass in memory that `card` reads directly, for `h5feed.loops.card.moved` alone.

        A transform could start copies of its own from that memory, and not wait for them: it gets ordinary memory.
        """
        if get_worker_info() is not None or self._preparation().transforms:
            return iter(self)
        if self._locked is None or self._locked[0] != os.getpid():
            most = max(POOL_BYTES, 2 * (self._fetching["readahead"] or 0))
            self._locked = os.getpid(), BufferPool(most, allocate=LockedMemory(card).allocate)
        return self._batches(self._passes.call(), 0, 1, self._locked[1])

    def _batches(
        self, called: Pass | None, worker: int, workers: int, pool: BufferPool | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Every `workers`-th batch of a pass, from batch `worker` on. The pass starts when the first is requested.

        With `pool`, they are in its memory, and are not pinned.
        """
        resumed, self._resumed = self._resumed, None
        epoch, first, *_ = self._begun(called, resumed)
        following = first if resumed is None else resumed.following
        prepare = self._preparation()
        pin = self._pin and pool is None and torch.cuda.is_available()
        cache = None if self._cache is None else self._dataset.cache(*self._cache)
        number = epoch if self._plan.is_drawn else 0
        # The batches of this worker depend on where the pass started, not on where it is resumed.
        shares = self._shares((first + worker) % workers, workers, following)
        here = self._at = _Place(os.getpid(), epoch, first, following)
        fetching = {**self._fetching, "cache": cache, "pool": pool}
        reporting = self._reporting_of_worker()
        if reporting is None:
            # What a worker waits, the training loop does not wait: the worker works ahead of it.
            fetching["waits"] = self._meter.waits
        streams = [
            (index, self._dataset.read_passes(plan, number, start, stop, **fetching))
            for plan, start, stop, index in shares
            if start < stop
        ]
        self._open += [stream for _, stream in streams]
        self._meter.begin_pass()
        try:
            for index_of_first, stream in streams:
                for index in itertools.count(index_of_first, workers):
                    asked = clock()
                    batch = next(stream, None)
                    if batch is None:
                        break
                    trace, came = stream.taken, clock()
                    batch.index = index
                    tensors = tensors_of(prepare(batch, epoch, pool), pin)
                    self._meter.step(asked, came, trace, len(batch.rows))
                    if reporting is not None:
                        reporting.step()
                    # Counted before the yield, so that a state saved in the loop body includes this batch.
                    here.following = index + 1
                    yield tensors
            here.following = self._plan.batches
            if self._at is here and not self._passes.is_shared:
                self._at = None
            self._meter.end_pass()
        finally:
            if reporting is not None:
                reporting.tell()
            for _, stream in streams:
                stream.close()
                with contextlib.suppress(ValueError):
                    self._open.remove(stream)

    def stats(self) -> LoopStats:
        """Steps, rows and times so far: see `h5feed.loops.wait_stats.LoopStats`.

        With DataLoader workers, these are the statistics that the workers have reported, at least every half second:
        numbers of all workers together, and times of a worker on average. A worker waits ahead of the loop, and counts
        the time in which the loop has enough batches as `compute`.
        """
        own = super().stats()
        of_workers = self._worker_stats.read()
        if not of_workers.steps:
            return own
        return replace(own.then(of_workers) if own.steps else of_workers, via=own.via, replicas=own.replicas, last=None)

    def _reporting_of_worker(self) -> Reporting | None:
        """How this process reports what it measures, if it is a DataLoader worker. One per process."""
        worker = get_worker_info()
        if worker is None:
            return None
        if self._reporting is None or self._reporting[0] != os.getpid():
            # A forked worker inherits what its parent has measured.
            self._meter = Meter()
            self._reporting = os.getpid(), Reporting(self._worker_stats, self._meter, worker.id, worker.num_workers)
        return self._reporting[1]

    def _shares(self, worker: int, workers: int, following: int) -> list[tuple[Plan, int, int, int]]:
        """The batches `worker`, worker + workers … of the whole pass, from batch `following` on.

        Each item is a plan, its batches start … stop-1, and the index of the first of them in the whole pass.
        """
        if workers == 1:
            return [(self._plan, following, self._plan.batches, following)]
        # Shard s of S consists of the shards s, s+S, s+2S … of k·S, so the server can send the batches of a worker as
        # one stream. Of the last, incomplete step, each worker takes at most one batch, from the whole order.
        shard, shards = int(self._order.get("shard") or 0), int(self._order.get("shards") or 1)
        steps = self._plan.rows // (self._plan.batch_size * shards * workers)
        padded = any(tensor.name == WEIGHT for tensor in self._plan.tensors)
        of_worker: dict[str, Any] = {
            "shard": worker * shards + shard,
            "shards": workers * shards,
            "last": "pad" if padded else "drop",
        }
        if self._order.get("bucket") is not None and self._order.get("bucket_group") is None:
            # The order must not depend on the number of workers.
            of_worker["bucket_group"] = shards
        # The first batch of this worker that is not before `following`.
        step = max(0, -(-(following - worker) // workers))
        final = steps * workers + worker
        last = max(final, following)
        return [
            (self._planned(**of_worker) if step < steps else self._plan, step, steps, step * workers + worker),
            (self._plan, last, min(final + 1, self._plan.batches), last),
        ]

    def _planned(self, **of_worker: Any) -> Plan:
        return self._dataset.plan(self._split, **{**self._options, **of_worker}, fields=self._preparation().fields)

    def _preparation(self) -> Preparation:
        """One per process, because its recycled buffers belong to one process."""
        if self._prepared is None or self._prepared[0] != os.getpid():
            made = preparation_of(self._dataset, self._split, self._order, self._preparing, self._seed)
            self._prepared = os.getpid(), made
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = ("_prepared", "_locked", "_resumed", "_at", "_reporting")
        state = {**self.__dict__, "_open": [], **dict.fromkeys(of_this_process)}
        # A worker takes part in the passes of the original. Any other copy continues on its own from the same place.
        return state if get_spawning_popen() is not None else {**state, "_passes": PassNumbers(*self._where())}


@dataclass
class _Place:
    """The position of a process in a pass: it has delivered its batches before batch `following`."""

    pid: int
    epoch: int
    first: int
    """The batch that the pass started with: 0, or the first of a resumed pass."""
    following: int


class TorchRows(MapDataset[tuple[Any, ...]]):  # type: ignore[misc]
    """Single rows of a split by position, for your own samplers; made by `Dataset.torch_map`.

    A DataLoader gets the rows of a batch with one request (``__getitems__``). This is much slower than `TorchBatches`,
    even with workers, because nothing is fetched ahead of the sampler.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    **options
        Split options (``val``, ``test`` …), and ``x``, ``y``, ``sample_weight``, ``class_mode``, ``rescale``, ``mean``,
        ``std`` of `h5feed.prepare.Preparation`.

    Attributes
    ----------
    row_ids : (rows,) int64
        The row id in the dataset of each position.
    """

    def __init__(self, dataset: RemoteDataset, split: str = "all", **options: Unpack[TorchRowsOptions]) -> None:
        self._dataset = dataset
        order, preparing = divided(dataset, options)
        # Rows are always dense.
        del order["sparse"]
        if windows := sorted(set(order) & set(WindowOptions.__annotations__)):
            raise BadParameter(
                f"{windows[0]}= makes samples of several rows, but torch_map() has single rows: use torch()"
            )
        of_order = sorted(set(order) & set(OrderOptions.__annotations__) - set(SplitOptions.__annotations__))
        if of_order:
            raise BadParameter(f"unknown option {of_order[0]!r}: the sampler determines the order, not the dataset")
        check_options(options, TorchRows.__init__, SplitOptions.__annotations__, PREPARING)
        if split == "all" and any(order.get(name) is not None for name in ("test", "val", "folds")):
            raise BadParameter(
                "split='all' is every row, so test=, val= and folds= have no effect: name 'train', 'val' or 'test'"
            )
        if "transform" in preparing:
            raise BadParameter("transform= works on batches, but this dataset yields single rows: use a collate_fn")
        self._make = (split, order, preparing)
        self._prepared: tuple[int, Preparation] | None = None
        self._preparation()
        self.row_ids: npt.NDArray[np.int64] = dataset.split_rows(split, **order).copy()

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Any, ...]]:
        """The rows at these positions, with one request."""
        prepare = self._preparation()
        try:
            rows = self.row_ids[np.asarray(places, np.int64)]
        except IndexError:
            raise IndexError(f"index out of range for {len(self)} rows (valid: 0 to {len(self) - 1})") from None
        arrays = tensors_of(prepare(self._dataset.dense_rows(rows, prepare.fields)), False)
        return [mapped(itemgetter(place), arrays) for place in range(len(rows))]

    def _preparation(self) -> Preparation:
        if self._prepared is None or self._prepared[0] != os.getpid():
            split, order, preparing = self._make
            self._prepared = os.getpid(), preparation_of(self._dataset, split, order, preparing, 0)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}
