"""Datasets that are declared as growing: rows are added to their file while it is served.

Served are the rows of full chunks, the same number of every field. A revision is a digest of these rows: of the stored
bytes of their chunks, one after the other, and of everything in the layout that does not grow. So the digests of all
shorter datasets are computed on the way, and every server of the file knows each revision that it ever had, also after
a restart: as long as old rows stay as they are, requests that name an old revision get its rows.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError, Overloaded, Preparing, Unreadable
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.column import Segment
from h5feed.stored.layout import LAYOUT_VERSION
from h5feed.stored.local_file import Identity

from ..cache_folder.folder import CacheFolder
from ..storage.growing_file import DIGEST_BYTES, GrowingFile, HashedChunks, OpenFile, chunk_digest
from ..storage.hdf5.drivers import members_of
from ..storage.hdf5.inspector import Inspector
from ..storage.hdf5.writers import Writer, writer_of
from .array_probe import unreadable_array
from .assembling import Assembler, Refused
from .conventions import as_meant
from .dataset import Dataset
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset
from .digests import Content
from .grouping.families import Family
from .growing_arrays import LISTS, MAX_CUTS, ChunkSequence, GrowingArrays, chunks_of, growing_arrays, preparing
from .loading import LoadedFile
from .pandas_frames import Read

MAX_HELD = 8
"""Old revisions of one dataset that are held ready, besides the current one."""

RECHECK_BYTES = 16 << 20
"""Bytes of old chunks that are hashed again at each inspection, in turn. Others are when their rows are read."""

_SAVED_BYTES_PER_SECOND = 10e6
"""What is known of a file is stored in the cache folder at this rate at most."""

Assemble = Callable[[LoadedFile], Sequence[Dataset]]


@dataclass
class _Hashed:
    """What was hashed of a growing file. The chunks of later rows continue it.

    Attributes
    ----------
    sequence : ChunkSequence
    digests : (n, DIGEST_BYTES) uint8
        Of each chunk.
    running : blake2b
        Digest of the digests.
    cuts : dict of int to bytes
        Digest of the first rows, by their number.
    rewritten : Event
        Set if a chunk has other bytes now.
    rechecked : int
        Chunk that is to be hashed again next.
    """

    fixed: bytes
    sequence: ChunkSequence
    digests: npt.NDArray[np.uint8]
    running: Any
    cuts: dict[int, bytes]
    rewritten: threading.Event
    rechecked: int = 0

    @classmethod
    def begun(cls, inspected: GrowingArrays) -> _Hashed:
        """Nothing is hashed yet."""
        fixed, sequence = inspected.fixed(), inspected.sequence()
        digests = np.zeros((len(sequence), DIGEST_BYTES), np.uint8)
        return cls(fixed, sequence, digests, hashlib.blake2b(fixed), {}, threading.Event())

    def go_on(self, inspected: GrowingArrays, done: int, hash_chunk: Callable[[int], None]) -> None:
        """Add the chunks from number `done` on, and the digests of the rows before each boundary."""
        sequence = self.sequence
        cuts = inspected.cuts()
        cuts = cuts[cuts > next(reversed(self.cuts), 0)]
        # The chunks of a cut are the first ones, whose rows begin before it.
        for rows, end in zip(cuts.tolist(), np.searchsorted(sequence.begins, cuts).tolist(), strict=True):
            for number in range(done, end):
                hash_chunk(number)
                about = f" {sequence.sizes[number]} {sequence.masks[number]} ".encode()
                self.running.update(self.digests[number].tobytes() + about)
            done = end
            cut = self.running.copy()
            cut.update(f"{rows} rows".encode())
            self.cuts[rows] = cut.digest()
        for rows in list(self.cuts)[:-MAX_CUTS]:
            del self.cuts[rows]


class Growth:
    """The revisions of a growing dataset. Used by any thread.

    Parameters
    ----------
    inspected : GrowingArrays
    hashed : _Hashed
    source : callable
        ``source(digest)`` returns the file as the source of rows with this digest.
    read : callable
        Returns all values of a short array.
    assemble : callable
        Returns the datasets in a loaded file.
    is_earlier : bool
        These are rows that the file had earlier: it cannot be inspected now.
    """

    def __init__(
        self,
        inspected: GrowingArrays,
        hashed: _Hashed,
        source: Callable[[bytes], GrowingFile],
        read: Read,
        assemble: Assemble,
        *,
        is_earlier: bool,
    ) -> None:
        self.is_earlier = is_earlier
        self._inspected, self._cuts = inspected, hashed.cuts
        self._source, self._read, self._assemble = source, read, assemble
        self._held: OrderedDict[int, dict[str, Dataset]] = OrderedDict()
        self._rows_of: dict[str, int] | None = None
        self._lock = threading.Lock()
        self.datasets = tuple(replace(one, growth=self) for one in self._cut(inspected.rows))
        """The current ones."""

    def at(self, name: str, revision: str) -> Dataset | None:
        """The dataset as it was when it had this revision; None if it never had.

        Raises
        ------
        FeedError
        """
        names = self.datasets[0].names
        with self._lock:
            if self._rows_of is None:
                self._rows_of = {names.of_digest(digest): rows for rows, digest in self._cuts.items()}
            rows = self._rows_of.get(revision)
            if rows is None:
                return None
            held = self._held.get(rows)
            if held is None:
                held = self._held[rows] = {one.name: one for one in self._cut(rows)}
                while len(self._held) > MAX_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(rows)
            return held.get(name)

    def _cut(self, rows: int) -> Sequence[Dataset]:
        source, inspected = self._source(self._cuts[rows]), self._inspected
        tables: dict[int, Any] = {}
        segments = {}
        for array in inspected.layout.arrays:
            if array.path in inspected.arrays:
                assert array.chunks is not None
                table = tables.setdefault(id(array.chunks), array.chunks.first(chunks_of(array, rows)))
                # The text of a field is no list of names.
                shape, stored = (rows, *array.sample_shape), int(table.sizes.sum())
                array = replace(array, shape=shape, chunks=table, stored_bytes=stored, text=None)
            elif array.unreadable is None:
                array = replace(unreadable_array(array.path, inspected.why_not[array.path]), text=array.text)
            segments[array.path] = Segment(source, array)
        fields = as_meant(inspected.layout, segments, self._read, _not_paired, lambda matrix: matrix.data)
        fields = {path: _along_first(segment) for path, segment in fields.items()}
        content = Content(source.path, source.identity, source.digest)
        return self._assemble(LoadedFile(source, inspected.layout, segments, fields, (content,)))


def _along_first(segment: Segment) -> Segment:
    """The array; unreadable if its rows are along another axis than the first, which is the one that grows."""
    if not segment.transposed:
        return segment
    reason = f"its rows are along axis {segment.axis}, but growing = true is about rows along the first axis"
    return replace(segment, array=unreadable_array(segment.array.path, reason), axis=0)


class GrowingFiles:
    """Loads growing files; one per process. Remembers what it has hashed of each, also in the cache folder: all workers
    have the same rows while a writer without SWMR has a file open.

    Parameters
    ----------
    folder : CacheFolder
    inspector : Inspector
    assembler : Assembler
    read : callable
        Returns all values of a short array.
    is_remote : callable
        Returns whether the file at a path stands for an object of a store, which does not grow.
    closed : Event
        Set when the server stops.
    """

    def __init__(
        self,
        folder: CacheFolder,
        inspector: Inspector,
        assembler: Assembler,
        read: Read,
        *,
        is_remote: Callable[[str], bool],
        closed: threading.Event,
    ) -> None:
        self._folder = folder
        self._inspector, self._assembler, self._read = inspector, assembler, read
        self._is_remote = is_remote
        self._closed = closed
        self._known: dict[str, tuple[OpenFile, _Hashed]] = {}
        self._saved: dict[str, float] = {}
        """Until when nothing is written to the cache folder, by name."""

    def load(self, family: Family, path: str, refused: dict[str, Refused], declaration: bytes) -> tuple[Dataset, ...]:
        """The datasets in a growing file as it is now. See `Assembler.divide`.

        Raises
        ------
        Preparing
            A writer that does not keep it readable has it open, or it has no full chunk yet.
        Unreadable, Overloaded, SourceUnavailable, OSError
        """
        assert family.declared is not None
        if self._is_remote(path):
            raise Unreadable(f"{DECLARATION}: growing: objects of a store do not grow")
        if len(family.files) > 1 or members_of(path)[0] is not None:
            raise Unreadable(f"{DECLARATION}: growing: a growing dataset is one file, not {len(family.files)}")
        for gone in [other for other in list(self._known) if not os.path.exists(other)]:
            self._known.pop(gone, None)
        file, known = OpenFile(path), None
        if path in self._known and self._known[path][0].state()[:2] == file.state()[:2]:
            file, known = self._known[path]
        device, inode, *_ = file.state()
        place = _place(path, inode)
        is_earlier = False
        try:
            if known is None and (found := self._remembered(place, family.declared)) is not None:
                known = found[1]
            inspected, hashed = self._now(path, file, family.declared, known)
            self._remember(place, inspected.data, hashed, known)
        except Preparing:
            found = self._remembered(place, family.declared)
            if found is None or (path in self._known and hashed_equally(found[1], self._known[path][1])):
                raise
            (inspected, hashed), is_earlier = found, True
        self._known[path] = file, hashed
        identity = Identity(device, inode, 0, 0, 0)
        chunks = HashedChunks(file, hashed.sequence.offsets, hashed.sequence.sizes, hashed.digests, hashed.rewritten)
        return Growth(
            inspected,
            hashed,
            lambda digest: GrowingFile(path, identity, digest, chunks),
            self._read,
            lambda loaded: self._assembler.divide(family, {family.files[0]: loaded}, {}, refused, declaration),
            is_earlier=is_earlier,
        ).datasets

    def _now(
        self, path: str, file: OpenFile, declared: DeclaredDataset, known: _Hashed | None
    ) -> tuple[GrowingArrays, _Hashed]:
        """The file as it is now."""
        before, writer = file.state(), _writer(file)
        inspected = growing_arrays(self._layout(path, file, before, writer), declared)
        hashed = self._hash(file, inspected, known)
        # Full chunks of a SWMR writer stay as they are. Of a closed file, all must have stayed.
        if _writer(file) is not Writer.SWMR and file.state() != before:
            raise _written_to()
        return inspected, hashed

    def _remember(self, place: str, layout: bytes, hashed: _Hashed, known: _Hashed | None) -> None:
        """Store what is known, not so often that the disk is busy with it."""
        now = time.monotonic()
        if (known is not None and hashed_equally(known, hashed)) or now < self._saved.get(place, 0.0):
            return
        data = dump_arrays({}, {"layout": np.frombuffer(layout, np.uint8), "digests": hashed.digests})
        self._saved[place] = now + len(data) / _SAVED_BYTES_PER_SECOND
        self._folder.put(place, data)

    def _remembered(self, place: str, declared: DeclaredDataset) -> tuple[GrowingArrays, _Hashed] | None:
        """What this or another process has stored; None if that is nothing, or nothing that fits the declaration."""
        data = self._folder.find(place)
        if data is None:
            return None
        try:
            _, arrays = load_arrays(data)
            inspected, digests = growing_arrays(arrays["layout"].tobytes(), declared), arrays["digests"]
        except (LookupError, ValueError, FeedError):
            return None
        hashed = _Hashed.begun(inspected)
        if digests.shape != hashed.digests.shape:
            return None
        hashed.digests[:] = digests
        hashed.go_on(inspected, 0, lambda number: None)
        return inspected, hashed

    def _layout(self, path: str, file: OpenFile, before: Identity, writer: Writer) -> bytes:
        inspect = self._inspector.inspect_written if writer is Writer.SWMR else self._inspector.inspect
        try:
            return inspect(path)
        except Unreadable:
            if file.state() != before:
                raise _written_to() from None
            raise

    def _hash(self, file: OpenFile, inspected: GrowingArrays, known: _Hashed | None) -> _Hashed:
        """Hash the chunks, except those that are known and have stayed."""
        hashed = _Hashed.begun(inspected)
        fixed, sequence = hashed.fixed, hashed.sequence
        done = 0
        if known is not None and self._stayed(file, fixed, sequence, known):
            done = len(known.sequence)
            hashed.digests[:done] = known.digests
            hashed.running, hashed.cuts = known.running.copy(), dict(known.cuts)
            hashed.rewritten, hashed.rechecked = known.rewritten, known.rechecked

        def hash_chunk(number: int) -> None:
            hashed.digests[number] = np.frombuffer(self._digest(file, sequence, number), np.uint8)

        hashed.go_on(inspected, done, hash_chunk)
        return hashed

    def _stayed(self, file: OpenFile, fixed: bytes, sequence: ChunkSequence, known: _Hashed) -> bool:
        """Whether the chunks that are known are where they were, and those that are hashed again have not changed."""
        if fixed != known.fixed or known.rewritten.is_set() or not sequence.begins_with(known.sequence):
            return False
        left, count = RECHECK_BYTES, len(known.sequence)
        for _ in range(count):
            number = known.rechecked % count
            if self._digest(file, sequence, number) != known.digests[number].tobytes():
                known.rewritten.set()
                return False
            known.rechecked = number + 1
            left -= int(sequence.sizes[number])
            if left < 0:
                break
        return True

    def _digest(self, file: OpenFile, sequence: ChunkSequence, number: int) -> bytes:
        if self._closed.is_set():
            raise Overloaded("the server is stopping").because_of("stopping")
        digest = chunk_digest(file.fd, int(sequence.offsets[number]), int(sequence.sizes[number]))
        if not digest:
            raise preparing("its file ends before one of its chunks does")
        return digest


def hashed_equally(one: _Hashed, other: _Hashed) -> bool:
    """Whether the same was hashed of a file."""
    return one.fixed == other.fixed and np.array_equal(one.digests, other.digests)


def _place(path: str, inode: int) -> str:
    """Name in the cache folder."""
    key = hashlib.blake2b(f"{inode} {path}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return f"growing/{LAYOUT_VERSION}-{key}"


def _not_paired(items: Segment, offsets: Segment) -> Segment:
    """Instead of lists or sparse rows, whose items are cut where those of other fields are: an unreadable array."""
    return replace(items, array=unreadable_array(items.array.path, LISTS))


def _writer(file: OpenFile) -> Writer:
    """Who has a file open for writing.

    Raises
    ------
    Preparing
        A writer that may have written only a part of what belongs together.
    """
    writer = writer_of(file.fd)
    if writer is Writer.OTHER:
        raise preparing(
            "a program has its file open for writing, not for SWMR: it is read when that has closed it. If the program "
            "was killed, 'h5clear -s FILE' removes its mark"
        )
    if writer is Writer.UNKNOWN and file.state().is_young(time.time()):
        raise preparing("its file was written to a moment ago, and does not tell whether it is open for writing")
    return writer


def _written_to() -> Preparing:
    return preparing("its file was written to while it was inspected")
