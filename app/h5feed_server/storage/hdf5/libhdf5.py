"""Calls h5py's libhdf5 through ctypes for what h5py has no API for: chunk options, chunk index types, filters.

Runs only in child processes, like everything that uses libhdf5.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import h5py
import numpy.typing as npt
from h5feed.stored.codecs import DECODERS, undo_filter
from h5feed.stored.layout import Filter
from h5py import h5d, h5p, h5s, h5t, h5z

EXTENSIBLE_ARRAY = 4
"""H5D_CHUNK_IDX_EARRAY: the chunk index of arrays with one unlimited axis."""

_KNOWN_PROPERTIES = {
    b"layout",
    b"efl",
    b"dset_oh_minimize",
    b"alloc_time_state",
    b"fill_value",
    b"pline",
    b"min dense attr",
    b"max compact attr",
    b"object header flags",
}
"""Dataset creation properties of HDF5 2.0. The first five describe where and how data is stored."""

_WHOLE_EDGES = 2
"""Chunk option H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS: chunks that extend beyond the array are stored unfiltered."""

_EXTERNAL_LINKS = 64
"""H5L_TYPE_EXTERNAL: the class of links into other files."""

_REVERSE = 0x0100
"""H5Z_FLAG_REVERSE: the filter is called for decoding."""

_id, _size = ctypes.c_int64, ctypes.c_size_t
_lib = ctypes.CDLL(h5py.h5.__file__)
_Visit = ctypes.CFUNCTYPE(ctypes.c_int, _id, ctypes.c_char_p, ctypes.c_void_p)
_Apply = ctypes.CFUNCTYPE(
    _size,
    ctypes.c_uint,
    _size,
    ctypes.POINTER(ctypes.c_uint),
    _size,
    ctypes.POINTER(_size),
    ctypes.POINTER(ctypes.c_void_p),
)
for _name, _arguments, _result in (
    ("H5Pget_chunk_opts", (_id, ctypes.POINTER(ctypes.c_uint)), ctypes.c_int),
    ("H5Dget_chunk_index_type", (_id, ctypes.POINTER(ctypes.c_int)), ctypes.c_int),
    ("H5Piterate", (_id, ctypes.POINTER(ctypes.c_int), _Visit, ctypes.c_void_p), ctypes.c_int),
    ("H5Pget_size", (_id, ctypes.c_char_p, ctypes.POINTER(_size)), ctypes.c_int),
    ("H5Pget", (_id, ctypes.c_char_p, ctypes.c_void_p), ctypes.c_int),
    ("H5Zregister", (ctypes.c_void_p,), ctypes.c_int),
    ("H5Lregister", (ctypes.c_void_p,), ctypes.c_int),
    ("H5Sselect_project_intersection", (_id, _id, _id), _id),
    ("H5Sselect_copy", (_id, _id), ctypes.c_int),
    ("H5Pget_fill_value", (_id, _id, ctypes.c_void_p), ctypes.c_int),
    ("H5Dfill", (ctypes.c_void_p, _id, ctypes.c_void_p, _id, _id), ctypes.c_int),
    ("H5allocate_memory", (_size, ctypes.c_bool), ctypes.c_void_p),
    ("H5free_memory", (ctypes.c_void_p,), ctypes.c_int),
):
    _function = getattr(_lib, _name)
    _function.argtypes, _function.restype = _arguments, _result


def edges_are_whole(properties: h5p.PropDCID) -> bool:
    """Whether chunks that extend beyond the array are stored without filters.

    Raises
    ------
    ValueError
        The chunks have unknown options.
    """
    options = ctypes.c_uint()
    if _lib.H5Pget_chunk_opts(properties.id, options) < 0 or options.value & ~_WHOLE_EDGES:
        raise ValueError(f"its chunks have unknown options: {options.value}")
    return bool(options.value)


def chunk_index(dataset: h5d.DatasetID) -> int:
    """HDF5's number of the type of an array's chunk index; -1 if it is not available."""
    kind = ctypes.c_int(-1)
    return kind.value if _lib.H5Dget_chunk_index_type(dataset.id, kind) >= 0 else -1


def intersection_of(here: h5s.SpaceID, there: h5s.SpaceID, wanted: h5s.SpaceID) -> h5s.SpaceID:
    """The part of the selection `there` that belongs to what is selected both `here` and in `wanted`.

    Parameters
    ----------
    here, there : h5s.SpaceID
        Selections of as many elements, which belong to each other in this order.
    wanted : h5s.SpaceID
        A selection in the same space as `here`.
    """
    made = _lib.H5Sselect_project_intersection(here.id, there.id, wanted.id)
    if made < 0:
        raise ValueError("libhdf5 cannot project a selection")
    return h5s.SpaceID(made)


def same_selection(selected: h5s.SpaceID, space: h5s.SpaceID) -> h5s.SpaceID:
    """Select in a space what is selected in another one; returns it."""
    if _lib.H5Sselect_copy(space.id, selected.id) < 0:
        raise ValueError("libhdf5 cannot copy a selection")
    return space


def fill_selected(properties: h5p.PropDCID, kind: h5t.TypeID, target: npt.NDArray[Any], places: h5s.SpaceID) -> None:
    """Write the fill value of an array to what is selected of `target`, of which the elements are of a type."""
    value = ctypes.create_string_buffer(kind.get_size())
    is_defined = properties.fill_value_defined() != h5d.FILL_VALUE_UNDEFINED
    if is_defined and _lib.H5Pget_fill_value(properties.id, kind.id, value) < 0:
        raise ValueError("libhdf5 cannot read the fill value")
    if _lib.H5Dfill(value, kind.id, target.ctypes.data, kind.id, places.id) < 0:
        raise ValueError("libhdf5 cannot write the fill value")


def unknown_properties(properties: h5p.PropDCID) -> list[str]:
    """Names of creation properties that are unknown to this version and do not have HDF5's default value."""
    usual = h5p.create(h5p.DATASET_CREATE)
    names = {*_names(properties.id)} - _KNOWN_PROPERTIES
    return sorted(name.decode("utf-8", "replace") for name in names if _value(properties, name) != _value(usual, name))


def has_unknown_properties(properties: h5p.PropDCID) -> bool:
    """Whether `unknown_properties` has any. Returns at once if this libhdf5 has only known properties."""
    return _has_later_properties() and bool(unknown_properties(properties))


@cache
def _has_later_properties() -> bool:
    return not _KNOWN_PROPERTIES.issuperset(_names(h5p.create(h5p.DATASET_CREATE).id))


def _names(properties: int) -> list[bytes]:
    visited: list[bytes] = []
    visit = _Visit(lambda _, name, __: visited.append(name) or 0)  # type: ignore[func-returns-value]
    _lib.H5Piterate(properties, ctypes.c_int(), visit, None)
    return visited


def _value(properties: h5p.PropDCID, name: bytes) -> bytes | None:
    size = _size()
    if _lib.H5Pget_size(properties.id, name, size) < 0:
        return None
    value = ctypes.create_string_buffer(max(1, size.value))
    return value.raw if _lib.H5Pget(properties.id, name, value) >= 0 else None


_Traverse = ctypes.CFUNCTYPE(_id, ctypes.c_char_p, _id, ctypes.c_void_p, _size, _id, _id)
_Query = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_char_p, ctypes.c_void_p, _size, ctypes.c_void_p, _size)


class _LinkClass(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_int),
        ("comment", ctypes.c_char_p),
        ("create", ctypes.c_void_p),
        ("move", ctypes.c_void_p),
        ("copy", ctypes.c_void_p),
        ("traverse", _Traverse),
        ("delete", ctypes.c_void_p),
        ("query", _Query),
    )


def refuse_external_links() -> None:
    """Prevent libhdf5 from following links into other files, in this process. Their targets can still be read."""
    if _lib.H5Lregister(ctypes.byref(_REFUSED)) < 0:
        raise RuntimeError("cannot prevent libhdf5 from following links into other files")


def _copy_value(_: bytes, value: int, nbytes: int, buffer: int | None, capacity: int) -> int:
    if buffer:
        ctypes.memmove(buffer, value, min(nbytes, capacity))
    return nbytes


_REFUSED = _LinkClass(
    1, _EXTERNAL_LINKS, b"by h5feed", None, None, None, _Traverse(lambda *_: -1), None, _Query(_copy_value)
)
"""Replaces libhdf5's own class of external links. Global, because libhdf5 may call it at any time."""


# Filters -------------------------------------------------------------------------------------------------------------


class _FilterClass(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_int),
        ("encoder_present", ctypes.c_uint),
        ("decoder_present", ctypes.c_uint),
        ("name", ctypes.c_char_p),
        ("can_apply", ctypes.c_void_p),
        ("set_local", ctypes.c_void_p),
        ("apply", _Apply),
    )


class Plugins:
    """Registers our decoders with libhdf5 for filters that it has only as plug-ins. No plug-in is ever loaded.

    Attributes
    ----------
    chunk_bytes : int
        Set this before reading to the size of the largest chunk that will be decoded: libhdf5 does not tell a filter
        the size of its chunk.
    numbers : frozenset of int
        The filters that were registered.
    """

    def __init__(self) -> None:
        self.chunk_bytes = 0
        self._classes: list[_FilterClass] = []
        for number in DECODERS:
            if not h5z.filter_avail(number):
                apply = _Apply(self._undo(number))
                one = _FilterClass(1, number, 0, 1, b"by h5feed", None, None, apply)
                if _lib.H5Zregister(ctypes.byref(one)) < 0:
                    raise RuntimeError(f"libhdf5 does not accept the filter {number}")
                self._classes.append(one)
        self.numbers = frozenset(one.id for one in self._classes)

    def _undo(self, number: int) -> Any:
        def apply(flags: int, count: int, options: Any, nbytes: int, capacity: Any, buffer: Any) -> int:
            try:
                if not flags & _REVERSE:
                    return 0
                stored = ctypes.string_at(buffer[0], nbytes)
                # The same limit as `decode_chunk` has for intermediate steps.
                limit = 2 * self.chunk_bytes + (64 << 10)
                decoded = undo_filter(Filter(number, "", tuple(options[:count])), stored, limit)
                # libhdf5 reads a whole chunk from the buffer, even if the filter returns fewer bytes.
                size = max(len(decoded), self.chunk_bytes)
                target = _lib.H5allocate_memory(size, True)
                if not target:
                    return 0
                ctypes.memmove(target, decoded.ctypes.data, len(decoded))
                _lib.H5free_memory(buffer[0])
                buffer[0], capacity[0] = target, size
                return len(decoded)
            except Exception:
                # 0 is how a filter reports failure. ctypes would print an exception and return 0.
                return 0

        return apply
