"""Finds out what a source is, and opens it as what it is."""

from __future__ import annotations

from pathlib import Path

from h5feed.errors import Unreadable

from .image_source import image_files
from .members import PACKED_TAR_SUFFIXES, TAR_SUFFIXES
from .options import BuildOptions
from .source import Source


def open_source(path: Path, options: BuildOptions) -> Source:
    """Rows of whatever `path` is.

    Raises
    ------
    Unreadable, BadParameter
    """
    if not path.exists():
        raise Unreadable(f"{path} does not exist")
    name = path.name.lower()
    if path.is_dir() or name.endswith((".zip", *TAR_SUFFIXES, *PACKED_TAR_SUFFIXES)):
        return image_files(path, options)
    raise Unreadable(f"{path} is of no kind that is understood")
