"""What an array's elements are on disk: which of them travel as they lie, and which only libhdf5 can convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5t

from ..layout import Padding
from .text import MAX_REASON, decoded

MAX_TEXT_BYTES = 1 << 12

_MAX_MEMBERS = 10_000

_MAX_DEPTH = 16
"""Types within types that are looked into."""

_PADDINGS: dict[int, Padding] = {h5t.STR_NULLTERM: "nullterm", h5t.STR_SPACEPAD: "spacepad"}
"""Of text that numpy does not take as it lies: it pads with zeros, and takes what lies behind one for text."""


_WHOLE_BITFIELDS = tuple(getattr(h5t, f"STD_B{bits}{order}") for bits in (8, 16, 32, 64) for order in ("LE", "BE"))


@dataclass(frozen=True)
class Item:
    """What an element is; or why it does not travel.

    Attributes
    ----------
    dtype : np.dtype
        As numpy has it.
    exact : bool
        It lies on disk, byte by byte, as numpy has it: no number is converted by libhdf5.
    padding : str or None
        Of text of a fixed length, what does not belong to it.
    """

    dtype: np.dtype[Any] = np.dtype("|u1")  # noqa: RUF009
    enum_names: dict[str, int] | None = None
    is_bfloat16: bool = False
    is_bitfield: bool = False
    padding: Padding | None = None
    exact: bool = True
    problem: str | None = None

    def known(self) -> dict[str, Any]:
        """As the layout of an array that we read ourselves has it."""
        return {
            "dtype": self.dtype.str,
            "enum_names": self.enum_names,
            "is_bfloat16": self.is_bfloat16,
            "is_bitfield": self.is_bitfield,
            "padding": self.padding,
        }

    def converted(self) -> dict[str, Any]:
        """As the layout of an array that h5py reads has it."""
        # h5py makes these float32, and cuts what does not belong to text.
        dtype = np.dtype("<f4") if self.is_bfloat16 else self.dtype
        return {"dtype": dtype.str, "enum_names": self.enum_names, "is_bitfield": self.is_bitfield}


class Member(NamedTuple):
    """One member of a record; an array of plain elements has one without a name.

    Attributes
    ----------
    offset : int or None
        Where it begins in a record on disk; None where that is not known for certain.
    """

    name: str
    kind: h5t.TypeID
    item: Item
    shape: tuple[int, ...]
    offset: int | None


def item_of(stored: h5t.TypeID) -> Item:
    """What elements of this type are. Those that are lists, or text of any length, are none."""
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
        # h5py has no word for asking how many of their bits count; those that are equal to these use all of them.
        exact = any(stored.equal(whole) for whole in _WHOLE_BITFIELDS)
    else:
        # Odd precisions, offsets and byte orders are converted by libhdf5.
        exact = dtype.kind in "iufc" and bool(stored.equal(h5t.py_create(dtype)))
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        return Item(problem=f"its type {describe(dtype)} is not one that this version serves")
    return Item(dtype, enum_names, is_bitfield=kind == h5t.BITFIELD, exact=exact)


def list_item_of(stored: h5t.TypeID) -> Item:
    """What the items of lists, or the bytes of text, of any length are, as h5py gives them."""
    if stored.get_class() == h5t.STRING:
        return Item(np.dtype("|S1"))
    item = item_of(stored.get_super())
    if item.problem is None and (item.dtype.kind == "c" or item.dtype.byteorder == ">" or not item.exact):
        # Of big-endian ones, h5py gives the bytes as if they were not.
        return Item(problem=f"its lists are of {item.dtype.str} numbers, which this version does not serve")
    if item.problem is None and item.is_bfloat16:
        return Item(problem="its lists are of bfloat16, which this version does not serve")
    if item.problem is None and item.dtype.kind == "S" and item.dtype.itemsize > 1:
        return Item(problem="its lists are of text, which this version does not serve")
    return item


def is_ragged(stored: h5t.TypeID) -> bool:
    """Whether each element is a list, or text, of its own length."""
    kind = stored.get_class()
    return bool(kind == h5t.VLEN or (kind == h5t.STRING and stored.is_variable_str()))


def is_table(stored: h5t.TypeID) -> bool:
    """Whether elements are records; complex numbers look like records of two to HDF5."""
    return bool(stored.get_class() == h5t.COMPOUND and stored.dtype.kind != "c")


def _is_bfloat16(stored: h5t.TypeID) -> bool:
    """Whether elements are the upper halves of float32: a sign, 8 bits of exponent and 7 of mantissa."""
    if stored.get_class() != h5t.FLOAT or stored.get_size() != 2:
        return False
    return bool(stored.get_fields() == (15, 7, 8, 0, 7) and stored.get_ebias() == 127)


def members_of(stored: h5t.TypeCompoundID, address_bytes: int) -> list[Member]:
    """The members of a record, in their order.

    Parameters
    ----------
    address_bytes : int
        Bytes of a position in the file.
    """
    count = min(stored.get_nmembers(), _MAX_MEMBERS)
    members: list[Member] = []
    # libhdf5 says where members lie in memory. Each that is longer there, or shorter, than on disk has moved those that
    # lie behind it.
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
            item = Item(problem="its lists lie along more than one axis") if shape else list_item_of(kind)
        elif is_table(kind):
            item = Item(problem="it is a record itself")
        else:
            item = item_of(kind)
        members.append(Member(name, kind, item, tuple(shape), offsets[number]))
    return members


def disk_bytes(stored: h5t.TypeID, address_bytes: int, depth: int = 0) -> int | None:
    """Bytes of an element on disk, which libhdf5 does not say; None where they are not known for certain.

    Lists, and text, of any length are a length (4), the address of a heap, and a number in it (4). See the HDF5 file
    format, https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, section VIII.
    """
    kind = stored.get_class()
    if is_ragged(stored):
        return 8 + address_bytes
    if kind == h5t.REFERENCE:
        # Those that HDF5 1.12 has brought are of another size in memory, too.
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
    """Whether there are lists, or text, of any length in an element: read raw, they are addresses in memory."""
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
    """A type, in a reason."""
    if h5py.check_string_dtype(dtype):
        return "string"
    if h5py.check_vlen_dtype(dtype):
        return "variable-length array"
    if h5py.check_ref_dtype(dtype):
        return "reference"
    return str(dtype)[:MAX_REASON]
