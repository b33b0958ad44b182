"""Let the client read rows itself: the server sends their stored chunks ("pieces"), or tells the positions of the rows
in its files ("places"), which the client reads through descriptors that the server passes.

The arrays are the same, bit by bit, because both sides read with `h5feed.stored`. If anything goes wrong here, the
block is fetched again as ordinary tensors, and the server decides whether the data are damaged or have changed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block
from ..buffers import BufferPool
from ..errors import BadAnswer, BadParameter, ConnectionFailed, FeedError, TooLarge, Transient
from ..forks import tell_after_fork
from ..net.client import Client
from ..net.descriptors import MAX_DESCRIPTORS, NoDescriptor
from ..net.trace import DECODE, as_tensors, enter, read_here
from ..plan import Plan
from ..wire import ROWS, WEIGHT, read_body
from .leased import leased

if TYPE_CHECKING:
    from ..stored.array_reader import ArrayReader
    from ..stored.column import Column
    from ..stored.source import Source

NEEDED = ("imagecodecs", "cv2")
"""Packages that reading here needs: the extra ``h5feed[decode]``."""

TIMEOUT = 60.0
"""Seconds that reading a block may take."""

REPORT_TIMEOUT = 2.0
"""Seconds that a request may take whose only purpose is to tell the server what was read."""

WINDOW_ROWS = 1 << 14
"""Number of rows whose places are fetched with one request."""

_WINDOWS = 4
"""Windows of places that are kept, for blocks that are read at the same time."""

_MAX_FAILURES = 8
"""After this many consecutive failures to read a block here, the server reads the rest of the pass."""

_MIN_GAIN = 16
"""Places are used only if the response with them is at least this many times smaller than the rows."""

_MIN_SAMPLE_BYTES = 64 << 10
"""If compression does not make a block of at least this size smaller, later blocks are fetched as tensors. The first
blocks of a loop may have only a few small rows, which tell nothing about the others."""

Int64s = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]

logger = logging.getLogger("h5feed")


def missing() -> list[str]:
    """The packages that reading here needs, but that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def check_can_read(option: str) -> None:
    """Raise `ModuleNotFoundError` if reading here, which `option` asks for, needs packages that are not installed."""
    if lacking := missing():
        raise ModuleNotFoundError(
            f"{option} needs {' and '.join(lacking)}: `pip install 'h5feed[decode]'`", name=lacking[0]
        )


@dataclass(frozen=True)
class Window:
    """Description of batches start … stop-1: for each field, its arrays, or where to read them from.

    Attributes
    ----------
    arrays : mapping of str to array
        Fields that the server sent as arrays, row ids and weights, of all batches together.
    columns : mapping of str to (Column, (n,) int64 or None)
        Where the other fields are read from, and their rows; None: the row ids.
    reasons : mapping of str to str
        Why the server sent these fields as arrays.
    is_kept : bool
        Whether batches are read more than once, for example in later passes. They then get copies of `arrays`, because
        a loop may write to the arrays of its batch.
    """

    start: int
    stop: int
    arrays: Arrays
    columns: Mapping[str, tuple[Column, Int64s | None]]
    reasons: Mapping[str, str]
    plan: Plan
    epoch: int
    revision: str
    is_kept: bool

    @cached_property
    def files(self) -> int:
        """Number of files that fields are read from."""
        return len({segment.source.key for column, _ in self.columns.values() for segment in column.segments})

    def read(self, start: int, stop: int, reader: ArrayReader, pool: BufferPool) -> list[Batch]:
        """Batches start … stop-1, which are in this window.

        Raises
        ------
        FeedError
            A piece is damaged, or its file has changed.
        """
        size = self.plan.batch_size
        first = (start - self.start) * size
        rows = self.arrays[ROWS][first : (stop - self.start) * size]
        read: dict[str, npt.NDArray[Any]] = {}
        for name, (column, of_column) in self.columns.items():
            dtype, sample = self.plan.frame.tensors[name]
            # A sample may have several rows.
            each = math.prod(sample) // math.prod(column.sample_shape) if math.prod(sample) else 1
            wanted = rows if of_column is None else of_column[first * each : (first + len(rows)) * each]
            out = pool.lease_or_new(len(wanted) * column.row_bytes).view(column.dtype)
            reader.read(column, wanted, out.reshape(len(wanted), *column.sample_shape))
            read[name] = out.reshape(len(rows), *sample).view(dtype)
        plain_of = self._plain(start, stop)
        if self.is_kept:
            plain_of = _copied(plain_of, pool)
        batches = []
        for index, plain in zip(range(start, stop), plain_of, strict=True):
            begin = (index - start) * size
            end = begin + len(plain[ROWS])
            fields = {name: read[name][begin:end] if name in read else plain[name] for name in self.plan.frame.names}
            batches.append(
                Batch(
                    fields,
                    plain[ROWS],
                    plain.get(WEIGHT),
                    index=index,
                    epoch=self.epoch,
                    revision=self.revision,
                    sparse=self.plan.frame.sparse,
                )
            )
        return batches

    def _plain(self, start: int, stop: int) -> list[dict[str, npt.NDArray[Any]]]:
        """The parts of `arrays` that belong to each of batches start … stop-1."""
        size, final, frame = self.plan.batch_size, self.plan.batches - 1, self.plan.frame
        found = []
        for index in range(start, stop):
            begin = (index - self.start) * size
            end = begin + (size if index < final else self.plan.last_rows)
            plain = {}
            for name, array in self.arrays.items():
                if name in frame.flat:
                    offsets = self.arrays[frame.flat[name]][begin : end + 1]
                    plain[name] = array[offsets[0] : offsets[-1]]
                elif name in frame.offsets:
                    plain[name] = array[begin : end + 1] - array[begin]
                else:
                    plain[name] = array[begin:end]
            found.append(plain)
        return found


def _copied(batches: Sequence[Arrays], pool: BufferPool) -> list[dict[str, npt.NDArray[Any]]]:
    """The same arrays in memory of their own."""
    kinds = {
        (number, name): (array.dtype, array.shape)
        for number, arrays in enumerate(batches)
        for name, array in arrays.items()
    }
    copies = leased(pool, kinds)
    for (number, name), copy in copies.items():
        copy[...] = batches[number][name]
    return [{name: copies[number, name] for name in arrays} for number, arrays in enumerate(batches)]


class PieceFetcher:
    """Fetches blocks of a plan as pieces, or as places in files.

    Parameters
    ----------
    client : Client
    path : str
        URL path of the dataset.
    plan : Plan

    Attributes
    ----------
    reason : str or None
        Why all further blocks are fetched as tensors; None if they are not.
    """

    def __init__(self, client: Client, path: str, plan: Plan) -> None:
        self._client = client
        self._path = path
        self._plan = plan
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._lock = threading.Lock()
        self._places_refused = self._worth_it = False
        self._failures = 0
        self.reason: str | None = None
        if plan.not_here:
            self.reason = plan.not_here
        elif plan.is_packed:
            self.reason = "packed rows are sent as they are"
        elif plan.pieces is False:
            self.reason = "decode='server'"
        elif lacking := missing():
            self.reason = f"{' and '.join(lacking)} not installed: `pip install 'h5feed[decode]'`"
        elif plan.pieces is None and client.is_near and not client.is_local:
            self.reason = "the server is on this machine, so it decodes"
        self._compress = plan.compress
        self._ignored = ""
        if plan.compress is not None and client.is_near:
            self._do_not_compress("the server is on this machine")

    def fetch(self, block: Block, cancelled: threading.Event) -> list[Batch] | None:
        """The batches of a block; None if it has to be fetched as tensors.

        Raises
        ------
        FeedError
            The server does not answer, or refuses.
        """
        if self.reason is not None:
            self._tell(self.reason)
            return None
        by_place = self._client.is_local and not self._places_refused
        try:
            window = self._places(block, cancelled) if by_place else self._pieces(block, cancelled)
        except (BadParameter, BadAnswer, TooLarge) as error:
            # An older server refuses the parameter `body`.
            self._give_up(by_place, str(error))
            self._tell(str(error))
            return None
        if not window.columns:
            self._tell(_reasons(window))
        # A window that was kept comes without a response, which would have entered this phase.
        enter(DECODE)
        try:
            batches = window.read(block.start, block.stop, self._reader, self._client.pool)
        except FeedError as error:
            logger.debug("%s: fetched again as tensors: %s", self._path, error)
            # Its frames refer to the threads that decode, and may refer to the error.
            traceback.clear_frames(error.__traceback__)
            self._failures += 1
            self.forget()
            refused = isinstance(error, NoDescriptor) and error.retry_after is None
            if refused or self._failures >= _MAX_FAILURES:
                self._give_up(by_place, str(error))
            self._tell(f"reading them here failed: {error}")
            return None
        if window.columns:
            if self._plan.compress is not None:
                self._tell(_reasons(window) if window.reasons else "")
            self._failures = 0
            rows = sum(len(batch.rows) for batch in batches)
            each = sum(self._sample_bytes(name) for name in window.columns)
            read_here(rows, rows * each, from_files=by_place)
            if by_place:
                self._client.bytes_read.add(rows * each)
        return batches

    def _sample_bytes(self, name: str) -> int:
        dtype, sample = self._plan.frame.tensors[name]
        return math.prod(sample) * dtype.itemsize

    def _tell(self, why: str) -> None:
        """Report why rows are fetched as tensors, or are not compressed."""
        as_tensors("; ".join(filter(None, (why, self._ignored))))

    def _do_not_compress(self, why: str) -> None:
        self._ignored, self._compress = f"compress={self._plan.compress!r} is ignored: {why}", None

    @cached_property
    def _reader(self) -> ArrayReader:
        return reader()

    def forget(self) -> None:
        """Drop windows and descriptors: the files may have changed."""
        with self._lock:
            self._windows.clear()
        self._client.files.clear()

    def _give_up(self, by_place: bool, why: str) -> None:
        self._places_refused = by_place
        if not by_place or self._plan.pieces is None:
            self.reason = why

    def _pieces(self, block: Block, cancelled: threading.Event) -> Window:
        window = self._ask("pieces", block.epoch, block.start, block.stop, cancelled)
        nbytes = (block.stop - block.start) * self._plan.batch_bytes
        if not window.columns and (self._compress is None or nbytes >= _MIN_SAMPLE_BYTES):
            self.reason = _reasons(window)
        return window

    def _places(self, block: Block, cancelled: threading.Event) -> Window:
        """The window that contains a block. Several threads may ask for the same one; only one of them requests it."""
        per_window = max(1, WINDOW_ROWS // max(1, self._plan.batch_size * self._plan.rows_per_sample))
        number = block.start // per_window
        start, stop = number * per_window, min((number + 1) * per_window, self._plan.batches)
        if block.stop > stop:
            # The block crosses the border of two windows.
            start, stop, number = block.start, block.stop, -1 - block.start
        key = block.epoch, number
        with self._lock:
            window = self._windows.get(key)
            if window is None:
                if not self._worth_it:
                    # The first request covers only this block: it shows whether places are worth it.
                    start, stop = block.start, block.stop
                window = self._ask("places", block.epoch, start, stop, cancelled)
                if self._is_usable(window):
                    if self._worth_it:
                        self._windows[key] = window
                    self._worth_it = True
                    while len(self._windows) > _WINDOWS:
                        self._windows.popitem(last=False)
                return window
            self._windows.move_to_end(key)
        # Without the lock, so that the other threads continue.
        return self._report(block, cancelled) or window

    def _report(self, block: Block, cancelled: threading.Event) -> Window | None:
        """If a report is due, tell the server how many bytes were read, with a request for the places of a block.

        Returns
        -------
        Window or None
            The window in the response, which is to be read: the files may have changed. None: nothing was reported.
        """
        if not self._client.bytes_read.is_due():
            return None
        try:
            window = self._ask("places", block.epoch, block.start, block.stop, cancelled, REPORT_TIMEOUT)
        except (ConnectionFailed, Transient) as error:
            # The window is known: the request was only for the report.
            logger.debug("%s: not reported: %s", self._path, error)
            self._client.bytes_read.pause()
            return None
        self._is_usable(window)
        return window

    def _is_usable(self, window: Window) -> bool:
        """Whether rows of a window can be read from files and are worth it. If not, no more places are requested."""
        if not window.columns or self._too_long(window):
            self._give_up(True, _reasons(window))
            return False
        if window.files > MAX_DESCRIPTORS:
            # Descriptors would be closed before they are used again, and asking for one takes longer than a row.
            self._give_up(True, f"its rows are in {window.files} files, but at most {MAX_DESCRIPTORS} are kept open")
            return False
        return True

    def _too_long(self, window: Window) -> bool:
        plain = sum(array.nbytes for array in window.arrays.values())
        return plain * _MIN_GAIN > (window.stop - window.start) * self._plan.batch_bytes

    def _ask(
        self,
        form: str,
        epoch: int,
        start: int,
        stop: int,
        cancelled: threading.Event,
        within: float | None = None,
    ) -> Window:
        plan = self._plan
        query = {**plan.params, "epoch": str(epoch), "body": form, "start": str(start), "stop": str(stop)}
        most = plan.frame.max_bytes(plan.batch_size, stop - start, plan.max_bytes)
        ask = partial(self._client.body, f"{self._path}/batches", max_bytes=most, cancelled=cancelled, within=within)
        more = {} if self._compress is None or form != "pieces" else {"compress": self._compress}
        try:
            body = ask(query | more)
        except BadParameter as error:
            if not more:
                raise
            # An older server refuses the parameter `compress`. If the error is about something else, it comes again.
            body = ask(query)
            self._do_not_compress(str(error))
        try:
            tensors, about, nbytes = read_body(body)
            if nbytes != len(body):
                raise ValueError(f"it has {len(body)} bytes instead of {nbytes}")
            if not self._client.names.are_same(about["revision"], plan.params["revision"]):
                raise ValueError(f"it is of revision {about['revision']}")
            window = window_of(tensors, about, plan, epoch, start, stop, partial(self._file, form))
            return replace(window, is_kept=form == "places")
        except (ValueError, KeyError) as error:
            raise BadAnswer(f"the response does not describe the batches that were requested: {error}") from None

    def _file(self, form: str, name: str, identity: Any) -> Source:
        if form != "places":
            raise ValueError("it refers to a file, although all bytes were requested")
        from ..stored.local_file import LocalFile

        opener = self._client.files.opener(partial(self._descriptor, name))
        return LocalFile(opener, name, identity)

    def _descriptor(self, name: str) -> int:
        params = {"file": name, "revision": self._plan.params["revision"]}
        return self._client.descriptor(f"{self._path}/descriptor", params)


def window_of(
    tensors: Arrays, about: Mapping[str, str], plan: Plan, epoch: int, start: int, stop: int, file_of: Any
) -> Window:
    """The window in a body with these tensors and this metadata.

    Raises
    ------
    ValueError, KeyError, BadAnswer
        It is not the one that was requested.
    """
    from ..stored.pieces import BYTES, PREFIX, NamedFile, load_pieces
    from ..stored.source import ReceivedBytes

    if (about["index"], about["epoch"]) != (str(start), str(epoch)):
        raise ValueError(f"it is batch {about['index']} of epoch {about['epoch']}")
    received = ReceivedBytes(tensors.get(BYTES, np.empty(0, np.uint8)))

    def source_of(file: NamedFile | None) -> Source:
        return received if file is None else file_of(file.name, file.identity)

    columns, reasons = load_pieces(json.loads(about["pieces"]), tensors, source_of)
    rows = tensors[ROWS]
    count = (stop - start) * plan.batch_size
    if stop == plan.batches:
        count += plan.last_rows - plan.batch_size
    if rows.shape != (count,):
        raise ValueError(f"it has {rows.shape} rows instead of {count}")
    arrays = {name: array for name, array in tensors.items() if not name.startswith(PREFIX)}
    whole = plan.frame.without(columns)
    whole.check({name: array[None] for name, array in arrays.items()})
    for name, (column, of_column) in columns.items():
        dtype, sample = plan.frame.tensors[name]
        axes = sample[: len(sample) - len(column.sample_shape)]
        if (column.dtype.itemsize, (*axes, *column.sample_shape)) != (dtype.itemsize, sample):
            raise ValueError(f"{name!r} has rows of {column.dtype} and shape {column.sample_shape}")
        if column.dtype != dtype and not column.is_bfloat16:
            raise ValueError(f"{name!r} has rows of {column.dtype} instead of {dtype}")
        # `Column` takes the dtype from its first segment. Rows of another size would not fit their places in the array.
        if any(segment.wire != column.segments[0].wire for segment in column.segments):
            raise ValueError(f"the pieces of {name!r} have rows of different kinds")
        wanted = rows if of_column is None else of_column
        if wanted.shape != (len(rows) * math.prod(axes),) or (
            len(wanted) and not 0 <= wanted.min() <= wanted.max() < column.rows
        ):
            raise ValueError(f"the rows of {name!r} are not in its pieces")
    return Window(start, stop, arrays, columns, reasons, plan, epoch, about["revision"], is_kept=False)


def _reasons(window: Window) -> str:
    return (
        "; ".join(f"{name}: {reason}" for name, reason in window.reasons.items())
        or "most bytes would come as arrays anyway"
    )


# The reader of this process ------------------------------------------------------------------------------------------


class _Shared:
    """The reader of this process, whose threads decode for all datasets. They end when nobody uses it any more."""

    def __init__(self) -> None:
        self._reader: weakref.ref[ArrayReader] | None = None
        self._lock = threading.Lock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: the threads are the parent's, and a lock that one of them held is never released."""
        self._reader, self._lock = None, threading.Lock()

    def get(self) -> ArrayReader:
        """The reader, made if nobody has it. The caller keeps it as long as it reads."""
        from ..stored.array_reader import ArrayReader
        from ..stored.chunk_rows import ChunkRows
        from ..stored.decoder_pool import Decoders
        from ..stored.pieces import CHUNK_CACHE_BYTES, MAX_CHUNK_BYTES

        with self._lock:
            found = None if self._reader is None else self._reader()
            if found is None:
                decoders = Decoders(os.cpu_count() or 1, TIMEOUT, MAX_CHUNK_BYTES)
                chunk_rows = ChunkRows(decoders, CHUNK_CACHE_BYTES, TIMEOUT)
                found = ArrayReader(decoders, chunk_rows)
                for part in (decoders, chunk_rows):
                    weakref.finalize(found, part.close)
                self._reader = weakref.ref(found)
            return found


reader = _Shared().get
