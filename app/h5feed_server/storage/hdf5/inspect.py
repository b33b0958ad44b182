"""Walks HDF5 files with h5py and describes their layouts.

Runs only as a child process: a crafted file can crash libhdf5, hang it or exhaust its memory, and must not affect the
server.

Protocol: each line on standard input is JSON: a path, the size of a file that `piped_file` reads, or an object with
the paths of several files, or with that of a file that another process is writing to. Each response on standard output
is a frame of an 8-byte little-endian length, a kind byte (``L`` layout, ``E`` error text, ``T`` the layouts of several
files, as frames) and the content. `inspector` is the other end.

Each request is handled in its own fork, see `answer_in_fork`.
"""

from __future__ import annotations

import encodings.ascii
import encodings.latin_1
import encodings.raw_unicode_escape
import encodings.utf_8
import encodings.utf_16_le
import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import h5py
import numpy.ma
from h5feed.stored.codecs import load_codecs
from h5feed.stored.layout import ArrayLayout, ExternalLink, FileLayout, dump_layout
from h5feed.stored.local_file import Identity
from h5py import h5o

from .arrays import Arrays
from .attributes import MAX_NAME_BYTES, attributes_of, fuel_splits
from .child import LENGTH, answer_in_fork, confine
from .drivers import members_of
from .guard import Guard, held
from .h5py_reader import open_file
from .libhdf5 import Plugins
from .piped_file import OBJECT, ExactFile, Pipe, PipedBytes, PipedFile
from .text import decoded, json_bytes, reason_of

MAX_ARRAYS = 20_000
MAX_OBJECTS = 200_000
MAX_DEPTH = 32
"""Bounds on the walk through one file. The rest is not listed, and a note in the layout says so."""

MAX_TEXT_TOTAL = 16 << 20
"""Bound on the bytes of names, attributes and reasons in one layout, which every worker holds in memory."""

_TELLING = ("pandas_type", "encoding-type", "h5sparse_format", "MATLAB_sparse", "NX_class", "categories")
"""Attributes of groups that say how to interpret the arrays below them."""

_USED_LATE = (
    cv2,
    encodings.ascii,
    encodings.latin_1,
    encodings.raw_unicode_escape,
    encodings.utf_16_le,
    encodings.utf_8,
    numpy.ma,
)
"""Modules that would otherwise be imported on first use, after `_seal`, when no file can be opened any more."""

TOGETHER_SECONDS = 1.0
"""When the inspection of several files has taken so long, those that are left are not begun."""

_TOGETHER_BYTES = 32 << 20
"""The same for the size of their layouts."""

_LEVELS = 8
"""Levels of an index that are read ahead: all of them, because inspection needs the whole index."""


def inspect_file(path: str, plugins: Plugins, seconds: float, *, swmr: bool = False) -> FileLayout:
    """Return the layout of the file at `path`.

    Parameters
    ----------
    path : str
    plugins : Plugins
    seconds : float
        Timeout of the inspection, which the caller enforces. Here it bounds the comparison with libhdf5.
    swmr : bool
        Whether another process has the file open for SWMR writing.
    """
    _, members = members_of(path)
    status = os.stat(path)
    with open_file(path, swmr=swmr) as file:
        _seal()
        guard = Guard(held(file, Identity.of(status)), seconds, is_written=swmr)
        # Names of the other files of a split file or file family.
        names = tuple(map(os.path.basename, members))
        # Chunks that are added meanwhile are beyond the end that the file had.
        nbytes = sys.maxsize if swmr else status.st_size
        return _Walk(file, path, Arrays(file, nbytes, names, plugins, guard)).layout()


def inspect_piped(piped: PipedFile, plugins: Plugins, seconds: float) -> FileLayout:
    """Return the layout of a file that the parent reads. See `inspect_file`."""
    with h5py.File(piped, "r") as file:
        _seal()
        # If it is recorded what determines the layout, rows do not belong to that.
        guard = Guard(None if isinstance(piped, ExactFile) else PipedBytes(piped), seconds, is_remote=True)
        return _Walk(file, OBJECT, Arrays(file, piped.size, (), plugins, guard)).layout()


def _seal() -> None:
    """Prevent this process from opening further files: links, external storage and virtual arrays may name any file."""
    try:
        free = os.dup(0)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # This was done for the file before, and the open one has taken its place.
        return
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))


class _Walk:
    """Lists all arrays of a file by path, breadth first. Each group is visited once, however many links lead to it."""

    def __init__(self, file: h5py.File, path: str, described: Arrays) -> None:
        self._file = file
        self._path = path
        self._described = described
        self._links: list[ExternalLink] = []
        self._arrays: dict[str, ArrayLayout] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._notes: list[str] = []
        self._text_left = MAX_TEXT_TOTAL
        # Layouts by the address of the array: an array with several names is described once.
        self._known: dict[tuple[int, int], list[ArrayLayout]] = {}

    def layout(self) -> FileLayout:
        attributes = attributes_of(self._file)
        if (splits := fuel_splits(self._file)) is not None:
            attributes["split"] = splits
        self._text_left -= json_bytes(attributes)
        try:
            self._visit_all()
        except _Full:
            self._notes.append(f"only its first {len(self._arrays)} arrays are listed")
        arrays, links = tuple(self._arrays.values()), tuple(self._links)
        return FileLayout(arrays, attributes, tuple(self._notes), links, self._groups)

    def _visit_all(self) -> None:
        level: list[tuple[str, h5py.Group]] = [("", self._file)]
        seen = {_address(self._file)}
        objects = 0
        for _ in range(MAX_DEPTH):
            below: list[tuple[str, h5py.Group]] = []
            for prefix, group in level:
                for name in self._names(prefix, group):
                    objects += 1
                    if objects > MAX_OBJECTS:
                        raise _Full
                    path = f"{prefix}/{decoded(name)}" if prefix else decoded(name)
                    child = self._visit(path, group, name)
                    if child is not None and (address := _address(child)) not in seen:
                        seen.add(address)
                        below.append((path, child))
            level = below
            if not level:
                return
        self._notes.append(f"groups more than {MAX_DEPTH} deep are not listed")

    def _names(self, prefix: str, group: h5py.Group) -> Iterator[str | bytes]:
        where = f"group {prefix!r}" if prefix else "its root group"
        try:
            names = list(group)
        except Exception as error:
            self._notes.append(f"{where} cannot be listed: {self._reason(error)}")
            return
        for name in names:
            # libhdf5 would interpret these names as paths to other objects.
            if len(name) > MAX_NAME_BYTES or decoded(name) in ("", ".") or "/" in decoded(name):
                self._notes.append(f"{where} has a link {decoded(name)[:40]!r}, which cannot be followed")
                self._spend(len(self._notes[-1]))
            else:
                yield name

    def _visit(self, path: str, group: h5py.Group, name: str | bytes) -> h5py.Group | None:
        """List what `name` links to. Returns it if it is a group to descend into."""
        if isinstance(name, bytes):
            self._add(_unreadable(path, "its name is not UTF-8"))
            return None
        link = None
        try:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                self._spend(512 + len(path) + len(link.filename) + len(link.path))
                self._links.append(ExternalLink(path, decoded(link.filename), decoded(link.path)))
                return None
            item = group[name]
            if isinstance(item, h5py.Dataset):
                for array in self._arrays_at(path, item):
                    self._add(array)
            # Groups are followed through hard links only. Soft links lead to groups that are listed elsewhere.
            elif isinstance(item, h5py.Group) and isinstance(link, h5py.HardLink):
                _address(item)
                self._note(path, item)
                return item
        except _Full:
            raise
        except Exception as error:
            reason = f"it cannot be opened: {self._reason(error)}"
            if isinstance(link, h5py.SoftLink):
                reason = "it is a broken link"
            self._add(_unreadable(path, reason))
        return None

    def _note(self, path: str, group: h5py.Group) -> None:
        """Record the attributes of a group if they say how to interpret its arrays."""
        if any(name in group.attrs for name in _TELLING):
            self._groups[path] = attributes_of(group)
            self._spend(512 + json_bytes((path, self._groups[path])))

    def _add(self, array: ArrayLayout) -> None:
        if array.path in self._arrays:
            self._notes.append(f"{array.path!r} exists twice")
            self._spend(len(array.path))
            return
        if len(self._arrays) >= MAX_ARRAYS:
            raise _Full
        about = (
            array.path,
            array.attributes,
            array.text,
            array.enum_names,
            array.unreadable,
            array.shape,
            array.refers,
        )
        self._spend(512 + json_bytes(about) + len(array.inline or b"") + len(array.fill))
        self._arrays[array.path] = array

    def _spend(self, nbytes: int) -> None:
        self._text_left -= nbytes
        if self._text_left < 0:
            raise _Full

    def _reason(self, error: Exception) -> str:
        """The reason that an exception gives, without the path of the file, which clients must not see."""
        if isinstance(error, MemoryError):
            return "it takes more memory than inspection may use"
        return reason_of(error, self._path)

    def _arrays_at(self, path: str, dataset: h5py.Dataset) -> list[ArrayLayout]:
        """The layout of `dataset`; for a table of records, one for each member."""
        address = _address(dataset)
        if address not in self._known:
            self._known[address] = self._described.describe(dataset)
        return [replace(one, path=path + one.path) for one in self._known[address]]


class _Full(Exception):
    """A bound on the size of a layout is reached."""


def _unreadable(path: str, reason: str) -> ArrayLayout:
    return ArrayLayout(path, (), "|u1", unreadable=reason)


def _address(item: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    info = h5o.get_info(item.id)
    return info.fileno, info.addr


# The child process ---------------------------------------------------------------------------------------------------


def main(memory_bytes: int, timeout: float) -> None:
    """Inspect files until standard input ends.

    Parameters
    ----------
    memory_bytes : int
        Bound on the address space of this process and its forks.
    timeout : float
        Seconds for each file.
    """
    answers = confine(memory_bytes)
    load_codecs()
    plugins = Plugins()
    while line := sys.stdin.buffer.readline():
        file = json.loads(line)
        paths = file.get("together") if isinstance(file, dict) else None
        if isinstance(file, list):
            file = ExactFile(Pipe(answers, 0), 0, file[0], OBJECT)
        elif isinstance(file, int):
            file = PipedFile(Pipe(answers, 0, _LEVELS), 0, file, OBJECT)
        if not answer_in_fork(
            lambda file=file, paths=paths: (  # type: ignore[misc]
                (_answer(file, plugins, timeout),) if paths is None else _answer_together(paths, plugins, timeout)
            ),
            lambda number: b"E" + _cause_of_death(number, timeout).encode(),
            timeout,
            answers,
        ):
            return


def _answer(file: str | dict[str, list[str]] | PipedFile, plugins: Plugins, seconds: float) -> bytes:
    swmr = isinstance(file, dict)
    file = file["swmr"][0] if isinstance(file, dict) else file
    path = file if isinstance(file, str) else OBJECT
    try:
        if isinstance(file, PipedFile):
            return b"L" + dump_layout(inspect_piped(file, plugins, seconds))
        return b"L" + dump_layout(inspect_file(file, plugins, seconds, swmr=swmr))
    except MemoryError:
        return b"Einspecting it takes more memory than inspection may use"
    except Exception as error:
        reason = reason_of(error, path)
        if reason == "file signature not found":
            return b"Eit is not an HDF5 file, or an empty one"
        return b"E" + f"it cannot be opened: {reason}".encode()


def _answer_together(paths: Sequence[str], plugins: Plugins, seconds: float) -> Sequence[bytes]:
    """The layouts of the first files, as many as there is time for; or the error of the first that has one."""
    until = time.monotonic() + TOGETHER_SECONDS
    parts = [b"T"]
    for path in paths:
        # Each file has all the time that it would have by itself.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _answer(path, plugins, seconds)
        if answer[:1] != b"L":
            return (answer,)
        parts += (LENGTH.pack(len(answer)), answer)
        if time.monotonic() > until or sum(map(len, parts)) > _TOGETHER_BYTES:
            break
    return parts


def _cause_of_death(number: int, timeout: float) -> str:
    if number == signal.SIGALRM:
        return f"inspecting it took more than {timeout:g} s (H5FEED_INSPECT_TIMEOUT)"
    if number == signal.SIGKILL:
        return "the system killed its inspection, most likely because it took too much memory"
    if number:
        return f"inspecting it crashed libhdf5 ({signal.Signals(number).name})"
    return "inspecting it failed"


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
