"""MATLAB's cells, and fields of its arrays of structs: arrays of references to the arrays of the group ``#refs#``."""

from __future__ import annotations

import math
from typing import Any

import h5py
from h5py import h5r, h5t

from .text import decoded

MAX_CELLS = 20_000
"""Maximum number of references that are followed. As many arrays are listed of a file."""

MAX_TEXT_BYTES = 1 << 20
"""Maximum bytes of the texts of an array of cells, which every worker has in memory."""

_GROUP = "#refs#"


def cells_of(dataset: h5py.Dataset, stored: h5t.TypeID) -> dict[str, Any]:
    """What an array of references leads to, if MATLAB wrote it.

    Returns
    -------
    dict
        ``refers``, the paths; and ``text``, if all of them are texts. Empty for other arrays.
    """
    if stored.get_class() != h5t.REFERENCE or not stored.equal(h5t.STD_REF_OBJ):
        return {}
    try:
        if _GROUP not in dataset.file or not 0 < math.prod(dataset.shape) <= MAX_CELLS:
            return {}
        references = dataset[()].reshape(-1).tolist()
        names = [decoded(h5r.get_name(one, dataset.id) or b"").strip("/") for one in references]
        if not all(name.startswith(f"{_GROUP}/") for name in names):
            return {}
        texts = _texts(dataset.file, references)
    except Exception:
        # It is then listed like any other array of references.
        return {}
    return {"refers": tuple(names)} if texts is None else {"refers": tuple(names), "text": texts}


def _texts(file: h5py.File, references: list[h5py.Reference]) -> tuple[str, ...] | None:
    """The texts that references lead to; None if not all of them are texts of one line, or if they are too long."""
    texts, left = [], MAX_TEXT_BYTES
    for one in references:
        item = file[one]
        if not isinstance(item, h5py.Dataset) or item.attrs.get("MATLAB_class") != b"char" or item.dtype.str != "<u2":
            return None
        if "MATLAB_empty" in item.attrs:
            texts.append("")
            continue
        # A text of several lines is a matrix.
        if item.size != max(item.shape, default=0) or 2 * item.size > left:
            return None
        left -= 2 * item.size
        texts.append(item[()].tobytes().decode("utf-16-le", "replace"))
    return tuple(texts)
