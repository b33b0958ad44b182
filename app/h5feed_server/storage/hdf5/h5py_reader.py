"""Reads rows with h5py if their layout is not known: variable-length lists, virtual arrays, split files and families.

Runs only as a long-lived child process that holds files open. `reader_pool` is the other end.

Protocol: a request is a frame of an 8-byte little-endian length and JSON, followed by its ``rows`` as int64. Before it
responds, the reader may ask for blocks of files that are in a store, see `piped_file`. A response is a frame of
`KIND_BYTES` for its kind (``D`` data, ``E`` an error as JSON) and the content. For rows of a fixed size, the data are
their bytes, as stored, in the order requested. For ragged rows, the data are ``rows + 1`` offsets (int64, in items) and
the items.

Files may be crafted, and libhdf5 would follow the names in them to any file on the machine. So external links are
disabled, and the sources of a virtual array are checked before libhdf5 opens them: each must be in one of the files
that the request names, and no array may be a source of itself, which would crash libhdf5.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.errors import CLASS_BY_CODE, DatasetCorrupt, FeedError, SourceUnavailable, TooLarge, Unreadable
from h5feed.stored.local_file import Identity, changed, is_away
from h5py import h5d

from .child import KIND_BYTES, LENGTH, allow_many_files, confine, write_frame
from .drivers import SPLIT_ENDINGS, family_template, members_of
from .libhdf5 import Plugins, refuse_external_links
from .piped_file import Pipe, PipedFile
from .read_ahead import read_ahead
from .stored_types import disk_bytes
from .text import says_away
from .virtual import read_virtual

MAX_OPEN = 16
"""Sets of files held open: a file with the sources of its virtual arrays."""

_MAX_FILES = 1024
"""Files held open in all sets, unless one set needs more. libhdf5 takes half a megabyte of memory for each file."""

_MAX_DATASETS = 32
"""Arrays held open."""

_CHUNK_CACHE_BYTES = 32 << 20
"""Size of libhdf5's chunk cache for one array; for a virtual array, for all its sources together."""

MAX_PARTS = 4096
"""Maximum number of mappings of a virtual array."""

_MAX_NESTING = 8
"""Levels of virtual arrays whose sources are virtual arrays."""

_ROWS_AT_ONCE = 64
"""Ragged rows that are read by one call. Their size is known only after reading."""

IN_ANOTHER = "which is another object: it is not read from an object store"

Int64s = npt.NDArray[np.int64]
Known = tuple[int | str, ...]
"""Identity of a file, then a digest of its content, because content can change while the identity stays the same."""


def open_file(path: str, cache_bytes: int | None = None, *, swmr: bool = False) -> h5py.File:
    """Open a file. If it is the first of a split file or a file family, open the others too.

    Parameters
    ----------
    path : str
    cache_bytes : int, optional
        Size of libhdf5's chunk cache for each array; default: libhdf5's own default.
    swmr : bool
        Whether another process has it open for SWMR writing.
    """
    driver, _ = members_of(path)
    keep: dict[str, Any] = {"mode": "r", "locking": False, "rdcc_nbytes": cache_bytes}
    # Do not lock: the file is only read, and may be on a read-only or network mount.
    if driver == "split":
        endings = [ending.encode() for ending in SPLIT_ENDINGS]
        stem = path.removesuffix(SPLIT_ENDINGS[0])
        return h5py.File(stem, **keep, driver=driver, meta_ext=endings[0], raw_ext=endings[1])
    if driver == "family":
        return h5py.File(family_template(path), **keep, driver=driver, memb_size=0)
    return h5py.File(path, **keep, swmr=swmr)


def files_of(files: Iterable[Sequence[Any]], pipe: Pipe) -> tuple[dict[str, Known], dict[str, PipedFile]]:
    """The files of a request: what identifies each, by path, and those that are read through the parent.

    Parameters
    ----------
    files : iterable of (str, list, int or None)
        Path, what identifies it, and for a file in a store its size, as `files_for` has them.
    pipe : Pipe
    """
    known: dict[str, Known] = {}
    piped: dict[str, PipedFile] = {}
    for number, (path, identity, size) in enumerate(files):
        known[path] = tuple(identity)
        if size is not None:
            piped[path] = PipedFile(pipe, number, size, identity[-1])
    return known, piped


class OpenSet:
    """An open file, with the files that the sources of its virtual arrays are in.

    Parameters
    ----------
    files : mapping of str to tuple
    plugins : Plugins
    piped : mapping of str to PipedFile
        Those of the files that are in a store.
    """

    def __init__(self, files: Mapping[str, Known], plugins: Plugins, piped: Mapping[str, PipedFile]) -> None:
        self.files = files
        self.piped = piped
        self._plugins = plugins
        self.chunk_bytes = 0
        self._cache_bytes = min(_CHUNK_CACHE_BYTES // 4, _CHUNK_CACHE_BYTES // len(files))
        self._open: dict[str, h5py.File] = {}
        self.path = next(iter(files))
        self._checked: dict[tuple[str, str], bool] = {}
        self.datasets: OrderedDict[str, h5py.Dataset] = OrderedDict()
        """Arrays held open, the most recently used last."""
        self.spread: set[str] = set()
        """Those of a file in a store that have sources in other objects, where libhdf5 would not find them."""

    def dataset(self, path: str) -> h5py.Dataset:
        """The array at `path` of the first file, after checking that libhdf5 can read it safely."""
        if path not in self.datasets:
            dataset = self.item(self.path, path)
            if self.check(self.path, dataset, ()) and self.piped:
                self.spread.add(path)
            self.datasets[path] = dataset
        self.datasets.move_to_end(path)
        self._plugins.chunk_bytes = self.chunk_bytes
        return self.datasets[path]

    @property
    def main(self) -> PipedFile:
        """The first file, if it is in a store."""
        return self.piped[self.path]

    def check_unchanged(self) -> None:
        """Raise if one of the files was replaced or changed. Call it after reading.

        Checks by path, because libhdf5 opens the sources of virtual arrays by path, and only when it reads them. What
        comes from a store is checked block by block.

        Raises
        ------
        RevisionChanged, Overloaded
        """
        for path in self.files.keys() - self.piped.keys():
            self._check_identity(path, os.stat(path))

    def disagrees(self, files: Mapping[str, Known]) -> bool:
        """Whether the sets share a file, under any name, but may not agree on its state."""
        shared = {known[:2] for known in self.files.values()} & {known[:2] for known in files.values()}
        # If one set contains the other, all shared files have the same name, identity and digest in both.
        return bool(shared) and not (self.files.items() <= files.items() or self.files.items() >= files.items())

    def close(self) -> None:
        self.datasets.clear()
        for file in self._open.values():
            file.close()

    def item(self, file: str, path: str) -> h5py.Dataset:
        try:
            item = self.file(file)[path]
        except KeyError:
            raise Unreadable(f"its part {path!r} of {os.path.basename(file)!r} is missing") from None
        if not isinstance(item, h5py.Dataset):
            raise Unreadable(f"its part {path!r} of {os.path.basename(file)!r} is not an array")
        return item

    def source(self, file: str, name: str, path: str) -> tuple[str, h5py.Dataset]:
        """A source of a virtual array in a file: the file that it is in, and the array."""
        other = _named(file, name)
        return other, self.item(other, path)

    def file(self, path: str) -> h5py.File:
        if path not in self._open and path in self.piped:
            self._open[path] = h5py.File(self.piped[path], "r", rdcc_nbytes=self._cache_bytes)
        elif path not in self._open:
            opened = self._open[path] = open_file(path, self._cache_bytes)
            # Split files and families have no single descriptor.
            if not members_of(path)[0]:
                self._check_identity(path, os.fstat(opened.id.get_vfd_handle()))
        return self._open[path]

    def _check_identity(self, path: str, status: os.stat_result) -> None:
        known, now = Identity(*self.files[path][:-1]), Identity.of(status)  # type: ignore[arg-type]
        if now != known:
            raise changed(known, now)

    def check(self, file: str, dataset: h5py.Dataset, above: tuple[tuple[str, str], ...]) -> bool:
        """Reject arrays that would lead libhdf5 to files that the request does not name, or into a cycle.

        Parameters
        ----------
        file : str
            Where the array is.
        dataset : h5py.Dataset
        above : tuple of (str, str)
            The virtual arrays that it is a source of: file and address.

        Returns
        -------
        bool
            Whether it is a virtual array with sources that are named by their file, or a source of it is.

        Raises
        ------
        Unreadable
        """
        # Compare addresses, because an array can have several names.
        info = h5py.h5o.get_info(dataset.id)
        here = (file, str(info.addr))
        if here in above:
            raise Unreadable("it is a virtual array with itself as a source")
        if here in self._checked:
            return self._checked[here]
        is_spread = False
        properties = dataset.id.get_create_plist()
        if properties.get_external_count():
            raise Unreadable("its data, or that of a source, is in an external file")
        if properties.get_layout() == h5d.VIRTUAL:
            if len(above) >= _MAX_NESTING:
                raise Unreadable(f"it is made of virtual arrays nested more than {_MAX_NESTING} deep")
            for name, part in virtual_parts(properties):
                source = _named(file, name)
                if source not in self.files:
                    raise Unreadable(
                        f"it has sources in {os.path.basename(name)!r}, which is not a file of the data folder"
                    )
                is_spread |= self.check(source, self.item(source, part), (*above, here)) or name != "."
        if dataset.chunks is not None:
            # 32 bytes: the longest possible address.
            nbytes = disk_bytes(dataset.id.get_type(), 32) or dataset.id.get_type().get_size()
            self.chunk_bytes = max(self.chunk_bytes, math.prod(dataset.chunks) * nbytes)
        self._checked[here] = is_spread
        return is_spread


def _named(file: str, name: str) -> str:
    """Path of the file that a virtual array in a file has sources in."""
    return file if name == "." else os.path.realpath(os.path.join(os.path.dirname(file), name))


def virtual_parts(properties: h5py.h5p.PropDCID) -> list[tuple[str, str]]:
    """Return the sources of a virtual array, without duplicates.

    Returns
    -------
    list of (str, str)
        File (``"."``: the same file) and path of each source.

    Raises
    ------
    ValueError
        There are more than `MAX_PARTS` mappings, or sources are given by a pattern.
    """
    count = properties.get_virtual_count()
    if count > MAX_PARTS:
        raise ValueError(f"it is made of {count} parts, more than the {MAX_PARTS} that are read")
    parts: dict[tuple[str, str], None] = {}
    for number in range(count):
        name, part = properties.get_virtual_filename(number), properties.get_virtual_dsetname(number)
        if "%" in name or "%" in part:
            raise ValueError("its sources are named by a pattern, which is not supported")
        parts[name, part] = None
    return list(parts)


def _read_fixed(dataset: h5py.Dataset, member: str | None, rows: Int64s, stored: str) -> list[memoryview]:
    wanted, places = np.unique(rows, return_inverse=True)
    source = dataset if member is None else dataset.fields(member)
    element = dataset.dtype if member is None else dataset.dtype[member]
    values = np.empty((len(wanted), *dataset.shape[1:]), element)
    for start, stop in _runs(wanted, len(wanted)):
        run = slice(wanted[start], wanted[stop - 1] + 1)
        if member is None and element.subdtype is None:
            dataset.read_direct(values, run, np.s_[start:stop])
        else:
            values[start:stop] = source[run]
    return _ordered(values, places, stored)


def _read_virtual(
    opened: OpenSet, dataset: h5py.Dataset, member: str | None, rows: Int64s, stored: str
) -> list[memoryview]:
    wanted, places = np.unique(rows, return_inverse=True)
    return _ordered(read_virtual(opened.path, dataset, opened.source, wanted, member), places, stored)


def _ordered(values: npt.NDArray[Any], places: Int64s, stored: str) -> list[memoryview]:
    """Rows in the order of the request."""
    values = values.astype(stored, copy=False)
    if len(values) < len(places) or (places != np.arange(len(places))).any():
        values = values[places]
    return [memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))]


def _read_ragged(dataset: h5py.Dataset, member: str | None, rows: Int64s, stored: str, limit: int) -> list[memoryview]:
    source = dataset if member is None else dataset.fields(member)
    wanted, places = np.unique(rows, return_inverse=True)
    dtype = np.dtype(stored)
    parts: list[bytes] = []
    total = 0
    for start, stop in _runs(wanted, _ROWS_AT_ONCE):
        for value in source[wanted[start] : wanted[stop - 1] + 1].reshape(-1).tolist():
            items = value.encode() if isinstance(value, str) else value
            if not isinstance(items, bytes):
                items = np.asarray([] if items is None else items).astype(dtype).tobytes()
            parts.append(items)
            total += len(items)
            if total > limit:
                raise TooLarge(f"these rows have more than the {limit} bytes of one response: request fewer at once")
    chosen = [parts[place] for place in places.tolist()]
    lengths = np.array([len(items) for items in chosen], np.int64) // dtype.itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if offsets[-1] * dtype.itemsize > limit:
        raise TooLarge(f"these rows have more than the {limit} bytes of one response: request fewer at once")
    return [memoryview(offsets.view(np.uint8)), *(memoryview(items) for items in chosen)]


def _runs(rows: Int64s, longest: int) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin and end in `rows`, at most `longest` at a time."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        for first in range(start, stop, max(1, longest)):
            yield first, min(first + longest, stop)


# The child process ---------------------------------------------------------------------------------------------------


class _Reader:
    """Handles requests, and holds files open between them."""

    def __init__(self, pipe: Pipe) -> None:
        self._open: OrderedDict[str, OpenSet] = OrderedDict()
        self._plugins = Plugins()
        self._pipe = pipe

    def answer(self, request: dict[str, Any], rows: Int64s) -> list[memoryview]:
        key = json.dumps(request["files"])
        self._pipe.begin()
        opened = self._opened(key, *files_of(request["files"], self._pipe))
        try:
            content = self._read(opened, request, rows)
            opened.check_unchanged()
            return content
        except BaseException:
            # The error may be due to the state of the open files.
            self._open.pop(key).close()
            raise

    def _read(self, opened: OpenSet, request: dict[str, Any], rows: Int64s) -> list[memoryview]:
        dataset = opened.dataset(request["path"])
        while sum(len(held.datasets) for held in self._open.values()) > _MAX_DATASETS:
            next(held for held in self._open.values() if held.datasets).datasets.popitem(last=False)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < dataset.shape[0]:
            raise DatasetCorrupt(f"the array has {dataset.shape[0]} rows now")
        member = request["member"]
        if opened.piped:
            read_ahead(opened.main, dataset, rows)
            if request["path"] in opened.spread:
                return _read_virtual(opened, dataset, member, rows, request["dtype"])
        if request["ragged"]:
            return _read_ragged(dataset, member, rows, request["dtype"], request["limit"])
        return _read_fixed(dataset, member, rows, request["dtype"])

    def _opened(self, key: str, files: Mapping[str, Known], piped: Mapping[str, PipedFile]) -> OpenSet:
        if key not in self._open:
            # libhdf5 shares the state of a file between all its open handles, so close those that may be outdated.
            for old in [old for old, held in self._open.items() if held.disagrees(files)]:
                self._open.pop(old).close()
            while self._open and (len(self._open) >= MAX_OPEN or self._held + len(files) > _MAX_FILES):
                self._open.popitem(last=False)[1].close()
            self._open[key] = OpenSet(files, self._plugins, piped)
        self._open.move_to_end(key)
        return self._open[key]

    @property
    def _held(self) -> int:
        """Upper bound on the number of open files."""
        return sum(len(held.files) for held in self._open.values())


def _reason(error: Exception, files: Sequence[str]) -> FeedError:
    if isinstance(error, FeedError):
        return error
    if isinstance(error, MemoryError):
        return TooLarge("reading these rows takes more memory than a reader may use: request fewer at once")
    text = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and is_away(error)) or says_away(text):
        # The file was deleted, or its disk is unavailable. The next request finds out which.
        return SourceUnavailable("a file of this dataset cannot be read now; try again in a moment")
    for folder in {os.path.dirname(path) for path in files}:
        text = text.replace(f"{folder}{os.sep}", "")
    return DatasetCorrupt(f"HDF5 cannot read it: {text[:300]}")


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], Int64s] | None:
    length = stream.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    request = json.loads(stream.read(LENGTH.unpack(length)[0]))
    return request, np.frombuffer(stream.read(8 * request["rows"]), np.int64)


def main(memory_bytes: int, timeout: float) -> None:
    """Handle requests until standard input ends.

    Parameters
    ----------
    memory_bytes : int
        Bound on the address space of this process.
    timeout : float
        Seconds for each request.
    """
    refuse_external_links()
    allow_many_files()
    answers = confine(memory_bytes)
    reader = _Reader(Pipe(answers, sys.stdin.fileno()))
    while (asked := _receive(sys.stdin.buffer)) is not None:
        # SIGALRM kills by default, whatever libhdf5 is doing.
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            content = [memoryview(b"D".ljust(KIND_BYTES)), *reader.answer(*asked)]
        except Exception as error:
            problem = _reason(error, [path for path, *_ in asked[0]["files"]])
            assert problem.code in CLASS_BY_CODE
            content = [memoryview(b"E".ljust(KIND_BYTES) + json.dumps([problem.code, problem.detail]).encode())]
        write_frame(answers, *content)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
