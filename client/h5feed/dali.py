"""Batches for NVIDIA DALI, which decodes images on the GPU. DALI itself is not imported."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol, Unpack

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .cache import RowCache
from .errors import BadParameter
from .forks import tell_after_fork
from .loops.loop_options import check_dense, divided
from .loops.stream import Stream
from .options import EpochOptions, OrderOptions, ShardOptions
from .plan import Plan
from .samples import Samples
from .suggestions import check_options
from .wire import OFFSETS

Output = npt.NDArray[Any] | list[npt.NDArray[Any]]
"""What DALI takes as a batch: one array of all samples, or an array for each, if they differ in length."""


class BatchInfo(Protocol):
    """The part of `nvidia.dali.types.BatchInfo` that is used."""

    @property
    def iteration(self) -> int:
        """Number of the batch in its epoch."""

    @property
    def epoch_idx(self) -> int:
        """Number of times that the pipeline was reset."""


class _SourceOptions(EpochOptions, ShardOptions, total=False):
    """Options of a `Source`."""


class Source:
    """A source for ``nvidia.dali.fn.external_source``: fields of a split, images as the bytes of their files. ::

        source = Source(photos, "train", ("images", "labels"), batch_size=64, shuffle=True)

        @pipeline_def(batch_size=64, num_threads=4, device_id=0)
        def pipeline():
            files, labels = fn.external_source(source, num_outputs=2, batch_info=True)
            return fn.decoders.image(files, device="mixed"), labels

    Each epoch of the pipeline is one pass: every row of the split once, in a new order if `shuffle` is set. At its end,
    ``run`` of the pipeline raises StopIteration until you call ``reset``. Batches are fetched ahead in threads, so
    ``parallel=True`` would only slow the pipeline down.

    Parameters
    ----------
    dataset : Samples
    split : str
    fields : str or sequence of str
        One name: a call returns the batch of this field. Several: a tuple of batches, for ``num_outputs``.
    batch_size : int
        At most that of the pipeline. The last batch may be smaller, which DALI supports: see ``last``.
    shuffle : bool
    seed, epoch : int
        Epoch e of the pipeline has the order of epoch ``epoch + e`` for this seed.
    connections, readahead, cache
        See `h5feed.loops.loader.Loader`.
    **options
        Split and order options. ``encoded``: the fields that are not decoded; default: all that hold image files.

    Raises
    ------
    BadParameter
    """

    def __init__(
        self,
        dataset: Samples,
        split: str = "all",
        fields: str | Sequence[str] = ("images", "labels"),
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        **options: Unpack[_SourceOptions],
    ) -> None:
        check_options(options, Source.__init__, set(OrderOptions.__annotations__) - {"fields"})
        self._is_one = isinstance(fields, str)
        self._names = [fields] if isinstance(fields, str) else list(fields)
        given: dict[str, Any] = dict(options)
        dataset = dataset.joined_by(given)
        order, _ = divided(dataset, given)
        check_dense(order, "DALI")
        files = [field["name"] for field in dataset.info["fields"] if field.get("decode")]
        order.setdefault("encoded", [name for name in self._names if name in files])
        order |= {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "fields": self._names}
        fetching = {"connections": connections, "readahead": readahead, "cache": cache}
        self._stream = Stream(dataset, dataset.plan(split, **order), fetching)
        self._epoch = epoch
        self._lock = threading.Lock()
        tell_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: drop the parent's threads and locks."""
        self._lock = threading.Lock()
        self._stream.after_fork()

    @property
    def plan(self) -> Plan:
        """The rows and batches of one pass."""
        return self._stream.plan

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.plan.batches

    def __call__(self, info: BatchInfo) -> Output | tuple[Output, ...]:
        """A batch. Called by DALI with a `BatchInfo`, because of ``batch_info=True``.

        Returns
        -------
        (rows, *sample) array, or list of (length,) arrays
            A list for fields whose rows differ in length: uint8 for files and text. Several fields: a tuple of these.

        Raises
        ------
        StopIteration
            The pass has no further batches.
        """
        if not hasattr(info, "iteration"):
            raise BadParameter("DALI did not say which epoch it asks for: pass batch_info=True to fn.external_source")
        if info.iteration >= len(self):
            raise StopIteration
        with self._lock:
            batch = self._stream.batch(self._epoch + info.epoch_idx, info.iteration)
        outputs = tuple(_output(batch, name) for name in self._names)
        return outputs[0] if self._is_one else outputs

    def close(self) -> None:
        """Stop the read-ahead and its threads. The next batch restarts it."""
        with self._lock:
            self._stream.close()


def _output(batch: Batch, name: str) -> Output:
    return batch.lists(name) if name + OFFSETS in batch else np.asarray(batch[name])
