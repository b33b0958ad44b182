"""Fetch each row from the server that owns it, so that the caches of several servers hold different rows.

The row ids of a block of batches are known before its rows are requested, see `h5feed.cache.row_ids`. Each owner gets
one request for all its rows in the block, and the rows go to their places in the arrays of the block. The batches are
the same as those that one server sends.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..cache.row_ids import RowIds
from ..errors import BadAnswer, RevisionChanged, TooLarge
from ..frames import Frame, check_offsets
from ..net.client import Client
from ..net.placement import owners_of, rows_of_block
from ..net.servers import Server
from ..net.trace import as_tensors, not_placed
from ..plan import Plan, names_of
from ..revisions import is_provisional
from ..wire import ROWS
from .leased import leased
from .parts import PART_BYTES, opened

_DIRECT_ROW_BYTES = 256 << 10
"""Rows of at least this size are received straight into their places. For smaller ones, a copy takes less time than a
system call for each."""

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class PlacedFetcher:
    """Fetches blocks of a plan from the owners of their rows.

    Parameters
    ----------
    client : Client
    path : str
        URL path of the dataset.
    plan : Plan
    fetch_ids : callable
        Fetches batches of the plan without fields.
    """

    def __init__(self, client: Client, path: str, plan: Plan, fetch_ids: Fetch[Batch]) -> None:
        self._client, self._path, self._plan = client, path, plan
        self._fetch_ids, self._ids = fetch_ids, RowIds()
        self._block_rows = rows_of_block(plan.chunk_rows)
        row_bytes = max(1, plan.batch_bytes // max(1, plan.batch_size))
        self._at_once = max(1, min(plan.max_rows, min(PART_BYTES, plan.max_bytes) // row_bytes))
        # Threads that fetch at the same time begin with different servers.
        self._turns = itertools.count()
        self._differs = ""
        names = plan.frame.fields
        encoded = names_of(plan.params.get("encoded"))
        self._asked: dict[str, Any] = {"fields": names} | ({"encoded": encoded} if encoded else {})
        ignored = f"; compress={plan.compress!r} is ignored" if plan.compress else ""
        self._why_arrays = f"placement='cache'{ignored}"

    def fetch(self, block: Block, cancelled: threading.Event) -> list[Batch] | None:
        """The batches of a block; None if any server may send it.

        Raises
        ------
        FeedError
            No server answers, or they refuse.
        """
        revision = self._client.names.current(self._plan.params["revision"])
        if why := self._why_not(revision):
            not_placed(why)
            return None
        wanted = self._ids.batches(self._plan, self._fetch_ids, block, cancelled)
        gathered = _Gathered(self._plan.frame, wanted, self._client.pool)
        servers = self._client.owners()
        owners = owners_of(gathered.rows // self._block_rows, [server.identity for server in servers], revision)
        first = next(self._turns)
        try:
            for turn in range(len(servers)):
                number = (first + turn) % len(servers)
                self._fetch_from(servers[number], np.flatnonzero(owners == number), gathered, revision, cancelled)
        except RevisionChanged as error:
            self._differs = f"the servers differ, or the data have changed: {error}"
            not_placed(self._differs)
            return None
        as_tensors(self._why_arrays)
        return gathered.batches(block.epoch, self._plan.params["revision"])

    def _why_not(self, revision: str) -> str:
        """Why any server may send all rows; empty if each is to come from its owner."""
        if self._plan.not_by_id:
            return self._plan.not_by_id
        if self._differs:
            return self._differs
        if self._plan.is_packed:
            return "packed rows hold rows of several servers"
        if len(self._client.replicas) < 2:
            return "there is only one server"
        if is_provisional(revision):
            return "the revision is provisional, so its rows come from the server that gave it"
        return ""

    def _fetch_from(
        self, owner: Server, places: Int64s, gathered: _Gathered, revision: str, cancelled: threading.Event
    ) -> None:
        """Fetch the rows at these places, with one request if they fit into a response."""
        begin, size = 0, self._at_once
        while begin < len(places):
            part = _Part(gathered, places[begin : begin + size], revision, self._client)
            try:
                self._client.receive(
                    f"{self._path}/rows",
                    {"revision": revision},
                    part,
                    json={**self._asked, "rows": part.rows.tolist()},
                    max_bytes=gathered.frame.max_bytes(len(part.rows), 1, self._plan.max_bytes),
                    cancelled=cancelled,
                    owner=owner,
                )
            except TooLarge:
                # They are longer than others, or in more chunks than one response may read.
                if len(part.rows) == 1:
                    raise
                size = self._at_once = len(part.rows) // 2
                continue
            begin += len(part.rows)


class _Gathered:
    """The rows of a block of batches, which arrive in parts.

    Parameters
    ----------
    wanted : list of Batch
        The batches without fields.

    Attributes
    ----------
    rows : (n,) int64
        Row ids of all batches together.
    arrays : dict of str to (n, *sample) array
        The fields with rows of equal length, in one buffer with the row ids.
    """

    def __init__(self, frame: Frame, wanted: list[Batch], pool: BufferPool) -> None:
        self.frame, self._wanted, self._pool = frame.only(frame.fields, weighted=False), wanted, pool
        count = sum(len(batch.rows) for batch in wanted)
        fixed = self.frame.tensors.keys() - frame.flat.keys() - frame.offsets
        self.arrays = leased(pool, {name: (kind[0], (count, *kind[1])) for name, kind in self._kinds(fixed)})
        self.rows: Int64s = np.concatenate([batch.rows for batch in wanted], out=self.arrays.pop(ROWS))
        # Items of rows that differ in length, by field and by the first place of their part: their places, the items
        # and their offsets. Where they belong is known when all lengths are.
        self.lists: dict[str, dict[int, tuple[Int64s, npt.NDArray[Any], Int64s]]] = {name: {} for name in frame.flat}

    def _kinds(self, names: set[str]) -> Iterator[tuple[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
        return ((name, self.frame.tensors[name]) for name in self.frame.tensors if name in names)

    def batches(self, epoch: int, revision: str) -> list[Batch]:
        """The batches, when all parts have arrived."""
        lists = {name: self._joined(name) for name in self.frame.flat}
        of_offsets = {own: lists[name][1] for name, own in self.frame.flat.items()}
        batches, begin = [], 0
        for wanted in self._wanted:
            end = begin + len(wanted.rows)
            fields = {}
            for name in self.frame.names:
                if name in lists:
                    items, offsets = lists[name]
                    fields[name] = items[offsets[begin] : offsets[end]]
                elif name in of_offsets:
                    fields[name] = of_offsets[name][begin : end + 1] - of_offsets[name][begin]
                else:
                    fields[name] = self.arrays[name][begin:end]
            rows, weight = self.rows[begin:end], None if wanted.weight is None else np.array(wanted.weight)
            batches.append(
                Batch(
                    fields,
                    rows,
                    weight,
                    index=wanted.index,
                    epoch=epoch,
                    revision=revision,
                    sparse=self.frame.sparse,
                )
            )
            begin = end
        return batches

    def _joined(self, name: str) -> tuple[npt.NDArray[Any], Int64s]:
        """The items of all rows, and their offsets, (n + 1,) int64."""
        offsets = np.zeros(len(self.rows) + 1, np.int64)
        for places, _, own in self.lists[name].values():
            offsets[places + 1] = np.diff(own)
        np.cumsum(offsets, out=offsets)
        (joined,) = leased(self._pool, {name: (self.frame.tensors[name][0], (int(offsets[-1]),))}).values()
        for places, items, own in self.lists[name].values():
            spans = zip(places.tolist(), own[:-1].tolist(), own[1:].tolist(), strict=True)
            for place, begin, end in spans:
                joined[offsets[place] : offsets[place + 1]] = items[begin:end]
        return joined, offsets


class _Part:
    """Receives the rows at some places of a block: see `h5feed.net.exchange.Places`."""

    def __init__(self, gathered: _Gathered, places: Int64s, revision: str, client: Client) -> None:
        self._gathered, self._places, self._revision = gathered, places, revision
        self._names, self._pool = client.names, client.pool
        self.rows: Int64s = gathered.rows[places]

    def places(self, length: int) -> Iterator[Bytes]:
        """The buffers for a body of `length` bytes, one after the other; each is filled when the next is asked for."""
        tensors, metadata = yield from opened(length)
        if not self._names.are_same(metadata.get("revision", ""), self._revision):
            raise BadAnswer(
                f"requested rows of revision {self._revision}, but received {metadata.get('revision')}: a proxy or "
                "cache between client and server mixes up responses"
            )
        frame, arrays = self._gathered.frame, self._gathered.arrays
        frame.check_places(tensors, len(self.rows))
        direct = {
            tensor.name
            for tensor in tensors
            if tensor.name in arrays and arrays[tensor.name][:1].nbytes >= _DIRECT_ROW_BYTES
        }
        came = leased(
            self._pool, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors if tensor.name not in direct}
        )
        begins = np.flatnonzero(np.diff(self._places, prepend=-2) != 1)
        runs = list(zip(self._places[begins].tolist(), np.diff(begins, append=len(self._places)).tolist(), strict=True))
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.name not in direct:
                yield came[tensor.name].reshape(-1).view(np.uint8)
                continue
            for first, count in runs:
                yield arrays[tensor.name][first : first + count].reshape(-1).view(np.uint8)
        if not np.array_equal(came.pop(ROWS), self.rows):
            raise BadAnswer(f"requested {len(self.rows)} rows, but received others")
        for name, array in came.items():
            if name in arrays:
                arrays[name][self._places] = array
            elif name in frame.flat:
                offsets = came[frame.flat[name]]
                check_offsets(name, array[None], offsets[None])
                self._gathered.lists[name][int(self._places[0])] = self._places, array, offsets
