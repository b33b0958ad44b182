"""Finds single files of the data folder, to show what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from h5feed.errors import BadParameter, Unreadable
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import FileSource
from h5feed.suggestions import did_you_mean

from .catalog import Catalog
from .dataset import Dataset
from .discovery import shown

MAX_FIELDS = 100
"""Maximum number of fields that are listed for one array."""


@dataclass(frozen=True)
class ServedFile:
    """A file that the catalogue lists, as a readable dataset or not.

    Attributes
    ----------
    name : str
        Relative to the data folder.
    files : sequence of FileSource
        The file, followed by all served files that it refers to.
    """

    name: str
    files: Sequence[FileSource]

    @property
    def path(self) -> str:
        return self.files[0].path


def served_file(catalog: Catalog, name: str) -> ServedFile:
    """Find a file by its name, relative to the data folder.

    Raises
    ------
    PageNotFound
        The catalogue lists no such file: it does not exist, is hidden, or is outside of the data folder.
    Unreadable
        The file is listed, but must not be opened.
    RevisionChanged, Overloaded, SourceUnavailable, NotYet
    """
    # h5grove accepts a leading slash, and some clients send one.
    name = name.lstrip("/")
    entry = catalog.entry_of(name)
    place = entry.files.index(name)
    files = {entry.paths[place]: entry.identities[place]}
    files |= {path: identity for path, identity in entry.dependencies.copy().items() if identity is not None}
    return ServedFile(name, [catalog.source(path, identity) for path, identity in files.items()])


def file_of(
    catalog: Catalog, name: str, file: str | None, revision: str | None
) -> tuple[Dataset | None, str, Sequence[str]]:
    """Find a dataset and one of its files.

    Parameters
    ----------
    file : str, optional
        One of its files. Default: the first.

    Returns
    -------
    dataset : Dataset or None
        None if the dataset is listed but cannot be read.
    file : str
        Relative to the data folder.
    files : sequence of str
        All files of the dataset.

    Raises
    ------
    DatasetNotFound, BadParameter, RevisionChanged, SourceUnavailable, NotYet
    """
    dataset: Dataset | None = None
    try:
        dataset = catalog.dataset(name, revision)
        files = dataset.files
    except Unreadable:
        listed = next((line for line in catalog.listed() if line.name == name), None)
        if listed is None or not listed.files:
            raise
        files = listed.files
    if file is not None and file not in files:
        said = did_you_mean(file, map(shown, files), f"its first one is {shown(files[0])!r}")
        raise BadParameter(f"file={file}: dataset {name!r} has no such file: {said}")
    return dataset, file or files[0], files


def fields_by_array(dataset: Dataset, path: str) -> dict[str, list[dict[str, Any]]]:
    """Return the fields that are read from each array of one file, by the path of the array."""
    found: dict[str, list[dict[str, Any]]] = {}
    for field in dataset.fields:
        about = {"name": field.name, "role": field.role, "reason": field.unreadable}
        for segment in field.column.segments:
            if segment.file.path == path:
                for name in _names(segment.array):
                    said = found.setdefault(f"/{name}", [])
                    if len(said) < MAX_FIELDS and about not in said:
                        said.append(about)
    return found


def _names(array: ArrayLayout) -> list[str]:
    """Return possible paths of an array. For a member of a record, the path of the table ends at one of the dots."""
    if array.record is None and array.member is None:
        return [array.path]
    begin = array.path.rfind("/") + 1
    return [array.path[:end] for end in range(begin, len(array.path)) if array.path[end] == "."]
