"""Describes objects in the format of h5grove (https://silx-kit.github.io/h5grove/), which h5web and others use.

Runs only in child processes. If h5grove can describe an object, the result is the same. If it cannot, for example
because numpy does not have the type, only that object is affected here, and not its whole group.
"""

from __future__ import annotations

from typing import Any, Literal

import h5py
import numpy as np
from h5feed.errors import PageNotFound, TooLarge, UnsupportedField
from h5py import h5t

from .contents import Contents, Item, LeadsNowhere, Link, Place, is_followable, names_of, parts_of
from .text import decoded

Links = Literal["none", "only_valid", "all"]
"""Which soft and external links are followed: none, valid ones, or all, so that a broken link is an error."""

MAX_MEMBERS = 50_000
"""Maximum number of members of a group in one response."""

MAX_PATHS = 1_000_000

_MAX_TYPE_DEPTH = 32
_MAX_TYPE_MEMBERS = 10_000


def metadata(contents: Contents, path: str, links: Links) -> dict[str, Any]:
    """Describe the object at a path, and the members if it is a group.

    Raises
    ------
    PageNotFound, TooLarge
    """
    link, place = found(contents, path, links)
    name = path.rpartition("/")[2]
    if place is None:
        return _link_metadata(name, link)
    said = _object_metadata(name, place.item)
    if isinstance(place.item, h5py.Group):
        if len(place.item) > MAX_MEMBERS:
            raise TooLarge(
                f"{path} has {len(place.item)} members, more than the limit of {MAX_MEMBERS}: "
                "GET /v1/datasets/NAME/tree lists them page by page"
            )
        said["children"] = [_member_metadata(contents, place, member) for member in names_of(place.item)]
    return said


def attributes(contents: Contents, path: str, keys: list[str] | None, max_bytes: int) -> dict[str, Any]:
    """Read the values of attributes.

    Parameters
    ----------
    keys : list of str, optional
        Names. Default: all.
    max_bytes : int
        Maximum size of all values.

    Raises
    ------
    PageNotFound
        There is no such object or attribute.
    TooLarge, UnsupportedField
    """
    place = found(contents, path, "only_valid")[1]
    if place is None:
        raise UnsupportedField(f"{path} is a broken link, so it has no attributes")
    item = place.item
    values: dict[str, Any] = {}
    for name in item.attrs if keys is None else keys:
        if keys is not None and name not in item.attrs:
            raise PageNotFound(f"{path} has no attribute {name!r}")
        one = item.attrs.get_id(name)
        max_bytes -= int(np.prod(one.shape or (), dtype=object)) * one.get_type().get_size()
        if max_bytes < 0:
            raise TooLarge(f"the attributes of {path} are too large for one response: select some with attr_keys=")
        values[decoded(name)] = item.attrs[name]
    return values


def paths(contents: Contents, path: str, links: Links) -> list[str]:
    """Return the paths of a group and of everything below it. A group with several hard links is entered once.

    Raises
    ------
    PageNotFound, UnsupportedField
    TooLarge
        There are more than `MAX_PATHS`.
    """
    place = found(contents, path, links)[1]
    if place is None or not isinstance(place.item, h5py.Group):
        raise UnsupportedField(f"{path} is not a group")
    names: list[bytes] = []

    def take(name: bytes) -> bool:
        names.append(name)
        return len(names) >= MAX_PATHS

    if place.item.id.links.visit(take):
        raise TooLarge(f"{path} has more than {MAX_PATHS} objects below it: request a group in it")
    if links == "all":
        for name in names:
            _check_resolves(contents, place, name)
    prefix = path.rstrip("/")
    return [path, *(f"{prefix}/{decoded(name)}" for name in names)]


def found(contents: Contents, path: str, links: Links) -> tuple[Link, Place | None]:
    """Find the object at a path.

    Returns
    -------
    link : Link
        The last link of the path.
    place : Place or None
        The object. None if the link is broken, or `links` says not to follow it.

    Raises
    ------
    PageNotFound
        There is no such path, or `links` is ``all`` and the link is broken.
    """
    place, parts = contents.root, parts_of(path.encode("utf-8", "surrogateescape"))
    if not parts:
        return Link("hard"), place
    try:
        for part in parts[:-1]:
            place = contents.resolve(place, part)
        link = contents.link(place, parts[-1])
        if link.kind == "hard":
            return link, contents.open(place, parts[-1])
    except LeadsNowhere as error:
        raise PageNotFound(f"{path} is not a valid path in {contents.name}: {error}") from None
    if links == "none":
        return link, None
    try:
        return link, contents.resolve(place, parts[-1])
    except LeadsNowhere as error:
        if links == "all":
            raise PageNotFound(f"Cannot resolve the link at {path} of {contents.name}: {error}") from None
        return link, None


def _check_resolves(contents: Contents, place: Place, name: bytes) -> None:
    try:
        contents.resolve(place, name)
    except LeadsNowhere as error:
        shown = decoded(name)
        raise PageNotFound(f"Cannot resolve the link at {shown} of {contents.name}: {error}") from None


def _member_metadata(contents: Contents, group: Place, name: bytes) -> dict[str, Any]:
    """Describe one member of a group. A broken link is a link, and an object that cannot be opened is ``other``."""
    shown = decoded(name)
    if not is_followable(name):
        return {"name": shown, "kind": "other"}
    link = Link("user-defined")
    try:
        link = contents.link(group, name)
        return _object_metadata(shown, contents.resolve(group, name).item)
    except Exception:
        return _link_metadata(shown, link)


def _link_metadata(name: str, link: Link) -> dict[str, Any]:
    if link.kind == "soft":
        return {"name": name, "kind": "soft_link", "target_path": decoded(link.target)}
    if link.kind == "external":
        target = {"target_file": link.shown_file, "target_path": decoded(link.target)}
        return {"name": name, "kind": "external_link", **target}
    return {"name": name, "kind": "other"}


def _object_metadata(name: str, item: Item) -> dict[str, Any]:
    said: dict[str, Any] = {"name": name, "attributes": [_attribute_metadata(item, one) for one in sorted(item.attrs)]}
    if isinstance(item, h5py.Group):
        return {**said, "kind": "group"}
    if isinstance(item, h5py.Datatype):
        return {**said, "kind": "datatype", "type": _type_metadata(item.id)}
    properties = item.id.get_create_plist()
    filters = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    return {
        **said,
        "kind": "dataset",
        "chunks": item.chunks,
        "filters": [{"id": one[0], "name": decoded(one[3])} for one in filters] or None,
        "shape": item.shape,
        "type": _type_metadata(item.id.get_type()),
    }


def _attribute_metadata(item: Item, name: str | bytes) -> dict[str, Any]:
    one = item.attrs.get_id(name)
    return {"name": decoded(name), "shape": one.shape, "type": _type_metadata(one.get_type())}


def _type_metadata(stored: h5t.TypeID, depth: int = 0) -> dict[str, Any]:
    """Describe a type with HDF5's numbers of classes, byte orders, signs and character sets."""
    if depth > _MAX_TYPE_DEPTH:
        raise UnsupportedField(f"its type is nested more than {_MAX_TYPE_DEPTH} levels deep")
    kind = stored.get_class()
    said: dict[str, Any] = {"class": kind, "dtype": _dtype(stored), "size": stored.get_size()}
    if kind in (h5t.INTEGER, h5t.FLOAT, h5t.BITFIELD):
        said["order"] = stored.get_order()
    if kind == h5t.INTEGER:
        said["sign"] = stored.get_sign()
    elif kind == h5t.STRING:
        said |= {"cset": stored.get_cset(), "strpad": stored.get_strpad(), "vlen": stored.is_variable_str()}
    elif kind == h5t.OPAQUE:
        said["tag"] = decoded(stored.get_tag())
    elif kind == h5t.COMPOUND:
        said["members"] = [
            {"name": decoded(stored.get_member_name(n)), **_type_metadata(stored.get_member_type(n), depth + 1)}
            for n in range(_members(stored))
        ]
    elif kind == h5t.ENUM:
        said["members"] = {
            decoded(stored.get_member_name(n)): stored.get_member_value(n) for n in range(_members(stored))
        }
        said["base"] = _type_metadata(stored.get_super(), depth + 1)
    elif kind in (h5t.VLEN, h5t.ARRAY):
        said["base"] = _type_metadata(stored.get_super(), depth + 1)
        if kind == h5t.ARRAY:
            said["dims"] = stored.get_array_dims()
    return said


def _members(stored: h5t.TypeID) -> int:
    count: int = stored.get_nmembers()
    if count > _MAX_TYPE_MEMBERS:
        raise UnsupportedField(f"its type has {count} members, more than {_MAX_TYPE_MEMBERS}")
    return count


def _dtype(stored: h5t.TypeID) -> Any:
    try:
        return _dtype_text(stored.dtype)
    except (TypeError, ValueError):
        # numpy does not have this type.
        return f"|V{stored.get_size()}"


def _dtype_text(dtype: np.dtype[Any]) -> Any:
    """Return numpy's code of a type, or of each member of a record."""
    if dtype.fields is None:
        return dtype.str
    return {name: _dtype_text(member[0]) for name, member in dtype.fields.items()}
