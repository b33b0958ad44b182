"""A remote dataset for `torch.utils.data.DataLoader`, and for loops without one."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info

from .cache import RowCache
from .errors import BadParameter
from .loops.data_loaders import Loaded, check_accelerate, is_data_loader
from .loops.loader import PREPARING, check_loader_options, divided, preparation_of
from .loops.meter import Meter
from .loops.pass_numbers import Pass, PassNumbers
from .loops.tensors import mapped, tensors_of
from .loops.wait_stats import LoopStats
from .net.trace import clock
from .options import OrderOptions, SplitOptions, TorchRowsOptions
from .plan import Plan
from .prepare import Preparation
from .remote_dataset import RemoteDataset
from .suggestions import check_options
from .wire import WEIGHT


class TorchBatches(IterableDataset[tuple[Any, ...]]):  # type: ignore[misc]
    """Batches of a split as tensors, each pass in an order of its own where `shuffle` is set; made by `Dataset.torch`.

    It is batched already: give it to ``DataLoader(batches, batch_size=None)``. With ``num_workers=k`` each worker
    fetches every k-th batch, and the DataLoader delivers them in the same order as without workers. Threads fetch ahead
    in any case, so workers pay only where `transform` is slow: each of them has to hand its batches over by a copy.

    Each pass begun has the next number, with and without workers, persistent or not, whatever their seed. `set_epoch`
    sets it. A pass begins with the first batch that is asked for; workers ask as soon as there is an iterator.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    batch_size, shuffle, seed, epoch, connections, readahead, cache, **options
        As of `h5feed.loops.loader.Loader`. `readahead` is that of each worker.
    pin_memory : bool
        Pin the tensors where CUDA is there. With workers, leave it to the DataLoader's own ``pin_memory``.

    Raises
    ------
    BadParameter
        Also where a DataLoader would make batches of the batches, and where Accelerate would lose rows.

    Tensors lie in recycled memory, which is not used again as long as any view of it is referred to.
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
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        self._dataset = dataset
        self._split = split
        self._seed = seed
        check_loader_options(options, TorchBatches.__init__)
        self._order, self._preparing = divided(options)
        self._prepared: tuple[int, Preparation] | None = None
        self._options = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, **self._order}
        self._plan = self._planned()
        folder = cache.folder if isinstance(cache, RowCache) else cache
        cache_bytes = cache.max_bytes if isinstance(cache, RowCache) else None
        # A worker's cache is one of its own: it opens the folder anew.
        self._cache = None if folder is None else (os.fspath(folder), cache_bytes)
        self._fetching: dict[str, Any] = {"connections": connections, "readahead": readahead}
        self._pin = pin_memory
        self._passes = PassNumbers(epoch)
        self._meter = Meter()

    def __len__(self) -> int:
        """Batches of a pass."""
        return self._plan.batches

    @property
    def samples(self) -> int:
        """Rows of a pass."""
        return self._plan.rows

    @property
    def epoch(self) -> int:
        """Number of the pass that is begun next."""
        return self._passes.following

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the pass that is begun next; call it between passes."""
        if epoch < 0:
            raise BadParameter(f"epoch={epoch} must be 0 or more")
        check_accelerate(sys._getframe(1), int(self._order.get("shards") or 1))
        self._passes.go_to(epoch)

    def stats(self) -> LoopStats:
        """How long this process has waited for batches, and what for: a table when printed.

        Without workers of a DataLoader that is the training loop. With them nothing is told here: each of them waits
        for itself, ahead of the loop.
        """
        return self._meter.stats()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        batches = self._batches(self._passes.call(), worker, workers)
        return map(Loaded, batches) if is_data_loader(sys._getframe(1)) else batches

    def _batches(self, called: Pass | None, worker: int, workers: int) -> Iterator[tuple[Any, ...]]:
        """Batches `worker`, worker + workers, worker + 2 workers … of a pass, which begins with the first asked for."""
        epoch = self._passes.begin(called)
        prepare = self._preparation()
        pin = self._pin and torch.cuda.is_available()
        cache = None if self._cache is None else self._dataset.cache(*self._cache)
        number = epoch if self._plan.is_drawn else 0
        streams = [
            (index, self._dataset.read_passes(plan, number, start, stop, cache=cache, **self._fetching))
            for plan, start, stop, index in self._shares(worker, workers)
            if start < stop
        ]
        self._meter.begin_pass()
        try:
            for first, stream in streams:
                for index in itertools.count(first, workers):
                    asked = clock()
                    batch = next(stream, None)
                    if batch is None:
                        break
                    trace, came = stream.taken, clock()
                    batch.index = index
                    tensors = tensors_of(prepare(batch, epoch), pin)
                    self._meter.step(asked, came, trace, len(batch.rows))
                    yield tensors
            self._meter.end_pass()
        finally:
            for _, stream in streams:
                stream.close()

    def _shares(self, worker: int, workers: int) -> list[tuple[Plan, int, int, int]]:
        """What a worker fetches: batches start … stop-1 of a plan, and the index in the pass of the first of them."""
        if workers == 1:
            return [(self._plan, 0, self._plan.batches, 0)]
        # Shard s of S is at the same time the shards s, s+S, s+2S … of k·S: the server sends a worker's batches back to
        # back. Of the last, incomplete step each worker takes one batch at most, from the whole order.
        shard, shards = int(self._order.get("shard") or 0), int(self._order.get("shards") or 1)
        steps = self._plan.rows // (self._plan.batch_size * shards * workers)
        padded = any(tensor.name == WEIGHT for tensor in self._plan.tensors)
        of_worker = {
            "shard": worker * shards + shard,
            "shards": workers * shards,
            "last": "pad" if padded else "drop",
        }
        final = steps * workers + worker
        return [
            (self._planned(**of_worker) if steps else self._plan, 0, steps, worker),
            (self._plan, final, min(final + 1, self._plan.batches), final),
        ]

    def _planned(self, **of_worker: Any) -> Plan:
        return self._dataset.plan(self._split, **{**self._options, **of_worker}, fields=self._preparation().fields)

    def _preparation(self) -> Preparation:
        """One for each process: its recycled buffers are those of one process."""
        if self._prepared is None or self._prepared[0] != os.getpid():
            made = preparation_of(self._dataset, self._split, self._order, self._preparing, self._seed)
            self._prepared = os.getpid(), made
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


class TorchRows(MapDataset[tuple[Any, ...]]):  # type: ignore[misc]
    """Single rows of a split by their place in it, for samplers of your own; made by `Dataset.torch_map`.

    A DataLoader asks for the rows of a whole batch at once, which is one request (``__getitems__``). With `shuffle`
    and workers this is far from the speed of `TorchBatches`, since nothing is fetched ahead of the sampler.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    **options
        Split options (``val``, ``test`` …), and ``x``, ``y``, ``sample_weight``, ``class_mode``, ``rescale``, ``mean``,
        ``std`` as of `h5feed.prepare.Preparation`.

    Attributes
    ----------
    row_ids : (rows,) int64
        Row id in the dataset of each place.
    """

    def __init__(self, dataset: RemoteDataset, split: str = "all", **options: Unpack[TorchRowsOptions]) -> None:
        self._dataset = dataset
        order, preparing = divided(options)
        of_order = sorted(set(order) & set(OrderOptions.__annotations__) - set(SplitOptions.__annotations__))
        if of_order:
            raise BadParameter(f"unknown option {of_order[0]!r}: a sampler decides about the order, not the dataset")
        check_options(options, TorchRows.__init__, SplitOptions.__annotations__, PREPARING)
        if "transform" in preparing:
            raise BadParameter("transform= has no batch to work on here: transform rows in the collate_fn")
        self._make = (split, order, preparing)
        self._prepared: tuple[int, Preparation] | None = None
        self._preparation()
        self.row_ids: npt.NDArray[np.int64] = dataset.split_rows(split, **order).copy()

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Any, ...]]:
        """Rows at those places, by one request."""
        prepare = self._preparation()
        try:
            rows = self.row_ids[np.asarray(places, np.int64)]
        except IndexError:
            raise IndexError(f"there are {len(self)} rows: places are 0 … {len(self) - 1}") from None
        arrays = tensors_of(prepare(self._dataset.take(rows, fields=prepare.fields)), False)
        return [mapped(itemgetter(place), arrays) for place in range(len(rows))]

    def _preparation(self) -> Preparation:
        if self._prepared is None or self._prepared[0] != os.getpid():
            split, order, preparing = self._make
            self._prepared = os.getpid(), preparation_of(self._dataset, split, order, preparing, 0)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}
