"""Walks HDF5 files with h5py and writes down their layouts. Runs as a child process only: a crafted file can crash,
hang or bloat libhdf5, and must take nothing else with it.

Protocol: each line on standard input is a path as JSON; each answer on standard output is a frame of an 8-byte
little-endian length, a kind byte (``L`` layout, ``E`` error text) and the content. `inspector` is the other end.

Each file is inspected in a fork of its own: libhdf5 may damage its own memory in reading one file and crash, or say
what is wrong, only in reading the next.
"""

from __future__ import annotations

import encodings.ascii
import encodings.latin_1
import encodings.raw_unicode_escape
import encodings.utf_8
import json
import math
import os
import re
import resource
import select
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5o, h5s, h5t, h5z

from .child import confine, write_frame
from .drivers import members_of
from .h5py_reader import open_file, virtual_parts
from .layout import (
    MAX_RECORD_BYTES,
    ArrayLayout,
    ChunkTable,
    ExternalLink,
    FileLayout,
    Filter,
    check_array,
    dump_layout,
)
from .pickled_lists import plain_list

MAX_ARRAYS = 20_000
MAX_OBJECTS = 200_000
MAX_DEPTH = 32
"""Bounds on the walk through one file; what lies beyond them is not listed, and the layout says so."""

MAX_TEXT_TOTAL = 16 << 20
"""Bytes of names, attributes and reasons that go into one layout: it is kept in the memory of every worker."""

MAX_CHUNKS = 8 << 20
"""Chunks of all arrays of a file: 32 bytes each, in the memory of every worker."""

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1 << 16
"""Bounds on what of an object's attributes goes into the catalogue."""

MAX_NAME_BYTES = 1 << 10
"""Bytes of the name of a group, an array or an attribute."""

MAX_TEXT_BYTES = 1 << 12

MAX_INLINE_BYTES = 1 << 16
"""Compact arrays, and text that may be names of classes, are kept in the layout up to this size."""

_ATTRIBUTE_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM)
"""Attribute types that are read. Others are named only: libhdf5 crashes on some damaged ones."""

_MAX_REASON = 300
"""Characters of a reason that libhdf5 gives."""

_TELLING = ("pandas_type", "encoding-type", "MATLAB_sparse")
"""Attributes of groups that say how what lies below is to be read."""

_H5PY_TEXT = re.compile(r"(?:Unable to|Can't) .*? \((.*)\)", re.S)
"""What h5py puts around libhdf5's own words."""

_FUEL = ("split", "source", "start", "stop", "indices", "available")

_SCALAR = "it is a scalar: it has no rows"

_USED_LATE = (encodings.ascii, encodings.latin_1, encodings.raw_unicode_escape, encodings.utf_8)
"""Modules that Python would import when they are needed, which is when no file can be opened any more."""


def inspect_file(path: str) -> FileLayout:
    """The layout of the arrays in the file at `path`."""
    _, members = members_of(path)
    with open_file(path) as file:
        _seal()
        return _Walk(file, path, members).layout()


def _seal() -> None:
    """From here on this process opens no file: links, external storage and virtual arrays may name any."""
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))


class _Walk:
    """One pass through a file: all arrays by path, level after level; each group once, whatever links lead to it."""

    def __init__(self, file: h5py.File, path: str, members: tuple[str, ...]) -> None:
        self._file = file
        self._path = path
        self._nbytes = os.stat(path).st_size
        # Names of further files that this one goes on in.
        self._members = tuple(map(os.path.basename, members))
        self._links: list[ExternalLink] = []
        self._arrays: dict[str, ArrayLayout] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._notes: list[str] = []
        self._text_left = MAX_TEXT_TOTAL
        self._chunks_left = MAX_CHUNKS
        # Arrays by address: further names of one cost nothing but the name.
        self._known: dict[tuple[int, int], list[ArrayLayout]] = {}

    def layout(self) -> FileLayout:
        attributes = _attributes(self._file)
        if (splits := _fuel_splits(self._file)) is not None:
            attributes["split"] = splits
        self._text_left -= _json_bytes(attributes)
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
                    path = f"{prefix}/{_decoded(name)}" if prefix else _decoded(name)
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
            # libhdf5 takes these for paths, and they would lead elsewhere.
            if len(name) > MAX_NAME_BYTES or _decoded(name) in ("", ".") or "/" in _decoded(name):
                self._notes.append(f"{where} has a link {_decoded(name)[:40]!r}, which cannot be followed")
                self._spend(len(self._notes[-1]))
            else:
                yield name

    def _visit(self, path: str, group: h5py.Group, name: str | bytes) -> h5py.Group | None:
        """List what `name` links to; returns it where it is a group."""
        if isinstance(name, bytes):
            self._add(_unreadable(path, "its name is no UTF-8"))
            return None
        link = None
        try:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                self._spend(512 + len(path) + len(link.filename) + len(link.path))
                self._links.append(ExternalLink(path, _decoded(link.filename), _decoded(link.path)))
                return None
            item = group[name]
            if isinstance(item, h5py.Dataset):
                for found in self._arrays_at(path, item):
                    self._add(found)
            # Groups are reached by hard links: soft ones lead to what is listed elsewhere.
            elif isinstance(item, h5py.Group) and isinstance(link, h5py.HardLink):
                _address(item)
                self._note(path, item)
                return item
        except _Full:
            raise
        except Exception as error:
            reason = f"it cannot be opened: {self._reason(error)}"
            if isinstance(link, h5py.SoftLink):
                reason = "it is a link that leads nowhere"
            self._add(_unreadable(path, reason))
        return None

    def _note(self, path: str, group: h5py.Group) -> None:
        """Keep what a group says of its arrays."""
        if any(name in group.attrs for name in _TELLING):
            self._groups[path] = _attributes(group)
            self._spend(512 + _json_bytes((path, self._groups[path])))

    def _add(self, found: ArrayLayout) -> None:
        if found.path in self._arrays:
            self._notes.append(f"{found.path!r} is there twice")
            self._spend(len(found.path))
            return
        if len(self._arrays) >= MAX_ARRAYS:
            raise _Full
        about = (found.path, found.attributes, found.text, found.enum_names, found.unreadable, found.shape)
        self._spend(512 + _json_bytes(about) + len(found.inline or b"") + len(found.fill))
        self._arrays[found.path] = found

    def _spend(self, nbytes: int) -> None:
        self._text_left -= nbytes
        if self._text_left < 0:
            raise _Full

    def _reason(self, error: Exception) -> str:
        """The reason that an exception gives, without the path of the file, which is the server's own business."""
        if isinstance(error, MemoryError):
            return "it takes more memory than inspection may use"
        return _reason(error, self._path)

    def _arrays_at(self, path: str, dataset: h5py.Dataset) -> list[ArrayLayout]:
        """The array of `dataset`; of a table of records, one for each member. Those that nothing is wrong with can be
        read."""
        address = _address(dataset)
        if address not in self._known:
            found = []
            for one in _arrays("", dataset, self._chunks, self._members):
                try:
                    self._check(one)
                    found.append(one)
                except ValueError as error:
                    found.append(_unreadable(one.path, _decoded(str(error))))
            self._known[address] = found
        return [replace(one, path=path + one.path) for one in self._known[address]]

    def _check(self, found: ArrayLayout) -> None:
        check_array(found)
        if found.offset is not None and found.external is None:
            nbytes = found.rows * found.record[0] if found.record else found.nbytes
            if found.offset + nbytes > self._nbytes:
                raise ValueError(f"its data would end at byte {found.offset + nbytes}, the file does at {self._nbytes}")
        if found.chunks is not None and len(found.chunks.numbers):
            end = int((found.chunks.offsets + found.chunks.sizes).max())
            if end > self._nbytes:
                raise ValueError(f"one of its chunks would end at byte {end}, the file does at {self._nbytes}")

    def _chunks(self, dataset: h5py.Dataset) -> ChunkTable:
        table = _chunks(dataset, self._chunks_left)
        self._chunks_left -= len(table.numbers)
        return table


class _Full(Exception):
    """As much is listed of a file as may be."""


def _unreadable(path: str, reason: str) -> ArrayLayout:
    return ArrayLayout(path, (), "|u1", unreadable=reason)


def _address(item: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    info = h5o.get_info(item.id)
    return info.fileno, info.addr


def _decoded(name: str | bytes) -> str:
    """A name as Unicode that can be encoded; h5py gives bytes or lone surrogates where the file has no UTF-8."""
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")


def _reason(error: Exception, path: str) -> str:
    # str() of a KeyError is a literal.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
    text = text.replace(path, "the file").encode("utf-8", "replace").decode()
    if match := _H5PY_TEXT.fullmatch(text):
        text = match[1]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_MAX_REASON]


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value))


def _arrays(
    path: str, dataset: h5py.Dataset, chunks: Callable[[h5py.Dataset], ChunkTable], members: tuple[str, ...]
) -> list[ArrayLayout]:
    """The array at `path`; of a table of records, one for each member."""
    properties = dataset.id.get_create_plist()
    kind = properties.get_layout()
    # Before anything else is asked: the shape of a virtual array is that of others, which may be itself.
    if kind == h5d.VIRTUAL:
        return [_virtual(path, dataset, properties)]
    external = None
    if count := properties.get_external_count():
        if count > 1:
            return [_unreadable(path, "its data lies in several external files")]
        name, begin, _ = properties.get_external(0)
        external = _decoded(name), int(begin)
    if kind not in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT):
        return [_unreadable(path, f"it is of layout class {kind}, which this version does not read")]
    shape = tuple(dataset.shape or ())
    known: dict[str, Any] = {"path": path, "shape": shape, "dtype": "|u1", "attributes": _attributes(dataset)}
    if dataset.shape is None:
        return [ArrayLayout(**known, unreadable="it has no shape (a null dataspace)")]
    stored = dataset.id.get_type()
    known["text"] = _text(dataset, stored)
    if not shape and not members and stored.get_class() == h5t.STRING and stored.is_variable_str():
        return [_text_scalar(known, dataset)]
    if _is_ragged(stored) or members:
        return [_by_h5py(known, stored, properties, members)]
    record = stored.get_size()
    if _is_table(stored):
        found, problem = _members(stored)
        if record > MAX_RECORD_BYTES:
            problem = f"its records have {record} bytes, more than the {MAX_RECORD_BYTES} that are read"
        elif len(shape) > 1:
            problem = "its records lie along more than one axis"
    elif stored.get_class() == h5t.ARRAY:
        # Elements that are arrays themselves are records of one nameless member.
        item = _item(stored.get_super())
        problem = item.problem if len(shape) == 1 else "its elements are arrays, and lie along more than one axis"
        found = [Member("", item, stored.get_array_dims(), 0)]
    else:
        item = _item(stored)
        problem = item.problem
        found = [Member("", item, (), 0)]
    if problem is not None:
        return [ArrayLayout(**known, unreadable=problem)]
    known["stored_bytes"] = dataset.id.get_storage_size()
    if not shape:
        return [_scalar(known, dataset, stored, found)]
    if external is not None:
        known["external"], known["offset"] = external
    elif kind == h5d.CONTIGUOUS:
        # Without storage the offset means nothing: every element is the fill value.
        known["offset"] = dataset.id.get_offset() if known["stored_bytes"] else None
    elif kind == h5d.CHUNKED:
        known["chunk_shape"] = dataset.chunks
        known["filters"] = _filters(properties)
        known["chunks"] = chunks(dataset)
    else:
        known["inline"] = _raw(dataset, stored)
    # Types that are not served, in part or as a whole, are those of damaged files too: libhdf5 crashes on some of them.
    intact = all(member.item.problem is None for member in found) and stored.get_class() != h5t.ARRAY
    defined = properties.fill_value_defined() == h5d.FILL_VALUE_USER_DEFINED
    if defined and not intact and not _is_written(dataset):
        return [_unreadable(path, "some of it was never written, and its fill value is one that cannot be read")]
    fill = _fill(properties, stored, found[0].item.dtype) if defined and intact else bytes(record)
    arrays = []
    for member in found:
        if member.item.problem is not None:
            arrays.append(_unreadable(f"{path}.{member.name.replace('/', '.')}", member.item.problem))
            continue
        own = member.item.known
        own["fill"] = fill
        if member.name:
            own["path"] = f"{path}.{member.name.replace('/', '.')}"
        if member.name or member.shape:
            own |= {"shape": (*shape, *member.shape), "record": (record, member.offset)}
        arrays.append(ArrayLayout(**known | own))
    return arrays


def _scalar(known: dict[str, Any], dataset: h5py.Dataset, stored: h5t.TypeID, found: list[Member]) -> ArrayLayout:
    """A scalar: no array of rows, but its value may be that of one row among many files."""
    value = None
    if stored.get_class() not in (h5t.COMPOUND, h5t.ARRAY) and stored.get_size() <= MAX_TEXT_BYTES:
        known = known | found[0].item.known
        value = _raw(dataset, stored)
    return ArrayLayout(**known, unreadable=_SCALAR, scalar=value)


def _text_scalar(known: dict[str, Any], dataset: h5py.Dataset) -> ArrayLayout:
    value = dataset[()]
    if not isinstance(value, bytes) or not 0 < len(value) <= MAX_TEXT_BYTES:
        return ArrayLayout(**known, unreadable=_SCALAR)
    return ArrayLayout(**known | {"dtype": f"|S{len(value)}"}, unreadable=_SCALAR, scalar=value)


def _virtual(path: str, dataset: h5py.Dataset, properties: h5py.h5p.PropDCID) -> ArrayLayout:
    """An array that is made of others; nothing is asked of it that would make libhdf5 look for them."""
    parts = virtual_parts(properties)
    if not parts:
        return _unreadable(path, "it is a virtual array of no parts")
    space = properties.get_virtual_vspace(0)
    shape = space.get_simple_extent_dims()
    if shape != space.get_simple_extent_dims(True):
        return _unreadable(path, "it is a virtual array that grows with its parts, which is not read")
    known: dict[str, Any] = {"path": path, "shape": shape, "dtype": "|u1", "attributes": _attributes(dataset)}
    others = tuple({_decoded(name): None for name, _ in parts if name != "."})
    return _by_h5py(known, dataset.id.get_type(), None, others)


def _by_h5py(
    known: dict[str, Any], stored: h5t.TypeID, properties: h5py.h5p.PropDCID | None, others: tuple[str, ...]
) -> ArrayLayout:
    """An array whose rows h5py is to read."""
    known = known | {"by_h5py": True, "others": others}
    item = _item(stored)
    if _is_ragged(stored):
        item = _Item(np.dtype("|S1")) if stored.get_class() == h5t.STRING else _item(stored.get_super())
        known["ragged"] = True
        if len(known["shape"]) > 1:
            item = _Item(problem="its lists lie along more than one axis")
        elif item.problem is None and (item.dtype.kind == "c" or item.dtype.byteorder == ">" or item.is_bfloat16):
            # Of big-endian ones, h5py gives the bytes as if they were not.
            item = _Item(problem=f"its lists are of {item.dtype.str} numbers, which this version does not serve")
        elif item.problem is None and item.dtype.kind == "S" and item.dtype.itemsize > 1:
            item = _Item(problem="its lists are of text, which this version does not serve")
    problem = item.problem
    if properties is not None:
        known["filters"] = _filters(properties)
        for number, one in zip(range(properties.get_nfilters()), known["filters"], strict=True):
            if not h5z.filter_avail(properties.get_filter(number)[0]):
                problem = problem or f"it is packed by {one.name!r}, which h5py does not have"
    if not known["shape"]:
        problem = problem or _SCALAR
    if problem is not None:
        given = {name: known[name] for name in ("path", "shape", "dtype", "attributes", "text") if name in known}
        return ArrayLayout(**given, unreadable=problem)
    return ArrayLayout(**known | item.known)


@dataclass(frozen=True)
class _Item:
    """What an element is on disk; or why it does not travel."""

    dtype: np.dtype[Any] = np.dtype("|u1")  # noqa: RUF009
    enum_names: dict[str, int] | None = None
    is_bfloat16: bool = False
    problem: str | None = None

    @property
    def known(self) -> dict[str, Any]:
        """As a layout has it."""
        return {"dtype": self.dtype.str, "enum_names": self.enum_names, "is_bfloat16": self.is_bfloat16}


def _item(stored: h5t.TypeID) -> _Item:
    if _is_ragged(stored):
        return _Item(problem="its lists hold lists")
    dtype = stored.dtype
    enum_names = None
    if h5py.check_string_dtype(dtype):
        if 0 < dtype.itemsize <= MAX_TEXT_BYTES:
            return _Item(np.dtype(f"S{dtype.itemsize}"))
        return _Item(problem=f"its strings have {dtype.itemsize} bytes, more than the {MAX_TEXT_BYTES} that are read")
    if _is_bfloat16(stored):
        order = "<" if stored.get_order() == h5t.ORDER_LE else ">"
        return _Item(np.dtype(f"{order}u2"), is_bfloat16=True)
    if stored.get_class() == h5t.ENUM:
        stored = stored.get_super()
        if dtype.kind != "b":
            enum_names = {_decoded(key): int(value) for key, value in (h5py.check_enum_dtype(dtype) or {}).items()}
            dtype = np.dtype(dtype.str)
        exact = stored.get_size() == dtype.itemsize
    else:
        # Odd precisions, offsets and byte orders are converted by HDF5, which is not there when rows are read.
        exact = dtype.kind in "iufc" and stored.equal(h5t.py_create(dtype))
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8) or not exact:
        return _Item(problem=f"its type {_describe(dtype)} is not one that this version serves")
    return _Item(dtype, enum_names)


def _is_ragged(stored: h5t.TypeID) -> bool:
    """Whether each element is a list, or text, of its own length."""
    kind = stored.get_class()
    return bool(kind == h5t.VLEN or (kind == h5t.STRING and stored.is_variable_str()))


def _is_bfloat16(stored: h5t.TypeID) -> bool:
    """Whether elements are the upper halves of float32: a sign, 8 bits of exponent and 7 of mantissa."""
    if stored.get_class() != h5t.FLOAT or stored.get_size() != 2:
        return False
    return bool(stored.get_fields() == (15, 7, 8, 0, 7) and stored.get_ebias() == 127)


def _is_table(stored: h5t.TypeID) -> bool:
    """Whether elements are records; complex numbers look like records of two to HDF5."""
    return bool(stored.get_class() == h5t.COMPOUND and stored.dtype.kind != "c")


class Member(NamedTuple):
    """One member of a record; an array of plain numbers has one without a name."""

    name: str
    item: _Item
    shape: tuple[int, ...]
    offset: int


def _members(stored: h5t.TypeCompoundID) -> tuple[list[Member], str | None]:
    """The members, and the reason where none of them travels."""
    found: list[Member] = []
    problem: str | None = "its records have no members"
    for number in range(min(stored.get_nmembers(), MAX_ARRAYS)):
        name = _decoded(stored.get_member_name(number))
        kind, shape = stored.get_member_type(number), ()
        if kind.get_class() == h5t.ARRAY:
            shape, kind = kind.get_array_dims(), kind.get_super()
        if _is_table(kind):
            item = _Item(problem="it is a record itself")
        elif _is_ragged(kind):
            item = _Item(problem="it is a list, or text, of any length")
        else:
            item = _item(kind)
        found.append(Member(name, item, tuple(shape), stored.get_member_offset(number)))
        problem = problem if item.problem is None else f"its member {name!r}: {item.problem}"
    return found, problem if all(member.item.problem is not None for member in found) else None


def _fill(properties: h5py.h5p.PropDCID, stored: h5t.TypeID, dtype: np.dtype[Any]) -> bytes:
    """One element, or one record, as stored, for what was never written."""
    value = np.zeros((), stored.dtype if _is_table(stored) else dtype)
    if stored.get_size() == value.itemsize:
        properties.get_fill_value(value)
    return value.tobytes()


def _is_written(dataset: h5py.Dataset) -> bool:
    """Whether every element has a place in the file."""
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size())
    cells = (-(-extent // width) for extent, width in zip(dataset.shape, dataset.chunks, strict=True))
    return bool(dataset.id.get_num_chunks() == math.prod(cells))


def _raw(dataset: h5py.Dataset, stored: h5t.TypeID) -> bytes:
    """All elements as they are stored."""
    nbytes = math.prod(dataset.shape) * stored.get_size()
    if nbytes > MAX_INLINE_BYTES:
        raise ValueError(f"compact arrays have no {nbytes} bytes")
    out = np.empty(nbytes, np.uint8)
    dataset.id.read(h5s.ALL, h5s.ALL, out, mtype=stored)
    return out.tobytes()


def _text(dataset: h5py.Dataset, stored: h5t.TypeID) -> tuple[str, ...] | None:
    """The values of a short list of strings, which may be names of classes or of groups."""
    if stored.get_class() != h5t.STRING or len(dataset.shape) != 1:
        return None
    # What little is stored may decode to much: strings of variable length count by what they turn out to be.
    claimed = max(dataset.id.get_storage_size(), dataset.shape[0] * max(16, stored.get_size()))
    if claimed > MAX_INLINE_BYTES:
        return None
    values = [bytes(value) for value in dataset[()].tolist()]
    if sum(map(len, values)) > MAX_INLINE_BYTES:
        return None
    return tuple(value.decode("utf-8", "replace") for value in values)


def _describe(dtype: np.dtype[Any]) -> str:
    if h5py.check_string_dtype(dtype):
        return "string"
    if h5py.check_vlen_dtype(dtype):
        return "variable-length array"
    if h5py.check_ref_dtype(dtype):
        return "reference"
    return str(dtype)[:_MAX_REASON]


def _filters(properties: h5py.h5p.PropDCID) -> tuple[Filter, ...]:
    return tuple(_filter(properties.get_filter(number)) for number in range(properties.get_nfilters()))


def _filter(description: tuple[int, int, tuple[int, ...], bytes]) -> Filter:
    number, _, options, name = description
    names = {h5z.FILTER_DEFLATE: "gzip", h5z.FILTER_SHUFFLE: "shuffle"}
    return Filter(number, names.get(number) or name.decode("utf-8", "replace") or str(number), tuple(options))


def _chunks(dataset: h5py.Dataset, limit: int) -> ChunkTable:
    """Where the chunks lie.

    Raises
    ------
    ValueError, OverflowError
        The index names what cannot be, or more than `limit` chunks.
    """
    width = len(dataset.chunks) + 3
    found = array("q")

    def note(info: h5d.StoreInfo) -> bool | None:
        found.extend((*info.chunk_offset, info.byte_offset, info.size, info.filter_mask))
        # Anything but None ends the pass.
        return True if len(found) > limit * width else None

    # One pass over the index; asking for chunk i by number is quadratic.
    dataset.id.chunk_iter(note)
    if len(found) > limit * width:
        raise ValueError(f"the file has more than {MAX_CHUNKS} chunks")
    # table: (chunks, ndim + 3)
    table = np.frombuffer(found, np.int64).reshape(-1, width)
    corners = table[:, :-3]
    chunk_shape = np.array(dataset.chunks, np.int64)
    if (corners < 0).any() or (corners >= np.array(dataset.shape, np.int64)).any() or (corners % chunk_shape).any():
        raise ValueError("its chunk index names chunks that lie beyond its shape")
    # Number of the chunk in C order over the grid.
    grid = [-(-extent // chunk) for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    strides = np.array([math.prod(grid[axis + 1 :]) for axis in range(len(grid))], np.int64)
    numbers = (corners // chunk_shape) @ strides
    order = np.argsort(numbers, kind="stable")
    return ChunkTable(numbers[order], *(np.ascontiguousarray(table[order, axis]) for axis in (-3, -2, -1)))


def _attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """What fits into the catalogue of an object's attributes; what does not is named."""
    try:
        # Most of many arrays have none, and asking for their names takes as long as opening them.
        if not h5a.get_num_attrs(item.id):
            return {}
        names = list(item.attrs)
    except Exception as error:
        return {"": f"(its attributes cannot be listed: {_reason(error, item.file.filename)})"}
    attributes: dict[str, Any] = {}
    for name in names[:MAX_ATTRIBUTES]:
        try:
            value = _attribute(item, name)
        except Exception:
            value = "(it cannot be read)"
        attributes[_decoded(name)[:MAX_NAME_BYTES]] = value
    if len(names) > MAX_ATTRIBUTES:
        attributes[""] = f"({len(names) - MAX_ATTRIBUTES} more are not shown)"
    return attributes


def _attribute(item: h5py.Group | h5py.Dataset, name: str | bytes) -> Any:
    attribute = item.attrs.get_id(name)
    kind = attribute.get_type()
    shape = attribute.shape or ()
    readable = kind.get_class() in _ATTRIBUTE_CLASSES and math.prod(shape) * kind.get_size() <= MAX_ATTRIBUTE_BYTES
    # Axes of no extent hide others of any.
    if readable and attribute.shape is not None and 0 not in shape:
        value = item.attrs[name]
        shown = _json_value(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
        if _json_bytes(shown) <= 4 * MAX_ATTRIBUTE_BYTES:
            return shown
    return f"({_describe(attribute.dtype)}, shape {list(shape)}, not shown)"


def _fuel_splits(file: h5py.File) -> list[dict[str, Any]] | None:
    """The attribute ``split`` of the root as Fuel writes it: for each split and field, from which row to which."""
    try:
        if "split" not in file.attrs:
            return None
        attribute = file.attrs.get_id("split")
        if not set(_FUEL) <= set(attribute.dtype.names or ()) or math.prod(attribute.shape) > MAX_ATTRIBUTES:
            return None
        return [
            {
                "split": _decoded(row["split"]),
                "source": _decoded(row["source"]),
                "start": int(row["start"]),
                "stop": int(row["stop"]),
                "indices": bool(row["indices"]),
                "available": bool(row["available"]),
            }
            for row in file.attrs["split"].reshape(-1)
        ]
    except Exception:
        # It stays what it is to those who show it.
        return None


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes) and (names := plain_list(value)) is not None:
        return _json_value(names)
    if isinstance(value, (bytes, str)):
        return _decoded(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


# The child process ---------------------------------------------------------------------------------------------------


def main(memory_bytes: int, timeout: float) -> None:
    """Answer paths until standard input ends."""
    answers = confine(memory_bytes)
    while line := sys.stdin.buffer.readline():
        if not _attend(json.loads(line), timeout, answers):
            return


def _attend(path: str, timeout: float, answers: int) -> bool:
    """Have one file inspected and answer; returns whether anybody still waits for answers."""
    ended, alive = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(ended)
            # The signal's default is to kill: it ends libhdf5 wherever it is.
            signal.setitimer(signal.ITIMER_REAL, timeout)
            answer = _answer(path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_frame(answers, answer)
            code = 0
        finally:
            os._exit(code)
    os.close(alive)
    # Both hang up: the fork's pipe when it has ended, the input when the server has. That the next path is there says
    # nothing.
    poll = select.poll()
    poll.register(ended, 0)
    poll.register(0, 0)
    is_wanted = ended in dict(poll.poll())
    if not is_wanted:
        os.kill(process, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(process, 0)
    if is_wanted and status:
        write_frame(answers, b"E" + _obituary(status, timeout).encode())
    return is_wanted


def _answer(path: str) -> bytes:
    try:
        return b"L" + dump_layout(inspect_file(path))
    except MemoryError:
        return b"Edescribing it takes more memory than inspection may use"
    except Exception as error:
        reason = _reason(error, path)
        if reason == "file signature not found":
            return b"Eit is no HDF5 file, or an empty one"
        return b"E" + f"it cannot be opened: {reason}".encode()


def _obituary(status: int, timeout: float) -> str:
    number = os.waitstatus_to_exitcode(status)
    if number == -signal.SIGALRM:
        return f"inspecting it took more than {timeout:g} s (H5FEED_INSPECT_TIMEOUT)"
    if number == -signal.SIGKILL:
        return "the system ended its inspection, most likely for the memory that it took"
    if number < 0:
        return f"inspecting it crashed libhdf5 ({signal.Signals(-number).name})"
    return "inspecting it failed"


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
