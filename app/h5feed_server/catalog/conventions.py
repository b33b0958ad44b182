"""Conventions of other programs, recognised by the attributes and names that they write.

They are applied before arrays are grouped by name and length. Each convention takes the arrays of a file by path and
returns them under the paths to use as names, with what it knows about them.
"""

from __future__ import annotations

from collections.abc import Mapping

from h5feed.stored.column import Segment
from h5feed.stored.layout import FileLayout

from .anndata import categorical, is_anndata, observations
from .cells import with_cells
from .loom import cells, is_loom
from .netcdf import with_coordinates
from .nexus import with_signals
from .nwb import with_objects
from .pandas_frames import Read, as_frames
from .sparse import ByRows, Paired, with_sparse


def as_meant(
    layout: FileLayout, segments: Mapping[str, Segment], read: Read, paired: Paired, by_rows: ByRows
) -> dict[str, Segment]:
    """The arrays of a file under the paths to use as names.

    Parameters
    ----------
    layout : FileLayout
    segments : mapping
        All arrays of the file, by path.
    read : callable
        Returns all values of a short array.
    paired : callable
        Divides an array of items into lists, by an array of offsets.
    by_rows : callable
        The rows of a sparse matrix that is stored by columns.
    """
    groups = {"": layout.attributes, **layout.groups}
    fields = with_sparse(groups, segments, read, paired, by_rows)
    fields = with_cells(fields)
    fields = as_frames(groups, fields, read)
    fields = categorical(groups, fields, read)
    if is_anndata(layout.attributes, fields):
        return observations(groups, fields, read)
    if is_loom(layout.attributes, fields):
        return cells(fields)
    if "nwb_version" in layout.attributes:
        return with_objects(groups, fields, read)
    return with_coordinates(with_signals(groups, fields))
