"""MATLAB's cells, and fields of its arrays of structs: arrays of references to the arrays of the group ``#refs#``."""

from __future__ import annotations

import math
from typing import Any

import h5py
from h5py import h5d, h5l, h5o, h5r, h5t

MAX_CELLS = 20_000
"""Maximum number of references that are followed. As many arrays are listed of a file."""

MAX_FOLLOWED = 5 * MAX_CELLS
"""The same for all arrays of a file, which may share entries."""

MAX_TEXT_BYTES = 1 << 20
"""Maximum bytes of the texts of an array of cells, which every worker has in memory."""

_GROUP = "#refs#"


class Cells:
    """Follows the references of a file.

    Parameters
    ----------
    file : h5py.File
    """

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._left = MAX_FOLLOWED
        self._names: dict[int, bytes] | None = None

    def entries_of(self, dataset: h5py.Dataset, stored: h5t.TypeID) -> dict[str, Any]:
        """What an array of references leads to, if MATLAB wrote it.

        Returns
        -------
        dict
            ``refers``, the paths; and ``text``, if all of them are texts. Empty for other arrays.
        """
        if stored.get_class() != h5t.REFERENCE or not stored.equal(h5t.STD_REF_OBJ):
            return {}
        try:
            count = math.prod(dataset.shape)
            if _GROUP not in self._file or not dataset.shape or not 0 < count <= min(MAX_CELLS, self._left):
                return {}
            self._left -= count
            if self._names is None:
                self._names = _names_in(self._file[_GROUP])
            references = dataset[()].reshape(-1).tolist()
            group = self._file[_GROUP].id
            # Not h5r.get_name, which searches the whole file for each reference.
            addresses = [h5o.get_info(h5r.dereference(one, dataset.id)).addr for one in references]
            entries = [self._names[address] for address in addresses]
            # In a damaged group, several objects may have the same name.
            if any(h5o.get_info(group, name).addr != address for name, address in zip(entries, addresses, strict=True)):
                return {}
            names = tuple(f"{_GROUP}/{name.decode()}" for name in entries)
            texts = _texts(self._file, references)
        except Exception:
            # It is then listed like any other array of references.
            return {}
        return {"refers": names} if texts is None else {"refers": names, "text": texts}


def _names_in(group: h5py.Group) -> dict[int, bytes]:
    """The names of the objects in a group by their addresses."""
    names: dict[int, bytes] = {}

    def add(name: bytes, info: h5l.LinkInfo) -> None:
        if info.type == h5l.TYPE_HARD:
            names.setdefault(info.u, name)

    group.id.links.iterate(add, info=True)
    return names


def _texts(file: h5py.File, references: list[h5py.Reference]) -> tuple[str, ...] | None:
    """The texts that references lead to; None if not all of them are texts of one line, if they are too long, or if
    rows of text cannot hold them: what is not UTF-16, or ends in NUL, which pads shorter texts."""
    texts, left = [], MAX_TEXT_BYTES
    for one in references:
        item = file[one]
        if not isinstance(item, h5py.Dataset) or item.attrs.get("MATLAB_class") != b"char":
            return None
        if item.attrs.get("MATLAB_empty"):
            texts.append("")
            continue
        if item.dtype.str != "<u2":
            return None
        # A virtual one is zeros where its source cannot be opened. A text of several lines is a matrix.
        is_stored = item.id.get_create_plist().get_layout() != h5d.VIRTUAL
        if not is_stored or item.size != max(item.shape, default=0) or 2 * item.size > left:
            return None
        left -= 2 * item.size
        try:
            text = item[()].tobytes().decode("utf-16-le")
        except UnicodeDecodeError:
            return None
        if text.endswith("\0"):
            return None
        texts.append(text)
    return tuple(texts)
