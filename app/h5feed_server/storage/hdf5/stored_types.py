"""Types of elements on disk: which can be served as they are stored, and which only libhdf5 can convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5feed.stored.layout import Padding
from h5py import h5t

from .text import MAX_REASON, decoded

MAX_TEXT_BYTES = 1 << 12

_MAX_MEMBERS = 10_000

_MAX_DEPTH = 16
"""Maximum depth of nested types."""

_PADDINGS: dict[int, Padding] = {h5t.STR_NULLTERM: "nullterm", h5t.STR_SPACEPAD: "spacepad"}
"""Padding that numpy does not use. It pads text with zeros, and takes bytes after a zero for text."""


_WHOLE_BITFIELDS = tuple(getattr(h5t, f"STD_B{bits}{order}") for bits in (8, 16, 32, 64) for order in ("LE", "BE"))


@dataclass(frozen=True)
class Item:
    """The type of an element, or why it cannot be served.

    Attributes
    ----------
    dtype : np.dtype
    enum_names : dict of str to int, or None
        Names of an enum's numbers.
    is_bfloat16 : bool
        `dtype` is a 2-byte integer that holds the bits.
    is_bitfield : bool
    padding : str or None
        How text of a fixed length is padded, if not with zeros.
    exact : bool
        The bytes on disk are those of `dtype`: libhdf5 need not convert them.
    problem : str or None
        Why elements of this type cannot be served.
    """

    dtype: np.dtype[Any] = np.dtype("|u1")  # noqa: RUF009
    enum_names: dict[str, int] | None = None
    is_bfloat16: bool = False
    is_bitfield: bool = False
    padding: Padding | None = None
    exact: bool = True
    problem: str | None = None

    def known(self) -> dict[str, Any]:
        """Arguments of `ArrayLayout` for arrays that are read without libhdf5."""
        return {
            "dtype": self.dtype.str,
            "enum_names": self.enum_names,
            "is_bfloat16": self.is_bfloat16,
            "is_bitfield": self.is_bitfield,
            "padding": self.padding,
        }

    def converted(self) -> dict[str, Any]:
        """Arguments of `ArrayLayout` for arrays that h5py reads."""
        # h5py converts bfloat16 to float32, and removes the padding of text.
        dtype = np.dtype("<f4") if self.is_bfloat16 else self.dtype
        return {"dtype": dtype.str, "enum_names": self.enum_names, "is_bitfield": self.is_bitfield}


class Member(NamedTuple):
    """One member of a record. Elements that are not records count as records of one member without a name.

    Attributes
    ----------
    name : str
    kind : h5t.TypeID
        The type of one element of the member.
    item : Item
    shape : tuple of int
        Shape of a member that is an array; else empty.
    offset : int or None
        Where the member begins in a record on disk; None if that is not certain.
    """

    name: str
    kind: h5t.TypeID
    item: Item
    shape: tuple[int, ...]
    offset: int | None


def item_of(stored: h5t.TypeID) -> Item:
    """The item of a type of fixed size. Lists and variable-length text give a problem; see `list_item_of`."""
    if is_ragged(stored):
        return Item(problem="its lists hold lists")
    try:
        dtype = stored.dtype
    except (TypeError, ValueError) as error:
        return Item(problem=f"h5py has no type for its elements: {' '.join(str(error).split())[:MAX_REASON]}")
    enum_names = None
    if h5py.check_string_dtype(dtype):
        if 0 < dtype.itemsize <= MAX_TEXT_BYTES:
            return Item(np.dtype(f"S{dtype.itemsize}"), padding=_PADDINGS.get(stored.get_strpad()))
        return Item(problem=f"its strings have {dtype.itemsize} bytes, more than the {MAX_TEXT_BYTES} that are read")
    if _is_bfloat16(stored):
        order = "<" if stored.get_order() == h5t.ORDER_LE else ">"
        return Item(np.dtype(f"{order}u2"), is_bfloat16=True)
    kind = stored.get_class()
    if kind == h5t.ENUM:
        if dtype.kind != "b":
            enum_names = {decoded(key): int(value) for key, value in (h5py.check_enum_dtype(dtype) or {}).items()}
            dtype = np.dtype(dtype.str)
        base = stored.get_super()
        exact = base.get_size() == dtype.itemsize and bool(base.equal(h5t.py_create(np.dtype(base.dtype.str))))
    elif kind == h5t.BITFIELD:
        # h5py cannot tell the precision of bitfields, but those that are equal to one of these use all their bits.
        exact = any(stored.equal(whole) for whole in _WHOLE_BITFIELDS)
    else:
        # libhdf5 converts unusual precisions, bit offsets and byte orders.
        exact = dtype.kind in "iufc" and bool(stored.equal(h5t.py_create(dtype)))
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        return Item(problem=f"its type {describe(dtype)} is not supported")
    return Item(dtype, enum_names, is_bitfield=kind == h5t.BITFIELD, exact=exact)


def list_item_of(stored: h5t.TypeID) -> Item:
    """The item of variable-length lists as h5py returns them; for variable-length text, single bytes."""
    if stored.get_class() == h5t.STRING:
        return Item(np.dtype("|S1"))
    item = item_of(stored.get_super())
    if item.problem is None and (item.dtype.kind == "c" or item.dtype.byteorder == ">" or not item.exact):
        # h5py returns big-endian items without swapping the bytes.
        return Item(problem=f"its lists are of {item.dtype.str} numbers, which are not supported")
    if item.problem is None and item.is_bfloat16:
        return Item(problem="its lists are of bfloat16, which is not supported")
    if item.problem is None and item.dtype.kind == "S" and item.dtype.itemsize > 1:
        return Item(problem="its lists are of text, which is not supported")
    return item


def is_ragged(stored: h5t.TypeID) -> bool:
    """Whether elements are variable-length lists or text."""
    kind = stored.get_class()
    return bool(kind == h5t.VLEN or (kind == h5t.STRING and stored.is_variable_str()))


def is_table(stored: h5t.TypeID) -> bool:
    """Whether elements are records. Complex numbers are not, although HDF5 may store them as records of two numbers."""
    return bool(stored.get_class() == h5t.COMPOUND and stored.dtype.kind != "c")


def _is_bfloat16(stored: h5t.TypeID) -> bool:
    """Whether elements are the upper halves of float32: a sign, 8 bits of exponent and 7 of mantissa."""
    if stored.get_class() != h5t.FLOAT or stored.get_size() != 2:
        return False
    return bool(stored.get_fields() == (15, 7, 8, 0, 7) and stored.get_ebias() == 127)


def members_of(stored: h5t.TypeCompoundID, address_bytes: int) -> list[Member]:
    """Return the members of a record, in the order of the file.

    Parameters
    ----------
    stored : h5t.TypeCompoundID
    address_bytes : int
        Size of an address in the file.
    """
    count = min(stored.get_nmembers(), _MAX_MEMBERS)
    members: list[Member] = []
    # libhdf5 reports the offsets of members in memory. A member whose size differs between memory and disk shifts all
    # members after it.
    in_order = sorted(range(count), key=stored.get_member_offset)
    moved: int | None = 0
    offsets: dict[int, int | None] = {}
    for number in in_order:
        offsets[number] = None if moved is None else stored.get_member_offset(number) + moved
        kind = stored.get_member_type(number)
        nbytes = disk_bytes(kind, address_bytes)
        moved = None if moved is None or nbytes is None else moved + nbytes - kind.get_size()
    for number in range(count):
        name, kind, shape = decoded(stored.get_member_name(number)), stored.get_member_type(number), ()
        if kind.get_class() == h5t.ARRAY:
            shape, kind = kind.get_array_dims(), kind.get_super()
        if kind.get_class() == h5t.ARRAY:
            item = Item(problem="its elements are arrays of arrays")
        elif is_ragged(kind):
            item = Item(problem="it has lists along more than one axis") if shape else list_item_of(kind)
        elif is_table(kind):
            item = Item(problem="it is a record itself")
        else:
            item = item_of(kind)
        members.append(Member(name, kind, item, tuple(shape), offsets[number]))
    return members


def disk_bytes(stored: h5t.TypeID, address_bytes: int, depth: int = 0) -> int | None:
    """Return the size of an element on disk, which libhdf5 does not report; None if it is not certain.

    Variable-length lists and text are stored as a length (4 bytes), the address of a heap, and an index in it (4
    bytes). See the HDF5 file format, https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, section VIII.

    Parameters
    ----------
    stored : h5t.TypeID
    address_bytes : int
        Size of an address in the file.
    depth : int
        Number of types that this one is nested in.
    """
    kind = stored.get_class()
    if is_ragged(stored):
        return 8 + address_bytes
    if kind == h5t.REFERENCE:
        # The reference types of HDF5 1.12 and later (H5R_ref_t) are neither of these.
        if stored.equal(h5t.STD_REF_OBJ):
            return address_bytes
        return 4 + address_bytes if stored.equal(h5t.STD_REF_DSETREG) else None
    if depth > _MAX_DEPTH:
        return None
    if kind == h5t.ARRAY:
        item = stored.get_super()
        nbytes = disk_bytes(item, address_bytes, depth + 1)
        return None if nbytes is None else stored.get_size() // max(1, item.get_size()) * nbytes
    if kind == h5t.COMPOUND:
        total: int = stored.get_size()
        for number in range(min(stored.get_nmembers(), _MAX_MEMBERS)):
            member = stored.get_member_type(number)
            nbytes = disk_bytes(member, address_bytes, depth + 1)
            if nbytes is None:
                return None
            total += nbytes - member.get_size()
        return total
    size: int = stored.get_size()
    return size


def holds_lists(stored: h5t.TypeID, depth: int = 0) -> bool:
    """Whether an element contains variable-length lists or text, which libhdf5 returns as pointers."""
    kind = stored.get_class()
    if is_ragged(stored) or depth > _MAX_DEPTH:
        return True
    if kind == h5t.ARRAY:
        return holds_lists(stored.get_super(), depth + 1)
    if kind == h5t.COMPOUND:
        count = min(stored.get_nmembers(), _MAX_MEMBERS)
        return any(holds_lists(stored.get_member_type(number), depth + 1) for number in range(count))
    return False


def describe(dtype: np.dtype[Any]) -> str:
    """A short name of a dtype, for messages."""
    if h5py.check_string_dtype(dtype):
        return "string"
    if h5py.check_vlen_dtype(dtype):
        return "variable-length array"
    if h5py.check_ref_dtype(dtype):
        return "reference"
    return str(dtype)[:MAX_REASON]
