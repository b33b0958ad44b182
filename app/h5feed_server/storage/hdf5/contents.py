"""Finds the objects in a file by their paths, and follows links to files that the request allows.

Runs only in child processes, like everything that opens files with libhdf5. libhdf5 itself does not follow links into
other files here. `Contents` resolves them, and opens only files that the request names.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import h5py
from h5feed.errors import PageNotFound, Unreadable
from h5py import h5, h5d, h5g, h5l, h5o, h5p

from .attributes import MAX_NAME_BYTES
from .h5py_reader import IN_ANOTHER, Known, OpenSet
from .libhdf5 import Plugins
from .piped_file import PipedFile
from .text import decoded, reason_of

MAX_LINKS = 64
"""Maximum number of soft and external links on the way to an object."""

Item: TypeAlias = h5py.Group | h5py.Dataset | h5py.Datatype


class Link(NamedTuple):
    """A link in a group.

    Attributes
    ----------
    target, file : bytes
        Stored path of a soft or external link, and stored file name of an external link.
    """

    kind: Literal["hard", "soft", "external", "user-defined"]
    target: bytes = b""
    file: bytes = b""

    @property
    def shown_file(self) -> str:
        """File name of an external link, without its folder if that is absolute: it may be a folder of the server."""
        name = decoded(self.file)
        return os.path.basename(name) if os.path.isabs(name) else name


class Place(NamedTuple):
    """An object, and the path of the file that contains it."""

    file: str
    item: Item


class LeadsNowhere(Exception):
    """A path or link does not lead to an object that can be opened. The message gives the reason."""


class Contents:
    """The objects in one open file, and in the files that it refers to.

    Parameters
    ----------
    files : mapping of str to tuple
        Path and identity of each file that may be opened. The first is the file itself.
    piped : mapping of str to PipedFile
        Those of the files that are in a store.
    plugins : Plugins
    """

    def __init__(self, files: Mapping[str, Known], piped: Mapping[str, PipedFile], plugins: Plugins) -> None:
        self._open = OpenSet(files, plugins, piped)
        self._plugins = plugins
        self.path = next(iter(files))

    @property
    def root(self) -> Place:
        return self._root_of(self.path)

    def at(self, path: str) -> Place:
        """Return the object at a path, following links.

        Raises
        ------
        PageNotFound
            There is no object at the path.
        """
        try:
            return self.resolve(self.root, path.encode("utf-8", "surrogateescape"))
        except LeadsNowhere as error:
            raise PageNotFound(f"{path} is not a valid path in {self.name}: {error}") from None

    @property
    def name(self) -> str:
        """Name of the file without its folder."""
        return decoded(os.path.basename(self.path))

    def resolve(self, start: Place, path: bytes) -> Place:
        """Return the object at a path, relative to a group or absolute.

        Raises
        ------
        LeadsNowhere
        """
        place, rest, links = start, deque(parts_of(path)), 0
        if path.startswith(b"/"):
            place = self._root_of(start.file)
        while rest:
            name = rest.popleft()
            link = self.link(place, name)
            if link.kind == "hard":
                place = self.open(place, name)
                continue
            links += 1
            if links > MAX_LINKS:
                raise LeadsNowhere(f"it leads through more than {MAX_LINKS} links")
            if link.kind == "external":
                place = self._root_behind(place.file, link.file)
            elif link.kind != "soft":
                raise LeadsNowhere("it is a user-defined link")
            elif link.target.startswith(b"/"):
                place = self._root_of(place.file)
            rest.extendleft(reversed(parts_of(link.target)))
        return place

    def link(self, place: Place, name: bytes) -> Link:
        """Return the link of that name in a group.

        Raises
        ------
        LeadsNowhere
            The group has no such link, or the place is not a group.
        """
        shown = decoded(name[:MAX_NAME_BYTES])
        if not isinstance(place.item, h5py.Group):
            raise LeadsNowhere(f"{shown!r} is looked for in an object that is not a group")
        links = place.item.id.links
        # libhdf5 ends names at the first zero byte.
        if b"\0" in name or not links.exists(name):
            raise LeadsNowhere(f"there is no {shown!r}")
        kind = links.get_info(name).type
        if kind == h5l.TYPE_HARD:
            return Link("hard")
        if kind == h5l.TYPE_SOFT:
            return Link("soft", links.get_val(name))
        if kind == h5l.TYPE_EXTERNAL:
            file, target = links.get_val(name)
            return Link("external", target, file)
        return Link("user-defined")

    def open(self, place: Place, name: bytes) -> Place:
        """Open the object that a hard link in a group leads to."""
        group = place.item.id
        kind = h5o.get_info(group, name).type
        if kind == h5o.TYPE_GROUP:
            return Place(place.file, h5py.Group(h5g.open(group, name)))
        if kind == h5o.TYPE_DATASET:
            return Place(place.file, h5py.Dataset(h5d.open(group, name)))
        if kind == h5o.TYPE_NAMED_DATATYPE:
            return Place(place.file, h5py.Datatype(h5o.open(group, name)))
        raise LeadsNowhere("it is an object of an unknown kind")

    def readable(self, place: Place) -> h5py.Dataset:
        """Return the array at a place, after checking that libhdf5 opens only files of the request to read it.

        Raises
        ------
        Unreadable
        """
        dataset = place.item
        properties = dataset.id.get_create_plist()
        external = properties.get_external_count()
        for number in range(external):
            self._check_storage(place.file, properties.get_external(number)[0])
        if not external:
            try:
                is_spread = self._open.check(place.file, dataset, ())
            except ValueError as error:
                raise Unreadable(str(error)) from None
            if is_spread and self._open.piped:
                # libhdf5 would look for them in the same object.
                raise Unreadable(f"it has sources in another file, {IN_ANOTHER}")
        self._plugins.chunk_bytes = self._open.chunk_bytes
        return dataset

    def reason(self, error: Exception) -> str:
        """Return the message of an exception, without the folders of the files."""
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
        for folder in sorted({os.path.dirname(path) for path in self._open.files}, key=len, reverse=True):
            text = text.replace(f"{folder}{os.sep}", "")
        return reason_of(Exception(text), self.path)

    def check_unchanged(self) -> None:
        """Check that the files are still the ones of the request.

        Raises
        ------
        RevisionChanged, Overloaded
        """
        self._open.check_unchanged()

    def _check_storage(self, file: str, name: bytes) -> None:
        if file in self._open.piped:
            raise Unreadable(f"its data is in {decoded(os.path.basename(name))!r}, {IN_ANOTHER}")
        path = os.path.realpath(os.path.join(os.path.dirname(file), os.fsdecode(name)))
        if path not in self._open.files:
            raise Unreadable(
                f"its data is in {decoded(os.path.basename(name))!r}, which is not a file of the data folder"
            )

    def _root_of(self, file: str) -> Place:
        return Place(file, self._open.file(file)["/"])

    def _root_behind(self, file: str, name: bytes) -> Place:
        """Return the root of the file that a link in another file names."""
        path = os.path.realpath(os.path.join(os.path.dirname(file), os.fsdecode(name)))
        if path == os.path.realpath(file):
            return self._root_of(file)
        if path not in self._open.files:
            raise LeadsNowhere("it leads into a file that is not served")
        try:
            return self._root_of(path)
        except OSError as error:
            raise LeadsNowhere(f"it leads into a file that cannot be opened: {self.reason(error)}") from None


def parts_of(path: bytes) -> list[bytes]:
    """Split a path into names, like libhdf5."""
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def names_of(group: h5py.Group, start: int = 0, count: int | None = None) -> list[bytes]:
    """Return names of links in a group, from the given position on, in h5py's order."""
    names: list[bytes] = []

    def take(name: bytes) -> bool:
        names.append(name)
        return len(names) == count

    if count != 0 and start < len(group):
        tracked = group.id.get_create_plist().get_link_creation_order() & h5p.CRT_ORDER_TRACKED
        group.id.links.iterate(take, idx_type=h5.INDEX_CRT_ORDER if tracked else h5.INDEX_NAME, idx=start)
    return names


def is_followable(name: bytes) -> bool:
    """Whether an object can be requested by this name. libhdf5 would take some names for paths, and URLs are UTF-8."""
    if len(name) > MAX_NAME_BYTES or name in (b"", b".") or b"/" in name:
        return False
    return decoded(name).encode() == name


def address_of(item: Item) -> tuple[int, int]:
    """Return an identifier of an object that does not depend on the name it was opened by."""
    info = h5o.get_info(item.id)
    return info.fileno, info.addr
