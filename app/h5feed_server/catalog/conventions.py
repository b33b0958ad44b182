"""What other programs mean by the arrays that they write, told by what they write beside them.

It is asked before arrays are grouped by their names and lengths. Each convention takes the arrays of a file by path and
gives them back by the paths that are to name them, with what it knows of them in `Segment.about`. What it knows to be
no rows becomes an array that cannot be served, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..storage.column import Segment
from ..storage.layout import FileLayout
from .anndata import categorical, is_anndata, observations
from .netcdf import with_coordinates
from .pandas_frames import Read, as_frames
from .sparse import without_sparse


def as_meant(layout: FileLayout, segments: Mapping[str, Segment], read: Read) -> dict[str, Segment]:
    """The arrays of a file by the paths that are to name them.

    Parameters
    ----------
    segments : mapping
        All of its arrays, by their paths in the file.
    read : callable
        All values of a short array.
    """
    groups = {"": layout.attributes, **layout.groups}
    fields = without_sparse(groups, segments)
    fields = as_frames(groups, fields, read)
    fields = categorical(groups, fields, read)
    if is_anndata(layout.attributes, fields):
        return observations(groups, fields, read)
    return with_coordinates(fields)
