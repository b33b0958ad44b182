"""Reads rows with h5py where no layout says where they lie: lists of any length, virtual arrays, files in parts.

Runs as a child process only, and long: it holds files open. `reader_pool` is the other end.

Protocol: a request is a frame of an 8-byte little-endian length and JSON, followed by its ``rows`` as int64. An answer
is a frame of `KIND_BYTES` for its kind (``D`` data, ``E`` an error as JSON) and the content. Data of fixed rows are
their bytes, as stored, in the order asked; data of ragged rows are ``rows + 1`` offsets (int64, in items) and items.

The arrays may be crafted. libhdf5 would follow whatever names they hold to any file of this machine, so external links
are switched off, and the parts of a virtual array are looked at before libhdf5 is let to them: each must lie in one of
the files that the request names, and none may be made of itself, which libhdf5 does not survive.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.errors import CLASS_BY_CODE, DatasetCorrupt, FeedError, SourceUnavailable, TooLarge, Unreadable
from h5py import h5d

from ..local_file import Identity, changed, is_away
from .child import KIND_BYTES, LENGTH, confine, write_frame
from .drivers import SPLIT_ENDINGS, family_template, members_of
from .libhdf5 import Plugins, forget_external_links
from .stored_types import disk_bytes
from .text import says_away

MAX_OPEN = 16
"""Files held open, with those that belong to them."""

_MAX_FILES = 1024
"""The same, counted one by one, unless one needs more: libhdf5 takes half a megabyte of memory for each."""

_MAX_DATASETS = 32
"""Arrays held open."""

_CHUNK_CACHE_BYTES = 32 << 20
"""Decoded chunks that libhdf5 keeps of one array: of a virtual one, of all its parts together."""

MAX_PARTS = 4096
"""Parts of a virtual array."""

_MAX_NESTING = 8
"""Virtual arrays that are made of others that are virtual."""

_ROWS_AT_ONCE = 64
"""Ragged rows read by one call: it is known only afterwards how many bytes they have."""

Int64s = npt.NDArray[np.int64]
Known = tuple[int | str, ...]
"""What is known of a file: its identity, and a digest of its content, by which it may be another one all the same."""


def open_file(path: str, cache_bytes: int | None = None) -> h5py.File:
    """Open a file, or all that HDF5 wrote one file into, beginning with `path`.

    Parameters
    ----------
    cache_bytes : int, optional
        Decoded chunks that libhdf5 keeps of each array; default: its own.
    """
    driver, _ = members_of(path)
    keep: dict[str, Any] = {"mode": "r", "locking": False, "rdcc_nbytes": cache_bytes}
    # No lock is taken: the file may lie on a read-only or network mount, and is only read.
    if driver == "split":
        endings = [ending.encode() for ending in SPLIT_ENDINGS]
        stem = path.removesuffix(SPLIT_ENDINGS[0])
        return h5py.File(stem, **keep, driver=driver, meta_ext=endings[0], raw_ext=endings[1])
    if driver == "family":
        return h5py.File(family_template(path), **keep, driver=driver, memb_size=0)
    return h5py.File(path, **keep)


class _OpenSet:
    """A file, open, with those that its virtual arrays are made of."""

    def __init__(self, files: Mapping[str, Known], plugins: Plugins) -> None:
        self.files = files
        self._plugins = plugins
        self._chunk_bytes = 0
        self._cache_bytes = min(_CHUNK_CACHE_BYTES // 4, _CHUNK_CACHE_BYTES // len(files))
        self._open: dict[str, h5py.File] = {}
        self._main = next(iter(files))
        self._checked: set[tuple[str, str]] = set()
        self.datasets: OrderedDict[str, h5py.Dataset] = OrderedDict()
        """Arrays held open, the one used last at the end."""

    def dataset(self, path: str) -> h5py.Dataset:
        """The array at `path` of the first file, when it is known to be safe."""
        if path not in self.datasets:
            dataset = self._item(self._main, path)
            self._check(self._main, path, dataset, ())
            self.datasets[path] = dataset
        self.datasets.move_to_end(path)
        self._plugins.chunk_bytes = self._chunk_bytes
        return self.datasets[path]

    def check_unchanged(self) -> None:
        """What was read is of these files: by path, as libhdf5 opens parts, and late.

        Raises
        ------
        RevisionChanged, Overloaded
        """
        for path in self.files:
            self._check_identity(path, os.stat(path))

    def disagrees(self, files: Mapping[str, Known]) -> bool:
        """Whether it shares files with these, under whatever names, and one of them may be another now."""
        shared = {known[:2] for known in self.files.values()} & {known[:2] for known in files.values()}
        # Where one set holds the other, all that is shared has the same parts.
        return bool(shared) and not (self.files.items() <= files.items() or self.files.items() >= files.items())

    def close(self) -> None:
        self.datasets.clear()
        for file in self._open.values():
            file.close()

    def _item(self, file: str, path: str) -> h5py.Dataset:
        try:
            item = self._file(file)[path]
        except KeyError:
            raise Unreadable(f"its part {path!r} of {os.path.basename(file)!r} is not there") from None
        if not isinstance(item, h5py.Dataset):
            raise Unreadable(f"its part {path!r} of {os.path.basename(file)!r} is no array")
        return item

    def _file(self, path: str) -> h5py.File:
        if path not in self._open:
            opened = self._open[path] = open_file(path, self._cache_bytes)
            # Of a file in parts, there is no one descriptor.
            if not members_of(path)[0]:
                self._check_identity(path, os.fstat(opened.id.get_vfd_handle()))
        return self._open[path]

    def _check_identity(self, path: str, status: os.stat_result) -> None:
        known, now = Identity(*self.files[path][:-1]), Identity.of(status)  # type: ignore[arg-type]
        if now != known:
            raise changed(known, now)

    def _check(self, file: str, path: str, dataset: h5py.Dataset, above: tuple[tuple[str, str], ...]) -> None:
        """Refuse what would lead libhdf5 to other files than those named, or round in circles."""
        # By address: an array has as many names as there are links to it.
        info = h5py.h5o.get_info(dataset.id)
        here = (file, str(info.addr))
        if here in above:
            raise Unreadable("it is a virtual array that is made of itself")
        if here in self._checked:
            return
        properties = dataset.id.get_create_plist()
        if properties.get_external_count():
            raise Unreadable("its data, or that of a part, lies in an external file")
        if properties.get_layout() == h5d.VIRTUAL:
            if len(above) >= _MAX_NESTING:
                raise Unreadable(f"it is made of virtual arrays more than {_MAX_NESTING} deep")
            for name, part in virtual_parts(properties):
                source = file if name == "." else os.path.realpath(os.path.join(os.path.dirname(file), name))
                if source not in self.files:
                    raise Unreadable(
                        f"it is made of parts of {os.path.basename(name)!r}, which is no file of the data folder"
                    )
                self._check(source, part, self._item(source, part), (*above, here))
        if dataset.chunks is not None:
            # The longest that an address can be.
            nbytes = disk_bytes(dataset.id.get_type(), 32) or dataset.id.get_type().get_size()
            self._chunk_bytes = max(self._chunk_bytes, math.prod(dataset.chunks) * nbytes)
        self._checked.add(here)


def virtual_parts(properties: h5py.h5p.PropDCID) -> list[tuple[str, str]]:
    """File (``"."``: the same one) and path of each part of a virtual array, each once.

    Raises
    ------
    ValueError
        There are too many, or as many as there happen to be files.
    """
    count = properties.get_virtual_count()
    if count > MAX_PARTS:
        raise ValueError(f"it is made of {count} parts, more than the {MAX_PARTS} that are read")
    parts: dict[tuple[str, str], None] = {}
    for number in range(count):
        name, part = properties.get_virtual_filename(number), properties.get_virtual_dsetname(number)
        if "%" in name or "%" in part:
            raise ValueError("it is made of parts that are named by a pattern, which is not read")
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
    values = values.astype(stored, copy=False)
    if len(wanted) < len(rows) or (rows != wanted).any():
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
                raise TooLarge(f"these rows have more than the {limit} bytes of one answer: ask for fewer at once")
    chosen = [parts[place] for place in places.tolist()]
    lengths = np.array([len(items) for items in chosen], np.int64) // dtype.itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if offsets[-1] * dtype.itemsize > limit:
        raise TooLarge(f"these rows have more than the {limit} bytes of one answer: ask for fewer at once")
    return [memoryview(offsets.view(np.uint8)), *(memoryview(items) for items in chosen)]


def _runs(rows: Int64s, longest: int) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin and end in `rows`, at most `longest` at a time."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        for first in range(start, stop, max(1, longest)):
            yield first, min(first + longest, stop)


# The child process ---------------------------------------------------------------------------------------------------


class _Reader:
    """Answers requests, with files held open between them."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _OpenSet] = OrderedDict()
        self._plugins = Plugins()

    def answer(self, request: dict[str, Any], rows: Int64s) -> list[memoryview]:
        key = json.dumps(request["files"])
        opened = self._opened(key, {path: tuple(known) for path, known in request["files"]})
        try:
            content = self._read(opened, request, rows)
            opened.check_unchanged()
            return content
        except BaseException:
            # What is wrong with it may be what was opened.
            self._open.pop(key).close()
            raise

    def _read(self, opened: _OpenSet, request: dict[str, Any], rows: Int64s) -> list[memoryview]:
        dataset = opened.dataset(request["path"])
        while sum(len(held.datasets) for held in self._open.values()) > _MAX_DATASETS:
            next(held for held in self._open.values() if held.datasets).datasets.popitem(last=False)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < dataset.shape[0]:
            raise DatasetCorrupt(f"the array has {dataset.shape[0]} rows now")
        member = request["member"]
        if request["ragged"]:
            return _read_ragged(dataset, member, rows, request["dtype"], request["limit"])
        return _read_fixed(dataset, member, rows, request["dtype"])

    def _opened(self, key: str, files: Mapping[str, Known]) -> _OpenSet:
        if key not in self._open:
            # libhdf5 shares what it knows of a file between all who have it open: nobody may know it as it was.
            for old in [old for old, held in self._open.items() if held.disagrees(files)]:
                self._open.pop(old).close()
            while self._open and (len(self._open) >= MAX_OPEN or self._held + len(files) > _MAX_FILES):
                self._open.popitem(last=False)[1].close()
            self._open[key] = _OpenSet(files, self._plugins)
        self._open.move_to_end(key)
        return self._open[key]

    @property
    def _held(self) -> int:
        """Files held open at most."""
        return sum(len(held.files) for held in self._open.values())


def _reason(error: Exception, files: Sequence[str]) -> FeedError:
    if isinstance(error, FeedError):
        return error
    if isinstance(error, MemoryError):
        return TooLarge("these rows take more memory than there is for reading them: ask for fewer at once")
    text = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and is_away(error)) or says_away(text):
        # A file that is missing was deleted, or its disk is away: who asks again hears which.
        return SourceUnavailable("a file of this dataset cannot be read now; come again in a moment")
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
    """Answer requests until standard input ends."""
    forget_external_links()
    # A virtual array may have thousands of parts.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    answers = confine(memory_bytes)
    reader = _Reader()
    while (asked := _receive(sys.stdin.buffer)) is not None:
        # The signal's default is to kill: it ends libhdf5 wherever it is.
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            content = [memoryview(b"D".ljust(KIND_BYTES)), *reader.answer(*asked)]
        except Exception as error:
            problem = _reason(error, [path for path, _ in asked[0]["files"]])
            assert problem.code in CLASS_BY_CODE
            content = [memoryview(b"E".ljust(KIND_BYTES) + json.dumps([problem.code, problem.detail]).encode())]
        write_frame(answers, *content)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
