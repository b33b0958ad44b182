"""Fetch the batches of a mixture: ranges of the orders of its sources, put together row by row.

The n-th sample that comes from a source is the n-th of the order of that source. So a block of a mixture needs one
range of each source, or one for each step if there are several shards. Sources are read in batches of few rows, of
which the needed ones are requested together, like those of any other loop: from servers, caches or files.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..errors import ConnectionFailed
from ..mixing import Mixing
from ..order import BatchGrid
from ..plan import BLOCK_BYTES, Plan
from ..wire import DATA, INDICES, INDPTR, OFFSETS, ROWS, WEIGHT, Tensor
from .leased import leased
from .shared import SharedBatches

SOURCE = "__source__"
"""Name of the field with the number of the source of each row."""

SOURCE_BATCH_BYTES = 256 << 10
"""Size of the batches in which sources are read. Each batch takes time, however small it is; of larger ones, blocks
that need only a part would have to wait for more."""

MOST_SOURCE_ROWS = 64
"""Maximum number of rows of such a batch, for small rows."""

_GAP_BYTES = 64 << 10
"""Batches that are not needed are fetched too if the gap is smaller: a request of its own would take longer."""

SHARED_BYTES = 64 << 20
"""Limit on batches of sources that are kept because other blocks need the rest of them."""

_ROW_BYTES = 4 << 10
"""Rows of at least this size are copied one by one: NumPy takes twice as long for a list of places."""

Int64s = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SourcePlan:
    """How a source of a mixture is read.

    Attributes
    ----------
    plan : Plan
        Its order, in batches of few rows.
    names : mapping of str to str
        Its own name of each tensor that is not made for another one, by the name in the mixture.
    """

    plan: Plan
    names: Mapping[str, str]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its batches by their own names, as they are handed out: unpacked, and sparse rows as one
        tensor, as large as the dense one."""
        found = {tensor.name: tensor for tensor in self.plan.tensors}
        for name, columns in self.plan.frame.sparse.items():
            data, _, _ = (found.pop(name + suffix) for suffix in (DATA, INDICES, INDPTR))
            found[name] = replace(data, name=name, shape=(self.plan.batch_size, columns))
        for name, packing in self.plan.unpacking.items():
            found[name] = replace(found[name], dtype=np.dtype(packing.dtype))
        return found

    def indices_of(self, name: str) -> np.dtype[Any] | None:
        """Dtype of the column indices of a field, by its name in the mixture; None if its rows are not sparse."""
        own = self.names.get(name)
        if own not in self.plan.frame.sparse:
            return None
        return next(tensor.dtype for tensor in self.plan.tensors if tensor.name == f"{own}{INDICES}")


@dataclass(frozen=True, kw_only=True)
class MixturePlan(Plan):
    """The rows and batches of an epoch of a mixture."""

    mixing: Mixing
    grid: BatchGrid
    sources: tuple[SourcePlan, ...]

    @cached_property
    def is_drawn(self) -> bool:
        """Whether samples differ between epochs."""
        return callable(self.mixing.parts) or any(source.plan.is_drawn for source in self.sources)

    @property
    def block_bytes(self) -> int:
        """As small as the smallest of the sources."""
        return min(source.plan.block_bytes for source in self.sources)

    @cached_property
    def csr(self) -> dict[str, int]:
        """Fields that arrive as parts of sparse matrices, and their numbers of columns."""
        first = self.sources[0]
        sparse = {} if first.plan.dense else first.plan.frame.sparse
        return {name: sparse[own] for name, own in first.names.items() if own in sparse}

    @cached_property
    def index_dtypes(self) -> dict[str, np.dtype[Any]]:
        """Dtype of the column indices of each of these fields."""
        tensors = {tensor.name: tensor for tensor in self.tensors}
        return {name: tensors[name + INDICES].dtype for name in self.csr}

    @cached_property
    def kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and sample shape of each field whose rows do not differ in length."""
        left_out = {name + OFFSETS for name in self.flat} | self.flat
        left_out |= {ROWS, WEIGHT, SOURCE, *(name + part for name in self.csr for part in (DATA, INDICES, INDPTR))}
        tensors = {tensor.name: tensor for tensor in self.tensors}
        return {name: (one.dtype, one.shape[1:]) for name, one in tensors.items() if name not in left_out}

    @cached_property
    def flat(self) -> frozenset[str]:
        """Fields whose rows differ in length."""
        return frozenset(one.name.removesuffix(OFFSETS) for one in self.tensors if one.name.endswith(OFFSETS))

    @cached_property
    def has_source(self) -> bool:
        """Whether the source of each row is a field of the batches."""
        return any(tensor.name == SOURCE for tensor in self.tensors)


class MixtureFetcher:
    """Fetches blocks of a mixture; see `h5feed.blocks.Fetch`.

    Parameters
    ----------
    plan : MixturePlan
    fetches : sequence of callable
        Fetches blocks of each source.
    revision : str
        That of the batches.
    pool : BufferPool
        Provides the memory of the batches.
    """

    def __init__(self, plan: MixturePlan, fetches: Sequence[Fetch[Batch]], revision: str, pool: BufferPool) -> None:
        self._plan, self._fetches, self._revision, self._pool = plan, fetches, revision, pool
        self._shared = SharedBatches(SHARED_BYTES)

    def __call__(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        plan = self._plan
        positions, real = plan.grid.positions(block.start, block.stop)
        sources, places = plan.mixing.assigned(block.epoch if plan.is_drawn else 0, positions)
        batches = [self._empty(plan.grid.size(index)) for index in range(block.start, block.stop)]
        for number in np.unique(sources).tolist():
            samples = np.flatnonzero(sources == number)
            self._fill(batches, number, samples, places[samples], cancelled)
        finished = []
        for index, batch in enumerate(batches, block.start):
            begin = (index - block.start) * plan.batch_size
            own = slice(begin, begin + len(batch.rows))
            weight = real[own].astype(np.float32) if plan.grid.last == "pad" else None
            finished.append(batch.finished(index, block.epoch, self._revision, sources[own], weight, plan.has_source))
        return finished

    def _empty(self, rows: int) -> _Mixed:
        kinds = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in self._plan.kinds.items()}
        lists = [*self._plan.flat, *(name + part for name in self._plan.csr for part in (DATA, INDICES))]
        return _Mixed(
            leased(self._pool, kinds), np.empty(rows, np.int64), {name: [None] * rows for name in lists}, self._plan
        )

    def _fill(
        self, batches: Sequence[_Mixed], number: int, samples: Int64s, places: Int64s, cancelled: threading.Event
    ) -> None:
        """Fetch the samples of one source, and copy them into the batches.

        Parameters
        ----------
        samples : (k,) int64
            Their positions in the block.
        places : (k,) int64
            See `Mixing.assigned`.
        """
        source, size = self._plan.sources[number], self._plan.mixing.sizes[number]
        passes, positions = np.divmod(places, size)
        numbers, rows = np.divmod(positions, source.plan.batch_size)
        came = self._fetched(number, passes, numbers, cancelled)
        into, at = np.divmod(samples, self._plan.batch_size)
        changes = (np.diff(passes) != 0) | (np.diff(numbers) != 0) | (np.diff(into) != 0)
        for begin, end in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(samples)]):
            batch = came[int(passes[begin]), int(numbers[begin])]
            batches[into[begin]].copy(batch, source.names, rows[begin:end], at[begin:end])

    def _fetched(
        self, source: int, passes: Int64s, numbers: Int64s, cancelled: threading.Event
    ) -> dict[tuple[int, int], Batch]:
        """Batches of a source, by pass and number. Those of which other blocks need rows, too, are shared with them."""
        plan = self._plan.sources[source].plan
        uses = Counter(zip(passes.tolist(), numbers.tolist(), strict=True))
        came: dict[tuple[int, int], Batch] = {}
        while missing := sorted(uses.keys() - came.keys()):
            if cancelled.is_set():
                raise ConnectionFailed("the request was cancelled")
            partly = [key for key in missing if uses[key] < plan.rows_of(key[1])]
            claimed = {key for key in partly if self._shared.claim((source, *key))}
            others = [key for key in partly if key not in claimed]
            try:
                for batches in self._runs(source, [key for key in missing if key not in others], cancelled):
                    came |= batches
                    for key in claimed & batches.keys():
                        claimed.remove(key)
                        nbytes = len(batches) * plan.batch_bytes
                        self._shared.deliver((source, *key), batches[key], nbytes, uses[key])
            finally:
                for key in claimed:
                    self._shared.give_up((source, *key))
            for key in others:
                batch = self._shared.get((source, *key), uses[key], cancelled)
                if batch is not None:
                    came[key] = batch
        return came

    def _runs(
        self, source: int, keys: Sequence[tuple[int, int]], cancelled: threading.Event
    ) -> Iterator[dict[tuple[int, int], Batch]]:
        """Fetch batches of a source, by pass and number: those that follow each other together."""
        plan, fetch = self._plan.sources[source].plan, self._fetches[source]
        most = 1 + _GAP_BYTES // max(1, plan.batch_bytes)
        for of_pass, numbers in itertools.groupby(keys, key=operator.itemgetter(0)):
            wanted = np.array([number for _, number in numbers])
            for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > most) + 1):
                start, stop = int(run[0]), int(run[-1]) + 1
                epoch = of_pass if plan.is_drawn else 0
                rest: Block | None = Block(epoch, start, stop, (stop - start) * plan.batch_bytes)
                while rest is not None:
                    block, rest = rest.cut(BLOCK_BYTES)
                    batches = fetch(block, cancelled)
                    yield {(of_pass, index): batch for index, batch in enumerate(batches, block.start)}


@dataclass(frozen=True)
class _Mixed:
    """A batch that rows are copied into. Fields whose rows differ in length are put together at the end."""

    arrays: Arrays
    rows: Int64s
    lists: dict[str, list[Any]]
    plan: MixturePlan

    def copy(self, batch: Batch, names: Mapping[str, str], rows: Int64s, at: Int64s) -> None:
        """Copy some rows of a batch of a source to these places."""
        first, last = int(rows[0]), int(rows[-1])
        # A slice needs no copy of its own.
        taken = slice(first, last + 1) if last - first + 1 == len(rows) else rows
        self.rows[at] = batch.rows[taken]
        for name, array in self.arrays.items():
            part = batch[names[name]][taken]
            if array.strides[0] < _ROW_BYTES:
                array[at] = part
            else:
                for place, row in zip(at.tolist(), part, strict=True):
                    array[place] = row
        parts = [(name, names[name], names[name] + OFFSETS) for name in self.plan.flat]
        for name in self.plan.csr:
            own = names[name]
            parts += [(name + part, own + part, own + INDPTR) for part in (DATA, INDICES)]
        for name, own, own_offsets in parts:
            lists, flat, offsets = self.lists[name], batch[own], batch[own_offsets]
            for row, place in zip(rows.tolist(), at.tolist(), strict=True):
                lists[place] = flat[offsets[row] : offsets[row + 1]]

    def finished(
        self,
        index: int,
        epoch: int,
        revision: str,
        sources: Int64s,
        weight: npt.NDArray[np.float32] | None,
        has_source: bool,
    ) -> Batch:
        """The batch, when all rows are there."""
        fields = dict(self.arrays)
        for name, lists in self.lists.items():
            fields[name] = np.concatenate(lists)
        for name in self.plan.flat:
            fields[name + OFFSETS] = np.cumsum([0, *map(len, self.lists[name])], dtype=np.int64)
        for name, dtype in self.plan.index_dtypes.items():
            fields[name + INDICES] = fields[name + INDICES].astype(dtype, copy=False)
            fields[name + INDPTR] = np.cumsum([0, *map(len, self.lists[name + DATA])], dtype=np.int64)
        if has_source:
            fields[SOURCE] = sources.copy()
        return Batch(
            fields,
            self.rows,
            weight,
            index=index,
            epoch=epoch,
            revision=revision,
            source=sources.copy(),
            sparse=self.plan.csr,
        )
