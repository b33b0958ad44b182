"""Layouts of the arrays of an HDF5 file, as libhdf5 describes them. Runs only in a child process, see `inspect`.

A wrong layout would serve wrong bytes. So every property that an array can have is checked, and if anything is
uncertain (the size of a type on disk, an unknown property, an unknown kind of chunk index), h5py reads its rows.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import h5py
import numpy as np
from h5feed.stored.codecs import FILTER_NAMES, unsupported
from h5feed.stored.layout import MAX_CHUNK_BYTES, MAX_RECORD_BYTES, ArrayLayout, ChunkTable, Filter, check_array
from h5feed.stored.packing import Packing, packing_of
from h5py import h5d, h5s, h5t, h5z

from .attributes import attributes_of, dimensions_of, packing_attributes
from .cells import Cells
from .guard import Guard
from .h5py_reader import virtual_parts
from .libhdf5 import EXTENSIBLE_ARRAY, Plugins, chunk_index, edges_are_whole, has_unknown_properties
from .stored_types import (
    MAX_TEXT_BYTES,
    Item,
    Member,
    disk_bytes,
    holds_lists,
    is_ragged,
    is_table,
    item_of,
    list_item_of,
    members_of,
)
from .text import decoded

MAX_CHUNKS = 8 << 20
"""Bound on the chunks of all arrays of a file. Each takes 32 bytes in the memory of every worker."""

MAX_INLINE_BYTES = 1 << 16
"""Compact arrays, and text that may be class names, are stored in the layout up to this size."""

_SCALAR = "it is a scalar: it has no rows"

_CHUNK_INDICES = range(6)
"""Kinds of chunk indices that HDF5 2.0 has."""


class Arrays:
    """Describes the arrays of one file.

    Parameters
    ----------
    file : h5py.File
    nbytes : int
        Size of the file.
    members : tuple of str
        Names of the other files, if the file is a split file or a file family.
    plugins : Plugins
        Filters for libhdf5.
    guard : Guard
        Compares layouts with libhdf5.
    """

    def __init__(self, file: h5py.File, nbytes: int, members: tuple[str, ...], plugins: Plugins, guard: Guard) -> None:
        self._nbytes = nbytes
        self._members = members
        self._plugins = plugins
        self._guard = guard
        self._address_bytes, _ = file.id.get_create_plist().get_sizes()
        self._chunks_left = MAX_CHUNKS
        self._cells = Cells(file)

    def describe(self, dataset: h5py.Dataset) -> list[ArrayLayout]:
        """Return the layout of a dataset; for a table of records, one for each member.

        Paths are relative to the dataset: empty, or ``.member``.
        """
        properties = dataset.id.get_create_plist()
        kind = properties.get_layout()
        # Check this first: the shape of a virtual array depends on its sources, which may include the array itself.
        if kind == h5d.VIRTUAL:
            return self._virtual(dataset, properties)
        if kind not in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT):
            return [_unreadable(f"it is of layout class {kind}, which this version does not read")]
        if properties.get_external_count() > 1:
            return [_unreadable("its data is in several external files")]
        known: dict[str, Any] = {"path": "", "shape": tuple(dataset.shape or ()), "attributes": attributes_of(dataset)}
        if dataset.shape is None:
            return [_refused(known, "it has no shape (a null dataspace)")]
        stored = dataset.id.get_type()
        self._plugins.chunk_bytes = _chunk_bytes(dataset, stored, self._address_bytes)
        known["text"] = _text(dataset, stored)
        parts = self._parts(stored)
        if all(part.item.problem is not None for part in parts):
            last = parts[-1]
            problem = f"its member {last.name!r}: {last.item.problem}" if last.name else last.item.problem
            known |= self._cells.entries_of(dataset, stored)
            return [_refused(known, problem or "its records have no members")]
        if not dataset.shape:
            return [_scalar(known, dataset, stored, parts[0]) if not self._members else _refused(known, _SCALAR)]
        if (record := stored.get_size()) > MAX_RECORD_BYTES:
            problem = f"its records have {record} bytes, more than the {MAX_RECORD_BYTES} that are read"
            return [_refused(known, problem)]
        known["packing"] = _packing(dataset, parts)
        known["dimensions"] = dimensions_of(dataset)
        known["filters"] = _filters(properties) if kind == h5d.CHUNKED else ()
        own = self._own(dataset, properties, stored, parts, known)
        if own is not None:
            own = [self._checked(one) for one in own]
            # h5py cannot look up names that are not UTF-8.
            pairs = [(part.name, one) for part, one in zip(parts, own, strict=True) if "\ufffd" not in part.name]
            if self._guard.agrees(dataset, [(n, one) for n, one in pairs if not one.unreadable and not one.by_h5py]):
                return own
        problem = self._unknown_filter(known["filters"], properties)
        if properties.get_external_count():
            problem = "its data is in an external file in a way that this version does not read"
        return [self._checked(one) for one in _through_h5py(known, parts, problem, self._members)]

    def _checked(self, array: ArrayLayout) -> ArrayLayout:
        """The layout if it is valid, else an unreadable one with the reason."""
        try:
            check_array(array)
            if array.offset is not None and array.external is None:
                end = array.offset + array.rows * array.stored_row_bytes
                if end > self._nbytes:
                    raise ValueError(f"its data would end at byte {end}, but the file ends at {self._nbytes}")
            if array.chunks is not None and len(array.chunks.numbers):
                end = int((array.chunks.offsets + array.chunks.sizes).max())
                if end > self._nbytes:
                    raise ValueError(f"one of its chunks would end at byte {end}, but the file ends at {self._nbytes}")
        except ValueError as error:
            return _unreadable(decoded(str(error)), array.path)
        return array

    def _parts(self, stored: h5t.TypeID) -> list[Member]:
        if is_table(stored):
            return members_of(stored, self._address_bytes) or [
                Member("", stored, Item(problem="its records have no members"), (), 0)
            ]
        if stored.get_class() == h5t.ARRAY:
            # Treat elements that are arrays as records of one member without a name.
            kind = stored.get_super()
            item = Item(problem="its elements are lists, or arrays, of lists") if is_ragged(kind) else item_of(kind)
            if is_table(kind):
                item = Item(problem="its elements are arrays of records")
            return [Member("", kind, item, stored.get_array_dims(), 0)]
        return [Member("", stored, list_item_of(stored) if is_ragged(stored) else item_of(stored), (), 0)]

    def _own(
        self,
        dataset: h5py.Dataset,
        properties: h5py.h5p.PropDCID,
        stored: h5t.TypeID,
        parts: list[Member],
        known: dict[str, Any],
    ) -> list[ArrayLayout] | None:
        """Layouts to read the bytes without libhdf5; None if they are not certain."""
        kind, shape = properties.get_layout(), known["shape"]
        record = disk_bytes(stored, self._address_bytes)
        nested = any(part.name or part.shape for part in parts)
        if self._members or record is None or not 0 < record <= MAX_RECORD_BYTES or (nested and len(shape) > 1):
            return None
        if has_unknown_properties(properties) or unsupported(known["filters"]) is not None:
            return None
        where = {"stored_bytes": dataset.id.get_storage_size()}
        if properties.get_external_count():
            name, begin, nbytes = properties.get_external(0)
            if nbytes < math.prod(shape) * record:
                return None
            where |= {"external": decoded(name), "offset": int(begin)}
        elif kind == h5d.CONTIGUOUS:
            # Without storage the offset has no meaning: every element is the fill value.
            where["offset"] = dataset.id.get_offset() if where["stored_bytes"] else None
            if where["stored_bytes"] not in (0, math.prod(shape) * record):
                return None
        elif kind == h5d.CHUNKED:
            chunks = self._placed(dataset, properties, record)
            if chunks is None:
                return None
            most = dataset.maxshape[0]
            where |= {"chunk_shape": dataset.chunks, "chunks": chunks, "extends": most is None or most > shape[0]}
        elif holds_lists(stored) or where["stored_bytes"] != math.prod(shape) * record:
            return None
        else:
            where["inline"] = _raw(dataset, stored)
        # Do not read fill values of types that are not served: damaged files have them, and libhdf5 crashes on some.
        defined = properties.fill_value_defined() == h5d.FILL_VALUE_USER_DEFINED
        intact = all(_is_plain(part) for part in parts) and stored.get_class() != h5t.ARRAY
        if defined and not intact and not _is_written(dataset):
            return None
        where["fill"] = _fill(properties, stored, parts[0].item.dtype) if defined and intact else bytes(record)
        return [
            self._member_layout(part, known, where, record, self._unknown_filter(known["filters"], properties))
            for part in parts
        ]

    def _member_layout(
        self, part: Member, known: dict[str, Any], where: dict[str, Any], record: int, problem: str | None
    ) -> ArrayLayout:
        if part.item.problem is not None:
            return _unreadable(part.item.problem, _path_of(part))
        if is_ragged(part.kind) or not part.item.exact or part.offset is None:
            return _one_through_h5py(known, part, problem, ())
        own = known | where | part.item.known() | {"path": _path_of(part)}
        if part.name or part.shape:
            own |= {"shape": (*known["shape"], *part.shape), "record": (record, part.offset)}
        return ArrayLayout(**own)

    def _placed(self, dataset: h5py.Dataset, properties: h5py.h5p.PropDCID, record: int) -> ChunkTable | None:
        """Positions of the chunks; None if they are not certain."""
        index, nbytes = chunk_index(dataset.id), math.prod(dataset.chunks) * record
        if nbytes >= MAX_CHUNK_BYTES or index not in _CHUNK_INDICES:
            return None
        # For arrays that grow along an axis other than the first, libhdf5 reports wrong chunk coordinates: it stores
        # the chunks in the order of the axis that grows, but numbers them as if that were the first.
        if index == EXTENSIBLE_ARRAY and dataset.maxshape[0] is not None:
            return None
        whole_edges = edges_are_whole(properties)
        table = _chunks(dataset, self._chunks_left, properties.get_nfilters() if whole_edges else 0)
        if table is None:
            return None
        self._chunks_left -= len(table.numbers)
        every = (1 << properties.get_nfilters()) - 1
        plain = table.masks & every == every
        return table if (table.sizes[plain] == nbytes).all() else None

    def _unknown_filter(self, filters: tuple[Filter, ...], properties: h5py.h5p.PropDCID) -> str | None:
        """Why h5py cannot undo the filters; None if it can."""
        for number, one in zip(range(properties.get_nfilters()), filters, strict=False):
            ours = one.id in self._plugins.numbers
            if (ours or not h5z.filter_avail(properties.get_filter(number)[0])) and (why := unsupported([one])):
                return why
        return None

    def _virtual(self, dataset: h5py.Dataset, properties: h5py.h5p.PropDCID) -> list[ArrayLayout]:
        """Layouts of a virtual array, without calls that would make libhdf5 open its sources."""
        others = virtual_parts(properties)
        if not others:
            return [_unreadable("it is a virtual array without sources")]
        space = properties.get_virtual_vspace(0)
        shape = space.get_simple_extent_dims()
        if shape != space.get_simple_extent_dims(True):
            return [_unreadable("it is a virtual array that grows with its sources, which is not supported")]
        parts = self._parts(dataset.id.get_type())
        known: dict[str, Any] = {"path": "", "shape": shape, "attributes": attributes_of(dataset)}
        known["packing"] = _packing(dataset, parts)
        names = tuple({decoded(name): None for name, _ in others if name != "."})
        return [self._checked(one) for one in _through_h5py(known, parts, None, names)]


def _path_of(part: Member) -> str:
    return f".{part.name.replace('/', '.')}" if part.name else ""


def _unreadable(reason: str, path: str = "") -> ArrayLayout:
    return ArrayLayout(path, (), "|u1", unreadable=reason)


def _refused(known: dict[str, Any], reason: str) -> ArrayLayout:
    given = {name: known[name] for name in ("path", "shape", "attributes", "text", "refers") if name in known}
    return ArrayLayout(**given, dtype="|u1", unreadable=reason)


def _scalar(known: dict[str, Any], dataset: h5py.Dataset, stored: h5t.TypeID, part: Member) -> ArrayLayout:
    """A scalar: it has no rows and is unreadable as an array, but many files with one value each may form a column."""
    value: bytes | None = None
    given: dict[str, Any] = {"dtype": "|u1"} | {
        name: known[name] for name in ("path", "shape", "attributes", "text") if name in known
    }
    if stored.get_class() == h5t.STRING and stored.is_variable_str():
        text = dataset[()]
        if isinstance(text, bytes) and 0 < len(text) <= MAX_TEXT_BYTES:
            given["dtype"], value = f"|S{len(text)}", text
    elif stored.get_class() not in (h5t.ARRAY, h5t.VLEN) and not part.name and part.item.exact:
        given |= part.item.known()
        value = _raw(dataset, stored)
    return ArrayLayout(**given, unreadable=_SCALAR, scalar=value)


def _through_h5py(
    known: dict[str, Any], parts: list[Member], problem: str | None, others: tuple[str, ...]
) -> list[ArrayLayout]:
    """Layouts of a dataset whose rows h5py reads; for a table, one for each member."""
    return [_one_through_h5py(known, part, problem, others) for part in parts]


def _one_through_h5py(known: dict[str, Any], part: Member, problem: str | None, others: tuple[str, ...]) -> ArrayLayout:
    own = known | {"path": _path_of(part), "shape": (*known["shape"], *part.shape), "by_h5py": True, "others": others}
    problem = part.item.problem or problem
    own["ragged"] = is_ragged(part.kind)
    if own["ragged"] and math.prod(own["shape"][1:]) == 1:
        # One list a row: drop the axes of length 1.
        own["shape"] = own["shape"][:1]
    if own["ragged"] and len(own["shape"]) > 1:
        problem = problem or "it has lists along more than one axis"
    if part.name and "\ufffd" in part.name:
        problem = problem or "its name is not UTF-8"
    if not own["shape"]:
        problem = problem or _SCALAR
    if problem is not None:
        return _refused(own, problem)
    return ArrayLayout(**own | part.item.converted() | {"member": part.name or None})


def _packing(dataset: h5py.Dataset, parts: list[Member]) -> Packing | None:
    if len(parts) != 1 or parts[0].name or parts[0].item.problem or is_ragged(parts[0].kind):
        return None
    # The dtype of bfloat16 is an integer, which holds only its bits.
    return None if parts[0].item.is_bfloat16 else packing_of(packing_attributes(dataset), parts[0].item.dtype)


def _is_plain(part: Member) -> bool:
    """Whether a member is the same in numpy as on disk, so that h5py can return records with it."""
    return part.item.problem is None and part.item.exact and not part.item.is_bfloat16 and not is_ragged(part.kind)


def _chunk_bytes(dataset: h5py.Dataset, stored: h5t.TypeID, address_bytes: int) -> int:
    return math.prod(dataset.chunks or (0,)) * (disk_bytes(stored, address_bytes) or stored.get_size())


def _fill(properties: h5py.h5p.PropDCID, stored: h5t.TypeID, dtype: np.dtype[Any]) -> bytes:
    """The fill value: one element, or one record, as stored."""
    value = np.zeros((), stored.dtype if is_table(stored) else dtype)
    if stored.get_size() == value.itemsize:
        properties.get_fill_value(value)
    return value.tobytes()


def _is_written(dataset: h5py.Dataset) -> bool:
    """Whether every element is allocated in the file."""
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size())
    cells = (-(-extent // width) for extent, width in zip(dataset.shape, dataset.chunks, strict=True))
    return bool(dataset.id.get_num_chunks() == math.prod(cells))


def _raw(dataset: h5py.Dataset, stored: h5t.TypeID) -> bytes:
    """All elements as they are stored."""
    nbytes = math.prod(dataset.shape) * stored.get_size()
    if nbytes > MAX_INLINE_BYTES:
        raise ValueError(f"compact arrays cannot have {nbytes} bytes")
    out = np.empty(nbytes, np.uint8)
    dataset.id.read(h5s.ALL, h5s.ALL, out, mtype=stored)
    return out.tobytes()


def _text(dataset: h5py.Dataset, stored: h5t.TypeID) -> tuple[str, ...] | None:
    """The values of a short one-dimensional array of strings, which may be names of classes or groups; else None."""
    if stored.get_class() != h5t.STRING or len(dataset.shape) != 1:
        return None
    # A small compressed array may decode to a large one, so count the decoded size. The length of variable-length
    # strings is known only after reading; it is checked below.
    claimed = max(dataset.id.get_storage_size(), dataset.shape[0] * max(16, stored.get_size()))
    if claimed > MAX_INLINE_BYTES:
        return None
    try:
        values = [bytes(value) for value in dataset[()].tolist()]
    except Exception:
        # Not an error here: a request for its rows gets the reason.
        return None
    if sum(map(len, values)) > MAX_INLINE_BYTES:
        return None
    return tuple(value.decode("utf-8", "replace") for value in values)


def _filters(properties: h5py.h5p.PropDCID) -> tuple[Filter, ...]:
    return tuple(_filter(properties.get_filter(number)) for number in range(properties.get_nfilters()))


def _filter(description: tuple[int, int, tuple[int, ...], bytes]) -> Filter:
    number, _, options, name = description
    # If the file has no name for the filter, libhdf5 gives the name of the registered filter.
    return Filter(number, FILTER_NAMES.get(number) or name.decode("utf-8", "replace") or str(number), tuple(options))


def _chunks(dataset: h5py.Dataset, limit: int, unfiltered: int) -> ChunkTable | None:
    """Positions of the chunks; None if the index has invalid ones, such as chunks outside the array.

    Parameters
    ----------
    dataset : h5py.Dataset
    limit : int
        Maximum number of chunks.
    unfiltered : int
        Number of filters that are skipped for chunks that extend beyond the array.

    Raises
    ------
    ValueError
        There are more than `limit` chunks.
    OverflowError
        A number of the index does not fit into an int64.
    """
    width = len(dataset.chunks) + 3
    entries = array("q")

    def note(info: h5d.StoreInfo) -> bool | None:
        entries.extend((*info.chunk_offset, info.byte_offset, info.size, info.filter_mask))
        # Any return value except None stops the iteration.
        return True if len(entries) > limit * width else None

    # One pass over the index. Looking up the chunks by number would take quadratic time.
    dataset.id.chunk_iter(note)
    if len(entries) > limit * width:
        raise ValueError(f"the file has more than {MAX_CHUNKS} chunks")
    # table: (chunks, ndim + 3)
    table = np.frombuffer(entries, np.int64).reshape(-1, width)
    if dataset.file.swmr_mode:
        # The writer may have added chunks since the shape was read.
        table = table[(table[:, :-3] < np.array(dataset.shape, np.int64)).all(axis=1)]
    corners = table[:, :-3]
    chunk_shape = np.array(dataset.chunks, np.int64)
    if (corners < 0).any() or (corners >= np.array(dataset.shape, np.int64)).any() or (corners % chunk_shape).any():
        return None
    # Number of the chunk in C order over the grid.
    grid = [-(-extent // chunk) for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    strides = np.array([math.prod(grid[axis + 1 :]) for axis in range(len(grid))], np.int64)
    numbers = (corners // chunk_shape) @ strides
    order = np.argsort(numbers, kind="stable")
    if unfiltered:
        over = (corners + chunk_shape > np.array(dataset.shape, np.int64)).any(axis=1)
        table = table.copy()
        table[over, -1] |= (1 << unfiltered) - 1
    return ChunkTable(numbers[order], *(np.ascontiguousarray(table[order, axis]) for axis in (-3, -2, -1)))
