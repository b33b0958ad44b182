"""Reads virtual arrays whose sources are in other objects of a store.

libhdf5 would look for the sources by their names in the file system. So this does what libhdf5 does: it projects what
is wanted of the array to each of its sources, and lets libhdf5 read that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable
from h5py import h5d, h5s, h5t

from .libhdf5 import fill_selected, intersection_of, same_selection

Int64s = npt.NDArray[np.int64]
Find = Callable[[str, str, str], tuple[str, h5py.Dataset]]
"""``find(file, name, path)`` returns the file that a name in a file stands for, and the array at a path in it."""


def read_virtual(file: str, dataset: h5py.Dataset, find: Find, rows: Int64s, member: str | None) -> npt.NDArray[Any]:
    """Rows of an array, or of a member of its records.

    Parameters
    ----------
    file : str
        The file of the array.
    dataset : h5py.Dataset
    find : callable
        Its arrays must have been checked: none may be a source of itself.
    rows : (k,) int64
        Ascending, without duplicates.
    member : str or None

    Raises
    ------
    Unreadable
        The array is of lists or text of any length, or a source is smaller than the part that is taken from it.
    """
    shape = (len(rows), *dataset.shape[1:])
    dtype = dataset.dtype if member is None else np.dtype([(member, dataset.dtype[member])])
    if dtype.hasobject:
        raise Unreadable("it is made of lists or text in other objects, which is not read from an object store")
    target = np.empty(shape, dtype)
    if target.size:
        wanted = dataset.id.get_space()
        wanted.select_none()
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(rows, breaks):
            begin = (int(run[0]), *[0] * (len(shape) - 1))
            wanted.select_hyperslab(begin, (len(run), *shape[1:]), op=h5s.SELECT_OR)
        _copy(file, dataset, find, wanted, h5s.create_simple(shape), target, h5t.py_create(dtype))
    return target if member is None else target[member]


def _copy(
    file: str,
    dataset: h5py.Dataset,
    find: Find,
    wanted: h5s.SpaceID,
    places: h5s.SpaceID,
    target: npt.NDArray[Any],
    kind: h5t.TypeID,
) -> None:
    """Copy what is selected of an array to what is selected of `target`, of which the elements are of a type."""
    properties = dataset.id.get_create_plist()
    if properties.get_layout() != h5d.VIRTUAL:
        dataset.id.read(places, wanted, target, kind)
        return
    fill_selected(properties, kind, target, places)
    for number in range(properties.get_virtual_count()):
        here, there = properties.get_virtual_vspace(number), properties.get_virtual_srcspace(number)
        part = intersection_of(wanted, places, here)
        if not part.get_select_npoints():
            continue
        other, source = find(file, properties.get_virtual_filename(number), properties.get_virtual_dsetname(number))
        whole = source.id.get_space()
        if there.get_select_type() != h5s.SEL_ALL:
            # Not checked by libhdf5: the file has no extent of the space that this is a selection in.
            if any(last >= extent for last, extent in zip(there.get_select_bounds()[1], source.shape, strict=True)):
                raise Unreadable(f"the source {source.name!r} is smaller than the part that is taken from it")
            whole = same_selection(there, whole)
        _copy(other, source, find, intersection_of(here, whole, wanted), part, target, kind)
