"""Receive a batch that is larger than a single response, in parts.

The parts are received one after the other, straight into the arrays of the batch.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..errors import BadAnswer, TooLarge
from ..net.client import Client
from ..plan import Plan
from ..wire import MAX_HEADER_BYTES, ROWS, WEIGHT, TensorPlace, read_header
from .leased import leased

PART_BYTES = 32 << 20
"""Bytes of a part. Larger parts would take more memory on the server, and more to repeat if a connection breaks."""

_SPARE = 8
"""Memory for rows of different lengths is 1/8 larger than their estimated size."""

Bytes = npt.NDArray[np.uint8]


class PartFetcher:
    """Fetches batches of a plan in parts.

    Parameters
    ----------
    path : str
        Of the dataset.
    """

    def __init__(self, client: Client, path: str, plan: Plan) -> None:
        self._client, self._path, self._plan = client, path, plan
        self._together = plan.part_rows or plan.batch_size
        # Most items that a batch has had so far, for each field whose rows differ in length.
        self._items: dict[str, int] = {}

    def fetch(self, index: int, epoch: int, cancelled: threading.Event, together: int | None = None) -> Batch:
        """Batch `index`. Its arrays are 64-byte aligned.

        Parameters
        ----------
        together : int, optional
            Rows to request at once; if they are too many for a response, half of them. Default: as many as the server
            announced, or all.

        Raises
        ------
        TooLarge
            A single row is too large for a response.
        """
        plan = self._plan
        rows = plan.rows_of(index)
        arrays = _Arrays(plan, index, epoch, rows, self._client, self._items)
        query = {**plan.params, "epoch": str(epoch)}
        size = min(self._together, together or rows)
        begin = 0
        while begin < rows:
            end = min(begin + size, rows)
            asked = query if end - begin == rows else query | {"from_row": str(begin), "to_row": str(end)}
            most = plan.frame.max_bytes(end - begin, 1, plan.max_bytes)
            try:
                self._client.receive(
                    f"{self._path}/batches/{index}",
                    asked,
                    arrays.part(begin, end),
                    max_bytes=most,
                    cancelled=cancelled,
                )
            except TooLarge:
                if end - begin == 1:
                    raise
                # Rows that differ in length, or a server with a lower limit.
                size = self._together = (end - begin) // 2
                continue
            begin = end
        return arrays.batch()


class _Arrays:
    """The arrays of one batch, in one buffer. Arrays of fields whose rows differ in length grow when needed.

    Parameters
    ----------
    items : dict of str to int
        The most items that such a field has had in a batch, by name; updated.
    """

    def __init__(self, plan: Plan, index: int, epoch: int, rows: int, client: Client, items: dict[str, int]) -> None:
        self._plan, self._index, self._epoch, self._rows = plan, index, epoch, rows
        self._pool, self._names = client.pool, client.names
        self._most = items
        self._frame = plan.frame
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        # Items received so far.
        self._used = dict.fromkeys(self._frame.flat, 0)

    @property
    def offsets(self) -> frozenset[str]:
        """Names of the offsets."""
        return self._frame.offsets

    @property
    def flat(self) -> Mapping[str, str]:
        """Names of the fields whose rows differ in length, and of their offsets."""
        return self._frame.flat

    def part(self, begin: int, end: int) -> _Part:
        """Receives rows begin … end-1, after those before."""
        return _Part(self, begin, end)

    def batch(self) -> Batch:
        """The batch, when all parts have arrived."""
        for name, used in self._used.items():
            self._most[name] = max(self._most.get(name, 0), used)
        arrays = {
            name: array[: self._used[name]] if name in self._used else array for name, array in self._arrays.items()
        }
        self._frame.check({name: array[None] for name, array in arrays.items()})
        rows, weight = arrays.pop(ROWS), arrays.pop(WEIGHT, None)
        revision = self._plan.params["revision"]
        sparse = self._frame.sparse
        return Batch(arrays, rows, weight, index=self._index, epoch=self._epoch, revision=revision, sparse=sparse)

    def check_head(self, metadata: Mapping[str, str]) -> None:
        """Raise `BadAnswer` if this is a part of another batch."""
        wanted = {"index": str(self._index), "epoch": str(self._epoch), "revision": self._plan.params["revision"]}
        came = {name: metadata.get(name) for name in wanted}
        # The name may have been provisional when the first part came.
        is_same = self._names.are_same(came["revision"] or "", wanted["revision"])
        if not is_same or (came["index"], came["epoch"]) != (wanted["index"], wanted["epoch"]):
            raise BadAnswer(
                f"requested a part of the batch {wanted}, but received {came}: a proxy or cache between client and "
                "server mixes up responses"
            )

    def places(self, tensors: list[TensorPlace], begin: int, end: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Where the tensors of a part go, in their order in the body; offsets go to an array of their own.

        Raises
        ------
        BadAnswer
            These are not the tensors of rows begin … end-1.
        """
        frame, count = self._frame, end - begin
        frame.check_places(tensors, count)
        items = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.name in frame.flat}
        self._make_room(items, count)
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            name = tensor.name
            if name in frame.flat:
                used = self._used[name]
                yield name, self._arrays[name][used : used + items[name]]
            elif name in frame.offsets:
                yield name, np.empty(count + 1, np.int64)
            else:
                yield name, self._arrays[name][begin:end]

    def add_offsets(self, name: str, offsets: npt.NDArray[np.int64], items: int, begin: int) -> None:
        """Append the offsets of a part, which has this many items.

        Raises
        ------
        BadAnswer
            They do not divide the items.
        """
        if offsets[0] != 0 or offsets[-1] != items or (np.diff(offsets) < 0).any():
            raise BadAnswer(f"the offsets of {name!r} do not divide its {items} items into rows")
        self._arrays[self._frame.flat[name]][begin + 1 : begin + len(offsets)] = self._used[name] + offsets[1:]

    def add_items(self, name: str, items: int) -> None:
        """Count the items of a part that has arrived."""
        self._used[name] += items

    def _make_room(self, items: Mapping[str, int], count: int) -> None:
        """Make sure that a part of `count` rows with these items fits."""
        wanted = {name: self._used[name] + more for name, more in items.items()}
        if self._arrays and all(wanted[name] <= len(self._arrays[name]) for name in wanted):
            return
        room = {}
        for name, need in wanted.items():
            if self._arrays:
                had = len(self._arrays[name])
                room[name] = had if need <= had else max(need, had + had // 2)
            else:
                # As many as in the largest batch so far, or as these rows have on average and some more.
                guess = need * self._rows // count
                room[name] = max(need, self._most.get(name, guess + guess // _SPARE))
        before, self._arrays = self._arrays, self._leased(room)
        for name, array in before.items():
            kept = self._used.get(name, len(array))
            self._arrays[name][:kept] = array[:kept]

    def _leased(self, room: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
        """Arrays for all rows of the batch, in one leased buffer."""
        shapes = {}
        # The fields of a batch have the same order as in a response body.
        for name, (_, sample) in sorted(self._frame.tensors.items(), key=lambda item: -item[1][0].itemsize):
            shapes[name] = (room[name] if name in room else self._rows + (name in self._frame.offsets), *sample)
        arrays = leased(self._pool, {name: (self._frame.tensors[name][0], shape) for name, shape in shapes.items()})
        for name in self._frame.offsets:
            arrays[name][:1] = 0
        return arrays


def opened(length: int) -> Generator[Bytes, None, tuple[list[TensorPlace], Mapping[str, str]]]:
    """The buffers for the beginning of a body of `length` bytes; returns its tensors and its metadata.

    Raises
    ------
    BadAnswer
        It is not a body of that length.
    """
    opening = np.empty(8, np.uint8)
    yield opening[: min(8, length)]
    (head_bytes,) = struct.unpack("<Q", opening.tobytes())
    if length < 8 or head_bytes > min(MAX_HEADER_BYTES, length - 8):
        raise BadAnswer(f"the response of {length} bytes is not a part of a batch")
    head = np.empty(head_bytes, np.uint8)
    yield head
    tensors, metadata, nbytes = read_header(head.tobytes())
    if 8 + head_bytes + nbytes != length:
        raise BadAnswer(f"the response has {length} bytes, but its header announces {8 + head_bytes + nbytes}")
    return tensors, metadata


class _Part:
    """The part of a batch that one response brings: see `h5feed.net.exchange.Places`."""

    def __init__(self, arrays: _Arrays, begin: int, end: int) -> None:
        self._arrays, self._begin, self._end = arrays, begin, end

    def places(self, length: int) -> Iterator[Bytes]:
        """The buffers for a body of `length` bytes, one after the other; each is filled when the next is asked for."""
        tensors, metadata = yield from opened(length)
        self._arrays.check_head(metadata)
        items = {tensor.name: tensor.shape[0] for tensor in tensors if tensor.shape}
        offsets = {}
        for name, place in self._arrays.places(tensors, self._begin, self._end):
            if name in self._arrays.offsets:
                offsets[name] = place
            yield place.reshape(-1).view(np.uint8)
        # Not earlier: a response that breaks off is requested again.
        for name, own in self._arrays.flat.items():
            self._arrays.add_offsets(name, offsets[own], items[name], self._begin)
        for name in self._arrays.flat:
            self._arrays.add_items(name, items[name])
