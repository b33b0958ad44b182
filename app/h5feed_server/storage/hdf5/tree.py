"""Describes the objects in a file as a tree, one page at a time.

Runs only in child processes. The numbers of levels, of members of a group, of objects, and of bytes of attributes are
bounded. A response says what it leaves out.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import h5py
from h5feed.errors import BadParameter, PageNotFound
from h5py import h5a, h5d, h5o, h5t

from .attributes import MAX_ATTRIBUTES, MAX_NAME_BYTES, attribute_value
from .contents import Contents, Item, LeadsNowhere, Link, Place, address_of, is_followable, names_of, parts_of
from .stored_types import describe
from .text import decoded, json_bytes

MAX_NODES = 2000
"""Maximum number of objects in one response."""

MAX_VALUE_BYTES = 4 << 10
"""Size of the value of an attribute as JSON, for objects below the requested one. See also `MAX_ATTRIBUTE_BYTES`."""

MAX_TEXT_BYTES = 4 << 20
"""Size of all attributes, types and notes in one response, as JSON."""

_MAX_MEMBERS = 100
"""Maximum number of listed members of a record or an enum."""

_MAX_COUNTED_CHUNKS = 100_000
"""Arrays with more chunks get no stored size, because libhdf5 visits every chunk to compute it."""

_LAYOUTS = {h5d.COMPACT: "compact", h5d.CONTIGUOUS: "contiguous", h5d.CHUNKED: "chunked", h5d.VIRTUAL: "virtual"}


class _Group(NamedTuple):
    """A group whose members will be listed."""

    place: Place
    path: str
    level: int
    node: dict[str, Any]


class Tree:
    """Builds one response.

    Parameters
    ----------
    contents : Contents
    depth : int
        Number of levels below the requested object.
    offset, limit : int
        Which of its members are listed. Groups below it list their first `limit` members.
    """

    def __init__(self, contents: Contents, depth: int, offset: int, limit: int) -> None:
        self._contents = contents
        self._depth = depth
        self._offset = offset
        self._limit = limit
        self._seen: dict[tuple[int, int], str] = {}
        self._nodes_left = MAX_NODES
        self._text_left = MAX_TEXT_BYTES

    def at(self, path: str) -> dict[str, Any]:
        """Describe the object at a path, and the objects below it.

        Returns
        -------
        dict
            A ``TreeNode`` of the API, without ``fields``.

        Raises
        ------
        PageNotFound
            There is no object at the path.
        BadParameter
            `offset` is beyond the last member.
        """
        place, parts = self._contents.root, parts_of(path.encode("utf-8", "surrogateescape"))
        link, shown = Link("hard"), ""
        try:
            for part in parts:
                # A link back to a group above the path must not be entered.
                self._seen.setdefault(address_of(place.item), shown or "/")
                link = self._contents.link(place, part)
                place = self._contents.resolve(place, part)
                shown += f"/{decoded(part)}"
        except LeadsNowhere as error:
            if link.kind == "hard" or part != parts[-1]:
                raise PageNotFound(f"{path} is not a valid path in {self._contents.name}: {error}") from None
            return self._unresolved(f"{shown}/{decoded(part)}", link, str(error))
        self._seen.pop(address_of(place.item), None)
        node = self._node(shown or "/", link, place, whole=True)
        if isinstance(place.item, h5py.Group) and self._offset > len(place.item):
            raise BadParameter(f"offset={self._offset}: {shown or '/'} has {len(place.item)} members")
        waiting: deque[_Group] = deque()
        self._enter(waiting, place, shown, 0, node)
        while waiting:
            self._list(waiting.popleft(), waiting)
        return node

    def _list(self, group: _Group, waiting: deque[_Group]) -> None:
        """List members of one group."""
        offset = self._offset if group.level == 0 else 0
        count = min(self._limit, self._nodes_left)
        if group.level and count < min(self._limit, len(group.place.item)):
            # Do not list a part that looks like the whole page.
            group.node["note"] = "the response has too many objects: request this group by its path"
            return
        try:
            names = names_of(group.place.item, offset, count)
        except Exception as error:
            group.node["note"] = f"it cannot be listed: {self._contents.reason(error)}"
            return
        self._nodes_left -= len(names)
        group.node["children"] = [self._member(group, name, waiting) for name in names]

    def _member(self, group: _Group, name: bytes, waiting: deque[_Group]) -> dict[str, Any]:
        path = f"{group.path}/{decoded(name[:MAX_NAME_BYTES])}"
        if not is_followable(name):
            why = "its name is not UTF-8, too long, or contains a slash, so it cannot be requested"
            node = self._unresolved(path, Link("hard"), why)
            return node | {"name": decoded(name[:MAX_NAME_BYTES]), "path": None}
        link = Link("hard")
        try:
            link = self._contents.link(group.place, name)
            place = self._contents.resolve(group.place, name)
            node = self._node(path, link, place)
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, LeadsNowhere)
                else f"it cannot be opened: {self._contents.reason(error)}"
            )
            return self._unresolved(path, link, reason)
        # Enter groups by hard links only: the targets of other links are listed elsewhere.
        if link.kind == "hard":
            self._enter(waiting, place, path, group.level + 1, node)
        return node

    def _enter(self, waiting: deque[_Group], place: Place, path: str, level: int, node: dict[str, Any]) -> None:
        """Queue a group, unless it was already found under another path."""
        address = address_of(place.item)
        first = self._seen.setdefault(address, path or "/")
        if first != (path or "/"):
            node["same_as"] = first
        elif isinstance(place.item, h5py.Group) and level < self._depth:
            waiting.append(_Group(place, path, level, node))

    def _node(self, path: str, link: Link, place: Place, whole: bool = False) -> dict[str, Any]:
        item = place.item
        kind = "group" if isinstance(item, h5py.Group) else "array" if isinstance(item, h5py.Dataset) else "type"
        node = self._blank(path, kind, link)
        node["hard_links"] = h5o.get_info(item.id).rc
        if isinstance(item, h5py.Group):
            node["members"] = len(item)
        elif isinstance(item, h5py.Dataset):
            node["array"] = self._array(item)
        if not isinstance(item, h5py.Group):
            stored = item.id.get_type() if isinstance(item, h5py.Dataset) else item.id
            node["type"] = self._bounded(self._type, stored)
        node |= self._attributes(item, whole)
        return node

    def _unresolved(self, path: str, link: Link, why: str) -> dict[str, Any]:
        node = self._blank(path, "unresolved", link)
        node["note"] = why
        self._text_left -= len(why)
        return node

    @staticmethod
    def _blank(path: str, kind: str, link: Link) -> dict[str, Any]:
        leads = link.kind in ("soft", "external")
        return {
            "name": path.rpartition("/")[2],
            "path": path,
            "kind": kind,
            "link": {
                "kind": link.kind,
                "path": decoded(link.target[:MAX_NAME_BYTES]) if leads else None,
                "file": link.shown_file[:MAX_NAME_BYTES] if link.kind == "external" else None,
            },
            "hard_links": None,
            "same_as": None,
            "note": None,
            "type": None,
            "array": None,
            "attributes": [],
            "attributes_total": 0,
            "members": None,
            "children": None,
        }

    def _array(self, dataset: h5py.Dataset) -> dict[str, Any]:
        """Describe the shape, layout and filters of an array."""
        properties = dataset.id.get_create_plist()
        shape, chunks = dataset.shape, dataset.chunks
        external = properties.get_external_count()
        filters = []
        for number in range(properties.get_nfilters()):
            code, _, options, name = properties.get_filter(number)
            filters.append({"id": code, "name": decoded(name) or None, "options": list(options)})
        layout = properties.get_layout()
        cells = 1
        if chunks is not None:
            cells = math.prod(-(-extent // max(1, width)) for extent, width in zip(shape, chunks, strict=True))
        return {
            "shape": None if shape is None else list(shape),
            "max_shape": None if shape is None else list(dataset.maxshape),
            "layout": "external" if external else _LAYOUTS.get(layout, "unknown"),
            "chunks": None if chunks is None else list(chunks),
            "filters": filters,
            "logical_bytes": None if shape is None else math.prod(shape) * dataset.id.get_type().get_size(),
            "stored_bytes": dataset.id.get_storage_size() if cells <= _MAX_COUNTED_CHUNKS else None,
        }

    def _type(self, stored: h5t.TypeID) -> dict[str, Any]:
        """Describe a type, in numpy's terms if possible."""
        members = values = None
        try:
            name = describe(stored.dtype)
        except (TypeError, ValueError):
            name = f"{stored.get_size()} bytes, a type that numpy does not have"
        kind = stored.get_class()
        if kind == h5t.COMPOUND:
            name = "record" if stored.dtype.kind == "V" else name
            members = []
            for number in range(min(stored.get_nmembers(), _MAX_MEMBERS)):
                member = stored.get_member_type(number)
                members.append({"name": decoded(stored.get_member_name(number)), "dtype": describe(member.dtype)})
        elif kind == h5t.ENUM:
            count = min(stored.get_nmembers(), _MAX_MEMBERS)
            values = {decoded(stored.get_member_name(n)): int(stored.get_member_value(n)) for n in range(count)}
        return {"dtype": name, "bytes": stored.get_size(), "members": members, "enum": values}

    def _bounded(self, make: Any, stored: h5t.TypeID) -> dict[str, Any] | None:
        """Describe a type, without its members if the response has become too large."""
        try:
            made: dict[str, Any] = make(stored)
        except Exception as error:
            made = {"dtype": f"unknown: {self._contents.reason(error)}", "bytes": None, "members": None, "enum": None}
        self._text_left -= json_bytes(made)
        if self._text_left < 0:
            made |= {"members": None, "enum": None}
        return made

    def _attributes(self, item: Item, whole: bool) -> dict[str, Any]:
        try:
            total = h5a.get_num_attrs(item.id)
            names = list(item.attrs)[:MAX_ATTRIBUTES] if total else []
        except Exception as error:
            return {"attributes": [], "attributes_total": None, "note": self._contents.reason(error)}
        return {"attributes": [self._attribute(item, name, whole) for name in names], "attributes_total": total}

    def _attribute(self, item: Item, name: str | bytes, whole: bool) -> dict[str, Any]:
        """Describe an attribute. If its value is too long or cannot be read, a note gives the reason."""
        said: dict[str, Any] = {"name": decoded(name)[:MAX_NAME_BYTES], "dtype": None, "shape": None, "value": None}
        said["note"] = None
        try:
            one = item.attrs.get_id(name)
            said |= {"dtype": describe(one.dtype), "shape": None if one.shape is None else list(one.shape)}
            is_shown, value = attribute_value(item, name)
            nbytes = json_bytes(value)
            if not is_shown:
                said["note"] = value.strip("()")
            elif nbytes > self._text_left or (nbytes > MAX_VALUE_BYTES and not whole):
                said["note"] = f"{nbytes} bytes: request the object by its path"
            else:
                said["value"] = value
                self._text_left -= nbytes
        except Exception as error:
            said["note"] = f"it cannot be read: {self._contents.reason(error)}"
        self._text_left -= 100
        return said
